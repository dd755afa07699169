"""CoreInfer: sets against a plain computation, state that belongs to one generation, and the low-memory mode."""

from __future__ import annotations

import copy
import json
import threading

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from actsparse import Plan, calibrate, restore, sparsify
from actsparse.measure.evaluate import compare_perplexity
from actsparse.measure.neuron_report import neuron_report, write
from actsparse.methods.base import MethodError
from actsparse.methods.coreinfer import (
    ENOUGH,
    LEAD,
    PRIOR_TOKENS,
    CoreRule,
    cluster,
    core_level,
    core_of,
    elbow,
    strengths,
)
from actsparse.methods.statistics import Batch
from actsparse.models.caches import cache_argument, cache_of
from actsparse.models.sites import ModelError
from actsparse.models.text import TextError, Windows
from actsparse.plan import PlanError
from actsparse.runtime.decode import Decoder
from actsparse.runtime.lowmemory import open_mapped
from actsparse.runtime.swap import state_of

N, LAYERS = 96, 3


class Words:
    """A tokenizer: one token per character."""

    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 64 for letter in text]}


def make(seed=0, activation="silu", **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=N, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, hidden_act=activation,
        tie_word_embeddings=False, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def model():
    return make()


def stability(model, sparsity=0.5, **options):
    return calibrate(model, None, None, method="coreinfer", mode="stability", sparsity=sparsity, **options)


def texts(count=24, length=48, seed=0):
    """Documents of two kinds that use different characters."""
    generator = np.random.default_rng(seed)
    return ["".join(chr(64 + 32 * (i % 2) + x) for x in generator.integers(0, 32, length)) for i in range(count)]


def values_of(model, tokens):
    """The inputs of every down projection of the dense model, [layers, B, T, N]."""
    seen = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        for layer in model.model.layers
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def over(model, tokens, cache, **options):
    """The model's output for tokens that follow what the cache holds."""
    return model(tokens, **cache_argument(model.forward, cache), **options)


def session_of(model, cache):
    return state_of(model).prompts.session(cache)


def masked_logits(model, tokens, prompt, sets):
    """The dense model's logits with the FFNs of positions >= prompt restricted to ``sets`` (per layer)."""
    hooks = []
    for layer, neurons in sets.items():

        def mask(_, args, neurons=neurons):
            keep = torch.zeros(N).index_fill_(0, neurons.long(), 1.0)
            value = args[0].clone()
            value[:, prompt:] *= keep
            return (value,)

        hooks.append(model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(mask))
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return logits


def check_set(neurons, strength, alpha, count):
    """A set must hold every neuron of more counts than its last, and among equal counts the stronger ones."""
    level = torch.stack(
        [row.sort(descending=True).values[max(1, round(alpha * int((row > 0).sum()))) - 1] for row in strength]
    )
    counts = ((strength >= level[:, None]) & (strength > 0)).sum(0)
    force = (strength / level[:, None]).double().sum(0)
    order = sorted(range(N), key=lambda i: (-int(counts[i]), -float(force[i])))
    assert neurons.dtype == torch.int32
    assert neurons.tolist() == sorted(order[:count])


@pytest.mark.parametrize(
    ("activation", "ranking"), [("silu", "magnitude"), ("relu", "magnitude"), ("relu", "positive")]
)
@pytest.mark.parametrize("alpha", [0.02, 0.4])
def test_sets_match_a_plain_computation(activation, ranking, alpha):
    model = make(activation=activation)
    tokens = torch.randint(0, 64, (1, 21))
    values = values_of(model, tokens)
    sparsify(model, stability(model, 0.6, alpha=alpha, ranking=ranking, layers="0-2"))
    session = session_of(model, cache_of(model(tokens, use_cache=True)))
    for layer in range(LAYERS):
        check_set(session.neurons(layer), strengths(values[layer, 0], ranking), alpha, round(0.4 * N))


def test_core_level_selects_the_same_everywhere():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.randn(37, 64).to(dtype)
        for sparse in (False, True):
            level = core_level(values, 0.25, "magnitude", sparse=sparse)
            assert torch.equal(level, values.float().abs().sort(1, descending=True).values[:, 15:16])
        assert (core_of(values.float().abs(), level).sum(1) >= 16).all()
        positive = values.float().clamp(min=0)
        active = (positive > 0).sum(1, keepdim=True)
        want = positive.sort(1, descending=True).values.gather(1, (0.25 * active).round().long().clamp(min=1) - 1)
        assert torch.equal(core_level(values, 0.25, "positive", sparse=True), want)
    assert not core_of(torch.zeros(2, 8), core_level(torch.zeros(2, 8), 0.5, "magnitude", sparse=True)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_is_the_masked_dense_model(model, dtype):
    model.to(dtype)
    tokens = torch.randint(0, 64, (1, 30))
    plan = stability(model)
    sparsify(model, plan)
    cache = DynamicCache()
    over(model, tokens[:, :24], cache)
    sets = dict(session_of(model, cache).choices[0].neurons)
    assert set(sets) == {1, 2}
    steps = torch.cat([over(model, tokens[:, at : at + 1], cache).logits for at in range(24, 30)], 1)
    decoder = Decoder(model, 40)
    decoder.prefill(tokens[0, :24])
    native = torch.stack([decoder.step(int(tokens[0, at])) for at in range(24, 30)])
    restore(model)
    want = masked_logits(model.float(), tokens, 24, sets)[:, 24:]
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.15 * float(want.std())}
    )
    torch.testing.assert_close(steps.float(), want, **tolerance)
    torch.testing.assert_close(native.float(), want[0], **tolerance)


def test_skipped_neurons_are_not_read(model):
    tokens = torch.randint(0, 64, (1, 20))
    sparsify(model, stability(model))
    cache = cache_of(model(tokens, use_cache=True))
    copied = copy.deepcopy(cache)
    good = over(model, tokens[:, :1], cache).logits
    for layer in (1, 2):
        skipped = sorted(set(range(N)) - set(session_of(model, copied).neurons(layer).tolist()))
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight[skipped] = torch.nan
        mlp.up_proj.weight[skipped] = torch.nan
        mlp.down_proj.weight[:, skipped] = torch.nan
    assert torch.equal(over(model, tokens[:, :1], copied).logits, good)


def generated(model, tokens, **options):
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False,
                          pad_token_id=0, **options).tolist()  # fmt: skip


def test_generations_do_not_leak_into_each_other(model):
    first, second = torch.randint(0, 64, (1, 20)), torch.randint(0, 64, (1, 33))
    sparsify(model, stability(model, 0.8))
    alone = [generated(model, first)]
    restore(model)
    sparsify(model, stability(model, 0.8))
    alone.append(generated(model, second))
    assert [generated(model, first), generated(model, second), generated(model, first)] == [*alone, alone[0]]
    # Interleaved, token by token, each on its cache.
    caches = [DynamicCache(), DynamicCache()]
    rows = [first, second]
    new = [over(model, row, cache).logits[:, -1:].argmax(-1) for row, cache in zip(rows, caches, strict=True)]
    for _ in range(8):
        rows = [torch.cat([row, token], 1) for row, token in zip(rows, new, strict=True)]
        new = [over(model, t, c).logits[:, -1:].argmax(-1) for t, c in zip(new, caches, strict=True)]
    assert [row.tolist() for row in rows] == alone
    # A static cache is the same object in every generation.
    assert generated(model, second, cache_implementation="static") == alone[1]
    assert generated(model, first, cache_implementation="static") == alone[0]


def test_two_models_and_threads_do_not_leak(model):
    other = make(1)
    tokens = torch.randint(0, 64, (1, 20))
    for one in (model, other):
        sparsify(one, stability(one, 0.8))
    alone = [generated(model, tokens), generated(other, tokens)]
    cache = cache_of(model(tokens, use_cache=True))
    assert session_of(other, cache) is None
    results = [[], []]
    prompts = [tokens, torch.randint(0, 64, (1, 27))]
    alone.append(generated(model, prompts[1]))

    def work(index):
        results[index] = [generated(model, prompts[index]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[alone[0]] * 4, [alone[2]] * 4]
    assert generated(other, tokens) == alone[1]


def test_a_failed_forward_leaves_nothing(model):
    tokens = torch.randint(0, 64, (1, 20))
    sparsify(model, stability(model))
    cache = DynamicCache()
    with pytest.raises(IndexError):
        over(model, torch.full((1, 5), 99), cache)
    assert session_of(model, cache) is None
    assert not state_of(model).prompts._runs
    assert generated(model, tokens) == generated(model, tokens)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_every_sequence_of_a_batch_has_its_own_set(model, implementation):
    short, long = torch.randint(1, 64, (1, 13)), torch.randint(1, 64, (1, 20))
    sparsify(model, stability(model, 0.7))
    alone = [generated(model, short)[0][13:], generated(model, long)[0][20:]]
    batch = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :7] = 0
    options = {"cache_implementation": "static"} if implementation == "static" else {}
    both = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    assert both[:, 20:].tolist() == alone
    cache = DynamicCache()
    over(model, batch, cache, attention_mask=mask)
    sets = [session_of(model, cache).neurons(1, sequence).tolist() for sequence in (0, 1)]
    for sequence, tokens in enumerate((short, long)):
        mine = session_of(model, cache_of(model(tokens, use_cache=True)))
        assert sets[sequence] == mine.neurons(1).tolist()
    beams = model.generate(long, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0)
    assert beams.shape == (1, 24)
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ModelError, match="the batch has 1 sequences, neurons were chosen for 2"):
        over(model, long[:, :1], cache)


def test_later_text_refreshes_the_set(model):
    tokens = torch.randint(0, 64, (1, 60))
    sparsify(model, stability(model, 0.7))
    cache = DynamicCache()
    over(model, tokens[:, :20], cache)
    first = session_of(model, cache)
    over(model, tokens[:, 20:21], cache)  # an answer of one token: decoding changes nothing
    assert session_of(model, cache) is first
    forked = copy.deepcopy(cache)
    over(model, tokens[:, 21:40], cache)
    second = session_of(model, cache)
    assert second.neurons(1).tolist() != first.neurons(1).tolist()
    assert session_of(model, forked) is first
    # Text scored in two parts without an answer in between is one text.
    parts, whole = DynamicCache(), DynamicCache()
    over(model, tokens[:, :20], parts)
    over(model, tokens[:, 20:40], parts)
    over(model, tokens[:, :40], whole)
    for layer in (1, 2):
        assert session_of(model, parts).neurons(layer).tolist() == session_of(model, whole).neurons(layer).tolist()


def test_a_decoder_that_was_taken_back(model):
    tokens = torch.randint(0, 64, (1, 40))
    sparsify(model, stability(model, 0.7))
    decoder = Decoder(model, 64)
    decoder.prefill(tokens[0, :30])
    asked = decoder._session
    first = [int(decoder.step(7).argmax()) for _ in range(3)]
    # The same prompt once more: its last token runs again, dense, and nothing changes.
    decoder.rewind(29)
    decoder.prefill(tokens[0, 29:30])
    for layer in (1, 2):
        assert decoder._session.neurons(layer).tolist() == asked.neurons(layer).tolist()
    assert [int(decoder.step(7).argmax()) for _ in range(3)] == first
    # Other text in its place: what was forgotten no longer counts, what is left does.
    decoder.rewind(20)
    decoder.prefill(tokens[0, 31:40])
    fresh = DynamicCache()
    over(model, torch.cat([tokens[:, :20], tokens[:, 31:40]], 1), fresh)
    for layer in (1, 2):
        assert decoder._session.neurons(layer).tolist() == session_of(model, fresh).neurons(layer).tolist()
    # Nothing at all in its place: there is no set for what is left.
    decoder.rewind(20)
    with pytest.raises(ModelError, match="a decode step at position 20, neurons were chosen for a prompt of 29 tokens"):
        decoder.step(7)
    with pytest.raises(ModelError, match="a decode step at position 0, neurons were chosen for a prompt of 0 tokens"):
        Decoder(model, 8).step(7)


def test_calibration_stores_frequencies_per_cluster(model, tmp_path):
    documents = texts()
    path, file = tmp_path / "plan", tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": t, "domain": "ab"[i % 2]}) + "\n" for i, t in enumerate(documents)))
    plan = calibrate(
        model, Words(), str(file), method="coreinfer", mode="similarity", clusters="domains", alpha=0.1,
        sparsity=0.5, window=32, tokens=None, output=path,
    )  # fmt: skip
    tokens = torch.tensor([Words()(text)["input_ids"][:32] for text in documents])
    values = values_of(model, tokens)
    level = values.abs().sort(-1, descending=True).values[..., [round(0.1 * N) - 1]]
    frequency = (values.abs() >= level).float().mean(2)  # [layers, W, N]
    assert plan.settings["windows_per_cluster"] == [12, 12]
    want = torch.stack([frequency[1:, kind::2].mean(1) for kind in (0, 1)], 1)
    torch.testing.assert_close(plan.rules["prompt.frequency"], want)
    sparsify(model, path)
    for kind in (0, 1):
        prompt = torch.tensor([Words()(texts(seed=5)[kind])["input_ids"][:12]])
        own = values_of(model, prompt)[1, 0].abs()
        own = (own >= own.sort(1, descending=True).values[:, [round(0.1 * N) - 1]]).float().mean(0)
        nearest = int((want[0] - own).norm(dim=1).argmin())
        choice = session_of(model, cache_of(model(prompt, use_cache=True))).choices[0]
        assert choice.facts["cluster"] == "ab"[nearest]
        for layer in (1, 2):
            score, neurons = want[layer - 1, nearest].clone(), choice.neurons[layer].long()
            lowest = score[neurons].min()
            score[neurons] = -1
            assert lowest >= score.max() - 1e-6


@pytest.mark.parametrize(("tokens", "mode"), [(12, "similarity"), (400, "stability")])
def test_auto_and_blend_follow_the_stated_criterion(tokens: int, mode: str):
    torch.manual_seed(0)
    settings = {"layers": [0, 0], "counts": [8], "alpha": 0.1, "ranking": "magnitude", "feature_layer": 0,
                "clusters": ["a", "b"], "sparse": False}  # fmt: skip
    frequency = torch.rand(1, 2, 40)
    half = tokens // 2
    values = torch.randn(tokens, 40) + torch.linspace(0, 1, 40)
    rules = {mode: CoreRule({**settings, "mode": mode}, {"prompt.frequency": frequency}) for mode in ("auto", "blend")}
    scores = {0: torch.stack([rules["auto"].score(values[:half]), rules["auto"].score(values[half:])])}
    core = (values.abs() >= values.abs().sort(1, descending=True).values[:, 3:4]).float()
    force = values.abs() / values.abs().sort(1, descending=True).values[:, 3:4]
    halves = [core[:half].sum(0), core[half:].sum(0)]
    nearest = int(torch.cdist(halves[0][None] / half, frequency[0])[0].argmin())
    own = (halves[0] + force[:half].sum(0) / 1e3).topk(8).indices
    other = frequency[0, nearest].topk(8).indices
    choice = rules["auto"].choose(scores)
    assert choice.facts["own"] == pytest.approx(float(halves[1][own].sum() / halves[1].topk(8).values.sum()))
    lead = (halves[1][own].sum() - halves[1][other].sum()) / halves[1].topk(8).values.sum()
    assert choice.facts["mode"] == ("stability" if lead > LEAD * (half**-0.5 - ENOUGH**-0.5) else "similarity")
    assert choice.facts["mode"] == mode
    whole = int(torch.cdist(core.mean(0)[None], frequency[0])[0].argmin())
    force = force.sum(0)
    want = core.sum(0) + force / (1 + force.max()) + PRIOR_TOKENS * frequency[0, whole]
    assert rules["blend"].choose({0: scores[0].sum(0, keepdim=True)}).neurons[0].tolist() == sorted(
        want.topk(8).indices.tolist()
    )
    # A single token cannot be split: its cluster decides.
    one = rules["auto"].score(values[:1])
    assert rules["auto"].choose({0: torch.stack([torch.zeros_like(one), one])}).facts["mode"] == "similarity"


def test_clusters():
    points = torch.cat([torch.randn(20, 4) * 0.1 + 5 * k for k in range(3)])
    labels, names = cluster(points, ["x"] * 60, "silhouette")
    assert len(names) == 3
    assert all(len(set(labels[20 * k : 20 * k + 20].tolist())) == 1 for k in range(3))
    assert len(cluster(points, ["x"] * 60, "elbow")[1]) == 3
    assert cluster(points[:2], ["b", "a"], "domains")[0].tolist() == [1, 0]
    assert elbow([100, 20, 10, 5, 1]) == 1
    with pytest.raises(MethodError, match="no domain labels"):
        cluster(points, [""] * 60, "domains")
    with pytest.raises(MethodError, match="clusters is 9, expected at most the text's 4 windows"):
        cluster(points[:4], [""] * 4, 9)


def test_perplexity_continues_on_the_prompts_sets(model):
    plan = stability(model, 0.6)
    windows = Windows(torch.randint(0, 64, (3, 40)), "random", ("",) * 3)
    result = compare_perplexity(model, plan, windows)
    losses = []
    for row in windows.tokens:
        sparsify(model, plan)
        sets = dict(session_of(model, cache_of(model(row[None, :20], use_cache=True))).choices[0].neurons)
        restore(model)
        logits = masked_logits(model, row[None], 20, sets)[0, 20:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, row[21:]))
    assert result.sparse.ppl == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)
    kept = round(0.4 * N) / N
    assert result.weights_read.ffn_fraction == pytest.approx((1 + 2 * kept) / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha is 0, expected 0 < alpha <= 1"),
        ({"mode": "x"}, "mode is 'x', expected one of"),
        ({"ranking": "positive"}, "ranking positive is for ReLU models"),
        ({"layers": "2-1"}, "layers is '2-1', expected 0 <= first <= last"),
        ({"layers": "1-9"}, "layers is 1-9, the model's last layer is 2"),
        ({"clusters": "many"}, "clusters is 'many', expected"),
    ],
)
def test_settings_are_refused_in_one_line(model, options, message):
    with pytest.raises(MethodError, match=message):
        calibrate(model, None, None, method="coreinfer", **{"mode": "stability", **options})


def test_bad_plans_are_refused(model):
    with pytest.raises(TextError, match="no text given"):
        calibrate(model, None, None, method="coreinfer")
    with pytest.raises(PlanError, match="scope is 'all', expected decode"):
        calibrate(model, None, None, method="griffin", scope="all")
    plan = stability(model)
    for change, message in (
        ({"layers": [0, 9]}, r"prompt.layers is \[0, 9\]"),
        ({"counts": [1]}, "prompt.counts is"),
        ({"counts": [0, 5]}, "prompt.counts is"),
        ({"rule": "x"}, "prompt rule 'x' is unknown"),
        ({"mode": "similarity"}, "feature_layer|prompt.frequency"),
        ({"alpha": "x"}, "'alpha' is 'x'"),
    ):
        bad = Plan(**{**vars(plan), "prompt": {**plan.prompt, **change}})
        with pytest.raises(PlanError, match=message):
            sparsify(model, bad)
        assert state_of(model) is None


def test_statistics_resume(model):
    from actsparse.methods.coreinfer import CoreCounts

    values = torch.randn(4, 6, 16)
    whole, part, rest = (CoreCounts(0.2, "magnitude", sparse=False) for _ in range(3))
    whole.update({"value": values}, Batch(0, ("a", "b", "a", "c")))
    part.update({"value": values[:2]}, Batch(0, ("a", "b")))
    rest.load_state(part.state())
    rest.update({"value": values[2:]}, Batch(2, ("a", "c")))
    assert torch.equal(rest.frequency, whole.frequency)
    assert rest.domains == ("a", "b", "a", "c")


@pytest.mark.parametrize("tied", [False, True])
def test_low_memory_decodes_the_same(tmp_path, tied):
    model = make()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 64, (1, 30))
    plan = stability(model, 0.6)
    mapped = open_mapped(str(tmp_path))
    sparsify(mapped, plan)
    sparsify(model, plan)
    torch.testing.assert_close(mapped(tokens).logits, model(tokens).logits)
    assert generated(mapped, tokens) == generated(model, tokens)
    cache = cache_of(mapped(tokens, use_cache=True))
    over(mapped, tokens[:, :1], cache)
    session = session_of(mapped, cache)
    copies = session.gathered[1, 0]
    assert copies.up.shape == (round(0.4 * N), 32)
    decoders = [Decoder(one, 40) for one in (mapped, model)]
    for decoder in decoders:
        decoder.prefill(tokens[0])
    steps = [torch.stack([decoder.step(token) for token in (1, 2, 3)]) for decoder in decoders]
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)


def test_low_memory_needs_a_checkpoint(tmp_path):
    with pytest.raises(ModelError, match="no directory with a config.json"):
        open_mapped(str(tmp_path))
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="is not a sound safetensors file"):
        open_mapped(str(tmp_path))


def test_report_of_stability_and_similarity(model, tmp_path):
    file = tmp_path / "text.jsonl"
    rows = [{"text": t, "domain": "ab"[i % 2]} for i, t in enumerate(texts(6, 40))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = neuron_report(model, Words(), str(file), alpha=0.1, beta=0.5, tokens=None, window=32)
    assert report.positions == [4, 8, 16, 32]
    assert report.texts == [3, 3]
    values = torch.cat([values_of(model, torch.tensor([Words()(row["text"])["input_ids"][:32]])) for row in rows], 1)
    core = values.abs() >= values.abs().sort(-1, descending=True).values[..., [round(0.1 * N) - 1]]

    def members(begin, end):
        level = values.abs().sort(-1, descending=True).values[..., [round(0.1 * N) - 1]]
        score = core[:, :, begin:end].double().sum(2) + 1e-6 * (values.abs() / level)[:, :, begin:end].double().sum(2)
        return torch.zeros_like(score).scatter_(-1, score.topk(N // 2).indices, 1.0)

    whole = (members(0, 8) * members(0, 32)).sum(-1).mean(1) / (N // 2)
    following = (members(0, 8) * members(8, 16)).sum(-1).mean(1) / (N // 2)
    for layer in range(LAYERS):
        assert report.whole[layer][1] == pytest.approx(float(whole[layer]), abs=0.01)
        assert report.following[layer][1] == pytest.approx(float(following[layer]), abs=0.01)
        assert report.whole[layer][-1] == 1
    sets = members(0, 32)
    pairs = [(0, 2), (0, 4), (2, 4)]
    want = sum(float((sets[:, i] * sets[:, j]).sum()) for i, j in pairs) / (3 * LAYERS * (N // 2))
    assert report.similarity[0][0] == pytest.approx(want, abs=0.01)
    written = {path.name for path in write(report, tmp_path / "out")}
    assert {"neurons.json"} <= written <= {"neurons.json", "stability.png", "similarity.png"}
    with pytest.raises(MethodError, match="beta is 2, expected 0 < beta <= 1"):
        neuron_report(model, Words(), str(file), beta=2)

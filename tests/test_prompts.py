"""Sessions of plans that choose neurons per prompt: whatever a cache went through, the text alone decides."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from actsparse import calibrate, sparsify
from actsparse.measure.evaluate import check_skipped, compare_perplexity
from actsparse.methods.prompt import PromptRule
from actsparse.models.caches import cache_argument, cache_in, cache_of, cut
from actsparse.models.sites import ModelError, hidden_of
from actsparse.models.text import Windows
from actsparse.plan import Plan, PlanError
from actsparse.runtime.decode import Decoder
from actsparse.runtime.generate import Sampling, Session
from actsparse.runtime.layers import Meter
from actsparse.runtime.sessions import Tally
from actsparse.runtime.swap import prompts_of, restore

N, LAYERS, VOCABULARY = 96, 3, 64
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": N, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
    "tie_word_embeddings": False, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip


class Words:
    """A tokenizer for a model whose tokens are not looked at."""

    eos_token_id = None

    def decode(self, tokens, **_):
        return " ".join(str(token) for token in tokens)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().requires_grad_(False)


def plan_of(model, mode="stability", sparsity=0.6):
    """A plan of CoreInfer in any mode, with clusters of random frequencies, or of GRIFFIN."""
    if mode == "griffin":
        return calibrate(model, None, None, method="griffin", sparsity=sparsity)
    plan = calibrate(model, None, None, method="coreinfer", mode="stability", sparsity=sparsity, alpha=0.1)
    if mode == "stability":
        return plan
    frequency = torch.rand(LAYERS - 1, 2, N, generator=torch.Generator().manual_seed(1))
    prompt = {**plan.prompt, "mode": mode, "feature_layer": 1, "clusters": ["a", "b"]}
    return Plan(**{**vars(plan), "prompt": prompt, "rules": {"prompt.frequency": frequency}})


def text_of(count, seed=0):
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def over(model, tokens, cache, **options):
    return model(tokens, **cache_argument(model.forward, cache), **options)


def sets_of(session):
    return {layer: session.neurons(layer).tolist() for layer in range(1, LAYERS)}


def sets_in(session):
    """The sets on which a generation session decodes."""
    engine = session._engine
    if hasattr(engine, "_decoder"):
        return sets_of(engine._decoder._session)
    return sets_of(engine._prompts.session(engine._cache))


def without_native(monkeypatch):
    monkeypatch.setattr(
        "actsparse.runtime.generate.Decoder.supports", staticmethod(lambda model, length=0: "switched off")
    )


def reply(session, tokens, count=6):
    return session.reply(tokens, Sampling(), max_new_tokens=count).tokens


@pytest.fixture(params=["native", "transformers"])
def path(request, monkeypatch):
    # Small blocks, so that short texts have many.
    monkeypatch.setattr(PromptRule, "block", 8)
    if request.param == "transformers":
        without_native(monkeypatch)
    return request.param


@pytest.mark.parametrize("mode", ["stability", "auto", "blend", "griffin"])
@pytest.mark.parametrize("length", [5, 16, 17, 43])
def test_the_same_prompt_twice_gives_the_same(model, path, mode, length):
    sparsify(model, plan_of(model, mode))
    prompt = text_of(length)
    session = Session(model, Words(), 128)
    first, sets = reply(session, prompt), sets_in(session)
    again = session.reply(prompt, Sampling(), max_new_tokens=6)
    assert (again.tokens, sets_in(session)) == (first, sets)
    # What a fresh run leaves at the last block's beginning is taken as it is.
    assert again.prefill_tokens == length - (length - 1) // 8 * 8
    fresh = Session(model, Words(), 128)
    assert (reply(fresh, prompt), sets_in(fresh)) == (first, sets)


@pytest.mark.parametrize("mode", ["stability", "auto", "griffin"])
def test_a_second_turn_is_a_fresh_run_over_the_conversation(model, path, mode):
    sparsify(model, plan_of(model, mode))
    session, prompt = Session(model, Words(), 200), text_of(27)
    for turn in range(1, 4):
        prompt = [*prompt, *reply(session, prompt, 11), *text_of(9, seed=turn)]
        answer = reply(session, prompt, 7)
        fresh = Session(model, Words(), 200)
        assert (reply(fresh, prompt, 7), sets_in(fresh)) == (answer, sets_in(session))
    # To the last bit: the cache holds what the fresh run's does.
    for mine, other in zip(caches_of(session), caches_of(fresh), strict=True):
        assert torch.equal(mine, other)


def caches_of(session):
    """Keys and values that a session holds for its tokens."""
    engine, count = session._engine, len(session._engine.tokens)
    if hasattr(engine, "_decoder"):
        return engine._decoder._keys[:, :, :count], engine._decoder._values[:, :, :count]
    layers = engine._cache.layers
    return torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])


@pytest.mark.parametrize("mode", ["stability", "auto", "griffin"])
@pytest.mark.parametrize("shared", [3, 16, 30])
def test_a_prefix_shared_with_the_last_turn_counts(model, path, mode, shared):
    sparsify(model, plan_of(model, mode))
    session = Session(model, Words(), 128)
    first = text_of(41)
    reply(session, first)
    for rest in (text_of(20, seed=2), text_of(1, seed=3)):
        other = [*first[:shared], *rest]
        fresh = Session(model, Words(), 128)
        assert (reply(session, other), sets_in(session)) == (reply(fresh, other), sets_in(fresh))


def test_transformers_own_caches_give_a_fresh_runs_sets(model, monkeypatch):
    monkeypatch.setattr(PromptRule, "block", 8)
    sparsify(model, plan_of(model, "auto", 0.7))
    prompts = prompts_of(model)
    tokens = torch.tensor([text_of(60)])

    def generate(tokens, cache):
        options = {
            "max_new_tokens": 5,
            "do_sample": False,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(tokens),
        }
        return model.generate(tokens, **options, **cache_argument(model.forward, cache))

    cache = DynamicCache()
    answered = generate(tokens[:, :30], cache)
    whole = torch.cat([answered, tokens[:, 30:41]], 1)
    fresh = DynamicCache()
    assert generate(whole, cache).tolist() == generate(whole, fresh).tolist()
    assert sets_of(prompts.session(cache)) == sets_of(prompts.session(fresh))
    # Cut back into the scored text, anywhere, and on with other text, of a single token too.
    for position, rest in ((21, tokens[:, 41:60]), (13, tokens[:, 50:51]), (8, tokens[:, 44:46])):
        cut(cache, position)
        over(model, rest, cache)
        whole, fresh = torch.cat([whole[:, :position], rest], 1), DynamicCache()
        over(model, whole, fresh)
        assert sets_of(prompts.session(cache)) == sets_of(prompts.session(fresh))
        assert cache.get_seq_length() == whole.shape[1]
    # A copy of the cache goes its own way.
    forked = copy.deepcopy(cache)
    over(model, tokens[:, :3], cache)
    assert prompts.session(forked) is not prompts.session(cache)


def test_what_cannot_be_run_again_is_refused(model, monkeypatch):
    monkeypatch.setattr(PromptRule, "block", 8)
    plan = plan_of(model)
    sparsify(model, plan)
    batch = torch.tensor([text_of(20), text_of(20, seed=1)])

    def decoded(tokens, **options):
        cache = DynamicCache()
        over(model, tokens, cache, **options)
        one = torch.ones(len(cache.layers[0].keys), 1, dtype=torch.long)
        mask = {"attention_mask": torch.cat([options["attention_mask"], one], 1)} if options else {}
        over(model, one, cache, **mask)
        return cache, mask

    cache, _ = decoded(batch)
    with pytest.raises(ModelError, match="tokens 20 to 21 run again, which is not done for a batch of 2"):
        over(model, batch[:, :5], cache)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, :4] = 0
    cache, mask = decoded(batch[:1], attention_mask=mask)
    mask = torch.cat([mask["attention_mask"], torch.ones(1, 5, dtype=torch.long)], 1)
    with pytest.raises(ModelError, match="is not done where there is padding"):
        over(model, batch[:1, :5], cache, attention_mask=mask)
    cache = DynamicCache()
    model(inputs_embeds=model.get_input_embeddings()(batch[:1]), **cache_argument(model.forward, cache))
    cut(cache, 13)
    with pytest.raises(ModelError, match="came as embeddings: give the whole text to an empty cache"):
        over(model, batch[:1, :5], cache)
    cache, _ = decoded(batch[:1])
    with pytest.raises(ModelError, match="are not at their own positions"):
        over(model, batch[:1, :5], cache, position_ids=torch.arange(100, 105)[None])
    torch.manual_seed(0)
    sliding = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)).eval()
    sparsify(sliding, plan_of(sliding))
    cache = DynamicCache(config=sliding.config)
    over(sliding, batch[:1], cache)
    over(sliding, batch[:1, :1], cache)
    with pytest.raises(ModelError, match="cannot be taken back from token 21 to 20: start from an empty one"):
        over(sliding, batch[:1, :5], cache)


def rename(model, name):
    """What a release of transformers could do next: its layers' stack takes the cache under another keyword."""
    decoder, forward = model.get_decoder(), model.get_decoder().forward
    old = next(iter(cache_argument(forward, DynamicCache())))

    def before(module, args, kwargs):
        return args, {name if key == old else key: value for key, value in kwargs.items()}

    def renamed(*args, **kwargs):
        return forward(*args, **{old if key == name else key: value for key, value in kwargs.items()})

    decoder.forward = renamed
    return decoder.register_forward_pre_hook(before, with_kwargs=True, prepend=True)


def hide(model):
    """The layers' stack gets the cache inside something that does not show it."""

    class Opaque:
        def __init__(self, inside):
            self.inside = inside

    decoder, forward = model.get_decoder(), model.get_decoder().forward

    def before(module, args, kwargs):
        return args, {key: Opaque(value) if cache_in([value]) else value for key, value in kwargs.items()}

    def opened(*args, **kwargs):
        return forward(*args, **{key: getattr(value, "inside", value) for key, value in kwargs.items()})

    decoder.forward = opened
    return decoder.register_forward_pre_hook(before, with_kwargs=True, prepend=True)


def test_a_renamed_keyword_changes_nothing(model):
    plan = plan_of(model)
    windows = Windows(torch.tensor([text_of(40), text_of(40, seed=1)]), "random", ("", ""))
    tokens = torch.tensor([text_of(20)])

    def results():
        compared = compare_perplexity(model, plan, windows)
        sparsify(model, plan)
        cache, rows = DynamicCache(), []
        for part in tokens.split([12, 1, 1, 6], 1):
            rows.append(over(model, part, cache).logits[0, -1].tolist())
        generated = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()
        decoder = Decoder(model, 30)
        decoder.prefill(tokens[0])
        native = decoder.step(3).tolist()
        restore(model)
        return compared.sparse.ppl, compared.weights_read.fraction, rows, generated, native

    before = results()
    rename(model, "memory")
    assert results() == before
    assert before[1] < 1


def test_a_cache_that_cannot_be_seen_is_an_error(model):
    plan = plan_of(model)
    tokens = torch.tensor([text_of(20)])
    hide(model)
    sparsify(model, plan)
    over(model, tokens, DynamicCache())  # a text alone is dense in any case
    with pytest.raises(ModelError, match="a decode step at position 20 has a key/value cache that cannot be seen"):
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
    with pytest.raises(ModelError, match="no text before them has chosen neurons"):
        compare_perplexity(model, plan, Windows(tokens.repeat(2, 1), "random", ("", "")))
    assert not prompts_of(model) or not prompts_of(model)._runs


def test_a_first_token_alone_is_text(model):
    sparsify(model, plan_of(model))
    cache = cache_of(model(torch.tensor([[3]]), use_cache=True))
    assert prompts_of(model).session(cache).seen == 1
    model(torch.tensor([[3]]), use_cache=False)


def test_a_cache_that_was_not_read_is_an_error(model):
    tokens = torch.tensor([text_of(20)])
    cache = cache_of(model(tokens, use_cache=True))
    sparsify(model, plan_of(model))
    for more in (tokens[:, :1], tokens[:, :5]):
        with pytest.raises(ModelError, match="holds 20 tokens that this model has not read since it was sparsified"):
            over(model, more, cache)
    cache = cache_of(model(tokens, use_cache=True))
    longer = cache_of(model(tokens[:, :8], use_cache=True))
    prompts = prompts_of(model)
    prompts.attach(cache, prompts.session(longer))
    with pytest.raises(ModelError, match="holds 20 tokens, only 8 were read by this model"):
        over(model, tokens[:, :1], cache)
    with pytest.raises(ModelError, match="called outside its model's forward"):
        model.model.layers[1].mlp(torch.zeros(1, 1, 32))
    with pytest.raises(ModelError, match=r"expected only attention_mask, .*position_ids"):
        model.model(input_ids=tokens, padding=torch.ones_like(tokens))


def test_a_row_that_skipped_nothing_is_refused(model):
    windows = Windows(torch.tensor([text_of(40), text_of(40, seed=1)]), "random", ("", ""))
    plan = plan_of(model)
    identity = plan.model
    rules = {f"layers.{layer}.ffn.threshold": torch.zeros(1) for layer in range(LAYERS)}
    idle = Plan("chess", 0.5, identity, rules, achieved={f"layers.{layer}.ffn": 0.5 for layer in range(LAYERS)})
    with pytest.raises(PlanError, match=r"skipped nothing under scope all, expected up to 50.0% of a site"):
        compare_perplexity(model, idle, windows)
    with pytest.raises(PlanError, match="its rules were applied to no token"):
        check_skipped(plan, Meter())
    # Where nothing is to be skipped, nothing is missed: no rules, sparsity 0, every neuron.
    for fine in (
        Plan("dense", 0.0, identity, {}),
        Plan("chess", 0.0, identity, rules, achieved={"layers.0.ffn": 0.0}),
        plan_of(model, sparsity=0.0),
    ):
        result = compare_perplexity(model, fine, windows)
        assert result.sparse.ppl == pytest.approx(result.dense.ppl, rel=1e-5)


def test_sums_are_kept_at_fixed_places(monkeypatch):
    monkeypatch.setattr(PromptRule, "block", 8)

    class Sum(PromptRule):
        def score(self, values):
            return values.sum(0, keepdim=True)

        def choose(self, scores):
            raise NotImplementedError

    rule = Sum({"layers": [0, 0], "counts": [1]}, {})
    assert rule.marks(30) == [8, 16, 24]
    values = torch.randn(30, 4)
    whole = Tally().add(rule, 0, values)
    assert len(whole.blocks) == 3
    parts, at = Tally(), 0
    for size in (0, 3, 5, 9, 7, 6):
        parts = parts.add(rule, at, values[at : at + size])
        at += size
    torch.testing.assert_close(parts.sums(None), whole.sums(None))
    torch.testing.assert_close(whole.sums(2), torch.stack([values[:16].sum(0), values[16:].sum(0)])[:, None])
    assert torch.equal(Tally().add(rule, 0, values[:0]).sums(0), torch.zeros(2, 1, 4))
    rule.halves = True
    assert rule.marks(40) == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40]
    assert [rule.half(tokens) for tokens in (0, 1, 2, 11, 30, 37, 64, 90)] == [0, 0, 1, 5, 14, 16, 32, 40]
    for tokens in range(2, 400):
        assert rule.half(tokens) == tokens // 2 or rule.half(tokens) > 0.8 * (tokens // 2) - 0.5


def test_memory_of_a_session_is_as_stated(model):
    sparsify(model, plan_of(model))
    cache = cache_of(model(torch.tensor([text_of(256)]), use_cache=True))
    session = prompts_of(model).session(cache)
    # Two rows of float32, a column for the count of tokens, every 256 tokens.
    assert session.nbytes == (LAYERS - 1) * 2 * 4 * (N + 1)


def test_arguments_are_told_by_what_they_are():
    x = torch.zeros(1, 2, 4)
    assert hidden_of((x, 3), {}) is x
    assert hidden_of((), {"renamed": x, "mask": torch.zeros(1, 1, 2, 2), "ids": torch.zeros(1, 2).long()}) is x
    with pytest.raises(ModelError, match="called with 2 tensors of activations, expected one"):
        hidden_of((), {"a": x, "b": x})
    with pytest.raises(ModelError, match="got 2 key/value caches, expected one"):
        cache_in([DynamicCache(), {"inside": (DynamicCache(),)}])
    with pytest.raises(ModelError, match="carries no key/value cache"):
        cache_of((x,))
    with pytest.raises(ModelError, match="has 0 parameters annotated as a key/value cache"):
        cache_argument(lambda tokens: tokens, DynamicCache())


def test_a_native_step_refuses_what_it_does_not_know(model):
    assert Decoder.supports(model) is None
    model.model.layers[1].self_attn.scale = torch.nn.LayerNorm(8)
    assert "has a parameter self_attn.scale.weight, which the native decode step" in str(Decoder.supports(model))
    del model.model.layers[1].self_attn.scale
    model.config.num_key_value_heads = 4
    assert "layer 0 k has 16 rows, expected 4 heads of 8" in str(Decoder.supports(model))

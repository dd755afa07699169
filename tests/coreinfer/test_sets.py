"""Chosen neurons against a plain computation, decoding on them, and what is not read."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from actsparse import restore, sparsify
from actsparse.kernels.reference import core_of, core_parts
from actsparse.measure.evaluate import compare_perplexity
from actsparse.methods.coreinfer import core_level, core_sums, strengths
from actsparse.methods.statistics import core_count
from actsparse.models.caches import cache_of
from actsparse.models.text import Windows
from actsparse.runtime.decode import Decoder

from .cases import LAYERS, N, make, masked_logits, over, session_of, stability, values_of


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


@pytest.mark.parametrize("ranking", ["magnitude", "positive"])
def test_parts_of_a_text_are_summed_in_one_go(ranking):
    values = torch.randn(40, N, generator=torch.Generator().manual_seed(3)).bfloat16()
    values[7, 1:] = 0  # fewer active neurons than a core has
    stops = (1, 2, 7, 30, 40)
    got = core_parts(values, stops, core_count(N, 0.2, sparse=False), 0.2, positive=ranking == "positive")
    for part, begin, stop in zip(got, [0, *stops], stops, strict=False):
        counts, sums = core_sums(values[begin:stop], 0.2, ranking, sparse=False)
        assert torch.equal(part[0, :-1], counts)
        torch.testing.assert_close(part[1, :-1], sums)
        assert part[:, -1].tolist() == [stop - begin] * 2


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

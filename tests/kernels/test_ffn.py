"""The fused feed-forward block against float64."""

from __future__ import annotations

import math

import pytest
import torch

from actsparse import kernels
from actsparse.kernels import reference

from .blocks import SLOPE, Block
from .bounds import DTYPES, U32, assert_within, thresholds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "neurons"), [(2, 1), (3, 17), (65, 127), (384, 1344)])
def test_ffn_reads_only_what_the_gate_keeps(isa: str, dtype: torch.dtype, hidden: int, neurons: int) -> None:
    for batch in range(1, 9) if neurons == 127 else (1, 6):
        for density in (0.3,) if neurons > 1000 else (0.0, "one", 0.3, 1.0):
            threshold = thresholds(neurons, density)
            block = Block(batch, hidden, neurons, dtype, gate_threshold=threshold, mean=torch.randn(neurons))
            found = block.poison(threshold == 0).run()
            assert_within(found, block.expected(), block.bound())


@pytest.mark.parametrize("gate_layout", ["rows", "columns"])
@pytest.mark.parametrize("up_layout", ["rows", "columns"])
@pytest.mark.parametrize("down_layout", ["rows", "columns"])
def test_ffn_layouts(isa: str, threads: int, gate_layout: str, up_layout: str, down_layout: str) -> None:
    hidden, neurons = 127, 385
    every = {
        "gate_in_threshold": torch.rand(hidden), "up_in_threshold": torch.rand(hidden),
        "gate_threshold": torch.rand(neurons) / 2, "value_threshold": torch.rand(neurons) / 8,
        "mean": torch.randn(neurons), "up_activation": "relu",
    }  # fmt: skip
    index = torch.randperm(neurons)[:200].sort().values.int()
    for batch in (1, 4, 7):
        for options in ({}, every, {**every, "neurons": index}, {"neurons": index}, {"neurons": index[:0]}):
            block = Block(batch, hidden, neurons, torch.float32, **options)
            block.settle()
            assert_within(block.run(gate_layout, up_layout, down_layout), block.expected(), block.bound())


@pytest.mark.parametrize("activation", list(SLOPE))
@pytest.mark.parametrize("gated", [True, False])
def test_ffn_activations(isa: str, activation: str, gated: bool) -> None:
    neurons = 385
    block = Block(3, 65, neurons, torch.float32, gated=gated, activation=activation, gate_threshold=torch.rand(neurons))
    block.settle()
    assert_within(block.run(), block.expected(), block.bound())


def test_activations_over_their_whole_range(isa: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38])])
    eye = torch.ones(1, 1)
    for activation in SLOPE:
        for start in range(0, len(x), 8):
            part = x[start : start + 8, None]
            found = kernels.gated_ffn(part, None, eye, eye, activation=activation)
            exact = reference.ACTIVATIONS[activation](part.double())
            bound = 8 * U32 * (part.double().abs() + exact.abs()) + 1e-37
            finite = exact.abs() < torch.finfo(torch.float32).max
            assert_within(found[finite], exact[finite], bound[finite])
    nan = torch.full((1, 1), math.nan)
    for activation in SLOPE:
        assert kernels.gated_ffn(nan, None, eye, eye, activation=activation).isnan().all()


def test_ffn_plain_with_mean(isa: str) -> None:
    neurons = 127
    threshold = thresholds(neurons, 0.4)
    block = Block(5, 65, neurons, torch.float32, gated=False, activation="relu", gate_threshold=threshold,
                  mean=torch.randn(neurons))  # fmt: skip
    poisoned = block.poison(threshold == 0)
    poisoned.up = block.up  # up is what decides
    assert_within(poisoned.run(), block.expected(), block.bound())


def test_ffn_neuron_list_reads_nothing_else(isa: str, threads: int) -> None:
    neurons = 385
    for count in (0, 1, 100, neurons):
        index = torch.randperm(neurons)[:count].sort().values.int()
        block = Block(2, 65, neurons, torch.bfloat16, neurons=index, gate_threshold=torch.zeros(neurons))
        kept = torch.zeros(neurons, dtype=torch.bool).index_fill(0, index.long(), True)
        assert_within(block.poison(kept, gate=True).run(), block.expected(), block.bound())


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_ffn_predictor(isa: str, batch: int) -> None:
    hidden, neurons, rank = 65, 385, 17
    a, b = torch.randn(rank, hidden) / 8, torch.randn(neurons, rank) / 4
    bias = torch.randn(neurons) - 1
    block = Block(batch, hidden, neurons, torch.float32, activation="relu", predictor_a=a, predictor_b=b,
                  predictor_bias=bias, gate_threshold=torch.full((neurons,), 1e-30))  # fmt: skip
    score = reference.linear(reference.linear(block.x.double(), a.double()), b.double(), bias.double())
    assert score.abs().min() > 1e-6  # far enough from 0 for float32 to agree about every sign
    block.settle()
    wanted = (score > 0).any(0)
    assert wanted.any()
    assert not wanted.all()
    assert_within(block.poison(wanted, gate=True).run(), block.expected(), block.bound())


def test_ffn_nan_is_never_hidden(isa: str) -> None:
    block = Block(2, 65, 127, torch.float32, gate_threshold=torch.full((127,), 3e38))
    block.x[0, 3] = math.nan
    found = block.run()
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_stats_count_what_is_read(isa: str) -> None:
    hidden, neurons = 64, 100
    threshold = thresholds(neurons, 0.3)
    kept = int((threshold == 0).sum())
    block = Block(3, hidden, neurons, torch.bfloat16, gate_threshold=threshold)
    kernels.reset_stats()
    block.run()
    found = kernels.stats()
    assert found.pop("product_ns") > 0
    assert found == {
        "gate_rows": neurons, "up_rows": kept, "down_rows": kept, "bytes": (neurons + 2 * kept) * hidden * 2,
        "packed_planes": 0, "packed_weights": 0,
    }  # fmt: skip
    kernels.reset_stats()
    kernels.linear(torch.ones(1, neurons), torch.ones(neurons, hidden).T, None, threshold)
    assert kernels.stats()["bytes"] == kept * hidden * 4


def test_results_do_not_depend_on_timing(threads: int) -> None:
    block = Block(2, 384, 1344, torch.bfloat16, gate_threshold=thresholds(1344, 0.4))
    first = block.run()
    assert all(torch.equal(first, block.run()) for _ in range(20))

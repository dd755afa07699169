"""Statistics of activations, huge pages, timed calls."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch

from actsparse import kernels
from actsparse.kernels import cpu, portable, reference

from .bounds import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channel_statistics(isa: str, threads: int, dtype: torch.dtype) -> None:
    tokens, channels, bins, min_exponent, sub_bits = 33, 301, 60, -6, 2
    whole = (torch.randn(tokens, channels + 5) * torch.logspace(-3, 2, channels + 5)).to(dtype)
    whole[3, 7], whole[4, 8], whole[5, 9], whole[6, 10] = math.nan, math.inf, 0.0, -0.0
    x = whole[:, 2 : channels + 2]
    counts = torch.zeros(channels, bins, dtype=torch.int32)
    sum_abs, sum_square = torch.zeros(2, channels, dtype=torch.float64)
    for _ in range(2):
        assert kernels.channel_statistics(x, counts, min_exponent, sub_bits, sum_abs, sum_square) == 2

    value = np.abs(x.float().numpy().astype(np.float64))
    finite = np.isfinite(value)
    octave = np.floor(np.log2(np.where(finite & (value > 0), value, 1.0)))
    bin_of = (octave - min_exponent) * 2**sub_bits + np.floor((value / 2.0**octave - 1) * 2**sub_bits) + 2
    bin_of = np.where(value == 0, 0, np.clip(np.nan_to_num(bin_of), 1, bins - 1)).astype(int)
    expected = np.zeros((channels, bins), dtype=np.int32)
    for t in range(tokens):
        for c in range(channels):
            expected[c, bin_of[t, c]] += 2 * finite[t, c]
    assert np.array_equal(counts.numpy(), expected)
    clean = np.where(finite, value, 0.0)
    np.testing.assert_allclose(sum_abs.numpy(), 2 * clean.sum(0), rtol=1e-13)
    np.testing.assert_allclose(sum_square.numpy(), 2 * (clean**2).sum(0), rtol=1e-13)

    for plain in (reference, portable):
        again, *sums = torch.zeros_like(counts), torch.zeros_like(sum_abs), torch.zeros_like(sum_square)
        assert plain.channel_statistics(x, again, min_exponent, sub_bits, *sums) == 2
        assert torch.equal(2 * again, counts)
        np.testing.assert_allclose(2 * sums[0].numpy(), sum_abs.numpy(), rtol=1e-13)
        np.testing.assert_allclose(2 * sums[1].numpy(), sum_square.numpy(), rtol=1e-13)


def test_huge_pages_change_nothing_but_the_pages() -> None:
    weight = torch.randn(1100, 1030)
    values, address = weight.clone(), weight.data_ptr()
    moved = kernels.use_huge_pages(weight, None)
    assert moved % (2 << 20) == 0
    assert 0 <= moved <= weight.nbytes
    assert kernels.use_huge_pages(weight) == moved
    assert weight.data_ptr() == address
    assert torch.equal(weight, values)
    column = values.T.contiguous().T
    kernels.use_huge_pages(column)
    assert torch.equal(column, values)
    for left_alone in (torch.zeros(4, 4), weight[:, :500], weight.to("meta"), weight.to_sparse()):
        assert kernels.use_huge_pages(left_alone) == 0
    assert cpu.library().as_huge_pages(None, 1 << 30) == 0
    assert cpu.library().as_huge_pages(weight.data_ptr(), -1) == 0


def test_timed_calls_do_what_the_calls_do() -> None:
    x, y, up = torch.randn(1, 64), torch.zeros(3, 1, 96), torch.randn(96, 64)
    columns, threshold = torch.randn(64, 96).T, torch.rand(64)
    rows = torch.tensor([1, 40], dtype=torch.int32)
    by_columns, by_rows = kernels.matrix_of(columns), kernels.matrix_of(up)
    block = kernels.ffn_of(up, up, up.T, kernels.Rules("silu"))
    at = x.data_ptr()
    calls = [
        kernels.cpu.Call(w=ctypes.pointer(by_columns), threshold=threshold.data_ptr(), row_count=-1, x=at, y=y[0].data_ptr()),
        kernels.cpu.Call(w=ctypes.pointer(by_rows), rows=rows.data_ptr(), row_count=2, x=at, y=y[1].data_ptr()),
        kernels.cpu.Call(ffn=ctypes.pointer(block), x=at, y=y[2].data_ptr()),
    ]  # fmt: skip
    assert kernels.cpu.time_calls(calls, torch.float32) > 0
    torch.testing.assert_close(y[0], kernels.linear(x, columns, None, threshold))
    kept = torch.zeros(96).index_fill(0, rows.long(), 1.0)
    torch.testing.assert_close(y[1], kernels.linear(x, up) * kept)
    torch.testing.assert_close(y[2, :, :64], kernels.gated_ffn(x, up, up, up.T, activation="silu"))
    calls[0].y = None
    with pytest.raises(ValueError, match="refused"):
        kernels.cpu.time_calls(calls, torch.float32)


def test_read_bandwidth_is_plausible() -> None:
    median, least, greatest = kernels.read_bandwidth(repeats=3)
    assert 0.5 < least <= median <= greatest < 5000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(
    ("tokens", "channels", "count"), [(1, 1, 1), (5, 17, 3), (40, 384, 8), (23, 1344, 0), (9, 33, 33)]
)
def test_core_statistics_match_the_oracle(dtype, positive, tokens, channels, count):
    x = torch.randn(tokens, 2 * channels).to(dtype)[:, :channels]
    x[x.abs() < 0.3] = 0  # inactive channels, and ties
    found = kernels.core_statistics(x, count, 0.25, positive=positive)
    expected = kernels.reference.core_statistics(x, count, 0.25, positive=positive)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=0)

"""Products of one matrix against float64."""

from __future__ import annotations

import math

import pytest
import torch

from actsparse import kernels
from actsparse.kernels import cpu, reference

from .bounds import DTYPES, assert_within, linear_bound, rounding, stored, thresholds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(("out", "inn"), [(1, 1), (3, 17), (17, 3), (63, 65), (65, 127), (384, 1344), (4100, 63)])
def test_linear(isa: str, dtype: torch.dtype, layout: str, out: int, inn: int) -> None:
    bias, weight = torch.randn(out), torch.randn(out, inn)
    batches = range(1, 9) if inn == 65 else (1, 2, 5)
    for density in (None, 0.0, "one", 0.4, 1.0):
        threshold = None if density is None else thresholds(inn, density)
        clean = weight.to(dtype)
        unread = clean.clone()
        if threshold is not None and layout == "columns" and out * inn > 1:  # one value alone has both layouts
            unread[:, threshold > 0] = math.nan
        native = stored(unread, layout, dtype)
        for batch in batches:
            x = torch.randn(batch, inn).to(dtype)
            assert kernels.path_for(x, native) == f"cpu-{isa}"
            expected = reference.linear(x.double(), clean.double(), bias.double(), threshold)
            bound = linear_bound(x.double(), clean.double(), bias.double()) + rounding(expected, dtype)
            assert_within(kernels.linear(x, native, bias, threshold), expected, bound)


def test_linear_masks_each_row_of_a_batch(isa: str) -> None:
    weight = stored(torch.randn(65, 127), "columns", torch.float32)
    x = torch.randn(8, 127)
    threshold = torch.rand(127) * 1.5
    expected = reference.linear(x.double(), weight.double(), None, threshold)
    assert_within(kernels.linear(x, weight, None, threshold), expected, linear_bound(x.double(), weight.double(), None))
    for row in range(8):
        alone = kernels.linear(x[row : row + 1], weight, None, threshold)
        assert_within(alone, expected[row : row + 1], linear_bound(x[row].double(), weight.double(), None)[None])


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_those_beside_it(isa: str, dtype: torch.dtype, layout: str) -> None:
    out, inn = 1100, 333
    weight = stored(torch.randn(out, inn), layout, dtype)
    x, threshold = torch.randn(8, inn).to(dtype), torch.rand(inn) * 1.5
    together = kernels.linear(x, weight, None, threshold)
    # Of one row alone, rows of bfloat16 are added up in another order.
    for batch in range(1 if layout == "columns" else 2, 8):
        assert torch.equal(kernels.linear(x[-batch:], weight, None, threshold), together[-batch:])


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_threshold_keeps_ties_and_nan(isa: str, layout: str) -> None:
    inn = 37
    weight = stored(torch.eye(inn), layout, torch.float32)
    x = torch.full((1, inn), 0.5)
    x[0, 1], x[0, 2], x[0, 20] = -0.5, 0.49999997, 0.0
    threshold = torch.full((inn,), 0.5)
    expected = x.clone()
    expected[0, 2] = expected[0, 20] = 0.0
    assert torch.equal(kernels.linear(x, weight, None, threshold), expected)
    x[0, 5] = math.nan
    assert kernels.linear(x, weight, None, threshold).isnan().any()
    assert kernels.linear(x, weight, None, torch.full((inn,), 3e38)).isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_rows_leaves_other_outputs_alone(isa: str, dtype: torch.dtype) -> None:
    out, inn = 127, 65
    for count in (0, 1, 5, 127):
        rows = torch.randperm(out)[:count].sort().values.int()
        clean, bias = torch.randn(out, inn).to(dtype), torch.randn(out)
        weight = torch.full_like(clean, math.nan)
        weight[rows.long()] = clean[rows.long()]
        for batch in (1, 3, 8):
            x = torch.randn(batch, inn).to(dtype)
            found = torch.full((batch, out), 7.0, dtype=dtype)
            cpu.linear_rows(x, weight, rows, found, bias)
            expected = torch.full((batch, out), 7.0, dtype=torch.float64)
            named = rows.long()
            exact = reference.linear(x.double(), clean.double(), bias.double())
            expected[:, named] = exact[:, named]
            bound = torch.zeros_like(expected)
            spread = linear_bound(x.double(), clean.double(), bias.double()) + rounding(exact, dtype)
            bound[:, named] = spread[:, named]
            assert_within(found, expected, bound)

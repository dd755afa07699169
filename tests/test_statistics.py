"""Streaming statistics against exact ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actsparse.methods.statistics import Batch, CalibrationError, Histogram, Moments
from actsparse.plan import SKIP_ZEROS

WHERE = Batch(0, ("",))


def filled(statistic: Histogram | Moments, values: torch.Tensor, batches: int = 5) -> Histogram | Moments:
    for part in values.chunk(batches):
        statistic.update({"gate": part[None]}, WHERE)
    return statistic


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantile_is_within_its_bound(pooled: bool, fraction: float, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    values = (torch.randn(400, 72) * torch.rand(72).mul(3).exp()).to(dtype)
    found = filled(Histogram("gate", 72, pooled=pooled), values).quantile(fraction)
    exact = float((values.float().abs() < found.value).double().mean())
    assert abs(exact - fraction) <= found.rank_error + 1 / values.numel()
    assert found.rank_error < 0.05
    # In practice far closer than the bound; bfloat16 itself only has 128 values per power of two.
    assert abs(exact - fraction) < (0.004 if dtype == torch.bfloat16 else 0.001)


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_scaled_quantile_matches_numpy(fraction: float) -> None:
    torch.manual_seed(4)
    values, scale = torch.randn(3000, 40), torch.rand(40) + 0.05
    found = filled(Histogram("gate", 40, pooled=False), values).quantile(fraction, scale=scale)
    exact = np.quantile((values.abs() * scale).numpy(), fraction)
    assert found.value == pytest.approx(exact, rel=3e-3)


def test_exact_zeros_are_skipped_and_nothing_else() -> None:
    values = torch.randn(1000, 16).relu()
    found = filled(Histogram("gate", 16, pooled=True), values).quantile(0.3)
    assert found.value == SKIP_ZEROS
    assert found.achieved == pytest.approx(float((values == 0).double().mean()), abs=1e-9)


def test_nothing_asked_nothing_skipped() -> None:
    assert filled(Histogram("gate", 8, pooled=True), torch.randn(10, 8)).quantile(0).value == 0


def test_moments_match() -> None:
    values = torch.randn(777, 24) * 50
    moments = filled(Moments("gate", 24), values)
    torch.testing.assert_close(moments.mean_abs, values.double().abs().mean(0))
    torch.testing.assert_close(moments.root_mean_square, values.double().square().mean(0).sqrt())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    values = torch.randn(4, 8)
    values[2, 3] = bad
    with pytest.raises(CalibrationError, match="1 activations are NaN or infinite"):
        filled(Moments("gate", 8), values, batches=1)

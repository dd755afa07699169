"""The whitened decomposition, and the statistics that it and the thresholds are made from."""

from __future__ import annotations

import pytest
import torch

from actsparse.methods.statistics import Batch, CalibrationError, TokenSample
from actsparse.methods.whitening import Covariance, cholesky, low_rank, top_eigenvectors

WHERE = Batch(0, ("",))


def test_whitened_svd_is_the_svd_of_w_times_the_cholesky_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 40, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, 40)
    w = torch.randn(90, 40, dtype=torch.float64, generator=generator)
    factor = torch.linalg.cholesky(x.T @ x)
    left, values, right = torch.linalg.svd(w @ factor)
    expected = (left[:, :8] * values[:8]) @ torch.linalg.solve_triangular(factor.T, right[:8].T, upper=True).T
    found = low_rank(w, 8, x.T @ x / len(x))
    torch.testing.assert_close(found.b @ found.a, expected, rtol=1e-9, atol=1e-9)
    assert found.ridge == 0
    latents = x @ found.a.T
    torch.testing.assert_close(latents.T @ latents / len(x), torch.eye(8).double(), rtol=1e-8, atol=1e-8)


def test_whitening_beats_the_plain_svd_on_the_inputs_it_was_made_for() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(800, 40, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, 40)
    w = torch.randn(90, 40, dtype=torch.float64, generator=generator)
    errors = []
    for covariance in (x.T @ x / len(x), None):
        found = low_rank(w, 8, covariance)
        errors.append(float((x @ (w - found.b @ found.a).T).square().sum()))
    assert errors[0] < 0.9 * errors[1]


def test_fewer_tokens_than_channels_get_a_ridge_and_stay_finite() -> None:
    x = torch.randn(20, 60, dtype=torch.float64)
    factor, ridge = cholesky(x.T @ x / 20)
    assert 0 < ridge <= 1e-4
    assert bool(torch.isfinite(factor).all())
    w = torch.randn(80, 60).double()
    found = low_rank(w, 20, x.T @ x / 20)
    # Rank 20 holds everything that 20 tokens can show.
    torch.testing.assert_close(x @ (found.b @ found.a).T, x @ w.T, rtol=1e-3, atol=1e-3)


def test_inputs_that_are_all_zero_are_refused() -> None:
    with pytest.raises(CalibrationError, match="every activation is zero"):
        cholesky(torch.zeros(4, 4).double())


def test_iterated_eigenvectors_span_what_the_direct_ones_do() -> None:
    size = 1100
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    matrix = (basis * torch.logspace(0, -6, size).double()) @ basis.T
    vectors, residual = top_eigenvectors((matrix + matrix.T) / 2, 32)
    assert residual < 1e-9
    # Largest sine of an angle between the two subspaces.
    assert float((vectors - basis[:, :32] @ (basis[:, :32].T @ vectors)).norm(dim=0).max()) < 1e-6


def test_covariance_sums_every_token_once() -> None:
    statistic = Covariance("ffn_in", 12)
    x = torch.randn(3, 4, 12)
    statistic.update({"ffn_in": x[:1]}, WHERE)
    statistic.update({"ffn_in": x[1:]}, WHERE)
    flat = x.reshape(-1, 12).double()
    torch.testing.assert_close(statistic.mean, flat.T @ flat / 12)


def test_a_sample_holds_everything_up_to_its_capacity_then_a_uniform_part() -> None:
    sample = TokenSample("ffn_in", 1, capacity=64)
    values = torch.arange(640.0).reshape(-1, 1)
    sample.update({"ffn_in": values[:40]}, WHERE)
    assert sample.tokens()[:, 0].tolist() == list(range(40))
    for at in range(40, 640, 100):
        sample.update({"ffn_in": values[at : at + 100]}, WHERE)
    kept = sample.tokens()[:, 0]
    assert len(kept) == len(set(kept.tolist())) == 64
    assert kept.tolist() == sorted(kept.tolist())
    assert 200 < float(kept.mean()) < 440
    resumed = TokenSample("ffn_in", 1, capacity=64)
    resumed.load_state(sample.state())
    assert torch.equal(resumed.tokens(), sample.tokens())

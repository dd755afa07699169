"""Error feedback: better outputs than nearest rounding, at every level mix, and the same as it where nothing is shared."""

from __future__ import annotations

import pytest
import torch

from actsparse.kernels import planes
from actsparse.methods.feedback import curvature_of, energy_shares, round_with_feedback
from actsparse.methods.rounding import round_nearest


def correlated(tokens: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs // 4, inputs, generator=generator)
    return torch.randn(tokens, inputs // 4, generator=generator) @ mixing + 0.3 * torch.randn(
        tokens, inputs, generator=generator
    )


@pytest.mark.parametrize("read", [2, 4])
def test_the_output_is_closer_than_nearest_rounding(read: int) -> None:
    x, weight = correlated(2000, 300), torch.randn(90, 300)
    shares = torch.zeros(3, 300)
    shares[read // 2] = 1
    curvature = curvature_of(x.T @ x / len(x))
    exact = x @ weight.T

    def error(packed: planes.Packed) -> float:
        return float((x @ planes.unpack(packed, read).T - exact).square().mean())

    level_weight = shares[1:] + 1e-3
    assert error(round_with_feedback(weight, 4, curvature, shares)[0]) < 0.6 * error(
        round_nearest(weight, 4, level_weight)
    )


def test_uncorrelated_inputs_round_to_the_nearest() -> None:
    """Nearest to what gains make of codes, which is a code further in some places."""
    weight, shares = torch.randn(70, 40), torch.zeros(4, 40)
    shares[3] = 1
    packed, _ = round_with_feedback(weight, 6, curvature_of(torch.eye(40)), shares)
    nearest = round_nearest(weight, 6, shares[1:] + 1e-3 * shares[1:].mean())
    off, other = ((planes.unpack(one) - weight).abs() for one in (packed, nearest))
    assert bool((off <= other + 1e-6).all())
    assert float((planes.codes_of(packed) == planes.codes_of(nearest)).float().mean()) > 0.9


def test_more_inputs_than_tokens() -> None:
    x, weight = correlated(20, 160), torch.randn(64, 160)
    shares = torch.full((3, 160), 1 / 3)
    packed, _ = round_with_feedback(weight, 4, curvature_of(x.T @ x / len(x)), shares)
    assert bool(torch.isfinite(planes.unpack(packed)).all())


def test_shares_of_energy() -> None:
    deviation = torch.tensor([[0.5, 0.0], [1.0, 0.0], [-2.0, 0.0]])
    shares = energy_shares(deviation, torch.tensor([[0.8, 1.0], [1.5, 1.0]]))
    torch.testing.assert_close(shares[:, 0], torch.tensor([0.25, 1.0, 4.0]) / 5.25)
    torch.testing.assert_close(shares[:, 1], torch.tensor([0.0, 0.0, 1.0]))

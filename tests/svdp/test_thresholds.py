"""Thresholds of single neurons: the greedy search against one that takes one step at a time, and what they lose."""

from __future__ import annotations

import pytest
import torch

from actsparse.methods.svdp import Evidence, Svdp, advance, neuron_thresholds, outcome, rectified_moment

from .cases import greedy_one_by_one


@pytest.mark.parametrize(
    ("steps", "most_off"), [(-3, 9.0), (0, 9.0), (1, 9.0), (37, 9.0), (90, 9.0), (140, 1.0), (999, 99.0)]
)
def test_steps_taken_at_once_are_the_greedy_steps(steps: int, most_off: float) -> None:
    generator = torch.Generator().manual_seed(3)
    loss = torch.rand(12, 16, generator=generator, dtype=torch.float64).square().cumsum(1)
    start = torch.randint(0, 5, (12,), generator=generator)
    expected = greedy_one_by_one(loss, start, steps, most_off)
    assert torch.equal(advance(loss, start, steps, most_off), expected)


def test_thresholds_reach_the_rate_and_start_where_nothing_is_lost() -> None:
    generator = torch.Generator().manual_seed(4)
    exact = torch.randn(200, 2048, generator=generator) - 1
    scores = exact + 0.3 * torch.randn(exact.shape, generator=generator)
    energy = exact.relu().square()
    tokens = Evidence(torch.empty(0), torch.zeros(200), exact, energy)
    natural = float((exact <= 0).float().mean())
    found = outcome(scores, tokens, neuron_thresholds(scores, energy, 0.8 * natural))
    assert found.inactive == pytest.approx(0.8 * natural, abs=0.01)
    assert found.energy_lost < 0.05
    # A rate below the starting points leaves those, which lose nothing.
    assert outcome(scores, tokens, neuron_thresholds(scores, energy, 0.0)).energy_lost == 0


@pytest.mark.parametrize("order", [2, 4])
def test_rectified_moments_are_the_integrals(order: int) -> None:
    error = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    density = torch.exp(-error.square() / 2) / (2 * torch.pi) ** 0.5
    for t in (-3.0, -0.4, 0.0, 2.5):
        integral = torch.trapezoid((t + error).relu() ** order * density, error)
        torch.testing.assert_close(rectified_moment(torch.tensor(t).double(), order), integral, rtol=1e-5, atol=1e-9)


def test_smooth_thresholds_lose_less_on_tokens_they_have_not_seen() -> None:
    generator = torch.Generator().manual_seed(5)
    exact = torch.randn(300, 8192, generator=generator) - 1.5
    scores = exact + 0.5 * torch.randn(exact.shape, generator=generator)
    energy = exact.relu().square()
    halves = [
        Evidence(torch.empty(0), torch.zeros(300), exact[:, part], energy[:, part])
        for part in (slice(512), slice(512, None))
    ]
    seen, unseen = scores[:, :512], scores[:, 512:]
    lost = {}
    for name, weighed in (("full", halves[0].energy), ("smooth", halves[0].expected_energy(seen))):
        lost[name] = outcome(unseen, halves[1], neuron_thresholds(seen, weighed, 0.7)).energy_lost
    assert lost["smooth"] < 0.9 * lost["full"]


def test_fewer_tokens_than_grid_points_still_work() -> None:
    scores = torch.randn(20, 50)
    thresholds = neuron_thresholds(scores, scores.relu().square(), 0.3)
    assert bool(torch.isfinite(thresholds).all())


@pytest.mark.parametrize("bias", ["full", "smooth", "constant"])
def test_thresholds_of_a_single_token_are_finite(bias: str) -> None:
    one = torch.tensor([[0.5], [-1.0], [2.0]])
    seen = Evidence(inputs=torch.zeros(1, 2), offset=torch.zeros(3), exact=one, energy=one.clamp(min=0))
    assert bool(Svdp(bias=bias)._threshold(one, seen, 0.5).isfinite().all())

"""The automatic choice of ranks, and what a rank costs."""

from __future__ import annotations

import pytest
import torch

from actsparse.calibration.collect import Calibration
from actsparse.methods import make
from actsparse.methods.base import Layer
from actsparse.methods.svdp import Svdp, affordable_ranks, candidate_ranks, evidence, outcome
from actsparse.methods.whitening import low_rank
from actsparse.plan import ModelIdentity

from .cases import plan_of, relu_model, windows


def test_auto_picks_a_rank_per_layer_and_spends_no_more_bytes() -> None:
    model = relu_model()
    plan = plan_of(model, s=0.5, rank="auto")
    ranks = plan.settings["ranks"]
    assert len(ranks) == 3
    layer = Calibration(model, windows(), [make("svdp")])._views[2]
    assert all(rank in candidate_ranks(layer) for rank in ranks)


def test_auto_judges_on_tokens_that_the_thresholds_have_not_seen() -> None:
    """On 512 tokens of their own, thresholds lose a tenth and less of what they lose on the next ones."""
    hidden, neurons, tokens = 128, 512, 512
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(tokens + 4096, hidden, generator=generator) * torch.logspace(0, -1, hidden)
    shapes = {"gate": (neurons, hidden), "up": (neurons, hidden), "down": (hidden, neurons)}
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    bias = -1.3 * (weights["gate"].square() @ x.square().mean(0)).sqrt()
    identity = ModelIdentity("llama", 1, hidden, neurons, 1, 1, 64, "relu", "")
    layer = Layer(0, identity, weights.__getitem__, lambda name: bias if name == "gate" else None)
    method = Svdp()
    factors = low_rank(weights["gate"], 64, (x.T @ x / len(x)).double())
    rank, _, unseen = method._choose_rank(layer, factors, x[:tokens], 0.45)
    own, fresh = {}, {}
    seen, later = evidence(layer, x[:tokens], "full"), evidence(layer, x[tokens:], "full")
    for candidate, rate in affordable_ranks(candidate_ranks(layer), hidden, neurons, 0.45):
        cut = factors.cut(candidate)
        threshold = method._threshold(seen.scores(cut), seen, rate)
        own[candidate] = outcome(seen.scores(cut), seen, threshold).energy_lost
        fresh[candidate] = outcome(later.scores(cut), later, threshold).energy_lost
    assert unseen == pytest.approx(fresh[rank], rel=0.5)
    assert unseen > 10 * own[rank]
    assert fresh[rank] < 1.5 * min(fresh.values())


@pytest.mark.parametrize("inactive", [0.0, 0.4, 0.99])
def test_affordable_ranks_read_equal_bytes(inactive: float) -> None:
    hidden, neurons = 512, 2048
    found = affordable_ranks([40, 56, 80, 400], hidden, neurons, inactive)
    usual = 0.025 * neurons * (hidden + neurons) + (1 - inactive) * neurons * hidden
    for rank, rate in found:
        spent = rank * (hidden + neurons) + (1 - rate) * neurons * hidden
        assert 0 <= rate < 1
        assert spent <= usual * (1 + 1e-9) or rate == 0
    assert affordable_ranks([400], hidden, neurons, 0.9) == [(400, 0.9)]

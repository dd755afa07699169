"""The report on a predictor's quality."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actsparse.calibration.collect import Calibration
from actsparse.measure.predictor_report import measure
from actsparse.methods import make
from actsparse.methods.svdp import evidence, outcome
from actsparse.models.sites import layers_of

from .cases import plan_of, relu_model, windows


def low_rank_of(rules: dict[str, torch.Tensor]) -> Any:
    """A plan's predictor as the construction's own type."""
    from actsparse.methods.whitening import LowRank

    return LowRank(rules["ffn.predictor_a"].double(), rules["ffn.predictor_b"].double(), 0.0, 0.0)


def test_report_counts_pairs_of_tokens_and_neurons() -> None:
    model, text = relu_model(), windows(512, 64, seed=3)
    plan = plan_of(model, rank=10, s=0.6)
    quality = measure(model, plan, text)[1]
    layer, rules, seen = layers_of(model)[1], plan.layer_rules(1), []
    handle = layer.tap("ffn_in", lambda x: seen.append(x.reshape(-1, 48)))
    with torch.no_grad():
        model.get_decoder()(input_ids=text.tokens, use_cache=False)
    handle.remove()
    x = seen[0]
    score = x @ rules["ffn.predictor_a"].T @ rules["ffn.predictor_b"].T + rules["ffn.predictor_bias"]
    active, predicted = x @ layer.linear("gate").weight.T > 0, score > 0
    assert quality.tokens == 512
    assert quality.recall == pytest.approx(float(predicted[active].float().mean()), abs=1e-3)
    assert quality.precision == pytest.approx(float(active[predicted].float().mean()), abs=1e-3)
    assert quality.predicted_sparsity == pytest.approx(1 - float(predicted.float().mean()), abs=1e-3)
    assert quality.true_sparsity == pytest.approx(1 - float(active.float().mean()), abs=1e-3)
    ranks = torch.empty(score.numel()).scatter_(0, score.flatten().argsort(), torch.arange(1.0, score.numel() + 1))
    busy = int(active.sum())
    exact = (float(ranks[active.flatten()].double().sum()) - busy * (busy + 1) / 2) / (busy * (active.numel() - busy))
    assert quality.roc_auc == pytest.approx(exact, abs=1e-3)
    tokens = evidence(Calibration(model, text, [make("svdp")])._views[1], x, "full")
    expected = outcome(tokens.scores(low_rank_of(rules)), tokens, -rules["ffn.predictor_bias"]).energy_lost
    assert quality.energy_lost == pytest.approx(expected, abs=1e-3)

"""WINA: thresholds against the score of the paper, and what becomes of columns of zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actsparse.calibration.collect import Calibration
from actsparse.methods import make
from actsparse.methods.base import Targets
from actsparse.models import text
from actsparse.models.sites import layers_of


@pytest.fixture
def windows() -> text.Windows:
    tokens = torch.randint(4096, (24, 64), generator=torch.Generator().manual_seed(3))
    return text.Windows(tokens, "random", ("",) * 24)


def plan_of(model: Any, windows: text.Windows, sparsity: float) -> Any:
    method = make("wina")
    run = Calibration(model, windows, [method])
    return run.solve(method, run.collect()["wina"], Targets(sparsity))


@pytest.mark.parametrize("projection", ["q", "o", "up", "down"])
def test_thresholds_skip_the_smallest_weighted_inputs(tiny: Any, windows: text.Windows, projection: str) -> None:
    model = tiny("llama")
    plan = plan_of(model, windows, 0.6)
    linear = layers_of(model)[1].linear(projection)
    inputs: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.inference_mode():
        for window in windows.tokens:
            model(window[None])
    handle.remove()
    x = torch.cat(inputs)
    score = x.abs() * linear.weight.detach().norm(dim=0)
    skipped = x.abs() < plan.rules[f"layers.1.{projection}.threshold"]
    bound = plan.settings["quantile_rank_error_bound"]
    assert float(skipped.float().mean()) == pytest.approx(0.6, abs=bound)
    # One limit on the score for all channels: nothing skipped scores above anything kept.
    assert float(score[skipped].max()) <= float(score[~skipped].min()) * (1 + 1e-5)


def test_columns_of_zeros_are_always_skipped(tiny: Any, windows: text.Windows) -> None:
    model = tiny("llama")
    layers_of(model)[0].linear("up").weight.data[:, 3] = 0
    thresholds = plan_of(model, windows, 0.5).rules["layers.0.up.threshold"]
    assert thresholds[3] == torch.inf
    assert torch.isfinite(thresholds).sum() == len(thresholds) - 1

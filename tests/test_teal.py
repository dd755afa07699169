"""TEAL: thresholds against plain quantiles of what the layers see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actsparse.calibration.collect import Calibration
from actsparse.methods import make
from actsparse.methods.base import Targets
from actsparse.methods.teal import INPUTS
from actsparse.models import text
from actsparse.models.sites import layers_of


def seen_by(model: Any, windows: text.Windows) -> list[dict[str, torch.Tensor]]:
    """Per layer, the input [T, I] of every projection."""
    layers = layers_of(model)
    seen: list[dict[str, list[torch.Tensor]]] = [{} for _ in layers]
    handles = []
    for layer in layers:
        for name in INPUTS:

            def hook(module: Any, args: Any, index: int = layer.index, name: str = name) -> None:
                seen[index].setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

            handles.append(layer.linear(name).register_forward_pre_hook(hook))
    with torch.inference_mode():
        for window in windows.tokens:
            model(window[None])
    for handle in handles:
        handle.remove()
    return [{name: torch.cat(parts) for name, parts in layer.items()} for layer in seen]


@pytest.fixture
def windows() -> text.Windows:
    tokens = torch.randint(4096, (24, 64), generator=torch.Generator().manual_seed(3))
    return text.Windows(tokens, "random", ("",) * 24)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_thresholds_are_the_quantiles(tiny: Any, windows: text.Windows, sparsity: float) -> None:
    model, method = tiny("llama"), make("teal")
    run = Calibration(model, windows, [method])
    plan = run.solve(method, run.collect()["teal"], Targets(sparsity))
    bound = plan.settings["quantile_rank_error_bound"]
    assert bound < 0.02
    for index, layer in enumerate(seen_by(model, windows)):
        for name, x in layer.items():
            threshold = plan.rules[f"layers.{index}.{name}.threshold"]
            assert float((x.abs() < threshold).float().mean()) == pytest.approx(sparsity, abs=bound)


def test_every_site_takes_its_own_target(tiny: Any, windows: text.Windows) -> None:
    model, method = tiny("llama"), make("teal")
    run = Calibration(model, windows, [method])
    targets = Targets(0.5, {(0, "k"): 0.8, (1, "down"): 0.1})
    plan = run.solve(method, run.collect()["teal"], targets)
    assert plan.achieved["layers.0.k"] == pytest.approx(0.8, abs=0.02)
    assert plan.achieved["layers.0.q"] == pytest.approx(0.5, abs=0.02)
    assert plan.achieved["layers.1.down"] == pytest.approx(0.1, abs=0.02)

"""Activities streamed layer by layer against one ordinary forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from actsparse.calibration import activity
from actsparse.calibration.activity import HEAD, activities
from actsparse.methods.statistics import CalibrationError
from actsparse.models import sites


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_layer_by_layer_is_the_whole_model(
    tiny: Callable[..., Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "BATCH_TOKENS", 32)  # several batches
    model = tiny(family)
    tokens = torch.randint(1, 4096, (5, 16))
    expected: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
    products = {(HEAD, "head"): model.get_output_embeddings()}
    for layer in sites.layers_of(model):
        products |= {(layer.index, name): layer.linear(name) for name, _ in layer.family.projections}
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    handles = []
    for key, module in products.items():

        def after(module: Any, args: Any, output: torch.Tensor, key: tuple[int, str] = key) -> None:
            output.retain_grad()
            seen[key] = [args[0], output]

        handles.append(module.register_forward_hook(after))
    logits = model(input_ids=tokens, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for key, (x, output) in seen.items():
        assert output.grad is not None
        expected[key] = x.detach().flatten(0, 1), output.grad.flatten(0, 1).square().mean(0)

    order, ticks = [], []
    for found in activities(model, tokens, progress=lambda done, total: ticks.append((done, total))):
        order.append(found.layer)
        for name, x in found.inputs.items():
            inputs, sensitivity = expected.pop((found.layer, name))
            torch.testing.assert_close(x, inputs)
            torch.testing.assert_close(found.sensitivity[name], sensitivity, rtol=1e-4, atol=1e-10)
    assert not expected
    assert order == [HEAD, 1, 0]
    assert ticks[-1][0] == ticks[-1][1]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(model.get_decoder().layers) == 2


def test_what_is_not_finite_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        next(activities(model, torch.randint(1, 4096, (2, 16))))


def test_a_later_call_goes_on_where_one_stopped(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    tokens = torch.randint(1, 4096, (3, 16))
    whole = list(activities(model, tokens))
    done: list[int] = []
    rest = list(activities(model, tokens, start=(1, whole[1].gradients), done_with=done.append))
    assert [found.layer for found in rest] == [0]
    assert done == [0, 0]
    for name, sensitivity in whole[2].sensitivity.items():
        assert torch.equal(rest[0].sensitivity[name], sensitivity)
    from_head = list(activities(model, tokens, start=(HEAD, whole[0].gradients)))
    assert [found.layer for found in from_head] == [1, 0]

"""Calibration of methods that look at whole layers with the loss's gradients, resumable after every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from actsparse.calibration.activity import Progress, activities
from actsparse.methods import Method
from actsparse.methods.base import HEAD, Calibrated, Layer
from actsparse.plan import atomic_path


def observe(
    model: Any,
    tokens: torch.Tensor,
    methods: Sequence[Method],
    views: Mapping[int, Layer],
    *,
    key: str,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, list[Calibrated]]:
    """What ``methods`` make of every layer's activity, by method name; the output head comes last, as layer -1.

    Args:
        model: the dense model.
        tokens: int64 [W, L].
        methods: with ``activity``.
        views: the layers, and the head as :data:`HEAD`.
        key: what an interrupted run must share with this one to be continued.
        partial: where to keep the layers that are done; those that are there and fit are not done again.
        progress: called after every batch.
    """
    order = [HEAD, *sorted((index for index in views if index != HEAD), reverse=True)]
    saved = _resume(partial, key) if partial else {}
    done = [index for index in order if f"{index}.done" in saved]
    found: dict[str, dict[int, Calibrated]] = {method.name: {} for method in methods}
    for index in done:
        for method in methods:
            found[method.name][index] = Calibrated(views[index], _observed(method, saved, f"{index}.{method.name}."))
    start = None
    if done:
        count = sum(name.startswith("gradient.") for name in saved)
        start = done[-1], [saved[f"gradient.{number}"].to(model.device) for number in range(count)]
    if len(done) < len(order):
        for activity in activities(model, tokens, start=start, progress=progress):
            for method in methods:
                seen = method.observe(views[activity.layer], activity.inputs, activity.sensitivity)
                # In one order, however they came: sums over them are rounded.
                seen = dict(sorted(seen.items()))
                found[method.name][activity.layer] = Calibrated(views[activity.layer], seen)
            if partial:
                _save(partial, key, found, activity.gradients)
    return {
        name: [layers[index] for index in sorted(views, key=lambda i: (i == HEAD, i))] for name, layers in found.items()
    }


def _observed(method: Method, saved: Mapping[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in saved.items():
        if name.startswith(prefix):
            projection, _, part = name[len(prefix) :].partition(".")
            parts.setdefault(projection, {})[part] = tensor
    return {projection: method.observed(state) for projection, state in sorted(parts.items())}


def _save(
    partial: Path, key: str, found: Mapping[str, Mapping[int, Calibrated]], gradients: Sequence[torch.Tensor]
) -> None:
    tensors = {f"gradient.{number}": gradient for number, gradient in enumerate(gradients)}
    for name, layers in found.items():
        for index, calibrated in layers.items():
            tensors[f"{index}.done"] = torch.ones(1)
            for projection, statistic in calibrated.statistics.items():
                tensors |= {f"{index}.{name}.{projection}.{part}": one for part, one in statistic.state().items()}
    with atomic_path(partial) as temporary:
        save_file({name: one.cpu().contiguous() for name, one in tensors.items()}, temporary, {"activity": key})


def _resume(partial: Path, key: str) -> dict[str, torch.Tensor]:
    """The state of an unfinished run; nothing where there is none, or it belongs to other settings."""
    try:
        with safe_open(partial, framework="pt") as file:
            if (file.metadata() or {}).get("activity") != key:
                return {}
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        return {}

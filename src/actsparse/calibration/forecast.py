"""About what theta will be, before any layer is rounded.

Codes are rounded for how deep they will be read, and that hangs on theta, which is known only when all layers are done.  A
quarter of the tokens and an eighth of every matrix's columns, rounded to the nearest, tell it beforehand: products differ in
what they read by a factor of three, so that it is no guess to improve on later.

Shape letters: W windows, L tokens in a window, T tokens, I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from actsparse.calibration.activity import Progress, activities
from actsparse.methods.base import HEAD
from actsparse.methods.graded import (
    HEAD_WEIGHT,
    Reading,
    by_input,
    center_of,
    choose_theta,
    most_bits,
    reading_of,
    unit_of,
)
from actsparse.methods.rounding import round_nearest
from actsparse.models import sites
from actsparse.plan import atomic_path

# One window, and one column, in so many is looked at.
WINDOWS, COLUMNS = 4, 8


def forecast_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """The windows of int64 [W, L] that are looked at."""
    return tokens[::WINDOWS]


def forecast_theta(
    model: Any,
    tokens: torch.Tensor,
    stored: int,
    bits: float,
    *,
    done_with: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> float:
    """About the theta at which ``model`` will read ``bits`` bits per weight of codes of ``stored`` bits.

    Args:
        model: a dense Hugging Face causal language model.
        tokens: int64 [W, L], what :func:`forecast_tokens` gives of the calibration windows.
        stored: 4, 6 or 8.
        bits: of the decoder layers' matrices, scales included; every plane where that is less.
        done_with: called with a layer's index whenever its weights are not needed for a while.
        progress: called after every batch.

    Raises:
        CalibrationError: activations or gradients are not finite.
        ValueError: a weight is not finite.
    """
    layers = sites.layers_of(model)
    readings: dict[tuple[int, str], Reading] = {}
    for activity in activities(model, tokens, done_with=done_with, progress=progress):
        counts = HEAD_WEIGHT if activity.layer == HEAD else 1.0
        for names, x in by_input(activity.inputs):
            part = x[:, ::COLUMNS].contiguous()
            products = []
            for name in names:
                product = (
                    model.get_output_embeddings() if activity.layer == HEAD else layers[activity.layer].linear(name)
                )
                weight = product.weight.detach()[:, ::COLUMNS].float()
                packed = round_nearest(weight, stored)
                products.append((unit_of(weight, packed, counts * activity.sensitivity[name]), packed))
            center = center_of(part, products, bits)
            for name, (unit, packed) in zip(names, products, strict=True):
                readings[activity.layer, name] = reading_of(part, unit, packed, center)
    return choose_theta(readings, min(bits, most_bits(readings)))


def kept_theta(path: Path, forecast: Callable[[], float]) -> float:
    """The theta in the file ``path``, where a run that goes on finds it; ``forecast`` makes it where there is none."""
    if not path.is_file():
        with atomic_path(path) as temporary:
            Path(temporary).write_text(json.dumps({"theta": forecast()}) + "\n", encoding="utf-8")
    theta: float = json.loads(path.read_text(encoding="utf-8"))["theta"]
    return theta

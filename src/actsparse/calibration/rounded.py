"""A dense model whose weights are rounded as plain quantisation would store them: what quality costs, not a format."""

from __future__ import annotations

import copy
from typing import Any

import torch

from actsparse.calibration.activity import Progress, activities
from actsparse.methods.base import HEAD
from actsparse.methods.feedback import ROW_GROUP, curvature_of, round_rows_with_feedback
from actsparse.methods.graded import by_input
from actsparse.models import sites


def rounded_copy(
    model: Any, tokens: torch.Tensor, bits: int, *, group: int = ROW_GROUP, progress: Progress | None = None
) -> tuple[Any, float]:
    """A copy of ``model`` with all matrices rounded to ``bits`` bits with error feedback (GPTQ), and its bits per weight.

    Args:
        model: the dense model.
        tokens: int64 [W, L], calibration windows.
        bits: of a code; scales and zero points come on top.
        group: inputs of a row that share a scale and a zero point.
        progress: called after every batch.
    """
    fingerprint = sites.fingerprint(model)
    result = copy.deepcopy(model)
    sites.set_fingerprint(result, fingerprint)
    layers, taken = sites.layers_of(result), 0.0
    for activity in activities(model, tokens, progress=progress):
        for names, x in by_input(activity.inputs):
            curvature = curvature_of(x.T @ x / len(x))
            for name in names:
                head = activity.layer == HEAD
                product = result.get_output_embeddings() if head else layers[activity.layer].linear(name)
                rounded, taken = round_rows_with_feedback(product.weight.detach(), bits, curvature, group)
                # A new tensor: a head that is tied to the embedding leaves it as it is.
                product.weight = torch.nn.Parameter(rounded.to(product.weight.dtype), requires_grad=False)
    return result, taken

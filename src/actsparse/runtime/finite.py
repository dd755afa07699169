"""Logits that no token can be chosen from are refused instead of chosen from."""

from __future__ import annotations

import math

import torch
from transformers import LogitsProcessor

from actsparse.models.sites import ModelError


def check_logits(logits: torch.Tensor) -> None:
    """ModelError unless the likeliest of ``logits`` [..., V] is a finite number: with NaN, any choice would be arbitrary."""
    # NaN wins every comparison in max, so that one reduction finds it wherever it is.
    peak = float(logits.max())
    if not math.isfinite(peak):
        raise ModelError(f"the model's logits hold {peak}, expected finite numbers: its weights hold NaN or infinity")


class Finite(LogitsProcessor):
    """:func:`check_logits` inside transformers' generate."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_logits(scores)
        return scores

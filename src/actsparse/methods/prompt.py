"""What a method is that chooses neurons once per prompt: how a text is scored, and which neurons its scores choose.

A rule sees plain tensors and keeps no state.  Scores add up over texts, so that whoever runs the model can keep them per
sequence and go on when more text arrives; :mod:`actsparse.runtime.prompts` does.

Shape letters: T tokens, N neurons, S rows of a score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from actsparse.methods.base import Calibrated, MethodError, Solution, Targets
from actsparse.plan import PlanError


@dataclass(frozen=True)
class Choice:
    """Neurons per layer (int32, ascending), and what is worth telling about how they were chosen."""

    neurons: Mapping[int, torch.Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


class PromptRule(ABC):
    """One method's rule, made from a plan's ``prompt`` settings and ``prompt.*`` tensors.

    Args:
        settings: ``layers`` ([first, last]) and ``counts`` (neurons chosen, one number per layer of that range), and the
            method's own.
        tensors: the plan's tensors whose names start with ``prompt.``.
    """

    # Sums over a text are kept every so many tokens, so that any beginning of it can be taken up again.
    block = 256
    # Whether the choice compares a text's two halves.
    halves = False

    def __init__(self, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        first, last = settings["layers"]
        self.layers = range(first, last + 1)
        self.counts = dict(zip(self.layers, settings["counts"], strict=True))

    def marks(self, tokens: int) -> list[int]:
        """After which tokens, of the first ``tokens``, sums are kept: every block, and finer where halves are asked for."""
        marks = list(range(self.block, tokens + 1, self.block))
        if self.halves:
            # Four to an octave up to the fourth block: a half is never missed by more than a fifth.
            early = list(range(1, 9))
            while early[-1] < 4 * self.block:
                early += range(early[-1] + early[-1] // 4, 2 * early[-1] + 1, early[-1] // 4)
            marks = sorted({*marks, *(mark for mark in early if mark <= tokens)})
        return marks

    def half(self, tokens: int) -> int:
        """Where the first half of so many tokens ends: at the last mark that is not beyond the middle."""
        return max(self.marks(tokens // 2), default=0)

    @abstractmethod
    def score(self, values: torch.Tensor) -> torch.Tensor:
        """What some tokens add to their text's scores at one layer.

        Args:
            values: [T, N] products g * u of the tokens, in any float type and on any device.

        Returns:
            float32 [S, N] on the same device.
        """

    def score_parts(self, values: torch.Tensor, stops: Sequence[int]) -> torch.Tensor:
        """:meth:`score` of the tokens up to each of P ``stops`` since the one before, [P, S, N]."""
        return torch.stack([self.score(values[begin:stop]) for begin, stop in zip([0, *stops], stops, strict=False)])

    @abstractmethod
    def choose(self, scores: Mapping[int, torch.Tensor]) -> Choice:
        """The sets of one sequence from its scores per layer: [2, S, N] of both halves, [1, S, N] without ``halves``."""


def best(score: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` neurons of highest score [..., N], int32 ascending; equal scores go to the lower index."""
    order = torch.sort(score, descending=True, stable=True).indices
    return order[..., :count].sort().values.to(torch.int32)


def layer_range(layers: str | Sequence[int] | None) -> tuple[int, int] | None:
    """``FIRST-LAST``, a pair, or None (all layers) as (first, last); MethodError for anything else."""
    if layers is None:
        return None
    parts: Sequence[Any] = layers.split("-") if isinstance(layers, str) else layers
    try:
        first, last = (int(part) for part in parts)
    except (TypeError, ValueError):
        raise MethodError(f"layers is {layers!r}, expected FIRST-LAST such as 1-5") from None
    if not 0 <= first <= last:
        raise MethodError(f"layers is {layers!r}, expected 0 <= first <= last")
    return first, last


def prompt_solution(
    layers: Sequence[Calibrated], targets: Targets, wanted: tuple[int, int] | None, settings: Mapping[str, Any]
) -> Solution:
    """A solution whose ``prompt`` names the range and how many neurons each of its layers keeps.

    Where no range is wanted the first eighth of the layers, and at least one, stays dense: in the first layers fixed sets
    cost most by far (CoreInfer's own choice is from layer 4 of 32 on).
    """
    first, last = wanted or (min(max(1, round(len(layers) / 8)), len(layers) - 1), len(layers) - 1)
    if last >= len(layers):
        raise MethodError(f"layers is {first}-{last}, the model's last layer is {len(layers) - 1}")
    solution = Solution()
    counts = []
    for calibrated in layers[first : last + 1]:
        index, neurons = calibrated.layer.index, calibrated.layer.model.neurons
        count = max(1, round((1 - targets(index, "ffn")) * neurons))
        counts.append(count)
        solution.achieved[f"layers.{index}.ffn"] = 1 - count / neurons
    solution.prompt = {**settings, "layers": [first, last], "counts": counts}
    return solution


def setting(settings: Mapping[str, Any], name: str, kinds: type | tuple[type, ...]) -> Any:
    """One of a plan's prompt settings; PlanError when it is missing or of another type."""
    value = settings.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise PlanError(f"plan's prompt setting {name!r} is {value!r}, which has the wrong type")
    return value

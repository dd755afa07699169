"""GRIFFIN: the neurons that the prompt used most, relative to each token's whole activity.

Dong et al., "Prompt-prompted Adaptive Structured Pruning for Efficient LLM Generation", arXiv:2404.01365, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from actsparse.methods.base import Calibrated, Layer, Method, Solution, Targets
from actsparse.methods.prompt import Choice, PromptRule, best, layer_range, prompt_solution
from actsparse.methods.statistics import Statistic


class Griffin(Method):
    """Keep per prompt the neurons of largest ``||zbar_i||``, zbar the prompt's activations with every row normalised.

    Args:
        layers: the layers sparsified, (first, last) or ``"FIRST-LAST"``; by default all but the first eighth (at least one).
    """

    name = "griffin"
    source = "arXiv:2404.01365"
    phases = ()
    scopes = ("decode",)
    options = {  # noqa: RUF012
        "layers": {"metavar": "FIRST-LAST", "help": "layers to sparsify (default: all but the first eighth)"},
    }

    def __init__(self, layers: str | Sequence[int] | None = None) -> None:
        self.layers = layer_range(layers)

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        return {}

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        return prompt_solution(layers, targets, self.layers, {"rule": self.name})


class GriffinRule(PromptRule):
    """Scores are sums of squares, float32 [1, N]: the norm's square ranks as the norm does, and adds up over texts."""

    def score(self, values: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(1, values.shape[1], device=values.device)
        # A few rows at a time stay in cache, in memory that the process already has.
        for rows in values.split(16 if values.device.type == "cpu" else max(1, len(values))):
            square = rows.float().square()
            # A token without any activity adds nothing.
            weight = 1 / square.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            total += weight[None] @ square
        return total.nan_to_num()

    def choose(self, scores: Mapping[int, torch.Tensor]) -> Choice:
        return Choice({layer: best(scores[layer][0, 0], count) for layer, count in self.counts.items()})

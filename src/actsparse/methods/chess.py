"""CHESS: channel-wise thresholds in the FFN, selective sparsification of q and o in attention.

He et al., "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification", EMNLP 2024,
arXiv:2409.01366, sections 3.1 (FFN) and 3.2 (attention).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import torch

from actsparse.methods.base import (
    Calibrated,
    Layer,
    Method,
    MethodError,
    Solution,
    Targets,
    note_rank_error,
    pooled_threshold,
)
from actsparse.methods.statistics import Histogram, Moments, Statistic
from actsparse.plan import SKIP_ZEROS

STATISTICS = ("abs", "rms")


class Chess(Method):
    """Skip neuron i when ``|g_i| < t_i = T / m_i``, T the quantile of ``|g_i| m_i`` over the layer.

    Args:
        attention: also threshold the inputs of q and o, one scalar each ("CHESS w/"); False is "CHESS w/o".
        statistic: m_i is the mean of ``|u_i|`` (``abs``, the authors' v0.2) or its root mean square (``rms``, v0.1).
    """

    name = "chess"
    source = "arXiv:2409.01366"
    packable = True
    sites = ("ffn", "q", "o")
    options = {  # noqa: RUF012
        "attention": {"action": argparse.BooleanOptionalAction, "help": "also skip in q and o (default: yes)"},
        "statistic": {"choices": STATISTICS, "help": "m_i is the mean of |u_i| (abs, default) or its root mean square"},
    }

    def __init__(self, attention: bool = True, statistic: str = "abs") -> None:
        if statistic not in STATISTICS:
            raise MethodError(f"statistic is {statistic!r}, expected one of {', '.join(STATISTICS)}")
        self.attention = attention
        self.statistic = statistic

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        model = layer.model
        wanted: dict[str, Statistic] = {
            "gate/channels": Histogram("gate", model.neurons, pooled=False),
            "up/moments": Moments("up", model.neurons),
        }
        if self.attention:
            wanted["attention_in/pooled"] = Histogram("attention_in", model.hidden, pooled=True)
            wanted["o_in/pooled"] = Histogram("o_in", model.heads * model.head_dim, pooled=True)
        return wanted

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        solution = Solution()
        for calibrated in layers:
            index = calibrated.layer.index
            thresholds, achieved, rank_error = channel_thresholds(calibrated, targets(index, "ffn"), self.statistic)
            solution.threshold(index, "ffn", thresholds, achieved)
            note_rank_error(solution, rank_error)
            if self.attention:
                pooled_threshold(solution, calibrated, "attention_in/pooled", "q", targets(index, "q"))
                pooled_threshold(solution, calibrated, "o_in/pooled", "o", targets(index, "o"))
        return solution


def channel_thresholds(calibrated: Calibrated, sparsity: float, statistic: str) -> tuple[torch.Tensor, float, float]:
    """Thresholds t [N] of one layer, the sparsity they are expected to give, and the bound on its error."""
    moments: Moments = calibrated.statistics["up/moments"]  # type: ignore[assignment]
    histogram: Histogram = calibrated.statistics["gate/channels"]  # type: ignore[assignment]
    mean = moments.mean_abs if statistic == "abs" else moments.root_mean_square
    found = histogram.quantile(sparsity, scale=mean)
    # A neuron whose u is always 0 contributes nothing: T / 0 = inf skips it for good.
    thresholds = found.value / mean if found.value > SKIP_ZEROS else torch.full_like(mean, found.value)
    return thresholds, found.achieved, found.rank_error

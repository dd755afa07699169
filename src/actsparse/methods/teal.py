"""TEAL: one input threshold per matrix, on all seven matrices of a layer.

Liu et al., "Training-Free Activation Sparsity in Large Language Models", arXiv:2408.14690, sections 4.1 (thresholds) and
4.2 (block-wise greedy allocation, here :mod:`actsparse.calibration.allocation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actsparse.methods.base import Calibrated, Layer, Method, Solution, Targets, pooled_threshold
from actsparse.methods.statistics import Histogram, Statistic

# Which tap each projection's input is, and so which distribution its threshold comes from.
INPUTS = {
    "q": "attention_in",
    "k": "attention_in",
    "v": "attention_in",
    "o": "o_in",
    "gate": "ffn_in",
    "up": "ffn_in",
    "down": "value",
}


class Teal(Method):
    """Skip column i of W when ``|x_i| < t``, t the quantile of ``|x|`` over the layer's tokens and channels."""

    name = "teal"
    source = "arXiv:2408.14690"
    packable = True
    sites = tuple(INPUTS)
    budget = "layer"
    attention_alone = True

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        return {
            f"{tap}/pooled": Histogram(tap, layer.model.features(projection), pooled=True)
            for projection, tap in inputs_of(layer).items()
        }

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        solution = Solution()
        for calibrated in layers:
            for projection, tap in inputs_of(calibrated.layer).items():
                sparsity = targets(calibrated.layer.index, projection)
                pooled_threshold(solution, calibrated, f"{tap}/pooled", projection, sparsity)
        return solution


def inputs_of(layer: Layer) -> dict[str, str]:
    """:data:`INPUTS` of the projections that the layer has: a plain block has no gate, one of experts none at all."""
    absent = ("gate", "up", "down") if not layer.has_ffn else () if layer.gated else ("gate",)
    return {projection: tap for projection, tap in INPUTS.items() if projection not in absent}

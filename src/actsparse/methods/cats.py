"""CATS: one gate threshold for a whole layer.

Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models", arXiv:2404.08763, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actsparse.methods.base import Calibrated, Layer, Method, Solution, Targets, pooled_threshold
from actsparse.methods.statistics import Histogram, Statistic


class Cats(Method):
    """Skip neuron i when ``|g_i| < t``, t the quantile of ``|g|`` over the layer."""

    name = "cats"
    source = "arXiv:2404.08763"
    packable = True

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        return {"gate/pooled": Histogram("gate", layer.model.neurons, pooled=True)}

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        solution = Solution()
        for calibrated in layers:
            pooled_threshold(solution, calibrated, "gate/pooled", "ffn", targets(calibrated.layer.index, "ffn"))
        return solution

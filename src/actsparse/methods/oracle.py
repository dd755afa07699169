"""The oracle: what the FFN would lose if it were known beforehand which products are small.

No paper's method but the bound that all of them approach: at a fixed number of skipped neurons the FFN's output error is
least, neuron by neuron, when those of the smallest ``|g_i u_i|`` are skipped (CHESS, arXiv:2409.01366, section 3.1, starts
from this and replaces u by a statistic).  Knowing ``g_i u_i`` costs the reading that skipping should save, so a plan of the
oracle is for evaluation only, and the weights read that are reported for it are those of the ideal: gate, up and down of
the kept neurons alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actsparse.methods.base import Calibrated, Layer, Method, Solution, Targets, pooled_threshold
from actsparse.methods.statistics import Histogram, Statistic


class Oracle(Method):
    """Skip neuron i when ``|g_i u_i| < t``, t the quantile over the layer, as if that were known for free."""

    name = "oracle"
    source = "arXiv:2409.01366, section 3.1"
    sites = ("down",)

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        return {"value/pooled": Histogram("value", layer.model.neurons, pooled=True)}

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        solution = Solution(facts={"evaluation_only": True})
        for calibrated in layers:
            pooled_threshold(solution, calibrated, "value/pooled", "down", targets(calibrated.layer.index, "down"))
        return solution

"""No method at all: the dense model, so that the baseline goes through the same files and checks as everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actsparse.methods.base import Calibrated, Layer, Method, MethodError, Solution, Targets
from actsparse.methods.statistics import Statistic


class Dense(Method):
    """Skips nothing; needs no text beyond what a plan records."""

    name = "dense"
    source = "none"
    phases = ()
    sites = ()

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        return {}

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        if targets.default != 0:
            raise MethodError(f"method dense skips nothing: sparsity is {targets.default:g}, expected 0")
        return Solution()

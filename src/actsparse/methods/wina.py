"""WINA: input thresholds weighted by the norm of the column that the input multiplies.

Chen et al., "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference", arXiv:2505.19427,
section 3.

Two departures from the paper, so that WINA can run under the same rules and kernels as the other methods: the paper keeps
the K inputs of the largest score at every token, here a calibrated threshold on the same score keeps K on average; and the
paper first rotates the weights so that their columns become orthogonal, here the weights stay the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from actsparse.methods.base import Calibrated, Layer, Method, Solution, Targets, note_rank_error
from actsparse.methods.statistics import Histogram, Statistic
from actsparse.methods.teal import INPUTS, inputs_of
from actsparse.plan import SKIP_ZEROS


class Wina(Method):
    """Skip column i of W when ``|x_i| < t_i = T / ||W[:, i]||``, T the quantile of ``|x_i| ||W[:, i]||``."""

    name = "wina"
    source = "arXiv:2505.19427"
    packable = True
    sites = tuple(INPUTS)
    attention_alone = True

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        return {
            f"{tap}/channels": Histogram(tap, layer.model.features(projection), pooled=False)
            for projection, tap in inputs_of(layer).items()
        }

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        solution = Solution()
        for calibrated in layers:
            index = calibrated.layer.index
            for projection, tap in inputs_of(calibrated.layer).items():
                histogram: Histogram = calibrated.statistics[f"{tap}/channels"]  # type: ignore[assignment]
                norms = column_norms(calibrated.layer.weight(projection))
                found = histogram.quantile(targets(index, projection), scale=norms)
                # A column of zeros contributes nothing: T / 0 = inf skips it for good.
                scaled = found.value > SKIP_ZEROS
                thresholds = found.value / norms if scaled else torch.full_like(norms, found.value)
                solution.threshold(index, projection, thresholds, found.achieved)
                note_rank_error(solution, found.rank_error)
        return solution


def column_norms(weight: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of every column of W [O, I], float64 [I] on the CPU."""
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).double().cpu()

"""Exact ReLU sparsity, no predictor: compute every gate, skip the neurons whose gate is zero.  Nothing is lost.

This is the baseline that a predictor has to beat: at 90 % natural sparsity it already reads only 40 % of a gated block
(the whole gate, a tenth of up and down).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from actsparse.methods.base import Calibrated, Layer, Method, MethodError, Solution, Targets
from actsparse.methods.statistics import Batch, CalibrationError, Statistic
from actsparse.plan import SKIP_ZEROS

ACTIVATIONS = ("relu", "relu2", "drelu")


class Zeros(Statistic):
    """The share of exact zeros of one tap: counts, int64."""

    def __init__(self, tap: str) -> None:
        self.taps = (tap,)
        self._counts = torch.zeros(2, dtype=torch.int64)  # zeros, values

    def update(self, values: Mapping[str, torch.Tensor], batch: Batch) -> None:
        x = values[self.taps[0]]
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError("activations are NaN or infinite, expected finite values")
        self._counts += torch.tensor([int((x == 0).sum()), x.numel()])

    def state(self) -> dict[str, torch.Tensor]:
        return {"counts": self._counts}

    @property
    def zeros(self) -> int:
        """How many values were zero."""
        return int(self._counts[0])

    @property
    def count(self) -> int:
        """How many values there were."""
        return int(self._counts[1])


class Relu(Method):
    """Skip neuron i when ``g_i = 0`` exactly (and, with ReLU on up too, when ``g_i u_i = 0``); the target is not used."""

    name = "relu"
    source = "arXiv:2603.14110, section 2 (the predictor-free executor)"

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        check_activation(self.name, layer)
        wanted: dict[str, Statistic] = {"gate/zeros": Zeros("gate")}
        if layer.model.activation == "drelu":
            wanted["value/zeros"] = Zeros("value")
        return wanted

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        solution = Solution(target=0.0)
        for calibrated in layers:
            shares = {
                key: s.zeros / max(1, s.count) for key, s in calibrated.statistics.items() if isinstance(s, Zeros)
            }
            skip_zeros(solution, calibrated.layer, shares["gate/zeros"], shares.get("value/zeros", 0.0))
        return solution


def check_activation(method: str, layer: Layer) -> None:
    """MethodError unless the model's activation makes exact zeros."""
    activation = layer.model.activation
    if activation not in ACTIVATIONS:
        raise MethodError(
            f"method {method} needs exact zeros: the model's activation is {activation!r}, "
            f"expected one of {', '.join(ACTIVATIONS)}"
        )


def skip_zeros(solution: Solution, layer: Layer, gate_skipped: float, value_skipped: float) -> None:
    """Thresholds that skip exact zeros of the gate, and with ReLU on up those of the product; with what they skip."""
    solution.threshold(layer.index, "ffn", SKIP_ZEROS, gate_skipped)
    if layer.model.activation == "drelu":
        solution.threshold(layer.index, "down", SKIP_ZEROS, value_skipped)

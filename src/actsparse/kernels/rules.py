"""The rules of one feed-forward block: what the oracle, the portable executor and every native backend are told."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rules:
    """Activations, biases and decisions of a block of N neurons over H hidden channels (R: rank of the predictor).

    Vectors are float32, biases may be any float type; None means that the rule, or the bias, is absent.

    Attributes:
        activation: of the gate (of up, in a plain block), as the kernels name it.
        up_activation: applied to up's result: ``identity``, or ``relu`` for dReLU.
        gate_bias, up_bias: [N].
        down_bias: [H].
        gate_in_threshold, up_in_threshold: [H], drop inputs of gate and up.
        gate_threshold: [N], drops neurons by |g|.
        value_threshold: [N], drops neurons by |g u|.
        mean: [N], subtracted from a kept neuron's value.
        predictor_a: [R, H].
        predictor_b: [N, R].
        predictor_bias: [N].
        neurons: int32 [count], ascending: the only candidates.
    """

    activation: str
    up_activation: str = "identity"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_in_threshold: Tensor | None = None
    up_in_threshold: Tensor | None = None
    gate_threshold: Tensor | None = None
    value_threshold: Tensor | None = None
    mean: Tensor | None = None
    predictor_a: Tensor | None = None
    predictor_b: Tensor | None = None
    predictor_bias: Tensor | None = None
    neurons: Tensor | None = None

    def values(self) -> tuple[str | Tensor | None, ...]:
        """Every attribute, in order: the tail of the operator's schema."""
        return tuple(getattr(self, name) for name in NAMES)

    def of_neurons(self) -> Rules:
        """The same rules over the neurons of ``neurons`` alone, as a smaller block; itself where there is no such list."""
        chosen = self.neurons
        if chosen is None:
            return self
        picked = {name: getattr(self, name) for name in _PER_NEURON}
        picked = {name: None if t is None else t.index_select(0, chosen) for name, t in picked.items()}
        return replace(self, neurons=None, **picked)

    def check(self, neurons: int, hidden: int, out: int) -> None:
        """ValueError, naming the rule, its shape and the one expected, unless all fit a block of [N, hidden] and [out, N]."""
        a, b = self.predictor_a, self.predictor_b
        if (a is None) != (b is None):
            raise ValueError("predictor_a and predictor_b come together")
        if (
            a is not None
            and b is not None
            and (a.dim() != 2 or b.dim() != 2 or a.shape[1] != hidden or b.shape != (neurons, a.shape[0]))
        ):
            raise ValueError(
                f"predictor_a {tuple(a.shape)} and predictor_b {tuple(b.shape)}: expected (R, {hidden}) and ({neurons}, R)"
            )
        sizes = dict.fromkeys(_PER_NEURON, neurons) | {
            "down_bias": out, "gate_in_threshold": hidden, "up_in_threshold": hidden,
        }  # fmt: skip
        del sizes["predictor_b"]
        for name, size in sizes.items():
            vector = getattr(self, name)
            if vector is not None and vector.shape != (size,):
                raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected ({size},)")


NAMES = tuple(field.name for field in fields(Rules))
_PER_NEURON = ("gate_bias", "up_bias", "gate_threshold", "value_threshold", "mean", "predictor_b", "predictor_bias")

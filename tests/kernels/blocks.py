"""A random feed-forward block with its exact result and error bound."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse import kernels
from actsparse.kernels import reference

from .bounds import U32, linear_bound, rounding, stored

SLOPE = {"silu": 1.1, "relu": 1.0, "relu2": 2.0, "gelu": 1.13, "gelu_tanh": 1.13, "identity": 1.0}


class Block:
    """A random block with its exact float64 result and the error that float32 arithmetic may make."""

    def __init__(
        self, batch: int, hidden: int, size: int, dtype: torch.dtype, *, gated: bool = True, **options: object
    ):
        self.dtype = dtype
        self.x = torch.randn(batch, hidden).to(dtype)
        self.gate = (torch.randn(size, hidden) / math.sqrt(hidden)).to(dtype) if gated else None
        self.up = (torch.randn(size, hidden) / math.sqrt(hidden)).to(dtype)
        self.down = (torch.randn(hidden, size) / math.sqrt(size)).to(dtype)
        self.options = {"activation": "silu", "gate_bias": torch.randn(size) if gated else None,
                        "up_bias": torch.randn(size), "down_bias": torch.randn(hidden), **options}  # fmt: skip

    def double(self) -> dict[str, object]:
        return {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() and "threshold" not in k else v
            for k, v in self.options.items()
        }

    def values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g, g u and the float32 errors of both, in float64 over every neuron."""
        o = self.double()
        x = self.x.double()

        def product(weight: Tensor, bias: object, threshold: object) -> tuple[Tensor, Tensor]:
            assert bias is None or isinstance(bias, Tensor)
            assert threshold is None or isinstance(threshold, Tensor)
            return reference.linear(x, weight.double(), bias, threshold), linear_bound(x, weight.double(), bias)

        u, u_error = product(self.up, o["up_bias"], o.get("up_in_threshold"))
        z, z_error = (
            (u, u_error) if self.gate is None else product(self.gate, o["gate_bias"], o.get("gate_in_threshold"))
        )
        kind, up_kind = str(o["activation"]), str(o.get("up_activation", "identity"))
        g = reference.ACTIVATIONS[kind](z)
        slope = SLOPE[kind] * (z.abs() + 1 if kind == "relu2" else 1.0)
        g_error = slope * z_error + 16 * U32 * z.abs()
        if self.gate is None:
            return g, g, g_error, g_error
        u = reference.ACTIVATIONS[up_kind](u)
        u_error = SLOPE[up_kind] * u_error
        return g, g * u, g_error, g_error * u.abs() + u_error * g.abs() + g_error * u_error + U32 * (g * u).abs()

    def settle(self) -> None:
        """Give up thresholds so close to a value that rounding could decide: those neurons are kept."""
        g, value, g_error, value_error = self.values()
        for name, decided, error in (("gate_threshold", g, g_error), ("value_threshold", value, value_error)):
            threshold = self.options.get(name)
            if isinstance(threshold, Tensor):
                close = ((decided.abs() - threshold).abs() <= error).any(0)
                self.options[name] = torch.where(close, 0.0, threshold)

    def expected(self) -> Tensor:
        return reference.gated_ffn(
            self.x.double(), None if self.gate is None else self.gate.double(), self.up.double(), self.down.double(),
            kernels.Rules(**self.double()),
        )  # fmt: skip

    def bound(self) -> Tensor:
        _, value, _, error = self.values()
        mean, bias = self.options.get("mean"), self.options["down_bias"]
        assert isinstance(bias, Tensor)
        size = value.abs() + (mean.double().abs() if isinstance(mean, Tensor) else 0.0)
        down = self.down.double().abs()
        summing = (self.up.shape[0] + 4) * U32 * F.linear(size, down, bias.double().abs())
        return F.linear(error + 2 * U32 * size, down) + summing + rounding(self.expected(), self.dtype)

    def run(self, gate_layout: str = "rows", up_layout: str = "rows", down_layout: str = "columns") -> Tensor:
        gate = None if self.gate is None else stored(self.gate, gate_layout, self.dtype)
        up, down = stored(self.up, up_layout, self.dtype), stored(self.down, down_layout, self.dtype)
        assert kernels.path_for(self.x, gate, up, down).startswith("cpu-")
        return kernels.gated_ffn(self.x, gate, up, down, **self.options)

    def poison(self, kept: Tensor, *, gate: bool = False) -> Block:
        """The same block with NaN in every weight of the neurons outside ``kept`` (of gate as well when asked)."""
        other = Block.__new__(Block)
        other.__dict__.update(self.__dict__)
        other.up, other.down = self.up.clone(), self.down.clone()
        other.up[~kept] = math.nan
        other.down[:, ~kept] = math.nan
        if gate and self.gate is not None:
            other.gate = self.gate.clone()
            other.gate[~kept] = math.nan
        return other

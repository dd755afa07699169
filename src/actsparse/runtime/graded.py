"""The product on nested low-bit weights: the module that takes the place of a linear layer, and reads by level.

Shape letters: B batch, T tokens, I input features, O output features, L levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from actsparse import kernels
from actsparse.kernels import Nested
from actsparse.runtime.layers import SparseModule


class GradedLinear(SparseModule):
    """A linear layer over a packed weight that reads each column as deep as its input deserves.

    Args:
        packed: the weight.
        site: ``layers.{i}.{projection}``, or ``head``.
        level_threshold: float32 [L, I], not falling along L.
        center: float32 [I], taken off the input.
        start: float32 [O], what the output starts from: W center of the dense weight, and the bias.
        scope: which tokens; the others read every plane.
    """

    level_threshold: torch.Tensor
    center: torch.Tensor
    start: torch.Tensor

    def __init__(
        self,
        packed: Nested,
        site: str,
        level_threshold: torch.Tensor,
        center: torch.Tensor,
        start: torch.Tensor,
        scope: str,
    ) -> None:
        rules = {"level_threshold": level_threshold, "center": center, "start": start}
        device = packed.scale.device
        super().__init__(site, scope, {name: t.to(device, torch.float32).contiguous() for name, t in rules.items()})
        self.packed = packed
        self.in_features, self.out_features = packed.inputs, packed.out

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GradedLinear:
        super()._apply(fn, recurse)
        self.packed = kernels.packed_on(self.packed, self.start.device)
        return self

    def matrix(self) -> Any:
        """What the native decode step is told of it; every plane is read while the rules are set aside."""
        threshold = None if self.scope == "none" else self.level_threshold
        return kernels.packed_of(self.packed, threshold, self.center, self.start)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.graded_linear(x, self.packed, None, self.center, self.start)

    def sparse(self, x: torch.Tensor) -> torch.Tensor:
        if self.meter is not None:
            self._count(x)
        return kernels.graded_linear(x, self.packed, self.level_threshold, self.center, self.start)

    def _count(self, x: torch.Tensor) -> None:
        levels = kernels.planes.levels_read(x, self.level_threshold, self.center)
        costs = torch.tensor([0, *self.packed.level_bytes], dtype=torch.float64).cumsum(0)
        reached = torch.bincount(levels.flatten().long(), minlength=len(costs)).double().cpu()
        assert self.meter is not None
        self.meter.add(self.site, float((reached * costs).sum()), float(costs[-1] * levels.numel()))

    def extra_repr(self) -> str:
        bits = f"{self.packed.stored} bits stored"
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits}, scope={self.scope}"

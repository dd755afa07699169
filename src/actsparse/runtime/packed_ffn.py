"""A gated feed-forward block on packed weights whose gate decides which neurons count (CATS, CHESS).

Packed matrices are stored by columns, one for each input.  A neuron that the gate drops is an input of down, whose column is
not read; its weights in gate and up lie across all of their columns, and are read.

Shape letters: T tokens, H hidden, N neurons.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from actsparse import kernels
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.layers import SparseModule, expand


class PackedFFN(SparseModule):
    """The block with |g| < t dropped.

    Args:
        projections: attribute name and module of gate, up and down, as the block names them; down skips inputs that are zero.
        site: ``layers.{i}``.
        activation: as the kernels name it.
        gate_threshold: float32 [1] or [N].
        scope: which tokens.
        up_activation: what the block applies to up's result, as the kernels name it.
    """

    gate_threshold: torch.Tensor

    def __init__(
        self,
        projections: Mapping[str, tuple[str, nn.Module]],
        site: str,
        activation: str,
        gate_threshold: torch.Tensor,
        scope: str,
        up_activation: str,
    ) -> None:
        down = projections["down"][1]
        assert isinstance(down, GradedLinear)
        threshold = expand(gate_threshold, down.in_features, down.packed.scale.device)
        super().__init__(site, scope, {"gate_threshold": threshold})
        self.activation, self.up_activation = activation, up_activation
        self._names = {projection: name for projection, (name, _) in projections.items()}
        for name, module in projections.values():
            self.add_module(name, module)

    def rules(self) -> kernels.Rules:
        """What the native decode step is told of the block; its matrices bring their own thresholds."""
        return kernels.Rules(self.activation, self.up_activation, gate_threshold=self.gate_threshold)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        g, u = self._activated(x, sparse=False)
        return self._product("down", g * u, sparse=False)

    def sparse(self, x: torch.Tensor) -> torch.Tensor:
        g, u = self._activated(x, sparse=True)
        keep = kernels.reference.keep(g, self.gate_threshold)
        if self.meter is not None:
            self.meter.add(f"{self.site}.ffn", float(keep.sum()), keep.numel())
        return self._product(
            "down", torch.where(keep, g * u, torch.zeros((), dtype=x.dtype, device=x.device)), sparse=True
        )

    def _activated(self, x: torch.Tensor, *, sparse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        activations = kernels.reference.ACTIVATIONS
        g = activations[self.activation](self._product("gate", x, sparse=sparse))
        return g, activations[self.up_activation](self._product("up", x, sparse=sparse))

    def _product(self, name: str, x: torch.Tensor, *, sparse: bool) -> torch.Tensor:
        # Not through the modules' own forward: x may be a part of a sequence, of which they would take a part again.
        module = getattr(self, self._names[name])
        if isinstance(module, GradedLinear):
            return module.sparse(x) if sparse else module.dense(x)
        result: torch.Tensor = module(x)
        return result

    def extra_repr(self) -> str:
        return f"activation={self.activation}, scope={self.scope}"

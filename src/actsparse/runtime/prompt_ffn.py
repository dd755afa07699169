"""The feed-forward block of a model whose neurons are chosen once per prompt.

Shape letters: B batch, T tokens, H hidden, N neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from actsparse import kernels
from actsparse.models.sites import ModelError
from actsparse.runtime.host import HostWeights
from actsparse.runtime.layers import SparseModule, hold
from actsparse.runtime.prompts import Prompts, Run
from actsparse.runtime.sessions import Session, Tally


@dataclass(frozen=True)
class Gathered:
    """A layer's chosen neurons as a smaller dense block: gate and up [n, H], down [H, n] with its columns contiguous."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None


@dataclass(frozen=True)
class Operands:
    """Arguments of the FFN kernel after the activations: gate, up and down, and its options."""

    matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    options: dict[str, Any]


class PromptFFN(SparseModule):
    """A gated feed-forward block: text runs dense and is scored, decoding runs on the neurons that the text chose.

    Args:
        ffn: the block it replaces.
        projections: path (relative to the block) and layer of gate, up and down.
        layer: index of the layer.
        activation: as the kernels name it.
        prompts: the model's sessions; the block joins its modules.
        up_activation: of the up projection's values.
    """

    def __init__(
        self,
        ffn: nn.Module,
        projections: Mapping[str, tuple[str, nn.Linear]],
        layer: int,
        activation: str,
        prompts: Prompts,
        up_activation: str = "identity",
    ) -> None:
        super().__init__(f"layers.{layer}", "decode", {})
        self.layer = layer
        self.activation = activation
        self.up_activation = up_activation
        self.prompts = prompts
        # Called when a text is through this block, for weights that are mapped from a file: :mod:`actsparse.runtime.lowmemory`.
        self.release: Callable[[], None] | None = None
        # Where the weights are, when they are not where the model computes.
        self.host: HostWeights | None = None
        self._names = {projection: name for projection, (name, _) in projections.items()}
        hold(self, ffn, self._names.values())
        # Not a registered child: it holds the same layers, which must appear in the state dict once.
        self._replaced = (ffn,)
        prompts.modules.append(self)

    def projection(self, name: str) -> nn.Linear:
        """The layer behind ``gate``, ``up`` or ``down``."""
        return attrgetter(self._names[name])(self)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        return self._replaced[0](x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H] to [B, T, H]."""
        if torch.compiler.is_exporting():
            raise ModelError(
                "a model whose neurons are chosen per prompt cannot be exported: its sessions are no tensors"
            )
        run = self.prompts.current()
        if run is None:
            raise ModelError(f"{self.site}: the block was called outside its model's forward, where no prompt is known")
        if run.session is None or run.text:
            return self._scored(x, run)
        return self._decoded(x, run.session)

    def _scored(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        activate, activate_up = (kernels.reference.ACTIVATIONS[name] for name in (self.activation, self.up_activation))
        value = activate(self._product("gate", x)) * activate_up(self._product("up", x))
        with torch.no_grad():
            rows = value.detach().reshape(run.batch, -1, value.shape[-1])
            real = None if run.real is None else run.real.to(value.device)
            run.fresh[self.layer] = [
                self._tally(run.session, sequence, row if real is None else row[real[sequence]])
                for sequence, row in enumerate(rows)
            ]
        output = self._product("down", value)
        if self.release is not None:
            self.release()
        return output

    def _product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        linear = self.projection(name)
        if self.host is None:
            y: torch.Tensor = linear(x)
            return y
        with self.host.on_card(linear.weight) as weight:
            return F.linear(x, weight, linear.bias)

    def _tally(self, session: Session | None, sequence: int, values: torch.Tensor) -> Tally:
        if session is None:
            return Tally().add(self.prompts.rule, 0, values)
        return session.tallies[sequence][self.layer].add(self.prompts.rule, session.tokens(sequence), values)

    def _decoded(self, x: torch.Tensor, session: Session) -> torch.Tensor:
        # One call per sequence: a union of the sets would let a sequence use neurons that only another one chose.
        parts = []
        for sequence, row in enumerate(x):
            operands = self.operands(session, sequence)
            if self.meter is not None:
                self._count(session, sequence, row.shape[0])
            parts.append(kernels.gated_ffn(row, *operands.matrices, **operands.options))
        return torch.stack(parts)

    def _count(self, session: Session, sequence: int, tokens: int) -> None:
        neurons = session.neurons(self.layer, sequence)
        assert neurons is not None
        assert self.meter is not None
        for name in ("gate", "up", "ffn", "down"):
            self.meter.add(f"{self.site}.{name}", len(neurons) * tokens, self.projection("up").out_features * tokens)

    def operands(self, session: Session, sequence: int = 0) -> Operands:
        """What the FFN kernel needs to decode ``sequence``: index lists, or the copies where those are kept."""
        gate, up, down = (self.projection(name) for name in ("gate", "up", "down"))
        options: dict[str, Any] = {
            "activation": self.activation,
            "up_activation": self.up_activation,
            "down_bias": down.bias,
        }
        options |= {"gate_bias": gate.bias, "up_bias": up.bias}
        copies = session.gathered.get((self.layer, sequence))
        if copies is None and self._gathers:
            copies = self.gather(session, sequence)
        if copies is not None:
            options |= {"gate_bias": copies.gate_bias, "up_bias": copies.up_bias}
            return Operands((copies.gate, copies.up, copies.down), options)
        options["neurons"] = session.neurons(self.layer, sequence)
        return Operands((gate.weight, up.weight, down.weight), options)

    @property
    def _gathers(self) -> bool:
        # Off the CPU an index list would be gathered again at every token.
        return self.prompts.gather or self.projection("up").weight.device.type != "cpu"

    def gather(self, session: Session, sequence: int = 0, into: Gathered | None = None) -> Gathered:
        """Copy the neurons that a sequence's text chose, ``into`` another text's copies where these are not needed any more."""
        gate, up, down = (self.projection(name) for name in ("gate", "up", "down"))
        neurons = session.neurons(self.layer, sequence)
        assert neurons is not None
        index = neurons.to(up.weight.device if self.host is None else self.host.card, torch.int64)

        def pick(values: torch.Tensor | None, room: torch.Tensor | None) -> Any:
            if values is None:
                return None
            if self.host is not None and self.host.holds(values):
                return self.host.gather(values.detach(), index, room)
            return torch.index_select(values.detach(), 0, index, out=room)

        with torch.no_grad():
            # From the transposed view, so that the columns come out contiguous without a second copy.
            rooms = (None,) * 5 if into is None else (into.gate, into.up, into.down.t(), into.gate_bias, into.up_bias)
            parts = (gate.weight, up.weight, down.weight.t(), gate.bias, up.bias)
            rows = [pick(values, room) for values, room in zip(parts, rooms, strict=True)]
            copies = Gathered(rows[0], rows[1], rows[2].t(), rows[3], rows[4])
        if self.release is not None:
            self.release()
        session.gathered[self.layer, sequence] = copies
        return copies

    def extra_repr(self) -> str:
        return f"activation={self.activation}, rule={type(self.prompts.rule).__name__}"

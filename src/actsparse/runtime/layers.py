"""The hot path: the modules that take the place of a model's own, and obey a plan's rules through the kernels.

They share the parameters of the modules they replace (same names, same tensors), so a state dict does not change.

Shape letters: B batch, T tokens, H hidden, N neurons, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import nn
from torch.nn import functional as F

from actsparse import kernels
from actsparse.kernels.parallel import Share, local, set_local


@dataclass
class Meter:
    """Counts what sparse modules read of each projection, token by token, wherever the rules apply.

    ``kept`` and ``seen`` are keyed ``layers.{i}.{projection}`` (``ffn`` for the neurons that pass the gate's rules), in
    rows or columns of the weight's stored layout, summed over the tokens inside the scope.
    """

    kept: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)

    def add(self, site: str, kept: float, seen: float) -> None:
        """Count ``kept`` of ``seen`` at ``site``."""
        self.kept[site] = self.kept.get(site, 0.0) + kept
        self.seen[site] = self.seen.get(site, 0.0) + seen

    def sparsity(self) -> dict[str, float]:
        """Fraction skipped per site."""
        return {site: 1 - self.kept[site] / self.seen[site] for site in self.kept}


def first_sparse(scope: str, tokens: int) -> int:
    """Index of the first token of a forward over ``tokens`` tokens that ``scope`` sparsifies (``tokens`` for none).

    One token alone is a decode step.  ``none`` is no plan's scope: it stands while rules are set aside.
    """
    if scope == "none":
        return tokens
    if scope == "all" or tokens == 1:
        return 0
    return tokens if scope == "decode" else tokens // 2


class SparseModule(nn.Module):
    """What both sparse modules share: the scope, float32 rules that survive ``.to(dtype)``, and the meter."""

    def __init__(self, site: str, scope: str, rules: Mapping[str, torch.Tensor | None]) -> None:
        super().__init__()
        self.site = site
        self.scope = scope
        self.meter: Meter | None = None
        self._rules = {name: rule for name, rule in rules.items() if rule is not None}
        for name in rules:
            self.register_buffer(name, self._rules.get(name), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseModule:
        super()._apply(fn, recurse)
        for name, rule in self._rules.items():
            # model.half() must not round thresholds: take them again from the float32 originals.
            setattr(self, name, rule.to(getattr(self, name).device))
        return self

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """The replaced module's own result."""
        raise NotImplementedError

    def sparse(self, x: torch.Tensor) -> torch.Tensor:
        """The result under the rules."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T, H] to the replaced module's output, sparsified where the scope says so."""
        tokens = x.shape[-2] if x.dim() > 1 else 1
        start = first_sparse(self.scope, tokens)
        if start == 0:
            return self.sparse(x)
        if start == tokens:
            return self.dense(x)
        return torch.cat([self.dense(x[..., :start, :]), self.sparse(x[..., start:, :])], dim=-2)


class SparseLinear(SparseModule):
    """A linear layer that skips the columns of W whose inputs stay under a threshold.

    Args:
        linear: the layer it replaces; its weight should lie in column layout.
        site: ``layers.{i}.{projection}``.
        threshold: float32 [1] or [I].
        scope: which tokens.
        share: given where this process holds some of the columns, and of the threshold: results are added up.
    """

    threshold: torch.Tensor

    def __init__(
        self, linear: nn.Linear, site: str, threshold: torch.Tensor, scope: str, share: Share | None = None
    ) -> None:
        features = local(linear.weight).shape[1]
        super().__init__(site, scope, {"threshold": expand(threshold, features, linear.weight.device)})
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._share = share

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        return self._shared(F.linear(x, local(self.weight), self._bias()))

    def sparse(self, x: torch.Tensor) -> torch.Tensor:
        if self.meter is not None:
            keep = kernels.reference.keep(x, self.threshold)
            self.meter.add(self.site, float(keep.sum()), keep.numel())
        return self._shared(kernels.linear(x, local(self.weight), self._bias(), self.threshold))

    def _bias(self) -> torch.Tensor | None:
        return local(self.bias) if self._share is None else None

    def _shared(self, y: torch.Tensor) -> torch.Tensor:
        return y if self._share is None else self._share.add_up(y, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scope={self.scope}"


FFN_RULES = {
    "gate_in_threshold": "gate.threshold",
    "up_in_threshold": "up.threshold",
    "gate_threshold": "ffn.threshold",
    "value_threshold": "down.threshold",
    "predictor_a": "ffn.predictor_a",
    "predictor_b": "ffn.predictor_b",
    "predictor_bias": "ffn.predictor_bias",
}


class SparseFFN(SparseModule):
    """A gated feed-forward block that computes only the neurons its rules keep, in one kernel call.

    Args:
        ffn: the block it replaces.
        projections: path (relative to the block) and layer of gate, up and down.
        site: ``layers.{i}``.
        activation: as the kernels name it.
        rules: one layer's rules by the plan's names (``ffn.threshold`` ...); see :mod:`actsparse.plan`.
        scope: which tokens.
        up_activation: what the block applies to up's result, as the kernels name it.
        share: given where this process holds some of the neurons, and of the rules: results are added up.
    """

    def __init__(
        self,
        ffn: nn.Module,
        projections: Mapping[str, tuple[str, nn.Linear]],
        site: str,
        activation: str,
        rules: Mapping[str, torch.Tensor],
        scope: str,
        up_activation: str = "identity",
        share: Share | None = None,
    ) -> None:
        up = projections["up"][1]
        neurons, hidden = local(up.weight).shape
        sizes = {"gate_in_threshold": hidden, "up_in_threshold": hidden}
        sizes |= {"gate_threshold": neurons, "value_threshold": neurons}
        prepared: dict[str, torch.Tensor | None] = {}
        for argument, name in FFN_RULES.items():
            rule = rules.get(name)
            if rule is not None and argument in sizes:
                rule = expand(rule, sizes[argument], up.weight.device)
            elif rule is not None:
                rule = rule.to(up.weight.device)
            prepared[argument] = rule
        super().__init__(site, scope, prepared)
        self.activation, self.up_activation = activation, up_activation
        self._names = {projection: name for projection, (name, _) in projections.items()}
        self.hold(ffn, {name: linear for name, linear in projections.values()})
        # Not a registered child: it holds the same layers, which must appear in the state dict once.
        self._replaced = (ffn,)
        self._share = share
        self._match_predictor()

    def hold(self, ffn: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
        """Take in the projections (with a fused layer around them) under their own names: the state dict stays as it was."""
        hold(self, ffn, linears)

    def projection(self, name: str) -> nn.Linear:
        """The layer behind ``gate``, ``up`` or ``down``."""
        return attrgetter(self._names[name])(self)

    @property
    def gated(self) -> bool:
        """Whether the block has a gate projection."""
        return "gate" in self._names

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseFFN:
        super()._apply(fn, recurse)
        self._match_predictor()
        return self

    def _match_predictor(self) -> None:
        """The predictor's matrices are read like weights: in the weights' own type (its bias stays float32)."""
        for name in ("predictor_a", "predictor_b"):
            matrix = getattr(self, name)
            if matrix is not None:
                setattr(self, name, matrix.to(self.projection("up").weight.dtype))

    def rules(self) -> kernels.Rules:
        """What the FFN kernel is told; without the rules themselves while those are set aside."""
        obeyed = self.scope != "none"
        return kernels.Rules(
            activation=self.activation,
            up_activation=self.up_activation,
            gate_bias=local(self.projection("gate").bias) if self.gated else None,
            up_bias=local(self.projection("up").bias),
            down_bias=self.projection("down").bias if self._share is None else None,
            **{argument: getattr(self, argument) for argument in FFN_RULES if obeyed},
        )

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        return self._replaced[0](x)

    def sparse(self, x: torch.Tensor) -> torch.Tensor:
        gate = local(self.projection("gate").weight) if self.gated else None
        up, down = local(self.projection("up").weight), local(self.projection("down").weight)
        if self.meter is None:
            return self._shared(kernels.gated_ffn(x, gate, up, down, self.rules()))
        # The method's own arithmetic shows what the kernels would read; running both would double the price.
        y, kept = kernels.reference.gated_ffn_metered(x, gate, up, down, self.rules())
        for name, keep in kept.items():
            self.meter.add(f"{self.site}.{name}", float(keep.sum()), keep.numel())
        return self._shared(y)

    def _shared(self, y: torch.Tensor) -> torch.Tensor:
        return y if self._share is None else self._share.add_up(y, self.projection("down").bias)

    def extra_repr(self) -> str:
        rules = ", ".join(name for name in FFN_RULES if getattr(self, name) is not None)
        return f"activation={self.activation}, rules=[{rules}], scope={self.scope}"


class SparsePlainFFN(SparseFFN):
    """A block without a gate whose two projections lie in the decoder layer itself (OPT).

    It stands where the first projection stood and holds that one's parameters; the second's stay at their place in a
    :class:`Passed`.  Such layers flatten [B, T, H] to [B * T, H] before the block, so the scope needs to be told T.
    """

    def hold(self, ffn: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
        # A plain dict is no registered child: names in the state dict stay those of the first projection alone.
        self._linears = dict(linears)
        first = linears[self._names["up"]]
        self.weight, self.bias = first.weight, first.bias
        self._tokens = 1

    def projection(self, name: str) -> nn.Linear:
        return self._linears[self._names[name]]

    def note_tokens(self, tokens: int) -> None:
        """Remember how many tokens a sequence has in the decoder layer's forward that begins."""
        self._tokens = tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.unflatten(0, (-1, self._tokens))).flatten(0, 1) if x.dim() == 2 else super().forward(x)


def hold(module: nn.Module, ffn: nn.Module, paths: Iterable[str]) -> None:
    """Register the children of ``ffn`` that ``paths`` begin with as children of ``module``, under their own names."""
    for name in dict.fromkeys(path.partition(".")[0] for path in paths):
        module.add_module(name, getattr(ffn, name))


class Passed(nn.Module):
    """Keeps the parameters of a projection whose work another module does, under their own names; passes x on."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def expand(threshold: torch.Tensor, features: int, device: torch.device) -> torch.Tensor:
    """A scalar [1] or per-channel [features] threshold as contiguous float32 [features] on ``device``."""
    return threshold.to(device, torch.float32).expand(features).contiguous()


def is_columns(weight: torch.Tensor) -> bool:
    """Whether W [O, I] lies with its columns contiguous, as column skipping needs it; strides of one element mean nothing."""
    (out, inn), (row, column) = weight.shape, weight.stride()
    return (row == 1 or out == 1) and (column >= out or inn == 1)


def lay_columns(linear: nn.Linear) -> None:
    """Re-lay a weight so that each column is contiguous; its logical shape and values do not change."""
    set_local(linear.weight, local(linear.weight.data).t().contiguous().t())


def lay_rows(linear: nn.Linear) -> None:
    """Undo :func:`lay_columns`."""
    set_local(linear.weight, local(linear.weight.data).contiguous())

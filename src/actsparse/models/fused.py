"""Linear layers whose rows are several projections, seen as these projections, without a second copy of a weight.

From the moment that the package looks at such a model until :func:`fuse` (which ``restore`` calls), a fused layer stands as
a :class:`SplitLinear`.  The state dict keeps the fused names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from actsparse.models.families import Family, ModelError


class SplitLinear(nn.Module):
    """A fused linear layer as its parts, each a linear layer of its own over views of the fused weight and bias.

    Args:
        fused: the layer; its parameters are empty until :meth:`joined`.
        rows: rows of each part, by name, in order.
    """

    def __init__(self, fused: nn.Linear, rows: Mapping[str, int]) -> None:
        super().__init__()
        if sum(rows.values()) != fused.out_features:
            given = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise ModelError(f"a fused layer has {fused.out_features} rows, expected those of {given}")
        self.rows = dict(rows)
        # Not a registered child: its parameters are the parts'.
        self._fused = (fused,)
        begin = 0
        for name, count in rows.items():
            part = nn.Linear(fused.in_features, count, bias=fused.bias is not None, device="meta")
            for kind, whole in fused.named_parameters(recurse=False):
                view = whole.data[begin : begin + count]
                setattr(part, kind, nn.Parameter(view, requires_grad=whole.requires_grad))
            self.add_module(name, part)
            begin += count
        for whole in fused.parameters(recurse=False):
            whole.data = whole.data.new_empty(0)
        self.train(fused.training)
        self.register_state_dict_post_hook(_join_state)
        self.register_load_state_dict_pre_hook(_split_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]: the parts' results side by side."""
        return torch.cat([getattr(self, name)(x) for name in self.rows], -1)

    def settle(self) -> None:
        """Let go of the fused storage where only some parts still lie in it: those are copied out of it."""
        for kind in ("weight", "bias"):
            whole = [getattr(getattr(self, name), kind, None) for name in self.rows]
            values = [one for one in whole if isinstance(one, torch.Tensor)]
            places = [one.untyped_storage().data_ptr() for one in values]
            for value, place in zip(values, places, strict=True):
                if 1 <= places.count(place) < len(places) and value.untyped_storage().nbytes() > value.nbytes:
                    value.data = value.data.clone(memory_format=torch.preserve_format)

    def joined(self) -> nn.Linear:
        """The fused layer again, with the parts' values."""
        fused = self._fused[0]
        for kind, whole in fused.named_parameters(recurse=False):
            whole.data = _join([getattr(getattr(self, name), kind).data for name in self.rows])
        fused.train(self.training)
        return fused


def split(layer: nn.Module, family: Family, rows: Mapping[str, int]) -> None:
    """Let the fused layers of a decoder layer stand as their parts; ``rows`` gives the rows of every projection.

    Raises:
        ModelError: one is not a plain linear layer, or has other rows.
    """
    for path, names in family.fused.items():
        module = layer.get_submodule(path)
        if isinstance(module, SplitLinear):
            continue
        if type(module) is not nn.Linear:
            raise ModelError(
                f"{path} is a {type(module).__name__}, expected nn.Linear (a quantised model, or adapters?)"
            )
        layer.set_submodule(path, SplitLinear(module, {name: rows[name] for name in names}))


def settle(layer: nn.Module) -> None:
    """:meth:`SplitLinear.settle` of a decoder layer's."""
    for module in layer.modules():
        if isinstance(module, SplitLinear):
            module.settle()


def fuse(model: nn.Module) -> None:
    """Undo :func:`split` everywhere in ``model`` where the parts are plain linear layers (packed ones stay)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitLinear) and all(type(part) is nn.Linear for part in module.children()):
            model.set_submodule(name, module.joined())


def join_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Give the parts of fused layers that a state dict holds the fused layers' names and shapes, in place."""
    for name, module in model.named_modules():
        if isinstance(module, SplitLinear):
            _join_state(module, state, f"{name}.", None)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts below each other; no copy where they lie so already."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        if not part.is_contiguous() or part.untyped_storage()._cdata != first.untyped_storage()._cdata:
            return torch.cat(parts)
        if part.storage_offset() != at:
            return torch.cat(parts)
        at += part.numel()
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())


def _join_state(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for kind in ("weight", "bias"):
        names = [f"{prefix}{name}.{kind}" for name in module.rows]
        if all(name in state for name in names):
            state[f"{prefix}{kind}"] = _join([state.pop(name) for name in names])


def _split_state(module: Any, state: dict[str, Any], prefix: str, *more: Any) -> None:
    for kind in ("weight", "bias"):
        whole = state.pop(f"{prefix}{kind}", None)
        if whole is not None:
            for name, part in zip(module.rows, whole.split(list(module.rows.values())), strict=True):
                state[f"{prefix}{name}.{kind}"] = part

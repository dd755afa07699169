"""A device of our own for PyTorch, neither CPU nor CUDA: its values lie in CPU tensors that only its operators may see.

Made with PyTorch's open registration (the PrivateUse1 key), as torch_npu is.  A process can have one such device only, and
never gets rid of it: tests run programs that import this module.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "probe"
CALLED: set[str] = set()

# An autograd key over a device needs nothing of its own: what it lets through comes here.
_setup_privateuseone_for_python_backend(NAME)
_library = torch.library.Library("_", "IMPL")


class Probe(torch.Tensor):
    """A tensor of the device; ``values`` is the CPU tensor behind it."""

    values: torch.Tensor

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace != "aten":
            # Ours, which a tensor that is no subclass would not meet: what the device has no kernel for is composed of others.
            return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        return _run(operator, *args, **(kwargs or {}))

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Probe:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        made.values = values
        return made


def _inside(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.values if isinstance(value, Probe) else value


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    CALLED.add(str(operator))
    name = operator.name()
    if name == "aten::_to_copy":
        kwargs = dict(kwargs)
        target = torch.device(kwargs.pop("device", None) or NAME)
        result = operator(*pytree.tree_map(_inside, args), **kwargs)
        return Probe(result) if target.type == NAME else result
    result = operator(*pytree.tree_map(_inside, args), **pytree.tree_map(_inside, kwargs))
    given = {id(value.values): value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Probe)}

    def outside(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return given.get(id(value)) if id(value) in given else Probe(value)  # in-place operators return their argument

    return pytree.tree_map(outside, result)


_library.fallback(_run, "PrivateUse1")
# Called where Python's dispatch is off, where a fallback would not be found.
_named = torch.library.Library("aten", "IMPL")
for _operator in (
    torch.ops.aten.copy_.default,
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten._copy_from.default,
):
    _named.impl(_operator, functools.partial(_run, _operator), "PrivateUse1")


def upload(value: torch.Tensor) -> Probe:
    """A CPU tensor's values on the device, in a copy of their own with the same strides."""
    return Probe(value.detach().clone(memory_format=torch.preserve_format))

"""Models whose weights transformers has divided among processes (``DistributedConfig(tp_size=N)`` under ``torchrun``).

Such weights are DTensors: every process holds some rows of q, k, v, gate and up, and the same share of the columns of o and
down, whose results are added up.  A plan is made for the whole model, so each process takes its part of every rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Share:
    """One process's part.

    Attributes:
        rank: its number.
        size: how many there are.
        group: the process group over which results are added up.
    """

    rank: int
    size: int
    group: Any

    def part(self, rule: torch.Tensor) -> torch.Tensor:
        """This process's entries of a rule, [N, ...] to [N / size, ...]; a scalar [1] is everybody's."""
        if rule.shape[0] == 1:
            return rule
        own = rule.shape[0] // self.size
        return rule[self.rank * own : (self.rank + 1) * own].contiguous()

    def add_up(self, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The sum of every process's ``y``, and the bias once."""
        torch.distributed.all_reduce(y, group=self.group)
        return y if bias is None else y + local(bias)


def local(tensor: Any) -> Any:
    """What this process holds of a tensor or parameter; the tensor itself where nothing is divided (None for None)."""
    divided = getattr(tensor, "to_local", None)
    return tensor if divided is None else divided()


def set_local(parameter: Any, values: torch.Tensor) -> None:
    """Put ``values``, equal to what this process holds but laid otherwise, into the parameter."""
    if hasattr(parameter, "to_local"):
        # A DTensor describes strides of the whole, which nobody reads: only what is local is multiplied.
        parameter._local_tensor = values
    else:
        parameter.data = values


def share_of(weight: Any) -> Share | None:
    """The share of whoever holds this weight; None where nothing is divided.

    Raises:
        ValueError: divided unevenly, in more than one dimension, or on a mesh of several.
    """
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.size() == 1:
        return None
    if mesh.ndim != 1 or len(weight.placements) != 1:
        raise ValueError(f"weights are divided over a mesh of {mesh.ndim} dimensions, expected tensor parallel alone")
    size, (placement,) = mesh.size(), weight.placements
    if not placement.is_shard() or weight.shape[placement.dim] % size:
        raise ValueError(
            f"a weight of shape {list(weight.shape)} is held as {placement} by {size} processes, expected equal shares"
        )
    return Share(mesh.get_local_rank(), size, mesh.get_group())

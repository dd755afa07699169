"""Rounding columns to nested codes: a block of them with error feedback, and once more by coordinate descent.

The oracle in plain PyTorch, and the choice of what takes its place: C++ (:mod:`.cpu`) or CUDA (:mod:`.cuda`).  Outputs do
not depend on each other.  What belongs to weights is laid out [I, O], a column together, and O is whole groups.

Shape letters: O outputs, I inputs, G groups of 64 outputs, S bits stored, L = S/2 levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import cpu, cuda
from .planes import GROUP

# Columns of a block, at most: what a block passes on to those after it lies in a core's cache.
MOST_COLUMNS = 128
# Codes that are tried on both sides of the one nearest to what would leave nothing to gain.
REACH = 3


@dataclass(frozen=True)
class Columns:
    """What is known of columns before their codes are.

    Attributes:
        stored: S.
        half_range: float32 [I, G].
        shares: float32 [1 + L, I], the shares of each input's energy that are read at each level, level 0 (skipped) first.
        gain: float32 [L].
    """

    stored: int
    half_range: Tensor
    shares: Tensor
    gain: Tensor

    def values(self, column: int, codes: Tensor) -> Tensor:
        """What codes [..., O] of a column are read as at every level, float32 [L, ..., O]."""
        span = self.half_range[column].repeat_interleave(GROUP)
        levels = range(2, self.stored + 1, 2)
        cut = torch.stack([(codes.long() >> (self.stored - level)) + (0.5 - 2 ** (level - 1)) for level in levels])
        steps = torch.stack([self.gain[k] * 2.0 ** (1 - level) for k, level in enumerate(levels)])
        return cut * steps.view(-1, *[1] * codes.dim()) * span

    def nearest(self, column: int, weight: Tensor) -> Tensor:
        """Codes, int64, of weights [O] in a column."""
        half = 2 ** (self.stored - 1)
        span = self.half_range[column].repeat_interleave(GROUP)
        return (weight * (half / span.clamp(min=1e-30)) + half).floor().clamp(0, 2 * half - 1).long()

    def errors(self, column: int, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What codes [..., O] leave of weights [O]: as read on average, with every plane, and the mean square as read."""
        off = weight - self.values(column, codes)
        share = self.shares[:, column].view(-1, *[1] * codes.dim())
        square = share[0] * weight.square() + (share[1:] * off.square()).sum(0)
        return share[0] * weight + (share[1:] * off).sum(0), off[-1], square


class Backend(Protocol):
    """Who rounds; the oracle's functions say how."""

    def round_block(
        self, columns: Columns, begin: int, end: int, feedback: Tensor, weight: Tensor, rest: Tensor, codes: Tensor
    ) -> Tensor: ...

    def code_errors(self, columns: Columns, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]: ...

    def descend_block(
        self, columns: Columns, begin: int, end: int, hessian: Tensor, prompts: float, weight: Tensor, codes: Tensor,
        as_read: Tensor, whole: Tensor, stood: Tensor,
    ) -> None: ...  # fmt: skip


class Oracle:
    """Plain PyTorch, on any device."""

    def round_block(
        self, columns: Columns, begin: int, end: int, feedback: Tensor, weight: Tensor, rest: Tensor, codes: Tensor
    ) -> Tensor:
        """Round the columns ``begin`` to ``end`` one after the other, the error of each made good by those after it.

        Returns what is left of the block's weights as they are read, float32 [end - begin, O].

        Args:
            columns: of all inputs.
            feedback: float32 [I, I], what of a column's error (row) others (columns) are moved by.
            weight: float32 [I, O].
            rest: float32 [I, O], the weights and what those before the block moved them by; the block's become what each
                stood at.
            codes: uint8 [I, O], the block's are set.
        """
        errors = torch.empty(end - begin, weight.shape[1], device=weight.device)
        for i in range(begin, end):
            code = columns.nearest(i, rest[i])
            codes[i] = code
            errors[i - begin] = columns.errors(i, weight[i], code)[0]
            rest[i + 1 : end].addr_(feedback[i, i + 1 : end], errors[i - begin])
        return errors

    def code_errors(self, columns: Columns, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What codes uint8 [I, O] leave of weights [I, O]: as they are read on average, and with every plane."""
        as_read, whole = torch.empty_like(weight), torch.empty_like(weight)
        for i in range(len(weight)):
            as_read[i], whole[i], _ = columns.errors(i, weight[i], codes[i])
        return as_read, whole

    def descend_block(
        self, columns: Columns, begin: int, end: int, hessian: Tensor, prompts: float, weight: Tensor, codes: Tensor,
        as_read: Tensor, whole: Tensor, stood: Tensor,
    ) -> None:  # fmt: skip
        """Give each of the columns ``begin`` to ``end``, one after the other, the codes that cost least beside all others'.

        The cost of an output is, with E the errors as read, D those of every plane, D_l those at level l, s the shares and
        p ``prompts``::

            (1 - p) (sum over i != j of E_i H_ij E_j + sum over i, l of H_ii s_il D_il^2) + p D^T H D

        It never rises.

        Args:
            columns: of all inputs.
            hessian: H, float32 [I, I], with a diagonal above 0.
            prompts: how much the error of every plane counts.
            weight: float32 [I, O].
            codes: uint8 [I, O], changed.
            as_read: E, float32 [I, O], changed with the codes, as ``whole``.
            whole: D.
            stood: float32 [I, O], the block's become the weights at which the others' errors would leave nothing to gain.
        """
        read_pull, whole_pull = hessian[begin:end] @ as_read, hessian[begin:end] @ whole
        steps = torch.arange(-REACH, REACH + 1, device=weight.device).unsqueeze(1)
        for i in range(begin, end):
            own = hessian[i, i]
            read_slope = (1 - prompts) * (read_pull[i - begin] - own * as_read[i])
            whole_slope = prompts * (whole_pull[i - begin] - own * whole[i])
            stood[i] = weight[i] + (read_slope + whole_slope) / own
            tried = (columns.nearest(i, stood[i]) + steps).clamp(0, 2**columns.stored - 1)
            # The present code first: another has to be better.
            tried = torch.cat([codes[i].long().unsqueeze(0), tried])
            read, off, square = columns.errors(i, weight[i], tried)
            cost = own * ((1 - prompts) * square + prompts * off.square()) + 2 * (read_slope * read + whole_slope * off)
            best = cost.argmin(0, keepdim=True)
            code, read, off = (part.gather(0, best)[0] for part in (tried, read, off))
            read_pull[i + 1 - begin :].addr_(hessian[i, i + 1 : end], read - as_read[i])
            whole_pull[i + 1 - begin :].addr_(hessian[i, i + 1 : end], off - whole[i])
            codes[i], as_read[i], whole[i] = code, read, off


def backend_of(device: torch.device) -> Backend:
    """Who rounds on ``device``."""
    if device.type == "cpu" and not cpu.missing:
        return cpu.Rounder()
    if device.type == "cuda" and not cuda.device_obstacle(device.index):
        return cuda.Rounder()
    return Oracle()

"""Rounding to nested codes, a block of columns a launch; :class:`actsparse.kernels.rounding.Oracle` says what each does.

Letters: O outputs, I inputs, G groups of 64 outputs, L levels.
"""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..planes import GROUP
from . import compiler
from .products import Run
from .structures import Launch, pointer

if TYPE_CHECKING:
    from ..rounding import Columns

THREADS = 128
# Columns whose two pulls fit what a block has of shared memory.
_DESCENT_COLUMNS = 64


class Rounding(Structure):
    """A block of columns."""

    _fields_ = [
        *(
            (name, c_void_p)
            for name in ("weight", "rest", "as_read", "whole", "half_range", "matrix", "shares", "gain")
        ),
        *((name, c_void_p) for name in ("codes", "errors", "pull")),
        *((name, c_int32) for name in ("inputs", "out", "groups", "stored", "begin", "columns")),
        ("prompts", c_float),
    ]


class Rounder:
    """Every tensor is contiguous; ``run`` launches (tests emulate it)."""

    def __init__(self, run: Run = compiler.run) -> None:
        self._run = run

    def round_block(
        self, columns: Columns, begin: int, end: int, feedback: Tensor, weight: Tensor, rest: Tensor, codes: Tensor
    ) -> Tensor:
        errors = torch.empty(end - begin, weight.shape[1], device=weight.device)
        self._launch("rounding", columns, begin, end, feedback, weight, rest, codes, errors=errors)
        return errors

    def code_errors(self, columns: Columns, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        # Every column at once, level by level.
        span = columns.half_range.repeat_interleave(GROUP, 1)
        as_read = columns.shares[0].unsqueeze(1) * weight
        for k, gain in enumerate(columns.gain):
            level = 2 * k + 2
            value = (codes >> (columns.stored - level)).float() + (0.5 - 2 ** (level - 1))
            whole = weight - value * (span * (gain * 2.0 ** (1 - level)))
            as_read += columns.shares[k + 1].unsqueeze(1) * whole
        return as_read, whole

    def descend_block(
        self, columns: Columns, begin: int, end: int, hessian: Tensor, prompts: float, weight: Tensor, codes: Tensor,
        as_read: Tensor, whole: Tensor, stood: Tensor,
    ) -> None:  # fmt: skip
        for first in range(begin, end, _DESCENT_COLUMNS):
            last = min(first + _DESCENT_COLUMNS, end)
            rows = hessian[first:last]
            pulls = {"errors": rows @ as_read, "pull": rows @ whole}
            self._launch(
                "descent", columns, first, last, hessian, weight, stood, codes, as_read=as_read, whole=whole,
                prompts=prompts, **pulls,
            )  # fmt: skip

    def _launch(
        self, kernel: str, columns: Columns, begin: int, end: int, matrix: Tensor, weight: Tensor, rest: Tensor,
        codes: Tensor, *, errors: Tensor, as_read: Tensor | None = None, whole: Tensor | None = None,
        pull: Tensor | None = None, prompts: float = 0.0,
    ) -> None:  # fmt: skip
        inputs, out = weight.shape
        known = [columns.half_range, matrix, columns.shares, columns.gain]
        tensors = [weight, rest, as_read, whole, *(tensor.contiguous() for tensor in known), codes, errors, pull]
        places = [None if tensor is None else pointer(tensor) for tensor in tensors]
        p = Rounding(*places, inputs, out, columns.half_range.shape[1], columns.stored, begin, end - begin, prompts)
        shared = 4 * THREADS * (end - begin) * (1 if pull is None else 2)
        launch = Launch(kernel, (-(-out // THREADS), 1), THREADS, shared, p, tuple(tensors))
        self._run([launch], weight.device, torch.bfloat16, 1)

"""Rounding to nested codes in the library; :class:`actsparse.kernels.rounding.Oracle` says what each does."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .loading import check, library
from .structures import Rounding

if TYPE_CHECKING:
    from ..rounding import Columns


class Rounder:
    """One thread; every tensor is contiguous."""

    def round_block(
        self, columns: Columns, begin: int, end: int, feedback: Tensor, weight: Tensor, rest: Tensor, codes: Tensor
    ) -> Tensor:
        errors = torch.empty(end - begin, weight.shape[1])
        block = _block(columns, begin, end, feedback, codes)
        code = library().as_round_block(
            ctypes.byref(block), weight[begin:].data_ptr(), rest[begin:].data_ptr(), errors.data_ptr()
        )
        check(code, "round_block")
        return errors

    def code_errors(self, columns: Columns, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        as_read, whole = torch.empty_like(weight), torch.empty_like(weight)
        block = _block(columns, 0, len(weight), None, codes)
        code = library().as_code_errors(ctypes.byref(block), weight.data_ptr(), as_read.data_ptr(), whole.data_ptr())
        check(code, "code_errors")
        return as_read, whole

    def descend_block(
        self, columns: Columns, begin: int, end: int, hessian: Tensor, prompts: float, weight: Tensor, codes: Tensor,
        as_read: Tensor, whole: Tensor, stood: Tensor,
    ) -> None:  # fmt: skip
        rows = hessian[begin:end]
        pulls = rows @ as_read, rows @ whole
        block = _block(columns, begin, end, hessian, codes)
        places = (tensor[begin:].data_ptr() for tensor in (weight, as_read, whole))
        code = library().as_descend_block(
            ctypes.byref(block), prompts, *places, *(pull.data_ptr() for pull in pulls), stood[begin:].data_ptr()
        )
        check(code, "descend_block")


def _block(columns: Columns, begin: int, end: int, matrix: Tensor | None, codes: Tensor) -> Rounding:
    """The structure of the columns ``begin`` to ``end``; whoever holds the tensors keeps them meanwhile."""
    half_range, shares, gain = columns.half_range, columns.shares, columns.gain
    rows = (half_range, shares, codes) if matrix is None else (half_range, shares, codes, matrix)
    if not all(tensor.is_contiguous() for tensor in rows):
        raise ValueError("half ranges, shares, codes or the matrix do not lie in rows, expected contiguous tensors")
    return Rounding(
        end - begin, codes.shape[1], half_range.shape[1], columns.stored, half_range[begin:].data_ptr(),
        shares[:, begin:].data_ptr(), shares.stride(0), gain.data_ptr(),
        None if matrix is None else matrix[begin:, begin:].data_ptr(), 0 if matrix is None else matrix.stride(0),
        codes[begin:].data_ptr(),
    )  # fmt: skip

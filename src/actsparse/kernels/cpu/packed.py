"""Packed matrices in the library; whether a call may run natively is decided by :mod:`actsparse.kernels`."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from itertools import pairwise

import torch
from torch import Tensor

from ..planes import Packed
from .loading import check, library, stats_reference
from .structures import COLUMNS, DTYPES, PACKED, Matrix, pointer_to, vector_of

MAX_INPUTS = 1 << 17


class PackedMatrix(Structure):
    """``as_packed``: planes, mantissas and scales of a matrix, and what decides how much of them is read."""

    _fields_ = [
        ("plane", c_void_p),
        ("mantissa", c_void_p),
        ("stride", c_int64),
        ("plane_stride", c_int64),
        ("mantissa_stride", c_int64),
        ("scale", c_void_p),
        ("threshold", c_void_p),
        ("center", c_void_p),
        ("gain", c_float * 4),
        ("planes", c_int32),
    ]


def packed_obstacle(packed: Packed) -> str:
    """Why the kernels cannot take this matrix; empty when they can."""
    if packed.inputs > MAX_INPUTS:
        return f"{packed.inputs} inputs; the native kernels take at most {MAX_INPUTS} of a packed matrix"
    tensors = (packed.mantissa, *packed.planes, packed.scale, packed.gain)
    if not all(tensor.is_cpu for tensor in tensors):
        return f"the packed matrix is on {packed.scale.device}"
    begins = [plane.data_ptr() for plane in packed.planes]
    apart = {after - before for before, after in pairwise(begins)}
    rows = {plane.stride(0) for plane in packed.planes} if packed.inputs > 1 else {begins[1] - begins[0]}
    whole = all(part.stride(1) == 1 for part in (packed.mantissa, *packed.planes) if part.shape[1] > 1)
    if not whole or len(apart) != 1 or len(rows) != 1 or min(apart) <= 0 or not packed.scale.is_contiguous():
        return "the planes of the packed matrix do not lie evenly"
    return ""


def packed_of(
    packed: Packed, thresholds: Tensor | None = None, center: Tensor | None = None, start: Tensor | None = None
) -> Matrix:
    """The structure for y = start + sum over i of (x_i - center_i) W_b[:, i], to be used wherever a matrix is.

    thresholds float32 [L, I], not falling along L (None: every plane is read), center [I], start [O].  Raises ValueError when
    they do not fit or the planes lie where the kernels cannot reach them.
    """
    obstacle = packed_obstacle(packed)
    if obstacle:
        raise ValueError(obstacle)
    planes, inputs = len(packed.planes), packed.inputs
    if thresholds is not None:
        if tuple(thresholds.shape) != (planes, inputs):
            raise ValueError(f"thresholds have shape {tuple(thresholds.shape)}, expected ({planes}, {inputs})")
        thresholds = vector_of(thresholds.reshape(-1), planes * inputs, "thresholds")
    center = vector_of(center, inputs, "center")
    start = vector_of(start, packed.out, "start")
    gain = (c_float * 4)(*packed.gain.tolist())
    mantissa_stride = packed.mantissa.stride(0) if inputs > 1 else packed.groups
    plane_stride = packed.planes[1].data_ptr() - packed.planes[0].data_ptr()
    stride = packed.planes[0].stride(0) if inputs > 1 else plane_stride
    inner = PackedMatrix(
        packed.planes[0].data_ptr(), packed.mantissa.data_ptr(), stride, plane_stride, mantissa_stride,
        packed.scale.data_ptr(), pointer_to(thresholds), pointer_to(center), gain, planes,
    )  # fmt: skip
    matrix = Matrix(ctypes.addressof(inner), pointer_to(start), packed.out, inputs, 0, PACKED, COLUMNS)
    matrix.keep = (inner, packed, thresholds, center, start)
    return matrix


def graded_linear(x: Tensor, matrix: Matrix) -> Tensor:
    """The product of a structure of :func:`packed_of` with x [..., I], 1 to 8 rows of float32, bfloat16 or float16."""
    if x.shape[-1] != matrix.in_:
        raise ValueError(f"x has {x.shape[-1]} features, the packed matrix takes {matrix.in_}")
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], matrix.out), dtype=x.dtype, device="cpu")
    rows = x.numel() // matrix.in_
    code = library().as_linear(
        ctypes.byref(matrix), None, x.data_ptr(), y.data_ptr(), rows, DTYPES[x.dtype], stats_reference
    )
    if code:
        check(code, "graded_linear")
    return y


def has_many_rows() -> bool:
    """Whether :func:`many_rows` exists for this machine and the instruction set in use."""
    return bool(library().as_has_many_rows())


def many_rows(x: Tensor, matrix: Matrix) -> Tensor:
    """start + W (x - center) of a structure of :func:`packed_of` without thresholds, x bfloat16 [T, I] to bfloat16 [T, O].

    Every plane is read.  Weights and deviations are rounded to bfloat16, sums are float32.
    """
    if x.dim() != 2 or x.shape[1] != matrix.in_ or x.dtype != torch.bfloat16:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected bfloat16 [T, {matrix.in_}]")
    x = x.contiguous()
    y = torch.empty(len(x), matrix.out, dtype=x.dtype, device="cpu")
    if len(x):
        check(library().as_many_rows(ctypes.byref(matrix), x.data_ptr(), y.data_ptr(), len(x)), "many_rows")
    return y


def unpack_columns(
    matrix: Matrix, begin: int, end: int, planes: int, dtype: torch.dtype, room: Tensor | None = None
) -> Tensor:
    """Columns ``begin`` to ``end`` of a structure of :func:`packed_of`, of so many planes, [end - begin, O].

    ``room``: contiguous memory of that type for it, [end - begin or more, O]; None: its own.
    """
    if room is not None and (room.dtype != dtype or not room.is_contiguous() or room.shape[1] != matrix.out):
        raise ValueError(f"room is {room.dtype} {tuple(room.shape)}, expected contiguous {dtype} [.., {matrix.out}]")
    out = torch.empty(end - begin, matrix.out, dtype=dtype) if room is None else room[: end - begin]
    if begin == end:
        return out
    if len(out) < end - begin:
        raise ValueError(f"room has {len(out)} rows, expected {end - begin}")
    code = library().as_unpack(ctypes.byref(matrix), begin, end, planes, out.data_ptr(), DTYPES[dtype])
    check(code, "unpack_columns")
    return out

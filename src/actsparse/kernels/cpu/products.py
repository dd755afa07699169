"""Products and blocks of the library on tensors; whether a call may run natively is decided by :mod:`actsparse.kernels`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .loading import check, library, stats_reference
from .structures import DTYPES, FFN, Call, matrix_of, pointer_to, skipped_by, vector_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
    """Native linear; the caller has made sure that the path applies."""
    out, inn = weight.shape
    if x.shape[-1] != inn:
        raise ValueError(f"x has {x.shape[-1]} features, weight {tuple(weight.shape)} takes {inn}")
    x = x.contiguous()
    matrix = matrix_of(weight, bias, prefer=skipped_by(threshold))
    threshold = vector_of(threshold, inn, "threshold")
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype, device="cpu")
    code = library().as_linear(
        ctypes.byref(matrix),
        pointer_to(threshold),
        x.data_ptr(),
        y.data_ptr(),
        x.numel() // inn,
        matrix.dtype,
        stats_reference,
    )
    if code:
        check(code, "linear")
    return y


def linear_rows(x: Tensor, weight: Tensor, rows: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Writes y[..., i] = weight[i] . x + bias[i] into ``out`` [..., O] for the rows i named (int32, ascending) only.

    weight [O, I] must be stored by rows; x [..., I] and out contiguous and of one type, 1 to 8 rows of activations.
    """
    if rows.dtype != torch.int32 or rows.dim() != 1 or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous int32 [count], got {rows.dtype} {tuple(rows.shape)}")
    matrix = matrix_of(weight, bias)
    count = x.numel() // x.shape[-1]
    if x.shape[-1] != matrix.in_ or out.numel() != count * matrix.out or out.dtype != x.dtype:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and out {tuple(out.shape)} do not fit")
    if not (x.is_contiguous() and out.is_contiguous() and x.dtype in DTYPES):
        raise ValueError("x and out must be contiguous float32, bfloat16 or float16")
    code = library().as_linear_rows(
        ctypes.byref(matrix), rows.data_ptr(), rows.shape[0], x.data_ptr(), out.data_ptr(), count, DTYPES[x.dtype],
        stats_reference,
    )  # fmt: skip
    check(code, "linear_rows")


def gated_ffn(x: Tensor, ffn: FFN) -> Tensor:
    """Native feed-forward block; the caller has made sure that the path applies."""
    if x.shape[-1] != ffn.up.in_:
        raise ValueError(f"x has {x.shape[-1]} features, the block takes {ffn.up.in_}")
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], ffn.down.out), dtype=x.dtype, device="cpu")
    code = library().as_ffn_forward(
        ctypes.byref(ffn), x.data_ptr(), y.data_ptr(), x.numel() // ffn.up.in_, DTYPES[x.dtype], stats_reference
    )
    if code:
        check(code, "gated_ffn")
    return y


def time_calls(calls: list[Call], io_dtype: torch.dtype) -> float:
    """Seconds that the calls take one after the other, as a decode step makes them; ValueError when one is refused."""
    seconds = float(library().as_time_calls((Call * len(calls))(*calls), len(calls), DTYPES[io_dtype]))
    if seconds < 0:
        raise ValueError("time_calls: a call was refused (a dimension, type, stride or index does not fit)")
    return seconds

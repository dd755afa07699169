"""Streaming statistics of activations, for calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from .loading import check, library
from .structures import DTYPES, pointer_to


def channel_statistics(
    x: Tensor,
    counts: Tensor | None,
    min_exponent: int,
    sub_bits: int,
    sum_abs: Tensor | None,
    sum_square: Tensor | None,
) -> int:
    """Native :func:`actsparse.kernels.reference.channel_statistics`; x [T, C] with any row stride."""
    if x.dim() != 2 or x.dtype not in DTYPES or x.device.type != "cpu":
        raise ValueError(f"x must be a float32, bfloat16 or float16 CPU matrix, got {x.dtype} {tuple(x.shape)}")
    tokens, channels = x.shape
    if x.stride(1) != 1 and channels > 1:
        x = x.contiguous()
    if counts is not None and (
        counts.dim() != 2 or counts.shape[0] != channels or counts.element_size() != 4 or not counts.is_contiguous()
    ):
        raise ValueError(
            f"counts must be contiguous 32-bit [{channels}, bins], got {counts.dtype} {tuple(counts.shape)}"
        )
    for total in (sum_abs, sum_square):
        if total is not None and (total.dtype != torch.float64 or tuple(total.shape) != (channels,)):
            raise ValueError(f"sums must be float64 [{channels}], got {total.dtype} {tuple(total.shape)}")
    bad = library().as_channel_statistics(
        x.data_ptr(), DTYPES[x.dtype], tokens, channels, x.stride(0), pointer_to(counts),
        0 if counts is None else counts.shape[1], min_exponent, sub_bits, pointer_to(sum_abs), pointer_to(sum_square),
    )  # fmt: skip
    if bad < 0:
        check(bad, "channel_statistics")
    return int(bad)


def core_statistics(x: Tensor, count: int, share: float, *, positive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Native :func:`actsparse.kernels.reference.core_statistics`; x [T, C] with any row stride."""
    if x.dim() != 2 or x.dtype not in DTYPES or x.device.type != "cpu" or not x.shape[1]:
        raise ValueError(f"x must be a float32, bfloat16 or float16 CPU matrix, got {x.dtype} {tuple(x.shape)}")
    x = x.contiguous() if x.stride(1) != 1 else x
    tokens, channels = x.shape
    levels, counts, sums = (torch.empty(size, device="cpu") for size in (tokens, channels, channels))
    code = library().as_core_statistics(
        x.data_ptr() or levels.data_ptr(), DTYPES[x.dtype], tokens, channels, x.stride(0), count, share, positive,
        levels.data_ptr() or counts.data_ptr(), counts.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    check(code, "core_statistics")
    return levels, counts, sums

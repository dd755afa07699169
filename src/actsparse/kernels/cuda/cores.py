"""CoreInfer's core neurons of a text's tokens, counted by part of the text: two launches.

Letters: T tokens, C channels, P parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_void_p

import torch
from torch import Tensor

from . import compiler
from .products import Run
from .structures import Launch, pointer

_LEVEL_THREADS, _THREADS = 256, 128
_SCRATCH_BYTES = 128
MOST_PARTS = 64


class Levels(Structure):
    """Of which tokens the levels are wanted."""

    _fields_ = [
        *((name, c_void_p) for name in ("value", "level")),
        ("share", c_float),
        *((name, c_int32) for name in ("rows", "size", "count", "positive")),
    ]


class Cores(Structure):
    """What is counted of them."""

    _fields_ = [
        *((name, c_void_p) for name in ("value", "level", "sums")),
        *((name, c_int32) for name in ("size", "positive", "parts")),
        ("stops", c_int32 * MOST_PARTS),
    ]


def _shared_bytes(channels: int) -> int:
    return _SCRATCH_BYTES + 2 * channels


def fits(x: Tensor) -> bool:
    """Whether :func:`core_parts` knows the type and the size."""
    if x.dtype not in compiler.DTYPES or x.shape[1] % 2 or compiler.device_obstacle(x.device.index or 0):
        return False
    return _shared_bytes(x.shape[1]) <= compiler.machine(x.device.index).shared_bytes


def core_parts(
    x: Tensor, stops: Sequence[int], count: int, share: float, *, positive: bool, run: Run = compiler.run
) -> Tensor:
    """As :func:`actsparse.kernels.reference.core_parts`, of what :func:`fits`."""
    x = x.detach().contiguous()
    x = x.clone() if x.data_ptr() % 4 else x
    tokens, channels = x.shape
    level = torch.empty(tokens, dtype=torch.int16, device=x.device)
    sums = torch.empty(len(stops), 2, channels + 1, device=x.device)
    found = Levels(pointer(x), pointer(level), share, tokens, channels, count, positive)
    shared = _shared_bytes(channels)
    launches = [Launch("levels", (tokens, 1), _LEVEL_THREADS, shared, found, (x, level))] if tokens else []
    begin = 0
    for at in range(0, len(stops), MOST_PARTS):
        part = stops[at : at + MOST_PARTS]
        counted = Cores(
            x.data_ptr() + begin * channels * x.element_size(), level.data_ptr() + 2 * begin, pointer(sums[at]), channels,
            positive, len(part), (c_int32 * MOST_PARTS)(*(stop - begin for stop in part)),
        )  # fmt: skip
        grid = (-(-channels // 2 // _THREADS), len(part))
        launches.append(Launch("cores", grid, _THREADS, 0, counted, (x, level, sums)))
        begin = part[-1]
    run(launches, x.device, x.dtype, 1)
    return sums

"""Columns rounded one after the other with error feedback, as one launch a block of them.

Letters: O outputs, I inputs, G groups of 64 outputs, L levels.
"""

from __future__ import annotations

from ctypes import Structure, c_int32, c_void_p

import torch
from torch import Tensor

from . import compiler
from .products import Run
from .structures import Launch, pointer

THREADS = 128


class Rounding(Structure):
    """A block of columns."""

    _fields_ = [
        *((name, c_void_p) for name in ("rest", "half_range", "upper", "shares", "gain", "codes", "errors")),
        *((name, c_int32) for name in ("inputs", "out", "groups", "stored", "begin", "columns")),
    ]


def round_block(
    rest: Tensor, begin: int, end: int, stored: int, half_range: Tensor, upper: Tensor, shares: Tensor, gain: Tensor,
    codes: Tensor, *, run: Run = compiler.run,
) -> Tensor:  # fmt: skip
    """Columns ``begin`` to ``end`` of what is left, ``rest`` float32 [I, O]; returns their errors, float32 [end - begin, O].

    Each column's code goes to ``codes`` uint8 [I, O]; within the block its error is taken off those after it.  half_range
    [I, G], upper [I, I], shares [L, I] and gain [L] are float32.
    """
    inputs, out = rest.shape
    errors = torch.empty(end - begin, out, device=rest.device)
    values = [tensor.contiguous() for tensor in (half_range, upper, shares, gain)]
    p = Rounding(
        pointer(rest), *map(pointer, values), pointer(codes), pointer(errors), inputs, out, half_range.shape[1], stored,
        begin, end - begin,
    )  # fmt: skip
    shared = 4 * THREADS * (end - begin)
    launch = Launch("rounding", (-(-out // THREADS), 1), THREADS, shared, p, (rest, values, codes, errors))
    run([launch], rest.device, torch.bfloat16, 1)
    return errors

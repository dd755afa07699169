"""Packed matrices times many rows, as in a prompt, without ever holding a whole matrix unpacked.

With AMX's or AVX-512's products of bfloat16 a native call unpacks a tile of outputs into a core's cache and multiplies all rows
with it there. Elsewhere columns are unpacked some MB at a time and torch multiplies.

Shape letters: T rows, I inputs, O outputs, L levels; "..." any leading dimensions, whose product is T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, planes

# Columns unpacked at a time: some MB, so that they are still in cache when they are multiplied, a few outputs at a time: oneDNN
# multiplies 512 x 2048 at 205 to 216 GFLOP/s a core where it multiplies 512 x 8192 at 114 to 144.
UNPACKED_BYTES = 8 << 20
OUTPUTS_AT_ONCE = 2048


def graded_rows(
    x: Tensor,
    packed: planes.Packed,
    matrix: cpu.Matrix,
    thresholds: Tensor | None,
    center: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """:func:`actsparse.kernels.graded_linear` of x [..., I] on the CPU, computed in x's type with sums in float32.

    ``matrix`` is the structure of the packed matrix with these rules.
    """
    rows = x.reshape(-1, packed.inputs)
    if thresholds is None and fits(x):
        y = cpu.many_rows(rows, matrix)
    else:
        y = _unpacked(rows, packed, matrix, thresholds, center, start)
    return y.reshape(*x.shape[:-1], packed.out)


def fits(x: Tensor) -> bool:
    """Whether the native call takes these rows, when every plane is read."""
    return x.dtype == torch.bfloat16 and not (x.requires_grad and torch.is_grad_enabled()) and cpu.has_many_rows()


def _unpacked(
    rows: Tensor,
    packed: planes.Packed,
    matrix: cpu.Matrix,
    thresholds: Tensor | None,
    center: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    deviation = rows if center is None else (rows.float() - center).to(rows.dtype)
    read = None if thresholds is None else planes.levels_read(rows, thresholds, center)
    # Blocks are added up in float32: each would round the sum to the rows' type once more.
    y = torch.zeros(len(rows), packed.out, dtype=torch.float32)
    if start is not None:
        y += start.float()
    step = max(64, UNPACKED_BYTES // (packed.out * rows.element_size()))
    room = torch.empty(min(step, packed.inputs), packed.out, dtype=rows.dtype)  # fresh memory costs more than unpacking
    for begin in range(0, packed.inputs, step):
        end = min(begin + step, packed.inputs)
        for planes_read in range(1 if read is not None else len(packed.planes), len(packed.planes) + 1):
            part = deviation[:, begin:end]
            if read is not None:
                here = read[:, begin:end] == planes_read
                if not bool(here.any()):
                    continue
                part = torch.where(here, part, torch.zeros((), dtype=rows.dtype))
            weights = cpu.unpack_columns(matrix, begin, end, planes_read, rows.dtype, room)
            for first in range(0, packed.out, OUTPUTS_AT_ONCE):
                outputs = slice(first, first + OUTPUTS_AT_ONCE)
                y[:, outputs] += part @ weights[:, outputs]
    return y.to(rows.dtype)

"""Packed matrices on a GPU: products by levels for 1 to 8 rows, and unpacked weights for more.

Letters: B rows of x, I inputs, O outputs, L planes, T tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import planes
from . import compiler
from .launches import Builder
from .machine import MAX_BATCH, Machine
from .products import Run, machine_of
from .structures import Launch, pointer, vector
from .tiles import TILE, Tiles, packed_of

_THREADS = 256
_LEAST_SHARE = 16  # quads of columns of a block: fewer do not pay for its beginning
# Unpacked weights that are held at a time, for many rows.
_SCRATCH_BYTES = 256 << 20


class PlaneInput(Structure):
    """x of a product with packed matrices: 16-bit rows, a float32 vector, or vectors of sums."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "value", "sum", "second", "squares", "norm")),
        ("activation", c_int32),
        ("second_activation", c_int32),
        ("size", c_int32),
        ("eps", c_float),
    ]


class PlaneJob(Structure):
    """One packed matrix of a launch."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "codes", "mantissa", "scale", "threshold", "center", "start", "sum", "y", "rounded",
        )),
        ("gain", c_float * 4),
        ("out", c_int32),
        ("begin", c_int32),
        ("kept", c_int32),
    ]  # fmt: skip


class Planes(Structure):
    """A product with packed matrices."""

    _fields_ = [
        ("input", PlaneInput),
        ("job", PlaneJob * 3),
        ("arrived", c_void_p),
        ("clear", c_void_p),
        ("squares", c_void_p),
        *((name, c_int32) for name in (
            "jobs", "rows", "planes", "blocks", "quads", "even", "longer", "share", "segments", "cleared",
        )),
        ("inverse", c_uint32),
    ]  # fmt: skip


class Unpack(Structure):
    """Weights to 16 bits."""

    _fields_ = [
        ("codes", c_void_p),
        ("mantissa", c_void_p),
        ("scale", c_void_p),
        ("w", c_void_p),
        ("columns", c_int64),
        ("out", c_int32),
        ("planes", c_int32),
        ("read", c_int32),
        ("inputs", c_int32),
        ("begin", c_int32),
        ("gain", c_float),
    ]


@dataclass(frozen=True, eq=False)
class PlaneMatrix:
    """A packed matrix with what decides how deep it is read.

    thresholds float32 [L, I] (None: every plane), center [I], start [O].
    """

    tiles: Tiles
    thresholds: Tensor | None
    center: Tensor | None
    start: Tensor | None

    @property
    def out(self) -> int:
        """O."""
        return self.tiles.out

    @property
    def inn(self) -> int:
        """I."""
        return self.tiles.inputs


def plane_matrix(
    tiles: Tiles, thresholds: Tensor | None = None, center: Tensor | None = None, start: Tensor | None = None
) -> PlaneMatrix:
    """The matrix for the kernels; ValueError when something does not fit."""
    if obstacle := obstacle_of(tiles):
        raise ValueError(obstacle)
    levels, inputs = len(tiles.gains), tiles.inputs
    for name, given, shape in (
        ("thresholds", thresholds, (levels, inputs)), ("center", center, (inputs,)), ("start", start, (tiles.out,)),
    ):  # fmt: skip
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} have shape {tuple(given.shape)}, expected {shape}")
    device = tiles.codes.device
    flat = None if thresholds is None else vector(thresholds, device)
    return PlaneMatrix(tiles, flat, vector(center, device), vector(start, device))


def obstacle_of(tiles: object) -> str:
    """Why the kernels cannot take a packed matrix, in words; empty when they can."""
    if not isinstance(tiles, Tiles):
        return "a packed matrix lies in the CPU's order"
    if tiles.inputs % 4:
        return f"a packed matrix of {tiles.inputs} inputs, expected a multiple of 4"
    quads = tiles.codes.shape[0] * (tiles.inputs // 4)
    return "" if quads < 1 << 28 else f"a packed matrix of {tiles.out} x {tiles.inputs} weights is too large"


# Steps of the vectors of sums, to which the blocks of a product add their parts (csrc/sums.cuh).
SUM_STEPS = float(1 << 30)
# Room for the sum of a vector's squares, in several places.
SQUARES = 66


def zero_sums(count: int, device: torch.device) -> Tensor:
    """A vector of sums that are zero, int64."""
    return torch.zeros(count + 1 & ~1, dtype=torch.int64, device=device)


def sums_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 vector as sums, and its squares as a product keeps them [SQUARES]."""
    sums, squares = zero_sums(len(values), values.device), zero_sums(SQUARES, values.device)
    sums[: len(values)] = (values.double() * SUM_STEPS).round().long()
    squares[0], squares[1] = ((sums + 512 >> 10) ** 2).sum(), ((sums + (1 << 26) >> 27) ** 2).sum()
    return sums, squares


def product(
    build: Builder, x: PlaneInput, matrices: Sequence[PlaneMatrix], sums: Sequence[Tensor], *, out: Tensor | None = None,
    rounded: Tensor | None = None, kept: bool = False, squares: Tensor | None = None, clear: Tensor | None = None,
    blocks: int = 0, keep: tuple[Any, ...] = (),
) -> None:  # fmt: skip
    """Adds every matrix's product with x to its ``sums`` [B, O].

    What a single one's come to goes into ``out``, float32, or ``rounded``, 16 bits; the sums are zeros again unless ``kept``.
    ``squares`` [SQUARES] is what those of one row's sums come to, and follows them.
    Other sums, which the launch before has read, are set to zero: ``clear``.  ``blocks`` 0 chooses by shape.
    """
    rows, size, levels = build.rows, x.size, {len(matrix.tiles.gains) for matrix in matrices}
    if len(levels) != 1 or any(matrix.inn != size for matrix in matrices):
        raise ValueError("packed matrices of one input differ in bits stored or in inputs")
    (stored,) = levels
    tiles = sum(matrix.tiles.codes.shape[0] for matrix in matrices)
    inputs = 8 if x.sum else 4 if x.value else 0
    column = inputs + (8 if x.second else 0) + 4 * (stored + 1) + (4 if x.norm else 0) + 2
    cut = _cut(build, size // 4, tiles, stored, column, blocks)
    jobs, begin = (PlaneJob * 3)(), 0
    for at, (matrix, total) in enumerate(zip(matrices, sums, strict=True)):
        held = matrix.tiles
        jobs[at] = PlaneJob(
            pointer(held.codes), pointer(held.mantissa), pointer(held.scale), pointer(matrix.thresholds),
            pointer(matrix.center), pointer(matrix.start), pointer(total), pointer(out), pointer(rounded),
            (c_float * 4)(*held.gains), matrix.out, begin, kept,
        )  # fmt: skip
        begin += held.codes.shape[0]
    arrived = build.counters(tiles) if out is not None or rounded is not None else None
    p = Planes(
        x, jobs, pointer(arrived), pointer(clear), pointer(squares), len(matrices), rows, stored, cut.blocks, size // 4,
        *divmod(tiles * (size // 4), cut.blocks), cut.share, cut.segments, 0 if clear is None else clear.numel(),
        -(-(1 << 32) // stored),
    )  # fmt: skip
    alive = (keep, tuple(matrices), tuple(sums), arrived, out, rounded, clear, squares)
    build.launch("planes", _THREADS, cut.bytes, p, alive, cut.blocks)


@dataclass(frozen=True)
class _Cut:
    """How many blocks share the columns of all tiles; a block's quads, tiles and shared memory in bytes, at most."""

    blocks: int
    share: int
    segments: int
    bytes: int


def _cut(build: Builder, quads: int, tiles: int, stored: int, column: int, blocks: int) -> _Cut:
    """Even shares for a block on every multiprocessor, or for as many on each as their lists need."""
    rows, total, limit = build.compiled, tiles * quads, build.machine.shared_bytes
    warps = _THREADS // 32

    def cut(blocks: int) -> _Cut:
        share = -(-total // blocks)
        segments = min(tiles, -(-share // quads) + 1)
        entries = warps * (4 * -(-share // warps) * stored + 8 * segments)
        words = (warps + 1) * rows + warps * (segments + 1) + 4 * segments
        return _Cut(
            blocks,
            share,
            segments,
            entries * (4 * rows + 2) + share * (32 + 4 * column) + 4 * (segments * (rows + 1) * TILE + words),
        )

    if blocks:
        return cut(blocks)
    # Room for two of them, where that is to be had: the next kernel's beside this one's.
    if rows == 1 and limit >= 160 << 10:
        limit = limit // 2 - 1024
    made = cut(min(build.machine.processors, max(1, total // _LEAST_SHARE)))
    while made.bytes > limit:
        made = cut(made.blocks + build.machine.processors)
    return made


def linear(
    x: Tensor, matrix: PlaneMatrix, *, machine: Machine | None = None, run: Run = compiler.run, blocks: int = 0
) -> Tensor:
    """y = start + sum over i of (x_i - center_i) W_b(i)[:, i]; x [..., I] of 16 bits, 1 to 8 rows."""
    rows = x.numel() // x.shape[-1]
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], matrix.out))
    build = Builder(machine or machine_of(x), x.device, rows)
    sums = zero_sums(rows * matrix.out, x.device)
    product(build, PlaneInput(x=pointer(x), size=matrix.inn), [matrix], [sums], rounded=y, blocks=blocks)
    run(build.launches, x.device, x.dtype, rows)
    return y


def unpack(
    tiles: Tiles, dtype: torch.dtype, level: int | None = None, *, begin: int = 0, end: int | None = None,
    first: int = 0, last: int | None = None, into: Tensor | None = None, run: Run = compiler.run,
) -> Tensor:  # fmt: skip
    """W[first:last, begin:end] read to ``level`` bits (None: all), transposed: 16-bit [end - begin, last - first].

    ``first`` is a multiple of 512.  ``into`` is memory for it.
    """
    read = len(tiles.gains) if level is None else level // 2
    end, last = tiles.inputs if end is None else end, tiles.out if last is None else last
    columns, out = end - begin, last - first
    flat = torch.empty(columns * out, dtype=dtype, device=tiles.codes.device) if into is None else into
    w = flat[: columns * out].view(columns, out)
    number = first // TILE
    p = Unpack(
        tiles.codes[number].data_ptr(), tiles.mantissa[number].data_ptr(), pointer(tiles.scale), w.data_ptr(), columns,
        out, len(tiles.gains), read, tiles.inputs, begin, tiles.gains[read - 1],
    )  # fmt: skip
    grid = (-(-columns // 16), -(-out // TILE))
    if columns and out:
        run([Launch("unpack", grid, 256, 16 * (TILE + 8) * 2, p, (tiles, w))], w.device, dtype, 1)
    return w


# What a product starts from when its input is not centred: start - W center; with the tensors that it was made of.
_starts: WeakKeyDictionary[Tiles, tuple[Tensor | None, Tensor | None, torch.dtype, Tensor]] = WeakKeyDictionary()


def linear_rows(
    x: Tensor, tiles: Tiles, thresholds: Tensor | None, center: Tensor | None, start: Tensor | None, *,
    run: Run = compiler.run,
) -> Tensor:  # fmt: skip
    """The product for any number of rows of 16 bits, with weights that are unpacked a few at a time for the matrix library."""
    rows, shape = x.reshape(-1, tiles.inputs), (*x.shape[:-1], tiles.out)
    step = max(TILE, _SCRATCH_BYTES // (2 * tiles.inputs) // TILE * TILE)
    scratch = torch.empty(tiles.inputs * min(step, tiles.out), dtype=x.dtype, device=x.device)
    pieces = [(first, min(first + step, tiles.out)) for first in range(0, tiles.out, step)]
    if thresholds is None:
        base = _uncentred(tiles, center, start, x.dtype, scratch, pieces, run)
        parts = []
        for first, last in pieces:
            w = unpack(tiles, x.dtype, first=first, last=last, into=scratch, run=run)
            parts.append(rows @ w if base is None else torch.addmm(base[first:last], rows, w))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(shape)
    y = torch.empty(len(rows), tiles.out, dtype=x.dtype, device=x.device)
    read = planes.levels_read(rows, thresholds, center)
    deviation = rows if center is None else (rows.float() - center).to(x.dtype)
    for first, last in pieces:
        total = torch.zeros(len(rows), last - first, dtype=torch.float32, device=x.device)
        if start is not None:
            total += start[first:last].float()
        for level in tiles.levels:
            part = torch.where(read == level // 2, deviation, torch.zeros((), dtype=x.dtype, device=x.device))
            total += part @ unpack(tiles, x.dtype, level, first=first, last=last, into=scratch, run=run)
        y[:, first:last] = total.to(x.dtype)
    return y.view(shape)


def _uncentred(
    tiles: Tiles, center: Tensor | None, start: Tensor | None, dtype: torch.dtype, scratch: Tensor,
    pieces: Sequence[tuple[int, int]], run: Run,
) -> Tensor | None:  # fmt: skip
    """start - W center, rounded: many rows need not be centred then.  Made once."""
    if center is None:
        return None if start is None else start.to(dtype)
    known = _starts.get(tiles)
    if known is not None and known[0] is center and known[1] is start and known[2] == dtype:
        return known[3]
    base = torch.zeros(tiles.out, device=center.device) if start is None else start.float().clone()
    for first, last in pieces:
        # In float32 a few columns at a time: this happens once, and a prompt should not feel it.
        w = unpack(tiles, dtype, first=first, last=last, into=scratch, run=run)
        for begin in range(0, tiles.inputs, 1024):
            base[first:last] -= center[begin : begin + 1024] @ w[begin : begin + 1024].float()
    rounded = base.to(dtype)
    _starts[tiles] = (center, start, dtype, rounded)
    return rounded


def graded_obstacle(x: Tensor, tiles: Tiles) -> str:
    """Why the kernels cannot take a call, in words; empty when they can."""
    if not x.is_cuda or x.device != tiles.codes.device:
        return f"x is on {x.device}, the packed matrix on {tiles.codes.device}"
    if x.dtype not in compiler.DTYPES:
        return f"{x.dtype} has no native kernel"
    if torch.is_grad_enabled() and x.requires_grad:
        return "x requires grad"
    return obstacle_of(tiles) or compiler.device_obstacle(x.device.index)


# Rules as they were given, and as the kernels take them; not the matrix, which would keep its own key alive.
_rules: WeakKeyDictionary[Tiles, tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]] = WeakKeyDictionary()


def graded_linear(
    x: Tensor, tiles: Tiles, thresholds: Tensor | None, center: Tensor | None, start: Tensor | None
) -> Tensor:
    """As :func:`actsparse.kernels.graded_linear`."""
    if torch.compiler.is_compiling() or graded_obstacle(x, tiles):
        return planes.linear(x, packed_of(tiles), thresholds, center, start)
    if not 1 <= x.numel() // x.shape[-1] <= MAX_BATCH:
        return linear_rows(x, tiles, thresholds, center, start)
    given, known = (thresholds, center, start), _rules.get(tiles)
    if known is None or any(a is not b for a, b in zip(given, known[0], strict=True)):
        matrix = plane_matrix(tiles, *given)
        known = given, (matrix.thresholds, matrix.center, matrix.start)
        _rules[tiles] = known
    return linear(x, PlaneMatrix(tiles, *known[1]))

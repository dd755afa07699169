"""Nested low-bit weights: one code a weight, in planes of two bits, so that the first planes alone are a coarser weight.

The format (``docs/format.md`` gives every bit).  A matrix W [O, I] is stored by columns, one per input channel.  The outputs
of a column form groups of :data:`GROUP`; the last group is filled up with zeros.  A weight's code c has S bits (4, 6 or 8)
and stands for, read to a level of b bits (b = 2, 4, ... S)::

    w_b = gain_b * scale * mantissa / 255 * ((c >> (S - b)) + 1/2 - 2^(b-1)) * 2^(1-b)

with one ``scale`` a column (bfloat16), one ``mantissa`` (1 to 255) a group, and one ``gain`` a level.  Plane p holds bits
S-1-2p and S-2-2p of the codes: 16 bytes a group, groups in order; byte j of a group holds outputs 16 k + j of that group at its
bits 2k and 2k+1.

Shape letters: O outputs, I inputs, G groups of a column, S bits stored, L = S/2 levels, T rows of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUP = 64
STORED = (4, 6, 8)
_BYTES = GROUP // 4
_LINE = 64


class Nested:
    """What the codes of a matrix cost to read, whatever order their bytes lie in."""

    @property
    def groups(self) -> int:
        """G."""
        raise NotImplementedError

    @property
    def stored(self) -> int:
        """S, bits of a code."""
        raise NotImplementedError

    @property
    def levels(self) -> tuple[int, ...]:
        """Bits of the readable levels, without 0."""
        return tuple(range(2, self.stored + 1, 2))

    @property
    def level_bytes(self) -> tuple[int, ...]:
        """Bytes that each level reads of a column beyond the one before; mantissas and scale come with the first."""
        plane = _BYTES * self.groups
        return (plane + self.groups + 2, *[plane] * (self.stored // 2 - 1))


@dataclass(frozen=True, eq=False)
class Packed(Nested):
    """A packed matrix.

    Attributes:
        out: O.
        mantissa: uint8 [I, G].
        planes: uint8 [I, 16 G] each, most significant first; views of one storage or of several, each row contiguous.
        scale: bfloat16 [I].
        gain: float32 [L].
    """

    out: int
    mantissa: Tensor
    planes: tuple[Tensor, ...]
    scale: Tensor
    gain: Tensor

    @property
    def inputs(self) -> int:
        """I."""
        return self.mantissa.shape[0]

    @property
    def groups(self) -> int:
        """G."""
        return self.mantissa.shape[1]

    @property
    def stored(self) -> int:
        """S, bits of a code."""
        return 2 * len(self.planes)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix."""
        tensors = (self.mantissa, *self.planes, self.scale, self.gain)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles are laid out anew: parts that each lie somewhere else are multiplied by the oracle only.
        parts = self.mantissa.contiguous(), tuple(plane.contiguous() for plane in self.planes)
        return _laid_out, (self.out, *parts, self.scale, self.gain)

    @property
    def storages(self) -> tuple[Tensor, ...]:
        """What the mantissas and planes lie in, uint8 [1, bytes] each."""
        found = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in (self.mantissa, *self.planes)}
        device = self.mantissa.device
        return tuple(torch.empty(0, dtype=torch.uint8, device=device).set_(each).view(1, -1) for each in found.values())

    def check(self) -> None:
        """ValueError, naming what does not fit, unless shapes, types and values are those of the format."""
        inputs, groups, planes = self.inputs, self.groups, len(self.planes)
        if self.stored not in STORED or groups != -(-self.out // GROUP):
            raise ValueError(f"{self.stored} bits in {groups} groups for {self.out} outputs, expected 4, 6 or 8 bits")
        for name, tensor, shape, dtype in (
            ("mantissa", self.mantissa, (inputs, groups), torch.uint8),
            *((f"plane {p}", plane, (inputs, _BYTES * groups), torch.uint8) for p, plane in enumerate(self.planes)),
            ("scale", self.scale, (inputs,), torch.bfloat16),
            ("gain", self.gain, (planes,), torch.float32),
        ):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
        for name, tensor in (("scale", self.scale), ("gain", self.gain)):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} holds a value that is not finite")


def _laid_out(*parts: Any) -> Packed:
    return relaid(Packed(*parts))


def groups_of(outputs: int) -> int:
    """Groups of a column of ``outputs`` weights."""
    return -(-outputs // GROUP)


def pack(codes: Tensor, mantissa: Tensor, scale: Tensor, gain: Tensor, stored: int) -> Packed:
    """Codes uint8 [O, I] below 2^stored as planes; mantissa uint8 [G, I], scale [I], gain [L]; ValueError if they misfit.

    All columns' mantissas come first, then the planes, one after the other: most lines of the first plane are read, however
    few of the last.  A column's part of a plane is filled up to an odd number of lines of 64 bytes: columns that are read at
    the same time then lie in different memory channels and cache sets.
    """
    if stored not in STORED:
        raise ValueError(f"{stored} bits stored, expected 4, 6 or 8")
    outputs, inputs = codes.shape
    groups = groups_of(outputs)
    padded = codes.new_zeros(inputs, groups * GROUP)
    padded[:, :outputs] = codes.T
    # [I, G, k, j]: output 16 k + j of each group.
    fields = padded.view(inputs, groups, 4, _BYTES)
    kept, planes = _rooms(inputs, groups, stored // 2, codes.device)
    kept.copy_(mantissa.T)
    for p, plane in enumerate(planes):
        bits = (fields >> (stored - 2 - 2 * p)) & 3
        plane.view(inputs, groups, _BYTES).copy_(
            bits[:, :, 0] | (bits[:, :, 1] << 2) | (bits[:, :, 2] << 4) | (bits[:, :, 3] << 6)
        )
    packed = Packed(outputs, kept, planes, scale.to(torch.bfloat16), gain.float())
    packed.check()
    return packed


def relaid(packed: Packed, device: torch.device | None = None) -> Packed:
    """The same matrix as :func:`pack` lays it, whatever its storage was (a file's has no room between columns)."""
    device = packed.mantissa.device if device is None else device
    mantissa, planes = _rooms(packed.inputs, packed.groups, len(packed.planes), device)
    mantissa.copy_(packed.mantissa)
    for to, plane in zip(planes, packed.planes, strict=True):
        to.copy_(plane)
    return Packed(packed.out, mantissa, planes, packed.scale.to(device), packed.gain.to(device))


def _rooms(inputs: int, groups: int, levels: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Zeros for the mantissas [I, G] and planes [I, 16 G] of columns, in one storage."""
    room = (-(-_BYTES * groups // _LINE) | 1) * _LINE
    head = -(-inputs * groups // _LINE) * _LINE
    storage = torch.zeros(head + levels * inputs * room + _LINE, dtype=torch.uint8, device=device)
    storage = storage[-storage.data_ptr() % _LINE :]
    planes = storage[head : head + levels * inputs * room].view(levels, inputs, room)[:, :, : _BYTES * groups]
    return storage[: inputs * groups].view(inputs, groups), tuple(planes)


def columns_of(packed: Packed, begin: int, end: int) -> Packed:
    """Some of the columns, as views."""
    some = slice(begin, end)
    planes = tuple(plane[some] for plane in packed.planes)
    return Packed(packed.out, packed.mantissa[some], planes, packed.scale[some], packed.gain)


def codes_of(packed: Packed, level: int | None = None) -> Tensor:
    """The first ``level`` bits of the codes (all of them for None), uint8 [O, I]."""
    level = packed.stored if level is None else level
    inputs, groups = packed.inputs, packed.groups
    whole = torch.zeros(inputs, groups, 4, _BYTES, dtype=torch.uint8, device=packed.mantissa.device)
    for plane in packed.planes[: level // 2]:
        bytes_ = plane.reshape(inputs, groups, 1, _BYTES)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=plane.device).view(1, 1, 4, 1)
        whole = (whole << 2) | ((bytes_ >> shifts) & 3)
    return whole.reshape(inputs, groups * GROUP)[:, : packed.out].T


def unpack(packed: Packed, level: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights read to ``level`` bits (all of them for None), [O, I]; level 0 is zeros.

    Raises ValueError for a level that the format does not have.
    """
    level = packed.stored if level is None else level
    if level == 0:
        return torch.zeros(packed.out, packed.inputs, dtype=dtype, device=packed.mantissa.device)
    if level not in packed.levels:
        raise ValueError(f"level is {level}, expected 0 or one of {', '.join(map(str, packed.levels))}")
    centred = codes_of(packed, level).float() + (0.5 - 2.0 ** (level - 1))
    steps = packed.mantissa.float().T.repeat_interleave(GROUP, 0)[: packed.out]
    column = packed.scale.float() / 255 * packed.gain[level // 2 - 1] * 2.0 ** (1 - level)
    return (centred * steps * column).to(dtype)


def levels_read(x: Tensor, thresholds: Tensor, center: Tensor | None = None) -> Tensor:
    """How many planes each value of x [..., I] reads, uint8: level k wherever ``|x - center| >= thresholds[k - 1]``.

    thresholds float32 [L, I], not falling along L; NaN in x reads everything, so that it is never hidden.
    """
    centred = x.float() if center is None else x.float() - center
    count = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for threshold in thresholds:
        count += ~(centred.abs() < threshold)
    return count


def linear(
    x: Tensor,
    packed: Packed,
    thresholds: Tensor | None = None,
    center: Tensor | None = None,
    start: Tensor | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """The oracle: y = start + sum over i of (x_i - center_i) W_b[:, i], b the level that ``|x_i - center_i|`` reads.

    x [..., I]; thresholds float32 [L, I] (None: every plane is read), center [I], start [O] (float32; None: zeros).  Computed
    in ``compute``, by default float32 (float64 for float64 x), rounded once to x's type.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    compute = wide if compute is None else compute
    # Deviations are taken before anything is rounded to a narrower type.
    deviation = (x.to(wide) if center is None else x.to(wide) - center).to(compute)
    if thresholds is None:
        y = deviation @ unpack(packed, None, compute).T
    else:
        read = levels_read(x, thresholds, center)
        y = torch.zeros(*x.shape[:-1], packed.out, dtype=compute, device=x.device)
        for index, level in enumerate(packed.levels):
            here = read == index + 1
            if torch.compiler.is_compiling() or bool(here.any()):  # a graph has no place for the shortcut
                y = y + torch.where(here, deviation, 0.0) @ unpack(packed, level, compute).T
    return (y if start is None else y + start.to(compute)).to(x.dtype)

"""Packed matrices in the order that a GPU reads: the format's codes (``docs/format.md``), bytes in another order.

Outputs form tiles of 512, eight groups each; a tile holds of every column one record of L runs of 128 bytes, the tile's part of
each plane.  A run is [g 8][half 2][e 2][j 4], byte (g, half, e, j) being byte 2 g + e of group 4 half + j: each thread of a
warp gets, with one 16-byte load, two words of each half, whose bytes belong to four groups.  A column's mantissas are
[j 4][half 2].

Letters: O outputs, I inputs, G groups, L planes, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..planes import GROUP, Nested, Packed, groups_of

TILE = 512
RUN = TILE // 4
_GROUPS = TILE // GROUP


@dataclass(frozen=True, eq=False)
class Tiles(Nested):
    """A packed matrix for the CUDA kernels.

    Attributes:
        out: O.
        codes: uint8 [T, I, L, 128].
        mantissa: uint8 [T, I, 8].
        scale: bfloat16 [I].
        gain: float32 [L].
        gains: the same on the host.
    """

    out: int
    codes: Tensor
    mantissa: Tensor
    scale: Tensor
    gain: Tensor
    gains: tuple[float, ...] = field(default=())

    @property
    def inputs(self) -> int:
        """I."""
        return self.codes.shape[1]

    @property
    def groups(self) -> int:
        """G."""
        return groups_of(self.out)

    @property
    def stored(self) -> int:
        """S, bits of a code."""
        return 2 * self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix in the format: what fills tiles up is not counted."""
        return self.inputs * sum(self.level_bytes) + 4 * len(self.gains)

    @property
    def storages(self) -> tuple[Tensor, ...]:
        """What the codes lie in."""
        return (self.codes, self.mantissa)


def tiles_of(packed: Packed, device: torch.device | str | None = None) -> Tiles:
    """The same matrix in tiles on ``device`` (by default where it is); bytes are moved first and sorted there."""
    device = packed.scale.device if device is None else torch.device(device)
    inputs, groups, levels = packed.inputs, packed.groups, len(packed.planes)
    tiles = -(-packed.out // TILE)
    padded = tiles * _GROUPS
    codes = torch.empty(tiles, inputs, levels, 8, 2, 2, 4, dtype=torch.uint8, device=device)
    for number, plane in enumerate(packed.planes):
        # [I, G, g, e]; a column's groups are filled up to whole tiles.
        moved = _moved(plane, device).reshape(inputs, groups, 8, 2)
        if padded > groups:
            moved = torch.cat([moved, moved.new_zeros(inputs, padded - groups, 8, 2)], 1)
        codes[:, :, number] = moved.view(inputs, tiles, 2, 4, 8, 2).permute(1, 0, 4, 2, 5, 3)
    mantissa = torch.zeros(inputs, padded, dtype=torch.uint8, device=device)
    mantissa[:, :groups] = _moved(packed.mantissa, device)
    mantissa = mantissa.view(inputs, tiles, 2, 4).permute(1, 0, 3, 2).reshape(tiles, inputs, _GROUPS)
    # Copies: what lies in a file's mapping or among records is not aligned.
    scale, gain = packed.scale.to(device, copy=True).contiguous(), packed.gain.to(device).contiguous()
    return Tiles(packed.out, codes.view(tiles, inputs, levels, RUN), mantissa, scale, gain, tuple(packed.gain.tolist()))


def packed_of(tiles: Tiles, device: torch.device | str | None = None) -> Packed:
    """The same matrix in the format's order, on ``device`` (by default where it is)."""
    device = tiles.codes.device if device is None else torch.device(device)
    count, inputs, levels, _ = tiles.codes.shape
    groups = tiles.groups
    split = tiles.codes.view(count, inputs, levels, 8, 2, 2, 4)
    planes = tuple(
        split[:, :, number].permute(1, 0, 3, 5, 2, 4).reshape(inputs, -1)[:, : 16 * groups].contiguous().to(device)
        for number in range(levels)
    )
    mantissa = tiles.mantissa.view(count, inputs, 4, 2).permute(1, 0, 3, 2).reshape(inputs, -1)
    mantissa = mantissa[:, :groups].contiguous().to(device)
    return Packed(tiles.out, mantissa, planes, tiles.scale.to(device), tiles.gain.to(device))


def _moved(part: Tensor, device: torch.device) -> Tensor:
    """A packed part [I, bytes] on another device, without the room between its rows."""
    if part.device == device or part.is_contiguous():
        return part.to(device)
    return part.contiguous().to(device)

"""What launches are cut for: a GPU, and what a block of a product needs of it.

Letters: B rows of x, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_BATCH = 8
MOST_GROUP = 8  # query heads that one block of the attention kernel serves
MOST_SPLITS = 32  # blocks that share a head's positions
THREADS = 512
WARPS = THREADS // 32
SCRATCH = 4 * WARPS  # floats of a block
MOST_SLICE = 8 * 4 * THREADS  # inputs of a block: four bits of eight quads in a register of each thread
_BY_ROW, _BESIDE = 32, 64  # fewest outputs of a block by columns: of one row of x; of several, whose warps have so many


@dataclass(frozen=True)
class Machine:
    """What the launches are cut for: multiprocessors, shared memory of a block in bytes, and ``lot``, how many values of keys a
    block of the attention kernel holds at a time.
    """

    processors: int = 132
    shared_bytes: int = 227 << 10
    lot: int = 24576

    @property
    def ring(self) -> int:
        """16-byte copies that each thread of a product has under way."""
        return 8 if self.shared_bytes >= 160 << 10 else 4

    @property
    def ring_bytes(self) -> int:
        """Shared memory of a product's copies."""
        return THREADS * 16 * self.ring

    def place(self, shared: int) -> int:
        """Shared memory of a block that needs so much: at least so much that a multiprocessor has room for two, not three.

        Every kernel has one block for each multiprocessor, and the next one's blocks take the places beside them.
        """
        return max(shared, self.shared_bytes // 3 + 16 & ~15)


def compiled_rows(rows: int) -> int:
    """The compiled kernel's number of rows for a call with so many."""
    return 1 << (rows - 1).bit_length()


def narrowest(compiled: int) -> int:
    """Fewest outputs of a block of a product by columns."""
    return _BY_ROW if compiled == 1 else _BESIDE


def columns_bytes(machine: Machine, compiled: int, inputs: int, sides: int, tile: int, column: bool) -> int:
    """Shared memory of a product by columns: ``inputs`` of a block, ``sides`` matrices side by side, ``tile`` outputs."""
    floats = SCRATCH + 2 * tile + compiled * (inputs + 4) + column * inputs
    groups = 8 * THREADS // tile  # each takes an entry of a list at a time; beyond a list's end lie entries of nothing
    if compiled == 1:
        entries = sides * (inputs + groups) + machine.ring * groups
        return machine.ring_bytes + 4 * (floats + sides * WARPS * tile) + 2 * entries
    entries = sides * (inputs + 2 * groups) + machine.ring * groups
    results = 4 * WARPS * _BESIDE // tile * compiled * (tile + 4)  # the last side's take the place of the ring
    return max(machine.ring_bytes, results) + (sides - 1) * results + 4 * (floats + entries) + sides * inputs


def attention_warps(machine: Machine, head_dim: int) -> int:
    """Warps of a block of the attention kernel, each of which holds 16 positions' keys and values."""
    return max(1, min(12, machine.lot // (16 * head_dim)))


def attention_bytes(machine: Machine, head_dim: int, group: int) -> int:
    """Shared memory of a block of the attention kernel that serves ``group`` query heads."""
    chunks = head_dim // 8
    pitch = head_dim + 8 if chunks % 8 and chunks % 2 == 0 else head_dim  # csrc/attention.cuh
    held = 16 * attention_warps(machine, head_dim)
    return 2 * (2 * (held + group) * pitch + 3 * head_dim) + 4 * (MOST_GROUP * MOST_SPLITS + 4)

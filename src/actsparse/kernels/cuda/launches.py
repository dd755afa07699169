"""From matrices and rules to launches: who multiplies what, in how many blocks.

Letters: B rows of x, I inputs, O outputs, N neurons, S splits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rules import Rules
from .structures import (
    ACTIVATED,
    PAIRED,
    RAW,
    TIMES_SOURCE,
    Candidates,
    Columns,
    Finish,
    Input,
    Job,
    Launch,
    List,
    Parts,
    Rows,
    pointer,
    vector,
)

MAX_BATCH = 8
ACTIVATIONS = {"silu": 0, "relu": 1, "relu2": 2, "gelu": 3, "gelu_tanh": 4, "identity": 5}
THREADS = 512
# Weights of a product whose parts are worth the launch that adds them up and rounds them: four microseconds on an H100.
_WORTH_SPLITTING = 32 << 20
_PART = 2048  # inputs of a row that one warp takes at a time


@dataclass(frozen=True)
class Machine:
    """What the launches are cut for: multiprocessors, shared memory of a block in bytes, and ``lot``, how many values of keys a
    block of the attention kernel holds at a time.
    """

    processors: int = 132
    shared_bytes: int = 227 << 10
    lot: int = 12288

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


@dataclass(frozen=True)
class Matrix:
    """A logical [O, I] weight with its bias, stored by rows or by columns."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def columns(self) -> bool:
        """Whether its columns lie contiguous."""
        return self.weight.stride(0) == 1 and self.weight.shape[0] > 1

    @property
    def stride(self) -> int:
        """Values from one stored row to the next."""
        return self.weight.stride(1 if self.columns else 0)

    @property
    def out(self) -> int:
        """O."""
        return self.weight.shape[0]

    @property
    def inn(self) -> int:
        """I."""
        return self.weight.shape[1]


@dataclass(frozen=True)
class Kept:
    """Those of ``size`` neurons that passed, with their values: a list in segments."""

    parts: Parts
    size: int
    index: Tensor
    mask: Tensor
    counts: Tensor
    segments: int
    capacity: int


@dataclass(frozen=True)
class Passing:
    """What of a product's results passes into a list; thresholds and means are by neuron."""

    threshold: Tensor | None = None
    mean: Tensor | None = None
    positive: bool = False


def compiled_rows(rows: int) -> int:
    """The compiled kernel's number of rows for a call with so many."""
    return 1 << (rows - 1).bit_length()


def input_of(
    x: Tensor | Parts,
    size: int,
    *,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Input:
    """The structure for x: 16-bit [B, I] or parts."""
    parts = x if isinstance(x, Parts) else None
    return Input(
        pointer(x) if isinstance(x, Tensor) else None,
        pointer(parts.values) if parts else None,
        pointer(residual),
        pointer(residual_out),
        pointer(norm[0]) if norm else None,
        parts.splits if parts else 0,
        size,
        norm[1] if norm else 0.0,
    )


def _padded(size: int) -> int:
    return 2 * ((size // 2 + 31 & ~31) + 16)


class Builder:
    """Collects the launches of one call or one step.

    Args:
        machine: what to cut for.
        device: of every tensor.
        rows: B, 1 to 8.
        empty: makes scratch, ``empty(count, dtype)``; by default a new tensor each time.
    """

    def __init__(
        self,
        machine: Machine,
        device: torch.device,
        rows: int,
        empty: Callable[[int, torch.dtype], Tensor] | None = None,
    ) -> None:
        self.machine, self.device, self.rows = machine, device, rows
        self.compiled = compiled_rows(rows)
        self.launches: list[Launch] = []
        self._empty = empty or (lambda count, dtype: torch.empty(count, dtype=dtype, device=device))

    def scratch(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for results."""
        return self._empty(count + 3 & ~3, dtype)

    def rows_product(
        self,
        x: Input,
        matrices: Sequence[Matrix],
        *,
        mode: int = RAW,
        activation: str = "identity",
        second_activation: str = "identity",
        candidates: Candidates | None = None,
        units: int = 0,
        passing: Passing | None = None,
        rounded: Tensor | None = None,
        out: Tensor | None = None,
        prefetch: bool = False,
        beside: bool = False,
        keep: tuple[Any, ...] = (),
    ) -> list[Parts] | Kept:
        """Every matrix by rows; with ``candidates``, at most ``units``, only those rows.

        The results of what is ``passing`` come as a list; those of all rows as vectors, or as ``rounded`` or ``out``.
        ``prefetch`` brings all weights into L2 while the kernel before runs: a short one that reads little.  ``beside`` runs
        at the same time as the launch before, a product of the same x on whose results nothing here depends.
        """
        rows, size, compiled = self.rows, x.size, self.compiled
        paired = mode == PAIRED
        jobs, results, begin = (Job * 3)(), [], 0
        for at, matrix in enumerate(matrices):
            y = out if out is not None else None
            if y is None and rounded is None and passing is None and not (paired and at):
                y = self.scratch(rows * matrix.out)
            if y is not None:
                results.append(Parts(y, 1, matrix.out))
            bias = vector(matrix.bias, self.device)
            keep = (*keep, matrix.weight, bias, y)
            jobs[at] = Job(
                pointer(matrix.weight),
                pointer(bias),
                None,
                pointer(y),
                pointer(rounded),
                matrix.stride,
                matrix.out,
                begin,
            )
            begin += 0 if paired else matrix.out
        units = units if candidates is not None else matrices[0].out if paired else begin
        blocks = self._blocks
        most = -(-units // blocks) + 4 & ~3
        per_unit = (size + _PART - 1) // _PART * (2 if paired else 1)
        shared = self.machine.ring_bytes + 4 * (
            compiled * _padded(size) + 32 + most * (per_unit * compiled + compiled + 2) + self._found(candidates)
        )
        p = Rows(x, candidates or Candidates(), jobs)
        kept = None
        if passing is not None:
            kept, p.list, alive = self._list(passing, units, blocks, most)
            keep = (*keep, kept, alive)
        p.jobs, p.units, p.mode, p.rows = len(matrices), units, mode, rows
        p.activation, p.second_activation = ACTIVATIONS[activation], ACTIVATIONS[second_activation]
        p.prefetch_rows, p.beside = (THREADS if prefetch else 0), beside
        self.launch("rows", THREADS, shared, p, (keep, rounded, candidates))
        return kept if kept is not None else results

    def columns_product(
        self,
        x: Input | None,
        matrices: Sequence[tuple[Matrix, Tensor | None]],
        *,
        candidates: Candidates | None = None,
        units: int = 0,
        activation: str = "identity",
        second_activation: str = "identity",
        passing: Passing | None = None,
        tile: int = 0,
        splits: int = 0,
        rounded: Tensor | None = None,
        keep: tuple[Any, ...] = (),
    ) -> list[Parts] | Kept:
        """Every matrix, given with its threshold [I], by columns: of x, or of the candidates, at most ``units``.

        ``rounded`` [B, O] takes the result of a single matrix in 16 bits; else it comes in parts.  Activated, the first's
        times the second's, what is ``passing`` comes as a list.
        """
        size = x.size if x is not None else units
        outs = [matrix.out for matrix, _ in matrices]
        if passing is not None:
            outs, splits = outs[:1], 1
        elif rounded is not None and not splits and size * sum(outs) < _WORTH_SPLITTING:
            splits = 1
        tile, splits = self._cut(outs, tile, splits)
        while True:
            entries = -(-size // splits) + 4 & ~3
            list_floats = max(entries * (self.compiled + 1), THREADS // 32 * self.compiled * tile)
            list_floats += 2 * self.compiled * tile if passing is not None else 0
            values = self.compiled * _padded(size) if x is not None else self._found(candidates)
            shared = self.machine.ring_bytes + 4 * (32 + list_floats + values)
            if shared <= self.machine.shared_bytes or (tile == 32 and (splits >= 64 or passing is not None)):
                break
            tile, splits = (tile // 2, splits) if tile > 32 and (splits >= 4 or passing) else (tile, splits * 2)
        jobs, results, begin = (Job * 3)(), [], 0
        direct = rounded is not None and splits == 1
        for at, (matrix, threshold) in enumerate(matrices):
            y = None if direct or passing is not None else self.scratch(splits * self.rows * matrix.out)
            bias, least = vector(matrix.bias, self.device), vector(threshold, self.device)
            keep = (*keep, matrix.weight, bias, least, y)
            if y is not None:
                results.append(Parts(y, splits, matrix.out))
            jobs[at] = Job(
                pointer(matrix.weight), pointer(bias), pointer(least), pointer(y), pointer(rounded) if direct else None,
                matrix.stride, matrix.out, begin,
            )  # fmt: skip
            begin += -(-matrix.out // tile) if passing is None or at == 0 else 0
        p = Columns(x or Input(), candidates or Candidates(), jobs)
        p.jobs, p.splits, p.rows, p.slice, p.tiles = len(matrices), splits, self.rows, entries, begin
        p.activation, p.second_activation = ACTIVATIONS[activation], ACTIVATIONS[second_activation]
        kept = None
        if passing is not None:
            kept, p.list, alive = self._list(passing, outs[0], begin, tile)
            keep = (*keep, kept, alive)
        self.launch(f"columns{tile}", THREADS, shared, p, (keep, rounded, candidates), begin * splits)
        if rounded is not None and not direct:
            total = self.rows * matrices[0][0].out
            f = Finish(results[0].values.data_ptr(), rounded.data_ptr(), total, splits)
            self.launch("finish", 256, 0, f, (results, rounded))
        return kept if kept is not None else results

    def _list(self, passing: Passing, units: int, segments: int, capacity: int) -> tuple[Kept, List, tuple[Any, ...]]:
        """Room for a list of at most ``units``, its structure, and what must stay alive with that."""
        size = segments * capacity
        index, mask, counts = (self.scratch(n, torch.int32) for n in (size, size, segments))
        value = self.scratch(self.rows * size)
        least, mean = vector(passing.threshold, self.device), vector(passing.mean, self.device)
        structure = List(
            pointer(index), pointer(mask), pointer(value), pointer(counts), pointer(least), pointer(mean), size, capacity,
            passing.positive,
        )  # fmt: skip
        return Kept(Parts(value, 1, size), units, index, mask, counts, segments, capacity), structure, (least, mean)

    def _named(self, kept: list[Parts] | Kept) -> dict[str, Any]:
        """The options of a product over what passed another."""
        assert isinstance(kept, Kept)
        candidates = Candidates(
            pointer(kept.parts.values), pointer(kept.index), pointer(kept.mask), pointer(kept.counts), kept.parts.size,
            kept.segments, kept.capacity,
        )  # fmt: skip
        return {"candidates": candidates, "units": kept.size, "keep": (kept,)}

    def ffn(
        self, x: Input, gate: Matrix | None, up: Matrix, down: Matrix, rules: Rules, rounded: Tensor | None
    ) -> Parts | None:
        """One feed-forward block; its output in parts, or in ``rounded``.  :func:`ffn_obstacle` says what fits."""
        threshold = rules.value_threshold
        if gate is None and rules.gate_threshold is not None:
            threshold = rules.gate_threshold
        passing = Passing(threshold, rules.mean) if down.columns else None
        if up.columns:
            inputs = [(up, rules.up_in_threshold)]
            if gate is not None:
                inputs.insert(0, (gate, rules.gate_in_threshold))
            kept = self.columns_product(
                x, inputs, activation=rules.activation, second_activation=rules.up_activation, passing=passing
            )
        else:
            kept = self._rows_neurons(x, gate, up, rules, passing)
        if isinstance(kept, Kept):
            y = self.columns_product(None, [(down, None)], rounded=rounded, **self._named(kept))
        else:
            y = self.rows_product(input_of(kept[0], up.out), [down], rounded=rounded, keep=(kept,))
        assert isinstance(y, list)
        return y[0] if rounded is None else None

    def _rows_neurons(
        self, x: Input, gate: Matrix | None, up: Matrix, rules: Rules, passing: Passing | None
    ) -> list[Parts] | Kept:
        """Neurons of gate and up by rows: a list of what is ``passing``, or all."""
        options: dict[str, Any] = {}
        if rules.predictor_a is not None and rules.predictor_b is not None:
            inner = self.rows_product(x, [Matrix(rules.predictor_a)])
            assert isinstance(inner, list)
            scores = self.rows_product(
                input_of(inner[0], inner[0].size), [Matrix(rules.predictor_b, rules.predictor_bias)],
                passing=Passing(positive=True), keep=(inner,),
            )  # fmt: skip
            options = self._named(scores)
        elif rules.neurons is not None:
            neurons = rules.neurons.to(self.device, torch.int32).contiguous()
            candidates = Candidates(index=pointer(neurons), size=len(neurons))
            options = {"candidates": candidates, "units": len(neurons), "keep": (neurons,)}
        if gate is None:
            return self.rows_product(x, [up], mode=ACTIVATED, activation=rules.activation, passing=passing, **options)
        if rules.gate_threshold is None:
            return self.rows_product(
                x, [gate, up], mode=PAIRED, activation=rules.activation, second_activation=rules.up_activation,
                passing=passing, **options,
            )  # fmt: skip
        open_gates = self.rows_product(
            x, [gate], mode=ACTIVATED, activation=rules.activation, passing=Passing(rules.gate_threshold), **options
        )
        return self.rows_product(
            x,
            [up],
            mode=TIMES_SOURCE,
            second_activation=rules.up_activation,
            passing=passing,
            **self._named(open_gates),
        )

    @property
    def _blocks(self) -> int:
        """Of every kernel: one for each multiprocessor, and no more segments of a list than threads look at."""
        return min(self.machine.processors, THREADS - 1)

    def launch(
        self, kernel: str, threads: int, shared: int, parameters: Any, keep: tuple[Any, ...], blocks: int = 0
    ) -> None:
        """One launch: a block for each multiprocessor, or more."""
        if shared > self.machine.shared_bytes:
            raise ValueError(f"{shared} bytes of shared memory are needed, a block has {self.machine.shared_bytes}")
        grid = (max(blocks, self._blocks), 1)
        self.launches.append(Launch(kernel, grid, threads, self.machine.place(shared), parameters, keep))

    def _cut(self, outs: list[int], tile: int, splits: int) -> tuple[int, int]:
        """Columns per block, and splits of the kept: as many blocks as there are multiprocessors, or few less.

        Of equals, narrow tiles with few splits: they leave fewer parts to add up.
        """

        def tiles(width: int) -> int:
            return sum(-(-out // width) for out in outs)

        widths = (tile,) if tile else (64, 128, 256) if self.compiled <= 2 else (64, 128)
        cuts = [(width, splits or max(1, min(8, self.machine.processors // tiles(width)))) for width in widths]
        fitting = [cut for cut in cuts if tiles(cut[0]) * cut[1] <= self.machine.processors]
        return max(fitting, key=lambda cut: tiles(cut[0]) * cut[1]) if fitting else cuts[-1]

    def _found(self, candidates: Candidates | None) -> int:
        """Floats of shared memory for where a list's segments begin."""
        return candidates.segments + 4 & ~3 if candidates is not None else 0

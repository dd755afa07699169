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
from .machine import MOST_SLICE, SCRATCH, THREADS, Machine, columns_bytes, compiled_rows, narrowest
from .structures import (
    ACTIVATED,
    PAIRED,
    RAW,
    TIMES_SOURCE,
    Chosen,
    Columns,
    Finish,
    Input,
    Job,
    Launch,
    Parts,
    Passing,
    Rows,
    pointer,
    vector,
)

ACTIVATIONS = {"silu": 0, "relu": 1, "relu2": 2, "gelu": 3, "gelu_tanh": 4, "identity": 5}
# Weights of a product whose parts are worth the launch that adds them up and rounds them: about two microseconds on an H100.
_WORTH_SPLITTING = 32 << 20
_PART = 2048  # inputs of a row that one warp takes at a time


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
    """What passed of a product's results, zeros for the others [B, size]; how many each of ``segments`` has, from where on.

    ``column`` names the neuron of each, where not all have a place.
    """

    parts: Parts
    start: Tensor
    count: Tensor
    segments: int
    column: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """What of a product's results passes; thresholds and means are by neuron."""

    threshold: Tensor | None = None
    mean: Tensor | None = None
    positive: bool = False


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


def _chosen(chosen: Kept | Tensor | None) -> Chosen:
    """The structure for chosen rows."""
    if isinstance(chosen, Kept):
        return Chosen(
            pointer(chosen.parts.values), pointer(chosen.start), pointer(chosen.count), pointer(chosen.column),
            chosen.parts.size, chosen.segments,
        )  # fmt: skip
    return Chosen(index=pointer(chosen), size=len(chosen)) if chosen is not None else Chosen()


def _padded(size: int) -> int:
    return 2 * ((size + 255 & ~255) // 2 + 16)


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
        self._counters: Tensor | None = None
        self._empty = empty or (lambda count, dtype: torch.empty(count, dtype=dtype, device=device))

    def scratch(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for results."""
        return self._empty(count + 3 & ~3, dtype)

    def counters(self, count: int) -> Tensor:
        """int32 zeros, which every launch leaves as zeros: one after the other uses the same."""
        if self._counters is None or self._counters.numel() < count:
            self._counters = torch.zeros(count, dtype=torch.int32, device=self.device)
        return self._counters

    def rows_product(
        self,
        x: Input,
        matrices: Sequence[Matrix],
        *,
        mode: int = RAW,
        activation: str = "identity",
        second_activation: str = "identity",
        chosen: Kept | Tensor | None = None,
        rule: Rule | None = None,
        rounded: Tensor | None = None,
        out: Tensor | None = None,
        prefetch: bool = False,
        beside: bool = False,
        known: bool = False,
        keep: tuple[Any, ...] = (),
    ) -> list[Parts] | Kept:
        """Every matrix by rows; with ``chosen``, only the rows that passed another product, or an int32 list of them.

        What passes a ``rule`` comes with zeros for the others, of a list in its order; the results of all rows come as
        vectors, or as ``rounded`` or ``out``.  ``prefetch`` brings all weights into L2 while the kernel before runs: a short
        one that reads little.  ``beside`` runs at the same time as the launch before, a product of the same x on whose
        results nothing here depends.  ``known``: the launch before does not write x.
        """
        rows, size, compiled = self.rows, x.size, self.compiled
        paired = mode == PAIRED
        jobs, results, begin = (Job * 3)(), [], 0
        for at, matrix in enumerate(matrices):
            y = out if out is not None else None
            if y is None and rounded is None and rule is None and not (paired and at):
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
        column = chosen.column if isinstance(chosen, Kept) else chosen
        units = len(column) if column is not None else matrices[0].out if paired else begin
        most = -(-units // self._blocks) + 4 & ~3
        per_unit = (size + _PART - 1) // _PART * (2 if paired else 1)
        shared = self.machine.ring_bytes + 4 * (
            compiled * _padded(size) + SCRATCH + most * (per_unit * compiled + compiled + 2)
        )
        p = Rows(x, _chosen(chosen), jobs)
        kept = None
        if rule is not None:
            kept, p.passing, alive = self._passing(rule, units, column)
            keep = (*keep, kept, alive)
        p.jobs, p.units, p.mode, p.rows = len(matrices), units, mode, rows
        p.activation, p.second_activation = ACTIVATIONS[activation], ACTIVATIONS[second_activation]
        p.prefetch_rows, p.beside, p.known = (THREADS if prefetch else 0), beside, known
        self.launch("rows", THREADS, shared, p, (keep, rounded, chosen))
        return kept if kept is not None else results

    def columns_product(
        self,
        x: Input,
        matrices: Sequence[tuple[Matrix, Tensor | None]],
        *,
        column: Tensor | None = None,
        activation: str = "identity",
        second_activation: str = "identity",
        rule: Rule | None = None,
        tile: int = 0,
        splits: int = 0,
        rounded: Tensor | None = None,
        keep: tuple[Any, ...] = (),
    ) -> list[Parts] | Kept:
        """Every matrix, given with its threshold [I], by columns of x; without a threshold, those where x is not zero.

        ``column`` names the column of each input.  ``rounded`` [B, O] takes the result of a single matrix in 16 bits; else it
        comes in parts.  Activated, the first's times the second's, what passes a ``rule`` comes with zeros for the others.
        """
        size, compiled = x.size, self.compiled
        outs = [matrix.out for matrix, _ in matrices]
        sides = len(matrices) if rule is not None else 1
        if rule is not None:
            outs, splits = outs[:1], 1
        elif rounded is not None and not splits and self._direct(outs, size):
            splits = 1
        tile, splits = self._cut(outs, tile, splits, rounded is not None)
        least_tile = narrowest(compiled)
        while True:
            slice_size = 32 * -(-(size + 31 & ~31) // 32 // splits)
            shared = columns_bytes(self.machine, compiled, slice_size, sides, tile, column is not None)
            fits = shared <= self.machine.shared_bytes and slice_size <= MOST_SLICE
            if fits or (tile == least_tile and (splits >= 64 or rule is not None)):
                break
            tile, splits = (tile // 2, splits) if tile > least_tile and (splits >= 8 or rule) else (tile, splits * 2)
        jobs, results, begin = (Job * 3)(), [], 0
        direct = rounded is not None and splits == 1
        for at, (matrix, threshold) in enumerate(matrices):
            y = None if direct or rule is not None else self.scratch(splits * self.rows * matrix.out)
            bias, least = vector(matrix.bias, self.device), vector(threshold, self.device)
            keep = (*keep, matrix.weight, bias, least, y)
            if y is not None:
                results.append(Parts(y, splits, matrix.out))
            jobs[at] = Job(
                pointer(matrix.weight), pointer(bias), pointer(least), pointer(y), pointer(rounded) if direct else None,
                matrix.stride, matrix.out, begin,
            )  # fmt: skip
            begin += -(-matrix.out // tile) if rule is None or at == 0 else 0
        p = Columns(x, jobs)
        p.column = pointer(column)
        p.jobs, p.splits, p.rows, p.bits, p.tiles = (
            len(matrices),
            splits,
            self.rows,
            (tile // 8).bit_length() - 1,
            begin,
        )
        p.inverse = -(-(1 << 32) // splits) & 0xFFFFFFFF
        p.slice, p.staged = slice_size, 4 * (sides * slice_size + 2 * size) <= self.machine.ring_bytes
        p.activation, p.second_activation = ACTIVATIONS[activation], ACTIVATIONS[second_activation]
        kept = None
        if rule is not None:
            kept, p.passing, alive = self._passing(rule, outs[0], None)
            p.passing.start = p.passing.count = None  # by columns nobody needs to know how many
            keep = (*keep, kept, alive)
        self.launch("columns", THREADS, shared, p, (keep, rounded, column), begin * splits)
        if rounded is not None and not direct:
            total = self.rows * matrices[0][0].out
            f = Finish(results[0].values.data_ptr(), rounded.data_ptr(), total, splits)
            self.launch("finish", 256, 0, f, (results, rounded))
        return kept if kept is not None else results

    def _passing(self, rule: Rule, units: int, column: Tensor | None) -> tuple[Kept, Passing, tuple[Any, ...]]:
        """Room for what passes of so many, its structure, and what must stay alive with that."""
        size, blocks = units + 3 & ~3, self._blocks
        value = self.scratch(self.rows * size)
        start, count = (self.scratch(blocks, torch.int32) for _ in range(2))
        least, mean = vector(rule.threshold, self.device), vector(rule.mean, self.device)
        structure = Passing(
            pointer(value), pointer(start), pointer(count), pointer(least), pointer(mean), size, rule.positive
        )
        return Kept(Parts(value, 1, size), start, count, blocks, column), structure, (least, mean)

    def ffn(
        self, x: Input, gate: Matrix | None, up: Matrix, down: Matrix, rules: Rules, rounded: Tensor | None
    ) -> Parts | None:
        """One feed-forward block; its output in parts, or in ``rounded``.  :func:`ffn_obstacle` says what fits."""
        threshold = rules.value_threshold
        if gate is None and rules.gate_threshold is not None:
            threshold = rules.gate_threshold
        rule = Rule(threshold, rules.mean) if down.columns else None
        if up.columns:
            inputs = [(up, rules.up_in_threshold)]
            if gate is not None:
                inputs.insert(0, (gate, rules.gate_in_threshold))
            kept = self.columns_product(
                x, inputs, activation=rules.activation, second_activation=rules.up_activation, rule=rule
            )
        else:
            kept = self._rows_neurons(x, gate, up, rules, rule)
        if isinstance(kept, Kept):
            x = input_of(kept.parts, kept.parts.size)
            y = self.columns_product(x, [(down, None)], column=kept.column, rounded=rounded, keep=(kept,))
        else:
            y = self.rows_product(input_of(kept[0], up.out), [down], rounded=rounded, keep=(kept,))
        assert isinstance(y, list)
        return y[0] if rounded is None else None

    def _rows_neurons(
        self, x: Input, gate: Matrix | None, up: Matrix, rules: Rules, rule: Rule | None
    ) -> list[Parts] | Kept:
        """Neurons of gate and up by rows: what passes the ``rule``, or all."""
        chosen: Kept | Tensor | None = None
        if rules.predictor_a is not None and rules.predictor_b is not None:
            inner = self.rows_product(x, [Matrix(rules.predictor_a)])
            assert isinstance(inner, list)
            scores = self.rows_product(
                input_of(inner[0], inner[0].size), [Matrix(rules.predictor_b, rules.predictor_bias)],
                rule=Rule(positive=True), keep=(inner,),
            )  # fmt: skip
            assert isinstance(scores, Kept)
            chosen = scores
        elif rules.neurons is not None:
            chosen = rules.neurons.to(self.device, torch.int32)
            # Whole groups of four are read; the last ones' values are zeros.
            chosen = torch.nn.functional.pad(chosen, (0, -len(chosen) % 4))[: len(chosen)]
        if gate is None:
            return self.rows_product(
                x, [up], mode=ACTIVATED, activation=rules.activation, rule=rule, chosen=chosen,
                known=isinstance(chosen, Kept),
            )  # fmt: skip
        if rules.gate_threshold is None:
            return self.rows_product(
                x, [gate, up], mode=PAIRED, activation=rules.activation, second_activation=rules.up_activation,
                rule=rule, chosen=chosen, known=isinstance(chosen, Kept),
            )  # fmt: skip
        open_gates = self.rows_product(
            x, [gate], mode=ACTIVATED, activation=rules.activation, rule=Rule(rules.gate_threshold), chosen=chosen,
            known=isinstance(chosen, Kept),
        )  # fmt: skip
        assert isinstance(open_gates, Kept)
        return self.rows_product(
            x, [up], mode=TIMES_SOURCE, second_activation=rules.up_activation, rule=rule, chosen=open_gates, known=True
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

    def _direct(self, outs: list[int], size: int) -> bool:
        """Whether a single product's inputs are better not split: few weights, or of several rows enough narrow blocks."""
        if self.compiled > 1 and size * sum(outs) >= _WORTH_SPLITTING // 4:
            enough = 5 * sum(-(-out // 64) for out in outs) >= 3 * self.machine.processors
            return enough and size * sum(outs) < _WORTH_SPLITTING
        return size * sum(outs) < _WORTH_SPLITTING

    def _cut(self, outs: list[int], tile: int, splits: int, finished: bool) -> tuple[int, int]:
        """Columns per block, and splits of the inputs: as many blocks as there are multiprocessors, or few less.

        Of equals, 256 bytes of a column at a time, and no more than four splits: the next kernel's blocks all add them up.
        ``finished``, a kernel does that once: of equals no splits, or wide columns in up to eight.
        """

        def blocks(cut: tuple[int, int]) -> int:
            return sum(-(-out // cut[0]) for out in outs) * cut[1]

        widths = (max(tile, narrowest(self.compiled)),) if tile else (128, 64, 256) if self.compiled <= 4 else (128, 64)
        most = 8 if finished else 4
        cuts = [(width, splits or max(1, min(most, self.machine.processors // blocks((width, 1))))) for width in widths]
        fitting = [cut for cut in cuts if blocks(cut) <= self.machine.processors]
        if not fitting:
            return cuts[-1]
        return max(fitting, key=lambda cut: (blocks(cut), finished and cut[1] == 1, finished and cut[0]))

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
    Parts,
    Rows,
    pointer,
    vector,
)

MAX_BATCH = 8
ACTIVATIONS = {"silu": 0, "relu": 1, "relu2": 2, "gelu": 3, "gelu_tanh": 4, "identity": 5}
THREADS = 512
# Bytes of weights that each block brings into L2 while the kernel before it is still running.
PREFETCH_BYTES = 64 << 10


@dataclass(frozen=True)
class Machine:
    """What the launches are cut for: multiprocessors, and shared memory of a block in bytes."""

    processors: int = 132
    shared_bytes: int = 227 << 10


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
    """Neurons with their values: all of N, or a list that was compacted on the device."""

    parts: Parts
    index: Tensor | None = None
    mask: Tensor | None = None
    count: Tensor | None = None


def compiled_rows(rows: int) -> int:
    """The compiled kernel's number of rows for a call with so many."""
    return 1 << (rows - 1).bit_length()


def layout_obstacle(weight: Tensor) -> str:
    """Why the kernels cannot read a weight; empty when they can."""
    if weight.dim() != 2 or weight.numel() == 0:
        return f"a weight has shape {tuple(weight.shape)}"
    out, inn = weight.shape
    by_rows = weight.stride(1) == 1 and weight.stride(0) >= inn
    by_columns = weight.stride(0) == 1 and weight.stride(1) >= out
    if not by_rows and not by_columns:
        return f"a weight's strides are {weight.stride()}: neither contiguous nor the transpose of something contiguous"
    matrix = Matrix(weight)
    stored = matrix.out if matrix.columns else matrix.inn
    if stored % 8 or matrix.stride % 8 or weight.data_ptr() % 16:
        return f"a weight of shape {tuple(weight.shape)} is not in multiples of 8, which 16-byte reads need"
    return ""


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
        listed: bool = False,
        rounded: Tensor | None = None,
        out: Tensor | None = None,
        keep: tuple[Any, ...] = (),
    ) -> list[Parts] | Kept:
        """Every matrix by rows; with ``candidates`` only the rows that pass, whose results come as a list if ``listed``."""
        rows, size, compiled = self.rows, x.size, self.compiled
        paired = mode == PAIRED
        jobs, results, begin = (Job * 3)(), [], 0
        for at, matrix in enumerate(matrices):
            y = out if out is not None else None
            if y is None and rounded is None and not listed and not (paired and at):
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
        units = candidates.size if candidates is not None else matrices[0].out if paired else begin
        blocks = min(self.machine.processors, units)
        part = 2048 if compiled <= 2 else 1024
        per_unit = (size + part - 1) // part * (2 if paired else 1)
        most = -(-units // blocks) + 4 & ~3
        shared = 4 * (
            compiled * _padded(size) + 32 + most * (per_unit * compiled + compiled + 2) + self._found(candidates)
        )
        self._check_shared(shared)
        row_bytes = 2 * size
        p = Rows(x, candidates or Candidates(), jobs)
        kept = None
        if listed:
            index, mask, count = (self.scratch(n, torch.int32) for n in (units, units, 4))
            value = self.scratch(rows * units)
            kept = Kept(Parts(value, 1, units), index, mask, count)
            p.list_index, p.list_mask, p.list_value = index.data_ptr(), mask.data_ptr(), value.data_ptr()
            p.list_count, p.list_size = count.data_ptr(), units
            keep = (*keep, kept)
        p.jobs, p.units, p.mode, p.rows = len(matrices), units, mode, rows
        p.activation, p.second_activation = ACTIVATIONS[activation], ACTIVATIONS[second_activation]
        p.prefetch_rows = PREFETCH_BYTES // row_bytes
        self.launches.append(Launch("rows", (blocks, 1), THREADS, shared, p, (keep, rounded, candidates)))
        return kept if kept is not None else results

    def columns_product(
        self,
        x: Input | None,
        matrices: Sequence[tuple[Matrix, Tensor | None]],
        *,
        candidates: Candidates | None = None,
        tile: int = 0,
        splits: int = 0,
        rounded: Tensor | None = None,
        keep: tuple[Any, ...] = (),
    ) -> list[Parts]:
        """Every matrix, given with its threshold [I], by columns: of x, or of the candidates.

        ``rounded`` [B, O] takes the result of a single matrix in 16 bits; else it comes in parts.
        """
        size = x.size if x is not None else candidates.size if candidates is not None else 0
        tile, splits = self._cut([matrix.out for matrix, _ in matrices], tile, splits)
        while True:
            entries = -(-size // splits) + 4 & ~3
            list_floats = max(entries * (self.compiled + 1), THREADS // 32 * self.compiled * tile)
            values = self.compiled * _padded(size) if x is not None else self._found(candidates)
            shared = 4 * (32 + list_floats + values)
            if shared <= self.machine.shared_bytes or (tile == 32 and splits >= 64):
                break
            tile, splits = (tile // 2, splits) if tile > 32 and splits >= 4 else (tile, splits * 2)
        self._check_shared(shared)
        jobs, results, begin = (Job * 3)(), [], 0
        direct = rounded is not None and splits == 1
        for at, (matrix, threshold) in enumerate(matrices):
            y = None if direct else self.scratch(splits * self.rows * matrix.out)
            bias, least = vector(matrix.bias, self.device), vector(threshold, self.device)
            keep = (*keep, matrix.weight, bias, least, y)
            if y is not None:
                results.append(Parts(y, splits, matrix.out))
            jobs[at] = Job(
                pointer(matrix.weight), pointer(bias), pointer(least), pointer(y), pointer(rounded) if direct else None,
                matrix.stride, matrix.out, begin,
            )  # fmt: skip
            begin += -(-matrix.out // tile)
        p = Columns(x or Input(), candidates or Candidates(), jobs, len(matrices), splits, self.rows, entries)
        self.launches.append(Launch(f"columns{tile}", (begin, splits), THREADS, shared, p, (keep, rounded, candidates)))
        if rounded is not None and not direct:
            total = self.rows * matrices[0][0].out
            f = Finish(results[0].values.data_ptr(), rounded.data_ptr(), total, splits)
            self.launches.append(Launch("finish", (-(-total // 256), 1), 256, 0, f, (results, rounded)))
        return results

    def candidates_of(
        self,
        kept: Kept,
        *,
        threshold: Tensor | None = None,
        mean: Tensor | None = None,
        activation: str = "identity",
        second: Parts | None = None,
        second_activation: str = "identity",
        positive: bool = False,
    ) -> tuple[Candidates, tuple[Any, ...]]:
        """The structure, and what must stay alive with it."""
        least, offset = vector(threshold, self.device), vector(mean, self.device)
        c = Candidates(
            pointer(kept.parts.values), pointer(second.values) if second else None, pointer(kept.index),
            pointer(kept.mask), pointer(kept.count), pointer(least), pointer(offset), kept.parts.size, kept.parts.splits,
            second.splits if second else 0, ACTIVATIONS[activation], ACTIVATIONS[second_activation], positive,
        )  # fmt: skip
        return c, (kept, second, least, offset)

    def ffn(
        self, x: Input, gate: Matrix | None, up: Matrix, down: Matrix, rules: Rules, rounded: Tensor | None
    ) -> Parts | None:
        """One feed-forward block; its output in parts, or in ``rounded``.  :func:`ffn_obstacle` says what fits."""
        chosen = None
        keep: tuple[Any, ...] = ()
        if rules.predictor_a is not None and rules.predictor_b is not None:
            inner = self.rows_product(x, [Matrix(rules.predictor_a)])
            assert isinstance(inner, list)
            scores = self.rows_product(
                input_of(inner[0], inner[0].size), [Matrix(rules.predictor_b, rules.predictor_bias)], keep=(inner,)
            )
            assert isinstance(scores, list)
            chosen, keep = self.candidates_of(Kept(scores[0]), positive=True)
        elif rules.neurons is not None:
            neurons = rules.neurons.to(self.device, torch.int32).contiguous()
            identity = ACTIVATIONS["identity"]
            chosen, keep = Candidates(index=pointer(neurons), size=len(neurons), activation=identity), (neurons,)

        first = up if gate is None else gate
        options: dict[str, Any] = {"threshold": rules.value_threshold, "mean": rules.mean}
        kept: Kept
        if first.columns:
            inputs = [(first, rules.up_in_threshold if gate is None else rules.gate_in_threshold)]
            if gate is not None:
                inputs.append((up, rules.up_in_threshold))
            results = self.columns_product(x, inputs)
            second = results[1] if gate is not None else None
            if gate is None and rules.gate_threshold is not None:
                options["threshold"] = rules.gate_threshold
            final, alive = self.candidates_of(
                Kept(results[0]), activation=rules.activation, second=second,
                second_activation=rules.up_activation, **options,
            )  # fmt: skip
        else:
            one: dict[str, Any] = {"activation": rules.activation, "candidates": chosen, "keep": keep}
            if gate is not None and rules.gate_threshold is None:
                both = [gate, up]
                one |= {"mode": PAIRED, "second_activation": rules.up_activation}
                got = self.rows_product(x, both, listed=chosen is not None, **one)
            else:
                got = self.rows_product(x, [first], mode=ACTIVATED, listed=chosen is not None, **one)
            kept = got if isinstance(got, Kept) else Kept(got[0])
            if gate is None and rules.gate_threshold is not None:
                options["threshold"] = rules.gate_threshold
            elif gate is not None and rules.gate_threshold is not None:
                passing, alive = self.candidates_of(kept, threshold=rules.gate_threshold)
                got = self.rows_product(
                    x, [up], mode=TIMES_SOURCE, second_activation=rules.up_activation, candidates=passing, listed=True,
                    keep=alive,
                )  # fmt: skip
                assert isinstance(got, Kept)
                kept = got
            if not down.columns:
                y = self.rows_product(input_of(kept.parts, kept.parts.size), [down], rounded=rounded, keep=(kept,))
                assert isinstance(y, list)
                return y[0] if rounded is None else None
            final, alive = self.candidates_of(kept, **options)
        y = self.columns_product(None, [(down, None)], candidates=final, rounded=rounded, keep=alive)
        return y[0] if rounded is None else None

    def _cut(self, outs: list[int], tile: int, splits: int) -> tuple[int, int]:
        """Columns per block, and splits of the kept: about one to two blocks for each multiprocessor.

        Measured on an H100 (docs/cuda.md): narrow tiles with few splits are as fast as wide ones with many, and leave fewer
        parts to add up.
        """

        def tiles(width: int) -> int:
            return sum(-(-out // width) for out in outs)

        if not tile:
            fits = (width for width in (64, 128) if tiles(width) <= 2 * self.machine.processors)
            tile = next(fits, 256 if self.compiled <= 2 else 128)
        if not splits:
            splits = 1
            while tiles(tile) * splits * 6 < 5 * self.machine.processors and splits < 8:
                splits *= 2
        return tile, splits

    def _found(self, candidates: Candidates | None) -> int:
        """Floats of shared memory for the values that a rule looks at."""
        return candidates.size + 3 & ~3 if candidates is not None and self.compiled == 1 else 0

    def _check_shared(self, shared: int) -> None:
        if shared > self.machine.shared_bytes:
            raise ValueError(f"{shared} bytes of shared memory are needed, a block has {self.machine.shared_bytes}")


# Of a block's shared memory (99 KiB and more), for x in float32; lists and sums take the rest.
_INPUT_BYTES = 140 << 10


def linear_obstacle(x: Tensor) -> str:
    """Why a product has no CUDA path, in words; empty when it has one."""
    rows = compiled_rows(x.numel() // x.shape[-1])
    if x.shape[-1] % 8:
        return f"x has {x.shape[-1]} values, expected a multiple of 8"
    needed = 4 * rows * x.shape[-1]
    return f"{rows} rows of {x.shape[-1]} values do not fit shared memory" if needed > _INPUT_BYTES else ""


def ffn_obstacle(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules) -> str:
    """Why a block has no CUDA path, in words; empty when it has one."""
    last_input = x if Matrix(down).columns else x.new_empty((*x.shape[:-1], down.shape[1]), device="meta")
    for values in (x, last_input):
        if obstacle := linear_obstacle(values):
            return obstacle
    columns = [Matrix(weight).columns for weight in (gate, up, down) if weight is not None]
    first, last = columns[0], columns[-1]
    sparse = any(
        rule is not None
        for rule in (rules.predictor_a, rules.neurons, rules.gate_threshold, rules.value_threshold, rules.mean)
    )
    if sparse and up.shape[0] % 4 and rules.neurons is None:
        return f"{up.shape[0]} neurons, expected a multiple of 4"
    if sparse and not last:
        return "down is stored by rows, its columns are to be skipped"
    if gate is not None and columns[0] != columns[1]:
        return "gate and up are stored in different layouts"
    if not first and (rules.gate_in_threshold is not None or rules.up_in_threshold is not None):
        return "an input threshold meets a matrix stored by rows"
    if first and not last:
        return "down is stored by rows, gate and up by columns"
    if first and (rules.predictor_a is not None or rules.neurons is not None):
        return "neurons are chosen, but gate and up are stored by columns"
    if rules.predictor_a is not None and rules.neurons is not None:
        return "both a predictor and a list choose the neurons"
    if (
        rules.gate_threshold is not None
        and (gate is None or first)
        and (rules.value_threshold is not None or gate is not None)
    ):
        return "gate and value thresholds meet a gate stored by columns, or none"
    return ""

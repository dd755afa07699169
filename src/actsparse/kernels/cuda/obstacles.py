"""What the kernels cannot serve, in words."""

from __future__ import annotations

from torch import Tensor

from ..rules import Rules
from . import compiler
from .launches import Matrix
from .machine import MOST_SLICE, Machine, columns_bytes, compiled_rows, narrowest

# Of a block's shared memory, beside x in float32 and the weights that are being copied: for lists and sums.
_REST_BYTES = 20 << 10


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


def linear_obstacle(x: Tensor, weight: Tensor | None = None) -> str:
    """Why a product of x has no CUDA path, in words; empty when it has one.  By columns, x may be read slice by slice."""
    rows = compiled_rows(x.numel() // x.shape[-1])
    if x.shape[-1] % 8:
        return f"x has {x.shape[-1]} values, expected a multiple of 8"
    if weight is not None and Matrix(weight).columns:
        return ""
    machine = _machine_of(x)
    room = machine.shared_bytes - machine.ring_bytes - _REST_BYTES
    return _too_many(rows, x) if 4 * rows * x.shape[-1] > room else ""


def _machine_of(x: Tensor) -> Machine:
    return compiler.machine(x.device.index or 0) if x.is_cuda else Machine()


def _too_many(rows: int, x: Tensor) -> str:
    return f"{rows} rows of {x.shape[-1]} values do not fit shared memory"


def ffn_obstacle(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules) -> str:
    """Why a block has no CUDA path, in words; empty when it has one."""
    last_input = x.new_empty((*x.shape[:-1], down.shape[1]), device="meta") if not Matrix(down).columns else x
    for values, weight in ((x, up), (last_input, down)):
        if obstacle := linear_obstacle(values, weight):
            return obstacle
    if Matrix(up).columns:
        machine, rows, sides = _machine_of(x), compiled_rows(x.numel() // x.shape[-1]), 1 if gate is None else 2
        inputs = x.shape[-1] + 31 & ~31
        shared = columns_bytes(machine, rows, inputs, sides, narrowest(rows), False)
        if shared > machine.shared_bytes or inputs > MOST_SLICE:
            return _too_many(rows, x)
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

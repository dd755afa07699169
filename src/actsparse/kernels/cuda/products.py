"""The two operators on CUDA tensors; nothing here decides whether a call may run natively."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..rules import Rules
from . import compiler
from .launches import Builder, Matrix, input_of
from .machine import Machine
from .structures import Launch

# Runs launches: on the GPU, or in the tests' emulator.
Run = Callable[[list[Launch], torch.device, torch.dtype, int], None]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    *,
    machine: Machine | None = None,
    run: Run = compiler.run,
    tile: int = 0,
    splits: int = 0,
) -> Tensor:
    """As :func:`actsparse.kernels.linear`; ``tile`` and ``splits`` 0 choose by shape."""
    rows = x.numel() // x.shape[-1]
    x, matrix = x.contiguous(), Matrix(weight, bias)
    y = x.new_empty((*x.shape[:-1], matrix.out))
    build = Builder(machine or machine_of(x), x.device, rows)
    if matrix.columns:
        build.columns_product(input_of(x, matrix.inn), [(matrix, threshold)], rounded=y, tile=tile, splits=splits)
    else:
        build.rows_product(input_of(x, matrix.inn), [matrix], rounded=y)
    run(build.launches, x.device, x.dtype, rows)
    return y


def gated_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    rules: Rules,
    *,
    machine: Machine | None = None,
    run: Run = compiler.run,
) -> Tensor:
    """As :func:`actsparse.kernels.gated_ffn`."""
    rows = x.numel() // x.shape[-1]
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], down.shape[0]))
    build = Builder(machine or machine_of(x), x.device, rows)
    build.ffn(input_of(x, x.shape[-1]), *matrices_of(gate, up, down, rules), rules, y)
    run(build.launches, x.device, x.dtype, rows)
    return y


def matrices_of(gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules) -> tuple[Matrix | None, Matrix, Matrix]:
    """A block's matrices with their biases."""
    return (
        None if gate is None else Matrix(gate, rules.gate_bias),
        Matrix(up, rules.up_bias),
        Matrix(down, rules.down_bias),
    )


def machine_of(x: Tensor) -> Machine:
    """The GPU that holds x, as launches see it."""
    return compiler.machine(x.device.index if x.device.index is not None else torch.cuda.current_device())

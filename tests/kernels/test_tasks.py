"""Results do not depend on who runs which part of the work."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch
from torch import Tensor

from actsparse import kernels
from actsparse.kernels import cpu
from actsparse.kernels.cpu import loading

from .blocks import Block
from .bounds import stored, thresholds
from .test_decode_step import Llama
from .test_graded import Case

RANGE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
POOL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, RANGE, ctypes.c_void_p)


@ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(ctypes.c_uint32))
def four_threads(count):  # type: ignore[no-untyped-def]
    count[0] = 4
    return 0


@POOL
def in_order(begin, end, grain, body, context):  # type: ignore[no-untyped-def]
    body(begin, end, context)
    return 0


@POOL
def backwards(begin, end, grain, body, context):  # type: ignore[no-untyped-def]
    for i in reversed(range(begin, end)):
        body(i, i + 1, context)
    return 0


@POOL
def refused(begin, end, grain, body, context):  # type: ignore[no-untyped-def]
    return 1


def results_of_four_tasks() -> list[Tensor]:
    torch.manual_seed(1)
    hidden, neurons, dtype = 256, 1400, torch.bfloat16
    weight = torch.randn(hidden, neurons)
    found = []
    for batch in (1, 3):
        for density in (0.0, 0.003, 0.4, 1.0):
            x, threshold, bias = torch.randn(batch, neurons), thresholds(neurons, density), torch.randn(hidden)
            for layout in ("columns", "rows"):
                operands = x.to(dtype), stored(weight, layout, dtype)
                assert kernels.path_for(*operands) == f"cpu-{kernels.isa()}"
                found.append(kernels.linear(*operands, bias, threshold))
            # The product's threshold drops whole segments of what the gate's kept.
            last = torch.where(torch.arange(neurons) < 1000, 3e38, 0.0)
            for value_threshold in (None, last):
                block = Block(batch, hidden, neurons, dtype, gate_threshold=threshold, value_threshold=value_threshold)
                found.append(block.run())
                assert ((found[-1] - block.expected()).abs() <= block.bound()).all()
    return [*found, Case(300, 4000, 4).native(), *logits_of_four_tasks()]


def logits_of_four_tasks() -> list[Tensor]:
    torch.manual_seed(2)
    llama = Llama(window=0, q_norms="alike", biases=False, kind="rms")
    llama.widen(3000)
    native, found = llama.native(), []
    for position, token in enumerate((3, 1, 4)):
        found.append(torch.empty(llama.vocabulary))
        kernels.decode_step(native, token, position, found[-1])
    return found


@pytest.mark.parametrize("pool", [in_order, backwards, refused])
def test_results_do_not_depend_on_who_runs_the_tasks(pool: ctypes._CFunctionType) -> None:
    # One after the other on this thread, where waiting for a later task would never end; and on more threads than cores.
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        expected = results_of_four_tasks()
        assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(results_of_four_tasks(), expected, strict=True))
    finally:
        torch.set_num_threads(before)
    assert loading.pool is not None
    cpu.library().as_set_threads(ctypes.cast(pool, ctypes.c_void_p), ctypes.cast(four_threads, ctypes.c_void_p))
    try:
        found = results_of_four_tasks()
    finally:
        cpu.library().as_set_threads(*loading.pool)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_outputs_lie_on_the_cpu_whatever_the_default_device() -> None:
    x, weight = torch.randn(1, 8), torch.randn(8, 8)
    expected = kernels.linear(x, weight), kernels.gated_ffn(x, weight, weight, weight, activation="silu")
    with torch.device("meta"):
        found = kernels.linear(x, weight), kernels.gated_ffn(x, weight, weight, weight, activation="silu")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_calls_from_several_python_threads() -> None:
    blocks = [Block(1 + i, 65 + i, 385, torch.float32, gate_threshold=thresholds(385, 0.5)) for i in range(4)]
    expected = [block.run() for block in blocks]
    failures: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(blocks[i].run(), expected[i]):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures

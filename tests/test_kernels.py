"""The native CPU kernels against float64, for every instruction set, storage type and layout.

Shape letters: B rows of activations, I in, O out, H hidden, N neurons, R rank, C channels, T tokens.

Tolerances follow from norms: a sum of n products in float32 is wrong by at most about n u |W||x| (u = 2^-24), and the
result is rounded once to the output type. Nothing is tuned.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse import kernels
from actsparse.kernels import cpu, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = () if cpu.missing else kernels.available_isas()
U32 = 2.0**-24
# Any |w| and |x| here stay within a few units, so that float16 does not overflow.


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.select_isa(request.param)
    yield request.param
    kernels.select_isa(before)


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def stored(weight: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """The logical [O, I] weight in a storage type and layout, at an address aligned to its element only."""
    weight = weight.to(dtype)
    source = weight if layout == "rows" else weight.T
    storage = torch.empty(source.numel() + 1, dtype=dtype)[1:].view(source.shape)
    storage.copy_(source)
    return storage if layout == "rows" else storage.T


def thresholds(size: int, density: float | str) -> Tensor:
    """0 keeps, huge drops: the kept set is exact whatever the values."""
    keep = torch.rand(size) < density if isinstance(density, float) else torch.zeros(size, dtype=torch.bool)
    if density == "one":
        keep[size // 2] = True
    return torch.where(keep, 0.0, 3e38)


def rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return expected.abs() * (info.eps / 2) + info.smallest_normal * info.eps


def assert_within(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    error = (found.double() - expected).abs()
    worst = (error / bound).max() if error.numel() else torch.tensor(0.0)
    assert bool((error <= bound).all()), f"error is {worst:.3g} times its bound"


def linear_bound(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Error of the float32 sum, [.., O]; x and weight in float64."""
    scale = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    return (x.shape[-1] + 4) * U32 * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(("out", "inn"), [(1, 1), (3, 17), (17, 3), (63, 65), (65, 127), (384, 1344), (4100, 63)])
def test_linear(isa: str, dtype: torch.dtype, layout: str, out: int, inn: int) -> None:
    bias, weight = torch.randn(out), torch.randn(out, inn)
    batches = range(1, 9) if inn == 65 else (1, 2, 5)
    for density in (None, 0.0, "one", 0.4, 1.0):
        threshold = None if density is None else thresholds(inn, density)
        clean = weight.to(dtype)
        unread = clean.clone()
        if threshold is not None and layout == "columns" and out * inn > 1:  # one value alone has both layouts
            unread[:, threshold > 0] = math.nan
        native = stored(unread, layout, dtype)
        for batch in batches:
            x = torch.randn(batch, inn).to(dtype)
            assert kernels.path_for(x, native) == f"cpu-{isa}"
            expected = reference.linear(x.double(), clean.double(), bias.double(), threshold)
            bound = linear_bound(x.double(), clean.double(), bias.double()) + rounding(expected, dtype)
            assert_within(kernels.linear(x, native, bias, threshold), expected, bound)


def test_linear_masks_each_row_of_a_batch(isa: str) -> None:
    weight = stored(torch.randn(65, 127), "columns", torch.float32)
    x = torch.randn(8, 127)
    threshold = torch.rand(127) * 1.5
    expected = reference.linear(x.double(), weight.double(), None, threshold)
    assert_within(kernels.linear(x, weight, None, threshold), expected, linear_bound(x.double(), weight.double(), None))
    for row in range(8):
        alone = kernels.linear(x[row : row + 1], weight, None, threshold)
        assert_within(alone, expected[row : row + 1], linear_bound(x[row].double(), weight.double(), None)[None])


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_threshold_keeps_ties_and_nan(isa: str, layout: str) -> None:
    inn = 37
    weight = stored(torch.eye(inn), layout, torch.float32)
    x = torch.full((1, inn), 0.5)
    x[0, 1], x[0, 2], x[0, 20] = -0.5, 0.49999997, 0.0
    threshold = torch.full((inn,), 0.5)
    expected = x.clone()
    expected[0, 2] = expected[0, 20] = 0.0
    assert torch.equal(kernels.linear(x, weight, None, threshold), expected)
    x[0, 5] = math.nan
    assert kernels.linear(x, weight, None, threshold).isnan().any()
    assert kernels.linear(x, weight, None, torch.full((inn,), 3e38)).isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_rows_leaves_other_outputs_alone(isa: str, dtype: torch.dtype) -> None:
    out, inn = 127, 65
    for count in (0, 1, 5, 127):
        rows = torch.randperm(out)[:count].sort().values.int()
        clean, bias = torch.randn(out, inn).to(dtype), torch.randn(out)
        weight = torch.full_like(clean, math.nan)
        weight[rows.long()] = clean[rows.long()]
        for batch in (1, 3, 8):
            x = torch.randn(batch, inn).to(dtype)
            found = torch.full((batch, out), 7.0, dtype=dtype)
            cpu.linear_rows(x, weight, rows, found, bias)
            expected = torch.full((batch, out), 7.0, dtype=torch.float64)
            named = rows.long()
            exact = reference.linear(x.double(), clean.double(), bias.double())
            expected[:, named] = exact[:, named]
            bound = torch.zeros_like(expected)
            spread = linear_bound(x.double(), clean.double(), bias.double()) + rounding(exact, dtype)
            bound[:, named] = spread[:, named]
            assert_within(found, expected, bound)


# ---- feed-forward block ----------------------------------------------------------------------------------------------

SLOPE = {"silu": 1.1, "relu": 1.0, "relu2": 2.0, "gelu": 1.13, "gelu_tanh": 1.13, "identity": 1.0}


class Block:
    """A random block with its exact float64 result and the error that float32 arithmetic may make."""

    def __init__(
        self, batch: int, hidden: int, size: int, dtype: torch.dtype, *, gated: bool = True, **options: object
    ):
        self.dtype = dtype
        self.x = torch.randn(batch, hidden).to(dtype)
        self.gate = (torch.randn(size, hidden) / math.sqrt(hidden)).to(dtype) if gated else None
        self.up = (torch.randn(size, hidden) / math.sqrt(hidden)).to(dtype)
        self.down = (torch.randn(hidden, size) / math.sqrt(size)).to(dtype)
        self.options = {"activation": "silu", "gate_bias": torch.randn(size) if gated else None,
                        "up_bias": torch.randn(size), "down_bias": torch.randn(hidden), **options}  # fmt: skip

    def double(self) -> dict[str, object]:
        return {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() and "threshold" not in k else v
            for k, v in self.options.items()
        }

    def values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g, g u and the float32 errors of both, in float64 over every neuron."""
        o = self.double()
        x = self.x.double()

        def product(weight: Tensor, bias: object, threshold: object) -> tuple[Tensor, Tensor]:
            assert bias is None or isinstance(bias, Tensor)
            assert threshold is None or isinstance(threshold, Tensor)
            return reference.linear(x, weight.double(), bias, threshold), linear_bound(x, weight.double(), bias)

        u, u_error = product(self.up, o["up_bias"], o.get("up_in_threshold"))
        z, z_error = (
            (u, u_error) if self.gate is None else product(self.gate, o["gate_bias"], o.get("gate_in_threshold"))
        )
        kind, up_kind = str(o["activation"]), str(o.get("up_activation", "identity"))
        g = reference.ACTIVATIONS[kind](z)
        slope = SLOPE[kind] * (z.abs() + 1 if kind == "relu2" else 1.0)
        g_error = slope * z_error + 16 * U32 * z.abs()
        if self.gate is None:
            return g, g, g_error, g_error
        u = reference.ACTIVATIONS[up_kind](u)
        u_error = SLOPE[up_kind] * u_error
        return g, g * u, g_error, g_error * u.abs() + u_error * g.abs() + g_error * u_error + U32 * (g * u).abs()

    def settle(self) -> None:
        """Give up thresholds so close to a value that rounding could decide: those neurons are kept."""
        g, value, g_error, value_error = self.values()
        for name, decided, error in (("gate_threshold", g, g_error), ("value_threshold", value, value_error)):
            threshold = self.options.get(name)
            if isinstance(threshold, Tensor):
                close = ((decided.abs() - threshold).abs() <= error).any(0)
                self.options[name] = torch.where(close, 0.0, threshold)

    def expected(self) -> Tensor:
        return reference.gated_ffn(
            self.x.double(), None if self.gate is None else self.gate.double(), self.up.double(), self.down.double(),
            **self.double(),
        )  # fmt: skip

    def bound(self) -> Tensor:
        _, value, _, error = self.values()
        mean, bias = self.options.get("mean"), self.options["down_bias"]
        assert isinstance(bias, Tensor)
        size = value.abs() + (mean.double().abs() if isinstance(mean, Tensor) else 0.0)
        down = self.down.double().abs()
        summing = (self.up.shape[0] + 4) * U32 * F.linear(size, down, bias.double().abs())
        return F.linear(error + 2 * U32 * size, down) + summing + rounding(self.expected(), self.dtype)

    def run(self, gate_layout: str = "rows", up_layout: str = "rows", down_layout: str = "columns") -> Tensor:
        gate = None if self.gate is None else stored(self.gate, gate_layout, self.dtype)
        up, down = stored(self.up, up_layout, self.dtype), stored(self.down, down_layout, self.dtype)
        assert kernels.path_for(self.x, gate, up, down).startswith("cpu-")
        return kernels.gated_ffn(self.x, gate, up, down, **self.options)

    def poison(self, kept: Tensor, *, gate: bool = False) -> Block:
        """The same block with NaN in every weight of the neurons outside ``kept`` (of gate as well when asked)."""
        other = Block.__new__(Block)
        other.__dict__.update(self.__dict__)
        other.up, other.down = self.up.clone(), self.down.clone()
        other.up[~kept] = math.nan
        other.down[:, ~kept] = math.nan
        if gate and self.gate is not None:
            other.gate = self.gate.clone()
            other.gate[~kept] = math.nan
        return other


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "neurons"), [(2, 1), (3, 17), (65, 127), (384, 1344)])
def test_ffn_reads_only_what_the_gate_keeps(isa: str, dtype: torch.dtype, hidden: int, neurons: int) -> None:
    for batch in range(1, 9) if neurons == 127 else (1, 6):
        for density in (0.3,) if neurons > 1000 else (0.0, "one", 0.3, 1.0):
            threshold = thresholds(neurons, density)
            block = Block(batch, hidden, neurons, dtype, gate_threshold=threshold, mean=torch.randn(neurons))
            found = block.poison(threshold == 0).run()
            assert_within(found, block.expected(), block.bound())


@pytest.mark.parametrize("gate_layout", ["rows", "columns"])
@pytest.mark.parametrize("up_layout", ["rows", "columns"])
@pytest.mark.parametrize("down_layout", ["rows", "columns"])
def test_ffn_layouts(isa: str, threads: int, gate_layout: str, up_layout: str, down_layout: str) -> None:
    hidden, neurons = 127, 385
    every = {
        "gate_in_threshold": torch.rand(hidden), "up_in_threshold": torch.rand(hidden),
        "gate_threshold": torch.rand(neurons) / 2, "value_threshold": torch.rand(neurons) / 8,
        "mean": torch.randn(neurons), "up_activation": "relu",
    }  # fmt: skip
    index = torch.randperm(neurons)[:200].sort().values.int()
    for batch in (1, 4, 7):
        for options in ({}, every, {**every, "neurons": index}, {"neurons": index}, {"neurons": index[:0]}):
            block = Block(batch, hidden, neurons, torch.float32, **options)
            block.settle()
            assert_within(block.run(gate_layout, up_layout, down_layout), block.expected(), block.bound())


@pytest.mark.parametrize("activation", list(SLOPE))
@pytest.mark.parametrize("gated", [True, False])
def test_ffn_activations(isa: str, activation: str, gated: bool) -> None:
    neurons = 385
    block = Block(3, 65, neurons, torch.float32, gated=gated, activation=activation, gate_threshold=torch.rand(neurons))
    block.settle()
    assert_within(block.run(), block.expected(), block.bound())


def test_activations_over_their_whole_range(isa: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38])])
    eye = torch.ones(1, 1)
    for activation in SLOPE:
        for start in range(0, len(x), 8):
            part = x[start : start + 8, None]
            found = kernels.gated_ffn(part, None, eye, eye, activation=activation)
            exact = reference.ACTIVATIONS[activation](part.double())
            bound = 8 * U32 * (part.double().abs() + exact.abs()) + 1e-37
            finite = exact.abs() < torch.finfo(torch.float32).max
            assert_within(found[finite], exact[finite], bound[finite])
    nan = torch.full((1, 1), math.nan)
    for activation in SLOPE:
        assert kernels.gated_ffn(nan, None, eye, eye, activation=activation).isnan().all()


def test_ffn_plain_with_mean(isa: str) -> None:
    neurons = 127
    threshold = thresholds(neurons, 0.4)
    block = Block(5, 65, neurons, torch.float32, gated=False, activation="relu", gate_threshold=threshold,
                  mean=torch.randn(neurons))  # fmt: skip
    poisoned = block.poison(threshold == 0)
    poisoned.up = block.up  # up is what decides
    assert_within(poisoned.run(), block.expected(), block.bound())


def test_ffn_neuron_list_reads_nothing_else(isa: str, threads: int) -> None:
    neurons = 385
    for count in (0, 1, 100, neurons):
        index = torch.randperm(neurons)[:count].sort().values.int()
        block = Block(2, 65, neurons, torch.bfloat16, neurons=index, gate_threshold=torch.zeros(neurons))
        kept = torch.zeros(neurons, dtype=torch.bool).index_fill(0, index.long(), True)
        assert_within(block.poison(kept, gate=True).run(), block.expected(), block.bound())


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_ffn_predictor(isa: str, batch: int) -> None:
    hidden, neurons, rank = 65, 385, 17
    a, b = torch.randn(rank, hidden) / 8, torch.randn(neurons, rank) / 4
    bias = torch.randn(neurons) - 1
    block = Block(batch, hidden, neurons, torch.float32, activation="relu", predictor_a=a, predictor_b=b,
                  predictor_bias=bias, gate_threshold=torch.full((neurons,), 1e-30))  # fmt: skip
    score = reference.linear(reference.linear(block.x.double(), a.double()), b.double(), bias.double())
    assert score.abs().min() > 1e-6  # far enough from 0 for float32 to agree about every sign
    block.settle()
    wanted = (score > 0).any(0)
    assert wanted.any()
    assert not wanted.all()
    assert_within(block.poison(wanted, gate=True).run(), block.expected(), block.bound())


def test_ffn_nan_is_never_hidden(isa: str) -> None:
    block = Block(2, 65, 127, torch.float32, gate_threshold=torch.full((127,), 3e38))
    block.x[0, 3] = math.nan
    found = block.run()
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_stats_count_what_is_read(isa: str) -> None:
    hidden, neurons = 64, 100
    threshold = thresholds(neurons, 0.3)
    kept = int((threshold == 0).sum())
    block = Block(3, hidden, neurons, torch.bfloat16, gate_threshold=threshold)
    kernels.reset_stats()
    block.run()
    found = kernels.stats()
    assert found.pop("product_ns") > 0
    assert found == {
        "gate_rows": neurons, "up_rows": kept, "down_rows": kept, "bytes": (neurons + 2 * kept) * hidden * 2,
    }  # fmt: skip
    kernels.reset_stats()
    kernels.linear(torch.ones(1, neurons), torch.ones(neurons, hidden).T, None, threshold)
    assert kernels.stats()["bytes"] == kept * hidden * 4


def test_results_do_not_depend_on_timing(threads: int) -> None:
    block = Block(2, 384, 1344, torch.bfloat16, gate_threshold=thresholds(1344, 0.4))
    first = block.run()
    assert all(torch.equal(first, block.run()) for _ in range(20))


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
                found.append(kernels.linear(x, stored(weight, layout, dtype), bias, threshold))
            # The product's threshold drops whole segments of what the gate's kept.
            last = torch.where(torch.arange(neurons) < 1000, 3e38, 0.0)
            for value_threshold in (None, last):
                block = Block(batch, hidden, neurons, dtype, gate_threshold=threshold, value_threshold=value_threshold)
                found.append(block.run())
                assert ((found[-1] - block.expected()).abs() <= block.bound()).all()
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
    assert cpu._pool is not None
    cpu.library().as_set_threads(ctypes.cast(pool, ctypes.c_void_p), ctypes.cast(four_threads, ctypes.c_void_p))
    try:
        found = results_of_four_tasks()
    finally:
        cpu.library().as_set_threads(*cpu._pool)
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


# ---- Python layer ----------------------------------------------------------------------------------------------------


def test_path_tells_the_truth() -> None:
    x, weight = torch.randn(1, 8), torch.randn(4, 8)
    native = f"cpu-{kernels.isa()}"
    assert kernels.path_for(x, weight) == native
    assert kernels.path_for(x, weight, None) == native
    assert kernels.path_for(torch.randn(2, 4, 8), weight) == native
    for reason, call in {
        "9 rows": (torch.randn(9, 8), weight),
        "float64": (x.double(), weight.double()),
        "bfloat16": (x, weight.bfloat16()),
        "contiguous": (x, torch.randn(8, 16).T[::2]),
        "requires grad": (x, weight.clone().requires_grad_()),
        "meta": (x.to("meta"), weight.to("meta")),
    }.items():
        assert kernels.path_for(*call) == "reference"
        assert reason in kernels.explain(*call)
    with torch.no_grad():
        assert kernels.path_for(x, weight.clone().requires_grad_()) == native


def test_many_rows_take_the_reference_path() -> None:
    x, weight, threshold = torch.randn(3, 7, 65), torch.randn(17, 65), torch.rand(65)
    torch.testing.assert_close(
        kernels.linear(x, weight, None, threshold), F.linear(torch.where(x.abs() < threshold, 0.0, x), weight)
    )
    block = Block(21, 65, 127, torch.float32, gate_threshold=torch.rand(127), neurons=torch.arange(5, 90).int())
    block.settle()
    found = kernels.gated_ffn(block.x, block.gate, block.up, block.down, **block.options)
    assert_within(found, block.expected(), block.bound())


def test_gradients_flow_through_the_reference() -> None:
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: kernels.linear(x, w, None, torch.full((9,), 0.1)), (x, weight))
    small, up = x.detach().float().requires_grad_(), torch.randn(5, 9)
    kernels.gated_ffn(small, up, up, up.T, activation="silu").sum().backward()
    assert small.grad is not None
    assert small.grad.abs().sum() > 0
    (op_x,) = torch.autograd.grad(torch.ops.actsparse.linear(small, up, None, None).sum(), small)
    torch.testing.assert_close(op_x, up.sum(0).expand(2, -1))


def test_ops_pass_opcheck() -> None:
    x, weight = torch.randn(2, 17), torch.randn(33, 17)
    torch.library.opcheck(torch.ops.actsparse.linear.default, (x, weight, torch.randn(33), torch.rand(17)))
    torch.library.opcheck(torch.ops.actsparse.linear.default, (x, weight.requires_grad_(), None, None))
    options = [None] * 12
    options[5] = torch.rand(33)
    gate, up = torch.randn(2, 33, 17)
    torch.library.opcheck(
        torch.ops.actsparse.gated_ffn.default, (x, gate, up, torch.randn(33, 17).T, "silu", "identity", *options)
    )


@pytest.mark.parametrize("rows", [1, 20])
def test_compiles_into_one_graph(rows: int) -> None:
    weight, threshold, up = torch.randn(33, 17).T.contiguous().T, torch.rand(17), torch.randn(40, 33)

    def model(x: Tensor) -> Tensor:
        h = kernels.linear(x, weight, None, threshold)
        return kernels.gated_ffn(h, up, up, up.T, activation="silu", gate_threshold=torch.ones(40))

    x = torch.randn(rows, 17)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))


def test_bad_arguments_are_value_errors() -> None:
    x, weight = torch.randn(1, 8), torch.randn(4, 8)
    calls = {
        "8 features": lambda: kernels.linear(torch.randn(1, 7), weight),
        "threshold has shape": lambda: kernels.linear(x, weight, None, torch.rand(4)),
        "bias has shape": lambda: kernels.linear(x, weight, torch.rand(8)),
        "two dimensions": lambda: kernels.linear(x, torch.randn(8)),
        "gate has shape": lambda: kernels.gated_ffn(x, torch.randn(5, 8), weight, weight.T, activation="silu"),
        "down has shape": lambda: kernels.gated_ffn(x, weight, weight, weight, activation="silu"),
        "unknown activation": lambda: kernels.gated_ffn(x, weight, weight, weight.T, activation="swish"),
        "mean has shape": lambda: kernels.gated_ffn(x, weight, weight, weight.T, activation="silu", mean=torch.rand(3)),
        "predictor": lambda: kernels.gated_ffn(x, weight, weight, weight.T, activation="silu", predictor_a=weight),
        "neurons must be int32": lambda: kernels.gated_ffn(
            x, weight, weight, weight.T, activation="silu", neurons=torch.arange(2)
        ),
        "invalid arguments": lambda: kernels.gated_ffn(
            x, weight, weight, weight.T, activation="silu", neurons=torch.tensor([1, 4], dtype=torch.int32)
        ),
        "instruction set": lambda: kernels.select_isa("mmx"),
        "logits": lambda: kernels.decode_step(cpu.Decoder(embedding=kernels.matrix_of(weight)), 0, 0, torch.empty(3)),
        "row_stride|x must be": lambda: kernels.channel_statistics(x.double(), None, 0, 0, None, None),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    unsorted = torch.tensor([2, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="invalid arguments"):
        kernels.gated_ffn(x, weight, weight, weight.T, activation="silu", neurons=unsorted)


def test_c_interface_rejects_nonsense() -> None:
    lib = cpu.library()
    x = torch.zeros(8)
    matrix = kernels.matrix_of(torch.zeros(4, 8))
    good = (matrix, None, x.data_ptr(), x.data_ptr(), 1, 0, None)
    assert lib.as_linear(*good) == 0
    for position, value in ((0, None), (2, None), (3, None), (4, 0), (4, 9), (5, 3)):
        bad = list(good)
        bad[position] = value
        assert lib.as_linear(*bad) == -1
    for field, value in (("data", None), ("out", 0), ("in_", -1), ("stride", 7), ("dtype", 5), ("layout", 2)):
        broken = kernels.matrix_of(torch.zeros(4, 8))
        setattr(broken, field, value)
        assert lib.as_linear(broken, *good[1:]) == -1
    assert lib.as_ffn_forward(None, x.data_ptr(), x.data_ptr(), 1, 0, None) == -1
    assert lib.as_ffn_forward(cpu.FFN(), x.data_ptr(), x.data_ptr(), 1, 0, None) == -1
    assert lib.as_decode_step(None, 0, 0, x.data_ptr(), None) == -1
    assert lib.as_decode_step(cpu.Decoder(), 0, 0, x.data_ptr(), None) == -1


def test_a_missing_library_says_so() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.endswith('._kernels') else find(name, *a)\n"
        "import torch; from actsparse import kernels\n"
        "x, w = torch.ones(1, 4), torch.ones(2, 4)\n"
        "assert kernels.path_for(x, w) == 'reference'; assert 'missing' in kernels.explain(x, w)\n"
        "assert kernels.linear(x, w).tolist() == [[4.0, 4.0]]\n"
        "try: kernels.isa()\n"
        "except ImportError as e: assert 'compiled library' in str(e)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channel_statistics(isa: str, threads: int, dtype: torch.dtype) -> None:
    tokens, channels, bins, min_exponent, sub_bits = 33, 301, 60, -6, 2
    whole = (torch.randn(tokens, channels + 5) * torch.logspace(-3, 2, channels + 5)).to(dtype)
    whole[3, 7], whole[4, 8], whole[5, 9], whole[6, 10] = math.nan, math.inf, 0.0, -0.0
    x = whole[:, 2 : channels + 2]
    counts = torch.zeros(channels, bins, dtype=torch.int32)
    sum_abs, sum_square = torch.zeros(2, channels, dtype=torch.float64)
    for _ in range(2):
        assert kernels.channel_statistics(x, counts, min_exponent, sub_bits, sum_abs, sum_square) == 2

    value = np.abs(x.float().numpy().astype(np.float64))
    finite = np.isfinite(value)
    octave = np.floor(np.log2(np.where(finite & (value > 0), value, 1.0)))
    bin_of = (octave - min_exponent) * 2**sub_bits + np.floor((value / 2.0**octave - 1) * 2**sub_bits) + 2
    bin_of = np.where(value == 0, 0, np.clip(np.nan_to_num(bin_of), 1, bins - 1)).astype(int)
    expected = np.zeros((channels, bins), dtype=np.int32)
    for t in range(tokens):
        for c in range(channels):
            expected[c, bin_of[t, c]] += 2 * finite[t, c]
    assert np.array_equal(counts.numpy(), expected)
    clean = np.where(finite, value, 0.0)
    np.testing.assert_allclose(sum_abs.numpy(), 2 * clean.sum(0), rtol=1e-13)
    np.testing.assert_allclose(sum_square.numpy(), 2 * (clean**2).sum(0), rtol=1e-13)

    again = torch.zeros_like(counts)
    assert reference.channel_statistics(x, again, min_exponent, sub_bits, None, None) == 2
    assert torch.equal(2 * again, counts)


def test_huge_pages_change_nothing_but_the_pages() -> None:
    weight = torch.randn(1100, 1030)
    values, address = weight.clone(), weight.data_ptr()
    moved = kernels.use_huge_pages(weight, None)
    assert moved % (2 << 20) == 0
    assert 0 <= moved <= weight.nbytes
    assert kernels.use_huge_pages(weight) == moved
    assert weight.data_ptr() == address
    assert torch.equal(weight, values)
    column = values.T.contiguous().T
    kernels.use_huge_pages(column)
    assert torch.equal(column, values)
    for left_alone in (torch.zeros(4, 4), weight[:, :500], weight.to("meta"), weight.to_sparse()):
        assert kernels.use_huge_pages(left_alone) == 0
    assert cpu.library().as_huge_pages(None, 1 << 30) == 0
    assert cpu.library().as_huge_pages(weight.data_ptr(), -1) == 0


def test_timed_calls_do_what_the_calls_do() -> None:
    x, y, up = torch.randn(1, 64), torch.zeros(3, 1, 96), torch.randn(96, 64)
    columns, threshold = torch.randn(64, 96).T, torch.rand(64)
    rows = torch.tensor([1, 40], dtype=torch.int32)
    by_columns, by_rows = kernels.matrix_of(columns), kernels.matrix_of(up)
    block = kernels.ffn_of(up, up, up.T, activation="silu")
    at = x.data_ptr()
    calls = [
        kernels.cpu.Call(w=ctypes.pointer(by_columns), threshold=threshold.data_ptr(), row_count=-1, x=at, y=y[0].data_ptr()),
        kernels.cpu.Call(w=ctypes.pointer(by_rows), rows=rows.data_ptr(), row_count=2, x=at, y=y[1].data_ptr()),
        kernels.cpu.Call(ffn=ctypes.pointer(block), x=at, y=y[2].data_ptr()),
    ]  # fmt: skip
    assert kernels.cpu.time_calls(calls, torch.float32) > 0
    torch.testing.assert_close(y[0], kernels.linear(x, columns, None, threshold))
    kept = torch.zeros(96).index_fill(0, rows.long(), 1.0)
    torch.testing.assert_close(y[1], kernels.linear(x, up) * kept)
    torch.testing.assert_close(y[2, :, :64], kernels.gated_ffn(x, up, up, up.T, activation="silu"))
    calls[0].y = None
    with pytest.raises(ValueError, match="refused"):
        kernels.cpu.time_calls(calls, torch.float32)


def test_read_bandwidth_is_plausible() -> None:
    median, least, greatest = kernels.read_bandwidth(repeats=3)
    assert 0.5 < least <= median <= greatest < 5000


# ---- decode step -----------------------------------------------------------------------------------------------------


class Llama:
    """A tiny random decoder with every option, stepped in plain PyTorch at any precision."""

    def __init__(self, *, window: int, q_norms: bool, biases: bool, kind: str) -> None:
        self.heads, self.kv_heads, self.dim, self.hidden, self.neurons = 6, 2, 16, 40, 70
        self.vocabulary, self.length, self.window, self.kind = 50, 24, window, kind
        wide, narrow = self.heads * self.dim, self.kv_heads * self.dim
        shapes = {"q": (wide, self.hidden), "k": (narrow, self.hidden), "v": (narrow, self.hidden),
                  "o": (self.hidden, wide), "gate": (self.neurons, self.hidden), "up": (self.neurons, self.hidden),
                  "down": (self.hidden, self.neurons)}  # fmt: skip
        self.layers = []
        for _ in range(3):
            layer = {name: torch.randn(o, i) / math.sqrt(i) for name, (o, i) in shapes.items()}
            layer |= {f"{name}_bias": torch.randn(o) / 4 for name, (o, _) in shapes.items() if biases}
            layer |= {"n1": torch.rand(self.hidden) + 0.5, "n2": torch.rand(self.hidden) + 0.5}
            if kind == "layer":
                layer |= {"n1_bias": torch.randn(self.hidden), "n2_bias": torch.randn(self.hidden)}
            if q_norms:
                layer |= {"qn": torch.rand(self.dim) + 0.5, "kn": torch.rand(self.dim) + 0.5}
            layer |= {
                "q_t": torch.rand(self.hidden) / 2,
                "o_t": torch.rand(wide) / 4,
                "g_t": torch.rand(self.neurons) / 4,
            }
            self.layers.append(layer)
        self.embedding, self.norm = torch.randn(self.vocabulary, self.hidden), torch.rand(self.hidden) + 0.5
        angle = torch.outer(torch.arange(self.length).double(), 100.0 ** -(torch.arange(self.dim // 2) / 8.0))
        self.cosine, self.sine = angle.cos().float(), angle.sin().float()

    def native(self) -> cpu.Decoder:
        def matrix(layer: dict[str, Tensor], name: str) -> cpu.Matrix:
            columns = name in ("q", "o", "down")
            return kernels.matrix_of(stored(layer[name], "columns" if columns else "rows", torch.float32),
                                     layer.get(f"{name}_bias"))  # fmt: skip

        def norm(layer: dict[str, Tensor], name: str) -> cpu.Norm:
            return kernels.norm_of(layer[name], eps=1e-5, kind=self.kind, bias=layer.get(f"{name}_bias"))

        layers = []
        for layer in self.layers:
            ffn = kernels.ffn_of(
                layer["gate"], layer["up"], stored(layer["down"], "columns", torch.float32), activation="silu",
                gate_bias=layer.get("gate_bias"), up_bias=layer.get("up_bias"), down_bias=layer.get("down_bias"),
                gate_threshold=layer["g_t"],
            )  # fmt: skip
            caches = torch.full((2, self.kv_heads, self.length, self.dim), math.nan)
            heads = {
                n: kernels.norm_of(layer[w], eps=1e-5) for n, w in (("q_norm", "qn"), ("k_norm", "kn")) if w in layer
            }
            entry = kernels.layer_of(
                input_norm=norm(layer, "n1"), post_norm=norm(layer, "n2"), ffn=ffn, k_cache=caches[0],
                v_cache=caches[1], q_threshold=layer["q_t"], o_threshold=layer["o_t"], **heads,
                **{name: matrix(layer, name) for name in "qkvo"},
            )  # fmt: skip
            layers.append(entry)
        return kernels.decoder_of(
            layers, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.dim,
            embedding=kernels.matrix_of(self.embedding), lm_head=None, final_norm=kernels.norm_of(self.norm, eps=1e-5),
            cosine=self.cosine, sine=self.sine, attention_scale=self.dim**-0.5, window=self.window,
            embedding_scale=1.5, logit_scale=0.5, residual_scale=0.75,
        )  # fmt: skip

    def step(self, token: int, past: list[list[Tensor]], dtype: torch.dtype) -> Tensor:
        """Logits after one more token; ``past`` is one list of [2, kv_heads, dim] per layer and grows."""

        def rms(x: Tensor, weight: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.to(dtype)

        def norm(layer: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
            if self.kind == "rms":
                return rms(x, layer[name])
            return F.layer_norm(x, (self.hidden,), layer[name].to(dtype), layer[f"{name}_bias"].to(dtype), 1e-5)

        def product(layer: dict[str, Tensor], name: str, x: Tensor, threshold: Tensor | None = None) -> Tensor:
            bias = layer.get(f"{name}_bias")
            return reference.linear(x, layer[name].to(dtype), None if bias is None else bias.to(dtype), threshold)

        def rotate(x: Tensor, position: int) -> Tensor:
            cosine, sine = self.cosine[position].to(dtype).repeat(2), self.sine[position].to(dtype).repeat(2)
            return x * cosine + torch.cat([-x[..., self.dim // 2 :], x[..., : self.dim // 2]], -1) * sine

        h = 1.5 * self.embedding[token].to(dtype)
        for layer, cache in zip(self.layers, past, strict=True):
            position = len(cache)
            x = norm(layer, "n1", h)
            q = product(layer, "q", x, layer["q_t"]).view(self.heads, self.dim)
            k, v = (product(layer, name, x).view(self.kv_heads, self.dim) for name in "kv")
            if "qn" in layer:
                q, k = rms(q, layer["qn"]), rms(k, layer["kn"])
            q, k = rotate(q, position), rotate(k, position)
            cache.append(torch.stack([k, v]))
            seen = torch.stack(cache[-self.window :] if self.window else cache)  # [T, 2, kv_heads, dim]
            keys, values = (
                seen[:, i].repeat_interleave(self.heads // self.kv_heads, 1).transpose(0, 1) for i in range(2)
            )
            weights = (keys @ q[..., None] * self.dim**-0.5).softmax(1)
            mixed = (weights * values).sum(1).flatten()
            h = h + 0.75 * product(layer, "o", mixed, layer["o_t"])
            x = norm(layer, "n2", h)
            gate = F.silu(product(layer, "gate", x))
            gate = torch.where(reference.keep(gate, layer["g_t"]), gate, 0.0)
            h = h + 0.75 * product(layer, "down", gate * product(layer, "up", x))
        return 0.5 * F.linear(rms(h, self.norm), self.embedding.to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0, "q_norms": False, "biases": False, "kind": "rms"},
        {"window": 7, "q_norms": True, "biases": True, "kind": "rms"},
        {"window": 0, "q_norms": False, "biases": True, "kind": "layer"},
    ],
    ids=["llama", "window-qknorm-bias", "layernorm"],
)
def test_decode_step(isa: str, threads: int, options: dict[str, object]) -> None:
    model = Llama(**options)  # type: ignore[arg-type]
    decoder = model.native()
    exact: list[list[Tensor]] = [[] for _ in model.layers]
    single: list[list[Tensor]] = [[] for _ in model.layers]
    for position in range(model.length):
        token = int(torch.randint(model.vocabulary, ()))
        found = torch.full((model.vocabulary,), math.nan)
        kernels.decode_step(decoder, token, position, found)
        expected = model.step(token, exact, torch.float64)
        # No worse than a few times plain float32 PyTorch, whose error shows how well conditioned this step is.
        error = (model.step(token, single, torch.float32) - expected).abs().max()
        assert_within(found, expected, 8 * error + 64 * U32 * expected.abs().max() + torch.zeros_like(expected))
    with pytest.raises(ValueError, match="decode_step"):
        kernels.decode_step(decoder, 0, model.length, torch.empty(model.vocabulary))
    with pytest.raises(ValueError, match="decode_step"):
        kernels.decode_step(decoder, model.vocabulary, 0, torch.empty(model.vocabulary))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(
    ("tokens", "channels", "count"), [(1, 1, 1), (5, 17, 3), (40, 384, 8), (23, 1344, 0), (9, 33, 33)]
)
def test_core_statistics_match_the_oracle(dtype, positive, tokens, channels, count):
    x = torch.randn(tokens, 2 * channels).to(dtype)[:, :channels]
    x[x.abs() < 0.3] = 0  # inactive channels, and ties
    found = kernels.core_statistics(x, count, 0.25, positive=positive)
    expected = kernels.reference.core_statistics(x, count, 0.25, positive=positive)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=0)

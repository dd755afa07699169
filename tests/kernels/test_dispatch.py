"""The Python layer: paths, gradients, operators, refusals."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse import kernels
from actsparse.kernels import cpu

from .blocks import Block
from .bounds import assert_within


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

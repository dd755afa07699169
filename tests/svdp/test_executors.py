"""Blocks with predicted rows: models against the dense ones, kernels and portable executor against the oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from actsparse import kernels, restore, sparsify
from actsparse.kernels import Rules, portable, reference
from actsparse.plan import SKIP_ZEROS

from ..conftest import REPOSITORY
from .cases import MODELS, opt_model, plan_of, windows


@pytest.mark.parametrize("kind", MODELS)
def test_exact_path_is_lossless(kind: str) -> None:
    model, tokens = MODELS[kind](), windows(256, 64, seed=1).tokens
    with torch.no_grad():
        dense = model(input_ids=tokens).logits
        names = list(model.state_dict())
        plan = plan_of(model, "relu")
        sparsify(model, plan)
        assert list(model.state_dict()) == names
        torch.testing.assert_close(model(input_ids=tokens).logits, dense, rtol=1e-4, atol=1e-4)
        # Eight tokens and fewer take the native path.
        torch.testing.assert_close(model(input_ids=tokens[:1, :5]).logits, dense[:1, :5], rtol=1e-4, atol=1e-4)
        restore(model)
        assert torch.equal(model(input_ids=tokens).logits, dense)
    assert plan.sparsity == 0
    assert all(0.2 < value < 1 for value in plan.achieved.values())


@pytest.mark.parametrize("kind", MODELS)
def test_sparsified_models_follow_the_oracle(kind: str) -> None:
    """With full rank and s = 0 the predictor loses next to nothing; with a low rank, decode and prefill agree."""
    model, tokens = MODELS[kind](), windows(256, 64, seed=1).tokens
    with torch.no_grad():
        dense = model(input_ids=tokens).logits
        plans = [plan_of(model, rank=48, s=0.3), plan_of(model, rank=8, s=0.6)]
        sparsify(model, plans[0])
        error = (model(input_ids=tokens).logits - dense).norm() / dense.norm()
        assert float(error) < 0.05
        sparsify(model, plans[1])
        together = model(input_ids=tokens[:1]).logits
        some = model(input_ids=tokens[:1, :5]).logits
        torch.testing.assert_close(some, together[:, :5], rtol=1e-3, atol=1e-3)


def test_decode_scope_of_a_plain_block_sees_the_real_sequence_length() -> None:
    """OPT flattens batch and sequence before its block: a batched prefill must still not count as decoding."""
    model, tokens = opt_model(), windows(256, 64, seed=2).tokens
    plan = plan_of(model, rank=4, s=0.9, bias="constant")
    with torch.no_grad():
        dense = model(input_ids=tokens).logits
        sparsify(model, plan, scope="decode")
        assert torch.equal(model(input_ids=tokens).logits, dense)
        alone = model(input_ids=tokens[:, :1]).logits
        restore(model)
        assert not torch.equal(alone, model(input_ids=tokens[:, :1]).logits)


def ffn_case(
    dtype: torch.dtype, *, gated: bool = True, up_activation: str = "identity", rows: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Random operands of a block with a rank-5 predictor, and its options."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, neurons = 40, 150
    a, b = random(5, hidden) / hidden**0.5, random(neurons, 5)
    gate = (b @ a + 0.1 * random(neurons, hidden) / hidden**0.5).to(dtype)
    up = random(neurons, hidden).to(dtype) / hidden**0.5
    down = (random(neurons, hidden).to(dtype) / neurons**0.5).t()
    options: dict[str, Any] = {
        "activation": "relu",
        "up_activation": up_activation,
        "predictor_a": a.to(dtype),
        "predictor_b": b.to(dtype),
        "predictor_bias": 0.6 + 0.1 * random(neurons),
        "gate_threshold": torch.full((neurons,), SKIP_ZEROS),
        "down_bias": random(hidden).to(dtype),
    }
    if up_activation == "relu":
        options["value_threshold"] = torch.full((neurons,), SKIP_ZEROS)
    x = random(rows, hidden).to(dtype)
    return x, gate if gated else None, up if gated else gate, down, options


def options_in_float(options: dict[str, Any]) -> dict[str, Any]:
    """Matrices of the predictor in float32, as the kernels compute with them."""
    return {key: value.float() if key in ("predictor_a", "predictor_b") else value for key, value in options.items()}


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
EXECUTORS = {"kernel": kernels.gated_ffn, "portable": portable.gated_ffn}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["reglu", "drelu", "plain"])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_are_not_needed_are_not_read(executor: str, dtype: torch.dtype, kind: str, rows: int) -> None:
    """NaN in every gate row predicted inactive, and in every up row and down column whose gate is not above 0."""
    x, gate, up, down, options = ffn_case(
        dtype, gated=kind != "plain", up_activation="relu" if kind == "drelu" else "identity", rows=rows
    )
    with torch.no_grad():
        expected = reference.gated_ffn(x, gate, up, down, Rules(**options))
        read = reference.ffn_keep(
            x.float(), None if gate is None else gate.float(), up.float(), Rules(**options_in_float(options))
        )
        used = {name: mask.any(0) for name, mask in read.items()}
        assert 0 < int(used["down"].sum()) < int(used["gate" if gate is not None else "up"].sum()) < 150
        poisoned = [None if w is None else w.clone() for w in (gate, up)]
        for name, weight in zip(("gate", "up"), poisoned, strict=True):
            if weight is not None:
                weight[~used[name]] = torch.nan
        columns = down.t().clone()
        columns[~used["down"]] = torch.nan
        found = EXECUTORS[executor](x, *poisoned, columns.t(), Rules(**options))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rules", ["neurons", "everything", "nothing kept", "dense"])
def test_portable_executor_has_the_kernels_semantics(rules: str) -> None:
    x, gate, up, down, options = ffn_case(torch.float32, rows=3)
    if rules == "dense":
        options = {"activation": "silu"}
    if rules == "nothing kept":
        options["predictor_bias"] = torch.full((150,), -1e9)
    if rules in ("neurons", "everything"):
        options["neurons"] = torch.arange(0, 150, 2, dtype=torch.int32)
    if rules == "everything":
        options |= {
            "mean": torch.randn(150),
            "gate_bias": torch.randn(150),
            "up_bias": torch.randn(150),
            "gate_in_threshold": torch.full((40,), 0.3),
            "up_in_threshold": torch.full((40,), 0.2),
            "value_threshold": torch.full((150,), 0.05),
        }
    expected = reference.gated_ffn(x, gate, up, down, Rules(**options))
    torch.testing.assert_close(portable.gated_ffn(x, gate, up, down, Rules(**options)), expected, rtol=1e-5, atol=1e-5)


def test_portable_linear_reads_kept_columns_only() -> None:
    x, weight, bias = torch.randn(3, 40), torch.randn(7, 40).t().contiguous().t(), torch.randn(7)
    threshold = torch.full((40,), 1.5)
    expected = reference.linear(x, weight, bias, threshold)
    poisoned = weight.clone()
    poisoned[:, ~reference.keep(x, threshold).any(0)] = torch.nan
    torch.testing.assert_close(portable.linear(x, poisoned, bias, threshold), expected, rtol=1e-5, atol=1e-5)


# What the executor asks of a device; docs/svdp.md says which of them torch_npu documents.
OPERATORS = {
    "__and__", "abs", "add", "any", "bitwise_not", "index_select", "le", "lt", "matmul", "mul", "nonzero", "numpy_T", "relu",
    "reshape", "select", "to", "where",
}  # fmt: skip


METHODS = ("chess", "teal", "svdp")


@pytest.fixture(scope="module")
def on_a_private_device() -> dict[str, Any]:
    """What a process of its own, which has a device of its own, found of blocks and of each of the models."""
    program = subprocess.run(
        [sys.executable, "-m", "tests.svdp.private_executor", "blocks", *METHODS],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert program.returncode == 0, program.stderr
    found: dict[str, Any] = json.loads(program.stdout.splitlines()[-1])
    return found


def test_blocks_on_a_device_that_is_neither_cpu_nor_cuda(on_a_private_device: dict[str, Any]) -> None:
    found = on_a_private_device["blocks"]
    assert found["worst"] < 1e-5
    assert set(found["operators"]) == OPERATORS


@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_a_device_that_is_neither_cpu_nor_cuda(on_a_private_device: dict[str, Any], method: str) -> None:
    found = on_a_private_device[method]
    assert found["path"] == "portable"
    assert found["worst"] < 1e-5

"""vLLM under a plan gives what ``actsparse.sparsify`` gives: logits over the whole vocabulary, and the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STEPS, TOLERANCE, Wanted, arguments, same

import actsparse


def far(a: Wanted, b: list[Any]) -> bool:
    """Whether the two differ by much more than rounding."""
    return all(float((x[0] - y["logits"][0]).abs().max()) > 100 * TOLERANCE for x, y in zip(a.logits, b, strict=True))


def test_every_method_eager(
    models: dict[str, Path], plans: dict[str, Any], wanted: Callable[[str], Wanted], run_engines: Any
) -> None:
    methods = list(plans)
    requests = [
        (arguments(models[plans[m][0]], m, plans[m][1], enforce_eager=True), wanted(m).prompts) for m in methods
    ]
    dense = ({"model": str(models["swiglu"]), "enforce_eager": True}, wanted("chess").prompts)
    *results, without = run_engines([*requests, dense])
    for method, result in zip(methods, results, strict=True):
        same(result, wanted(method))
    assert far(wanted("chess"), without)


def test_two_rule_sets_over_one_compile_cache(
    models: dict[str, Path], plans: dict[str, Any], wanted: Callable[[str], Wanted], run_engines: Any, tmp_path: Path
) -> None:
    for method in ("chess", "teal"):  # a process each: the second finds the first one's graphs on the disk
        (result,) = run_engines([(arguments(models["swiglu"], method, plans[method][1]), wanted(method).prompts)])
        same(result, wanted(method))
        assert list((tmp_path / "cache").rglob("torch_compile_cache")), "nothing was compiled"


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_two_processes(
    eager: bool, models: dict[str, Path], plans: dict[str, Any], wanted: Callable[[str], Wanted], run_engines: Any
) -> None:
    methods = ("chess", "teal") if eager else ("chess",)
    requests = [
        (
            arguments(models["swiglu"], m, plans[m][1], enforce_eager=eager, tensor_parallel_size=2),
            wanted(m).prompts,
        )
        for m in methods
    ]
    results = run_engines(requests, VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="0|1")
    for method, result in zip(methods, results, strict=True):
        same(result, wanted(method))


def test_packed_directory(packed: Path, run_engines: Any) -> None:
    """Inputs are rounded to whole numbers inside the product, and one on the edge of a level may be read to another.

    So the bound is on the whole of the logits, and wider than the others'.
    """
    model, _ = actsparse.load(str(packed))
    actsparse.sparsify(model.float(), str(packed / "plan.safetensors"), scope="all")
    about = json.loads((packed / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    engine = {
        "model": str(packed), "enforce_eager": True,
        "hf_overrides": {"quantization_config": {**about, "scope": "all"}},
    }  # fmt: skip
    prompts = [[5, 9, 300], [77, 12, 1, 8, 400]]
    (result,) = run_engines([(engine, prompts)])
    for prompt, made in zip(prompts, result, strict=True):
        # Token by token, as the engine works: more than eight rows at once take another path.
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0, eos_token_id=[],
        )  # fmt: skip
        assert wanted.sequences[0, len(prompt) :].tolist() == made["tokens"]
        logits = torch.cat(wanted.logits)
        assert float((made["logits"] - logits).norm()) < 0.05 * float(logits.norm())

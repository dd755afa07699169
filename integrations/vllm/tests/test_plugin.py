"""What is refused, how matrices are divided among processes, and the operator; no engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import actsparse_vllm
import pytest
import torch
from actsparse_vllm import operators, packed
from actsparse_vllm.config import ActsparseConfig
from transformers import AutoConfig, AutoModelForCausalLM

from actsparse.kernels import planes
from actsparse.methods.rounding import round_nearest
from actsparse.plan import Plan


def configured(model: Path, **config: Any) -> ActsparseConfig:
    """As vLLM does it for a model with this quantization_config."""
    made = ActsparseConfig.from_config({"quant_method": "actsparse", **config})
    made.maybe_update_config(str(model), hf_config=AutoConfig.from_pretrained(model))
    return made


def refused(model: Path, message: str, **config: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        configured(model, **config)
    assert "\n" not in str(caught.value)


def changed(plan: Path, **changes: Any) -> Path:
    target = plan.with_suffix(".changed")
    dataclasses.replace(Plan.load(plan), **changes).save(target)
    return target


def test_a_plan_of_this_model_is_taken(models: dict[str, Path], plans: dict[str, Any]) -> None:
    assert configured(models["swiglu"], plan=str(plans["chess"][1])).plan.method == "chess"
    assert configured(models["swiglu"], plan="chess.plan").plan.method == "chess"  # relative to the model


def test_refusals_are_one_line(models: dict[str, Path], plans: dict[str, Any], tmp_path: Path) -> None:
    model, chess = models["swiglu"], plans["chess"][1]
    refused(model, "has plan None, expected")
    refused(model, "does not exist", plan="nowhere.safetensors")
    refused(model, "scope is 'decode', expected 'all'", plan=str(changed(chess, scope="decode")))
    assert configured(model, plan=str(changed(chess, scope="decode")), scope="all").plan.scope == "all"
    refused(model, "its activation is relu, the model's activation is silu", plan=str(plans["svdp"][1]))
    prompt = {"rule": "griffin", "layers": [0, 1], "counts": [10, 10]}
    refused(
        model, "chooses neurons per prompt",
        plan=str(changed(chess, scope="decode", prompt=prompt, rules={}, method="griffin")),
    )  # fmt: skip
    refused(model, "evaluation only", plan=str(changed(chess, settings={"evaluation_only": True})))
    other = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    refused(tmp_path / "other", "its weights is .*, the model's weights is", plan=str(chess))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}), encoding="utf-8")
    refused(tmp_path / "other", "family 'gpt2' is not supported", plan=str(chess))


def test_graded_needs_packed_weights(models: dict[str, Path], packed: Path) -> None:
    refused(models["swiglu"], "needs packed weights", plan=str(packed / "plan.safetensors"), scope="all")


def test_a_rule_without_a_layer_is_refused(models: dict[str, Path], plans: dict[str, Any]) -> None:
    config = configured(models["swiglu"], plan=str(plans["chess"][1]))
    with pytest.raises(ValueError, match="no layers that vLLM merges"):
        config.check_claimed()
    config._claimed = {0: {"o", "gate", "up", "down"}}
    with pytest.raises(ValueError, match=r"plan has layers\.0\.q\.threshold, the layer has no such projection"):
        config.check_claimed()


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0", "dev"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(actsparse_vllm.VersionError, match=rf"vLLM is {version}, expected >= 0.32, < 0.33"):
        actsparse_vllm.check_version(version)


def test_operator_has_a_fake_and_forgets_layers() -> None:
    layer = torch.nn.Linear(3, 4)
    operators.attach(layer, 4)
    operators.set_product(layer, lambda_product(layer))
    x = torch.randn(2, 3)
    handle = layer.actsparse_handle
    torch.library.opcheck(torch.ops.actsparse_vllm.product, (x, handle, None, 4))
    assert torch.equal(operators.call(layer, x, layer.bias), layer(x))
    number = int(handle)
    del layer
    assert number not in operators._products


class lambda_product:
    def __init__(self, layer: torch.nn.Linear) -> None:
        self._weight = layer.weight.detach()

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(x, self._weight, bias)


def test_packed_matrices_are_divided() -> None:
    weight = torch.randn(192, 40, generator=torch.Generator().manual_seed(1))
    whole = round_nearest(weight, 6)
    dense = planes.unpack(whole)
    for begin, end in ((0, 64), (64, 192), (128, 192)):
        assert torch.equal(planes.unpack(packed._rows(whole, begin, end, end - begin, "q")), dense[begin:end])
    padded = planes.unpack(packed._rows(whole, 128, 192, 128, "head"))
    assert torch.equal(padded[:64], dense[128:])
    assert bool((padded[64:] == 0).all())
    assert torch.equal(planes.unpack(packed._columns(whole, slice(10, 30))), dense[:, 10:30])
    with pytest.raises(ValueError, match=r"q is cut at 96 and 192 among processes, expected multiples of 64"):
        packed._rows(whole, 96, 192, 96, "q")


def test_key_heads_that_processes_share() -> None:
    method = packed.PackedLinearMethod(SimpleNamespace(rules={}), "layers.0", ("q", "k", "v"))
    method._sizes = [64, 64, 64]  # four processes, two key heads of 64
    for rank, expected in ((0, 0), (1, 0), (2, 64), (3, 64)):
        layer = SimpleNamespace(tp_rank=rank, tp_size=4)
        assert method._outputs(layer, 1, 128) == (expected, expected + 64)
        assert method._outputs(layer, 0, 256) == (64 * rank, 64 * rank + 64)

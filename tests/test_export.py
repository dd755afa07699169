"""Directories for serving engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actsparse.cli import main
from actsparse.models import sites
from actsparse.plan import ModelIdentity, Plan


@pytest.fixture
def model(tiny: Any, tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plan(tiny: Any, tmp_path: Path) -> Path:
    identity = ModelIdentity(**sites.describe(tiny()))
    rules = {"layers.0.ffn.threshold": torch.tensor([0.1])}
    Plan("cats", 0.5, identity, rules, scope="decode").save(tmp_path / "plan")
    return tmp_path / "plan"


def test_dense_directory_with_a_plan(model: Path, plan: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main(["export", str(model), "--plan", str(plan), "--engine", "vllm", "-o", str(target)]) == 0
    about = json.loads((target / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "actsparse"
    assert about["plan"] == "plan.safetensors"
    assert Plan.load(target / "plan.safetensors").scope == about["scope"] == "all"
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"model.safetensors"}
    assert "quantization_config" not in json.loads((model / "config.json").read_text())
    assert (target / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_relu_is_named_as_the_plug_in_knows_it(tiny: Any, plan: Path, tmp_path: Path) -> None:
    tiny(hidden_act="relu").save_pretrained(tmp_path / "relu")
    assert (
        main(["export", str(tmp_path / "relu"), "--plan", str(plan), "--engine", "vllm", "-o", str(tmp_path / "r")])
        == 0
    )
    assert json.loads((tmp_path / "r" / "config.json").read_text())["architectures"] == ["ReluLlamaForCausalLM"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "-o", "{out}"], "has no plan of its own: expected one"),
        (["{model}", "--plan", "{plan}", "-o", "{model}"], "it exists already"),
        (["{model}", "--plan", "{plan}", "-o", "{out}/a/b"], "is no directory"),
        (["nowhere/at/all", "--plan", "{plan}", "-o", "{out}"], "does not exist"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, model: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"model": model, "plan": plan, "out": tmp_path / "out"}
    assert main(["export", "--engine", "vllm", *(one.format(**names) for one in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob(".out*"))
    assert not (tmp_path / "out").exists()

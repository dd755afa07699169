"""Predictors in PowerInfer's file format: there and back, and what is refused."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from actsparse.cli import main
from actsparse.models.interchange import export_predictors, import_predictors
from actsparse.plan import ModelIdentity, Plan, PlanError

MODEL = ModelIdentity("llama", 2, 24, 60, 4, 2, 6, "relu", "0" * 64)


def plan(method: str = "svdp", rank: int = 5) -> Plan:
    """A plan with random predictors."""
    generator = torch.Generator().manual_seed(0)
    rules = {}
    for layer in range(MODEL.layers):
        rules[f"layers.{layer}.ffn.predictor_a"] = torch.randn(rank, 24, generator=generator)
        rules[f"layers.{layer}.ffn.predictor_b"] = torch.randn(60, rank, generator=generator)
        rules[f"layers.{layer}.ffn.predictor_bias"] = torch.randn(60, generator=generator)
    return Plan(method=method, sparsity=0.5, model=MODEL, rules=rules)


def test_files_are_what_powerinfer_and_svdp_read(tmp_path: Path) -> None:
    files = export_predictors(plan(), tmp_path / "out")
    assert [path.name for path in files] == ["model_0.pt", "model_1.pt"]
    state = torch.load(files[1], weights_only=True)
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "fc1.weight": (5, 24),
        "fc2.weight": (60, 5),
        "fc2.bias": (60,),
    }
    assert all(value.dtype == torch.float16 for value in state.values())


def test_there_and_back(tmp_path: Path) -> None:
    original = plan()
    export_predictors(original, tmp_path, dtype=torch.float32)
    brought = import_predictors(tmp_path, MODEL)
    for name, tensor in original.rules.items():
        assert torch.equal(brought.rules[name], tensor)
    assert float(brought.rules["layers.0.ffn.threshold"]) > 0
    drelu = import_predictors(tmp_path, dataclasses.replace(MODEL, activation="drelu"))
    assert "layers.1.down.threshold" in drelu.rules


def test_doubled_predictors_survive_a_relu_between_the_layers(tmp_path: Path) -> None:
    original = plan()
    state = torch.load(export_predictors(original, tmp_path, dtype=torch.float32, relu=True)[0], weights_only=True)
    x, rules = torch.randn(7, 24), original.layer_rules(0)
    through = (x @ state["fc1.weight"].T).relu() @ state["fc2.weight"].T
    expected = x @ rules["ffn.predictor_a"].T @ rules["ffn.predictor_b"].T
    torch.testing.assert_close(through, expected, rtol=1e-4, atol=1e-4)


class Payload:
    """Code that a careless loader would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_predictors(plan(), tmp_path)
    torch.save({"fc1.weight": Payload()}, tmp_path / "model_0.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=r"model_0.pt is refused: not a plain state dict"):
        import_predictors(tmp_path, MODEL)
    assert not (tmp_path / "owned").exists()


def replace(path: Path, **tensors: Any) -> None:
    """Change tensors of a file; None removes one."""
    state = torch.load(path, weights_only=True)
    for name, value in tensors.items():
        key = name.replace("_", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    torch.save(state, path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"fc1_weight": torch.zeros(5, 23)}, r"fc1.weight has shape \[5, 23\], expected \[rank, 24\]"),
        ({"fc2_weight": torch.zeros(60, 4)}, r"fc2.weight has shape \[60, 4\], expected \[60, 5\]"),
        ({"fc2_bias": torch.zeros(61)}, r"fc2.bias has shape \[61\], expected \[60\]"),
        ({"fc2_bias": torch.full((60,), float("nan"))}, "not finite"),
        ({"fc1_weight": torch.zeros(5, 24, dtype=torch.int32)}, "is torch.int32"),
        ({"fc1_weight": None}, "has the tensors fc2.bias, fc2.weight, expected"),
        ({"extra": torch.zeros(1)}, "has the tensors extra, "),
        ({"fc2_bias": None}, "has no fc2.bias: PowerInfer's own predictors need a ReLU"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    export_predictors(plan(), tmp_path)
    replace(tmp_path / "model_1.pt", **tensors)
    with pytest.raises(PlanError, match=message):
        import_predictors(tmp_path, MODEL)


def test_linear_files_without_bias_can_be_taken(tmp_path: Path) -> None:
    for path in export_predictors(plan(), tmp_path):
        replace(path, fc2_bias=None)
    brought = import_predictors(tmp_path, MODEL, linear=True)
    assert bool((brought.rules["layers.0.ffn.predictor_bias"] == 0).all())


@pytest.mark.parametrize(("damage", "message"), [("missing", "misses model_1.pt"), ("extra", "has model_2.pt")])
def test_every_layer_needs_exactly_one_file(tmp_path: Path, damage: str, message: str) -> None:
    export_predictors(plan(), tmp_path)
    if damage == "missing":
        (tmp_path / "model_1.pt").unlink()
    else:
        (tmp_path / "model_2.pt").write_bytes((tmp_path / "model_0.pt").read_bytes())
    with pytest.raises(PlanError, match=message):
        import_predictors(tmp_path, MODEL)


def test_garbage_and_missing_places_are_one_line(tmp_path: Path) -> None:
    export_predictors(plan(), tmp_path)
    (tmp_path / "model_0.pt").write_bytes(b"\0garbage")
    with pytest.raises(PlanError, match="model_0.pt is refused"):
        import_predictors(tmp_path, MODEL)
    with pytest.raises(PlanError, match="is not a directory"):
        import_predictors(tmp_path / "nowhere", MODEL)
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot make the directory"):
        export_predictors(plan(), tmp_path / "file")


def test_export_needs_predictors_that_fit_the_type(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="plan of method chess has no predictor for layer 0"):
        export_predictors(Plan(method="chess", sparsity=0.5, model=MODEL, rules={}), tmp_path)
    large = plan()
    large.rules["layers.1.ffn.predictor_b"][0, 0] = 1e9  # type: ignore[index]
    with pytest.raises(PlanError, match=r"layer 1 fc2.weight holds a value out of the range of torch.float16"):
        export_predictors(large, tmp_path)


def test_command_line_exports_imports_and_reports(
    tmp_path: Path, tiny: Any, tokenizer: Any, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, made, back = tmp_path / "model", tmp_path / "made.safetensors", tmp_path / "back.safetensors"
    tiny(hidden_act="relu").save_pretrained(model)
    tokenizer.save_pretrained(model)
    shared = ["--text", str(text_file), "--tokens", "1024", "--window", "64"]
    assert (
        main(["calibrate", str(model), "--method", "svdp", "--rank", "8", "--s", "0.4", *shared, "-o", str(made)]) == 0
    )
    assert Plan.load(made).sparsity == 0.4
    assert main(["predictors", "export", str(made), str(tmp_path / "files"), "--dtype", "float32"]) == 0
    assert main(["predictors", "import", str(back), str(tmp_path / "files"), "--model", str(model)]) == 0
    name = "layers.1.ffn.predictor_bias"
    assert torch.equal(Plan.load(made).rules[name], Plan.load(back).rules[name])
    capsys.readouterr()
    picture = tmp_path / "report.png"
    report = ["predictors", "report", str(back), "--model", str(model), *shared, "--json"]
    assert main([*report, "--plot", str(picture)]) == 0
    assert '"roc_auc"' in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    assert main(["predictors", "export", str(tmp_path / "none"), str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err

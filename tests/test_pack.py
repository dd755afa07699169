"""Packing a model, opening the directory, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from actsparse.calibration import pack as engine
from actsparse.calibration import presets
from actsparse.calibration.pack import Settings, pack
from actsparse.calibration.presets import QUALITIES, stored_for
from actsparse.cli import main
from actsparse.kernels import planes
from actsparse.measure.evaluate import scorer
from actsparse.methods.base import MethodError
from actsparse.methods.statistics import CalibrationError
from actsparse.models import opening, sites, text
from actsparse.models.sites import ModelError
from actsparse.runtime.decode import Decoder
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.packed import PackedLinear, open_packed
from actsparse.runtime.swap import open_model, restore, sparsify, state_of
from tests.conftest import REFERENCE

SETTINGS = Settings(bits_stored=6, bits_read=3.2, tokens=512)


@pytest.fixture
def directory(tiny: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    """A dense checkpoint; wide enough that scales and padding stay small."""
    path = tmp_path / "dense"
    model = tiny("llama", torch.bfloat16, hidden_size=128, intermediate_size=192, head_dim=32, num_attention_heads=4)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def text_settings(text_file: Path) -> Settings:
    return Settings(bits_stored=6, bits_read=3.2, text=str(text_file), tokens=512)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_a_packed_model_is_the_rounded_one(directory: Path, text_settings: Settings, tmp_path: Path) -> None:
    plan = pack(str(directory), tmp_path / "packed", text_settings)
    assert plan.settings["bits_read"] == pytest.approx(3.2)
    dense = opening.open_model(str(directory))
    model = open_model(str(tmp_path / "packed"))
    state = state_of(model)
    assert state is not None
    assert isinstance(model.model.layers[0].mlp.up_proj, GradedLinear)
    assert isinstance(model.get_output_embeddings(), GradedLinear)
    # Every plane: 6 bits of each weight.
    restore(model)
    for packed_layer, layer in zip(sites.layers_of(model), sites.layers_of(dense), strict=True):
        for name, _ in layer.family.projections:
            product = packed_layer.product(name)
            assert isinstance(product, PackedLinear)
            weight = layer.weight(name).float()
            error = (planes.unpack(product.packed) - weight).square().sum() / weight.square().sum()
            assert error < 0.2  # feedback moves codes off their weights on purpose
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    tokens = torch.randint(1, 4096, (1, 40))
    with torch.no_grad():
        exact, rounded = dense(tokens).logits.float(), model(tokens).logits.float()
    assert float((rounded - exact).norm() / exact.norm()) < 0.3
    sparsify(model, state.plan)
    assert Decoder.supports(model) is None


def test_an_interrupted_run_ends_in_the_same_bytes(
    directory: Path, text_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(str(directory), tmp_path / "whole", text_settings)
    do = engine._Run._do
    seen: list[int] = []

    def stop(run: Any, activity: Any, theta: float) -> None:
        if seen and activity.layer == 0:
            raise KeyboardInterrupt
        seen.append(activity.layer)
        do(run, activity, theta)

    monkeypatch.setattr(engine._Run, "_do", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(str(directory), tmp_path / "again", text_settings)
    assert seen == [-1, 1]
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(
        engine._Run, "_do", lambda run, activity, theta: (seen.append(activity.layer), do(run, activity, theta))
    )
    pack(str(directory), tmp_path / "again", text_settings)
    assert seen == [-1, 1, 0]
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert not (tmp_path / ".again.packing").exists()


def test_the_text_that_comes_along_is_enough(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(directory), "-o", str(tmp_path / "out"), "--bits-read", "3.5", "--tokens", "600"]) == 0
    assert "6 bits stored, 3.50 bits read per weight" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert not re.search(r"\.\d{12}", card)  # numbers are rounded
    # Where the text lies on this machine is nobody's business elsewhere.
    assert "from 512 tokens of default.jsonl, which comes with actsparse." in card
    assert "rounding error feedback and then coordinate descent" in card
    assert str(presets.DEFAULT_TEXT.parent).encode() not in (tmp_path / "out" / "plan.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "is truncated or damaged"),
        ("missing", "lacks actsparse-00001.safetensors"),
        ("scale", "scale holds a value that is not finite"),
        ("codes", "expected uint8"),
        ("foreign", "which the model does not know"),
        ("lacking", "lacks model.norm.weight"),
        ("version", "has format .9., expected 2"),
    ],
)
def test_damaged_directories_are_refused(
    directory: Path, text_settings: Settings, tmp_path: Path, damage: str, message: str
) -> None:
    path = tmp_path / "packed"
    pack(str(directory), path, text_settings)
    shard, rest = path / "actsparse-00001.safetensors", path / "actsparse-00000.safetensors"
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.unlink()
    elif damage == "version":
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"]["format_version"] = 9
        (path / "config.json").write_text(json.dumps(config))
    else:
        file = rest if damage in ("foreign", "lacking") else shard
        tensors = load_file(file)
        name = "model.layers.0.mlp.up_proj"
        if damage == "scale":
            tensors[f"{name}.scale"][3] = torch.inf
        elif damage == "codes":
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, :-1].contiguous()
        elif damage == "foreign":
            tensors["model.other.weight"] = torch.zeros(3)
        else:
            del tensors["model.norm.weight"]
        save_file(tensors, file)
    with pytest.raises(ModelError, match=message):
        open_packed(str(path))


def test_what_cannot_be_packed_is_refused(directory: Path, text_settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "packed"
    pack(str(directory), path, text_settings)
    with pytest.raises(ModelError, match="exists, expected a new directory"):
        pack(str(directory), path, text_settings)
    with pytest.raises(ModelError, match="is packed already"):
        pack(str(path), tmp_path / "twice", text_settings)
    with pytest.raises(ModelError, match="is packed, expected a dense one"):
        opening.open_model(str(path))
    with pytest.raises(MethodError, match="bits read is 9"):
        pack(str(directory), tmp_path / "more", Settings(bits_read=9))
    with pytest.raises(MethodError, match="bits read is 0"):
        pack(str(directory), tmp_path / "less", Settings(bits_read=0))
    assert not (tmp_path / "less").exists()


def test_weights_of_nan_leave_nothing_behind(directory: Path, text_settings: Settings, tmp_path: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        pack(str(directory), tmp_path / "packed", text_settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]


def test_a_budget_of_perplexity_is_met_beside_the_dense_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, path = str(REFERENCE / "swiglu"), str(tmp_path / "packed")
    source = str(REFERENCE / "text" / "calibration.jsonl")
    command = ["pack", dense, "-o", path, "--text", source, "--tokens", "512", "--max-ppl-increase"]
    # Every plane of six bits costs more than nothing.
    with monkeypatch.context() as patch:
        patch.setattr(presets, "quality_for", lambda budget: "balanced")
        assert main([*command, "0.0001%"]) == 2
    refusal = " ".join(capsys.readouterr().err.split())
    assert "at the least that graded can skip, expected at most the 0.0001% asked for" in refusal
    # It leaves its layers, says where, and they serve a budget that can be met.
    assert not Path(path).exists()
    assert [file.name for file in tmp_path.iterdir()] == [".packed.packing"]
    assert f"stay for another budget, remove them if none follows, in {tmp_path / '.packed.packing'}" in refusal
    with monkeypatch.context() as patch:
        patch.setattr(engine._Run, "_do", None)
        assert main([*command, "4%"]) == 0
    assert "asked for at most 4.00%" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["packed"]
    model = open_model(path)
    state = state_of(model)
    assert state is not None
    plan = state.plan
    assert plan.scope == "decode"
    windows = text.load_windows(source, AutoTokenizer.from_pretrained(path), tokens=512, window=512)
    found = scorer(model, windows, opening.open_model(dense))(plan.with_scope("all"))[1]
    assert found == pytest.approx(plan.settings["measured_ppl_increase"], abs=1e-3)
    assert 0.025 < found <= 0.04


def test_where_little_may_be_lost_codes_of_eight_bits_are_searched(
    directory: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pack", str(directory), "--text", str(text_file), "--tokens", "512", "--max-ppl-increase"]
    assert main([*command, "1%", "-o", str(tmp_path / "packed")]) == 0
    state = state_of(open_model(str(tmp_path / "packed")))
    assert state is not None
    assert state.plan.settings["bits_stored"] == 8
    assert state.plan.settings["measured_ppl_increase"] <= 0.01
    assert main([*command, "-0.5", "-o", str(tmp_path / "negative")]) == 2
    assert "perplexity increase is -0.5, expected 0 or more" in capsys.readouterr().err


def test_where_much_is_read_more_is_stored(directory: Path, text_file: Path, tmp_path: Path) -> None:
    assert [stored_for(bits) for bits in (1.0, 3.9, 4.0, 8.1, None)] == [6, 6, 8, 8, 6]
    assert {name: stored_for(bits) for name, bits in QUALITIES.items()} == {
        "near-lossless": 8,
        "balanced": 6,
        "fast": 6,
    }
    assert (Settings(bits_read=4.0).stored, Settings(6, 4.0).stored) == (8, 6)
    Settings(bits_read=7.5).check()
    with pytest.raises(MethodError, match="bits read is 7.5"):
        Settings(6, 7.5).check()
    options = ["--text", str(text_file), "--tokens", "512", "--quality", "near-lossless"]
    for more, stored in (([], 8), (["--bits-stored", "6"], 6)):
        path = tmp_path / str(stored)
        assert main(["pack", str(directory), "-o", str(path), *options, *more]) == 0
        assert json.loads((path / "config.json").read_text())["quantization_config"]["bits_stored"] == stored
        state = state_of(open_model(str(path)))
        assert state is not None
        assert state.plan.settings["bits_stored"] == stored
        assert state.plan.settings["bits_read"] == pytest.approx(4)
        assert len(state.plan.rules["layers.0.up.level_threshold"]) == stored // 2


def test_codes_of_another_model_are_refused(
    directory: Path, text_settings: Settings, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    pack(str(directory), tmp_path / "one", text_settings)
    changes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_attention_heads": 4}
    tiny("llama", torch.bfloat16, seed=1, **changes).save_pretrained(directory)
    pack(str(directory), tmp_path / "two", text_settings)
    name = "actsparse-00001.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(ModelError, match=r"actsparse-00001\.safetensors holds codes of another model or layer"):
        open_packed(str(tmp_path / "one"))


def test_weights_that_another_tool_quantised_are_refused(
    directory: Path, text_settings: Settings, tmp_path: Path
) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantised already \(gptq\), expected dense weights"):
        pack(str(directory), tmp_path / "packed", text_settings)
    assert not (tmp_path / "packed").exists()


def test_a_full_disk_is_one_line(
    directory: Path,
    text_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "pack",
        str(directory),
        "-o",
        str(tmp_path / "packed"),
        "--text",
        str(text_settings.text),
        "--tokens",
        "512",
    ]

    def full(tensors: Any, path: str, *more: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "save_file", full)
        assert main(arguments) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("actsparse: cannot write")
    assert err.endswith("No space left on device (os error 28)")
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(arguments) == 2
    assert "needs about 0.0 GB" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]

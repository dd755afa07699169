"""Hostile input: every verb refuses it with one short line and exit code 2, and nothing is left behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actsparse import kernels
from actsparse.models.opening import open_model
from actsparse.models.sites import ModelError
from actsparse.plan import atomic_path, one_line
from actsparse.runtime.generate import generate
from actsparse.runtime.layers import is_columns
from actsparse.runtime.lowmemory import open_mapped

from .conftest import REFERENCE, tiny_model
from .test_cli import refused

MODEL = str(REFERENCE / "swiglu")
TEXT = str(REFERENCE / "text" / "calibration.jsonl")
MANY = "9" * 5000
DEEP = "[" * 100_000
LAST = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A tiny model in a directory, with a tokenizer."""
    path = tmp_path / "model"
    tiny_model().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / "swiglu" / name, path / name)
    return path


def change(path: Path, what: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    what(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LAST][0, 0] = torch.nan


@pytest.mark.parametrize("opened", [open_model, open_mapped])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda tensors: tensors.clear(), "lacks|no tensors"),
        (lambda tensors: tensors.pop(LAST), f"lacks {LAST}"),
        (lambda tensors: tensors.update({LAST: torch.zeros(3, 48)}), f"another shape.*{LAST}"),
    ],
)
def test_a_model_without_its_weights_is_refused(stored: Path, opened: Any, damage: Any, complaint: str) -> None:
    opened(str(stored))
    change(stored, damage)
    with pytest.raises(ModelError, match=complaint):
        opened(str(stored))


def test_a_tied_head_need_not_be_stored(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    open_model(str(tmp_path))


@pytest.mark.parametrize("options", [[], ["--temperature", "1"]])
def test_weights_of_nan_are_refused_when_used(
    stored: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    change(stored, poison)
    capsys.readouterr()
    assert "NaN" in refused(["generate", str(stored), "--prompt", "hi", *options], capsys)


def test_weights_of_nan_are_refused_on_transformers_path(tokenizer: Any) -> None:
    model = tiny_model("opt", word_embed_proj_dim=48, ffn_dim=132)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match="logits hold nan"):
            generate(model, tokenizer, "hi", temperature=temperature)


def test_ppl_refuses_weights_of_nan(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(stored, poison)
    capsys.readouterr()
    options = ["--text", TEXT, "--tokens", "128", "--window", "64"]
    assert "nan" in [*_lines_of(["ppl", str(stored), *options], capsys)][-1]


def _lines_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    from actsparse.cli import main

    assert main(arguments) == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": "a\\ud800b"}', "lone surrogate U+D800 at character 1"),
        ('{"text": "a", "domain": "\\udfff"}', "lone surrogate U+DFFF"),
        ('{"text": "a", "domain": {}}', "'domain' that is dict"),
        (DEEP, "nested too deeply"),
        (f'{{"text": "a", "n": {MANY}}}', "cannot be read"),
    ],
)
def test_hostile_jsonl(content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(content, encoding="utf-8")
    for arguments in (["ppl", MODEL, "--text", str(text)], ["calibrate", MODEL, "--text", str(text), "-o", "p"]):
        said = refused(arguments, capsys)
        assert complaint in said
        assert len(said) < 330


def test_half_characters_in_prompts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = os.fsdecode(b"a\xff")
    assert "lone surrogate U+DCFF" in refused(["generate", MODEL, "--prompt", broken], capsys)
    assert "lone surrogate U+DCFF" in refused(["chat", MODEL, "--system", broken], capsys)
    for errors, complaint in (("strict", "not UTF-8"), ("surrogateescape", "lone surrogate")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8", errors=errors))
        assert complaint in _lines_of(["chat", MODEL], capsys)[-1]


@pytest.mark.parametrize("value", ["99999999999", MANY, "-" + MANY, "1e400", "nan", "", "0x10", "\u0663" * 3000])
@pytest.mark.parametrize(
    "arguments",
    [
        ["ppl", MODEL, "--text", TEXT, "--threads"],
        ["ppl", MODEL, "--text", TEXT, "--tokens"],
        ["calibrate", MODEL, "--text", TEXT, "-o", "/nowhere/p", "--window"],
        ["calibrate", MODEL, "--text", TEXT, "-o", "/nowhere/p", "--sparsity"],
        ["compare", MODEL, "--text", TEXT, "-o", "/nowhere/p", "--limit"],
        ["eval", MODEL, "--tasks", "x", "--batch-size"],
        ["bench", MODEL, "--repeats"],
        ["generate", MODEL, "--prompt", "x", "--seed"],
        ["generate", MODEL, "--prompt", "x", "--top-k"],
        ["generate", MODEL, "--prompt", "x", "--top-p"],
        ["chat", MODEL, "--context"],
        ["neurons", MODEL, "--text", TEXT, "-o", "/nowhere", "--tokens"],
    ],
    ids=lambda arguments: f"{arguments[0]}{arguments[-1]}",
)
def test_absurd_numbers(arguments: list[str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[-1] == "--seed" and value == "99999999999":
        pytest.skip("a sound seed")
    said = refused([*arguments[:-1], f"{arguments[-1]}={value}"], capsys)
    assert len(said) < 330


def test_hostile_configuration_and_plan(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for metadata in (DEEP, MANY, json.dumps({"format": "actsparse-plan", "format_version": "x" * 9000})):
        plan = tmp_path / "plan"
        save_file({"a": torch.zeros(1)}, plan, metadata={"actsparse": metadata})
        assert len(refused(["info", str(plan)], capsys)) < 330
    for content in (DEEP, MANY, "{", '{"model_type": "' + "x" * 9000 + '"}'):
        (stored / "config.json").write_text(content, encoding="utf-8")
        assert len(refused(["generate", str(stored), "--prompt", "x"], capsys)) < 330


def test_one_line_cuts_and_escapes() -> None:
    assert one_line("short") == "short"
    cut = one_line("plan x " + "1" * 6000 + ", expected 2")
    assert len(cut) <= 300
    assert cut.startswith("plan x 1")
    assert cut.endswith("1, expected 2")
    assert one_line("a\nb\x1b\udcff") == "a b\\x1b\\udcff"


def test_temporary_files_of_dead_processes_go_and_of_living_ones_stay(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom actsparse.plan import atomic_path\n"
        f"with atomic_path({str(tmp_path / 'plan.partial')!r}) as name:\n"
        "    open(name, 'w').write('half')\n    print(name, flush=True)\n    time.sleep(600)\n"
    )
    foreign = tmp_path / ".plan.partial.abcdefgh"
    foreign.touch()
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        left = Path(child.stdout.readline().strip())
        with atomic_path(tmp_path / "other"):
            pass
        assert left.read_text() == "half"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert left.exists()
    with atomic_path(tmp_path / "other") as temporary:
        Path(temporary).write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"other", foreign.name}


@pytest.mark.parametrize(("out", "inn"), [(1, 16), (16, 1), (1, 1)])
@pytest.mark.parametrize("columns", [False, True])
def test_a_product_with_one_dimension_of_1_reads_nothing_skipped(out: int, inn: int, columns: bool) -> None:
    weight, x = torch.ones(out, inn), torch.ones(1, inn)
    x[0, 0] = 0.1
    weight[:, 0] = torch.nan
    weight = weight.t().contiguous().t() if columns else weight
    assert is_columns(weight)
    y = kernels.linear(x, weight, None, torch.full((inn,), 0.5))
    assert y.tolist() == [[float(inn - 1)] * out]


@pytest.mark.parametrize("hidden", [1, 8])
@pytest.mark.parametrize("neurons", [1, 12])
def test_a_block_with_one_dimension_of_1_reads_nothing_skipped(hidden: int, neurons: int) -> None:
    gate, up, down = torch.ones(neurons, hidden), torch.ones(neurons, hidden), torch.ones(hidden, neurons)
    gate[0] = -1  # relu gives 0: neuron 0 is skipped
    up[0], down[:, 0] = torch.nan, torch.nan
    threshold = torch.full((neurons,), 0.5)
    x = torch.ones(1, hidden)
    y = kernels.gated_ffn(x, gate, up, down.t().contiguous().t(), activation="relu", gate_threshold=threshold)
    assert y.tolist() == [[float((neurons - 1) * hidden * hidden)] * hidden]


@pytest.mark.parametrize("device", ["cuda:7", "warp", "meta", "cpu:x"])
def test_device_that_this_machine_lacks(device: str) -> None:
    with pytest.raises(ModelError, match=r"device is .*expected one"):
        open_model("reference/nowhere", device=device)

"""The command line as its users meet it: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actsparse.cli import main
from actsparse.plan import Plan

from .conftest import REFERENCE, tiny_model

MODEL = str(REFERENCE / "swiglu")
TEXT = str(REFERENCE / "text" / "calibration.jsonl")
HELD_OUT = str(REFERENCE / "text" / "evaluation.jsonl")


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "chess.safetensors"
    options = ["--sparsity", "0.5", "--no-attention", "--tokens", "4096", "--window", "256"]
    assert main(["calibrate", MODEL, "--text", TEXT, "-o", str(path), *options]) == 0
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which ``arguments`` are refused, exit code 2."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert said.err.startswith("actsparse: ")
    assert said.err.count("\n") == 1, said.err
    return said.err


def test_ppl_ends_with_one_json_document(plan_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ppl", MODEL, "--plan", str(plan_path), "--text", HELD_OUT, "--tokens", "4096", "--window", "256"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = {"dense", "sparse", "delta_stderr", "divergence", "agreement", "weights_read", "sparsity"}
    assert set(result) == measured | {"tokens", "scope", "increase"}
    assert result["divergence"]["value"] > 5 * result["divergence"]["stderr"] > 0
    assert 0.5 < result["agreement"]["value"] < 1
    assert 1 < result["dense"]["ppl"] < result["sparse"]["ppl"] < 2 * result["dense"]["ppl"]
    assert result["increase"] == pytest.approx(result["sparse"]["ppl"] / result["dense"]["ppl"] - 1)
    assert result["sparse"]["bits_read"] == result["weights_read"]["bits_read"] < result["sparse"]["bits_stored"] == 16
    assert set(result["weights_read"]) == {"bytes", "fraction", "ffn_fraction", "bits_read", "bits_stored"}
    # Half the neurons leave all of gate and half of up and down to be read.
    assert result["weights_read"]["ffn_fraction"] == pytest.approx(2 / 3, abs=0.02)
    assert set(result["sparsity"]) == {f"layers.{layer}.ffn" for layer in range(6)}
    assert result["tokens"] == 16 * 255
    assert result["scope"] == "all"


def test_decode_scope_scores_the_continuation_only(plan_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ppl", MODEL, "--plan", str(plan_path), "--text", HELD_OUT, "--tokens", "2048", "--window", "256"]
    assert main([*arguments, "--scope", "decode", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["scope"] == "decode"
    assert result["tokens"] == 8 * 127
    assert result["sparse"]["ppl"] > result["dense"]["ppl"]


def test_info_shows_the_plan(plan_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(plan_path)]) == 0
    table = capsys.readouterr().out
    assert "chess" in table
    assert "target sparsity" in table
    assert main(["info", str(plan_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["neurons"] == 1344


def test_a_list_of_targets_gives_a_plan_each(tmp_path: Path) -> None:
    options = ["--sparsity", "0.3,0.7", "--tokens", "2048", "--window", "256", "--method", "cats"]
    assert main(["calibrate", MODEL, "--text", TEXT, "-o", str(tmp_path / "p.safetensors"), *options]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-0.3.safetensors", "p-0.7.safetensors"]
    assert Plan.load(tmp_path / "p-0.7.safetensors").sparsity == 0.7


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["calibrate", "/nowhere", "--text", TEXT], "model /nowhere does not exist"),
        (["calibrate", str(REFERENCE / "text"), "--text", TEXT], "has no config.json"),
        (["calibrate", MODEL, "--text", "/nowhere.txt"], "text file /nowhere.txt does not exist"),
        (["calibrate", MODEL, "--text", TEXT, "--sparsity", "1"], "sparsity is 1.0, expected 0 <= sparsity < 1"),
        (["calibrate", MODEL, "--text", TEXT, "--sparsity", "lots"], "'lots' is not a list of numbers"),
        (["calibrate", MODEL, "--text", TEXT, "--tokens", "0"], "tokens is 0, expected at least 1"),
        (["calibrate", MODEL, "--text", TEXT, "--method", "magic"], "method 'magic' is unknown"),
        (["calibrate", MODEL, "--text", TEXT, "--statistic", "max"], "invalid choice: 'max'"),
        (["calibrate", MODEL], "no --text given, chess needs some to calibrate on"),
        (["ppl", MODEL, "--plan", "/nowhere.safetensors", "--text", TEXT], "plan /nowhere.safetensors does not exist"),
        (["ppl", MODEL, "--plan", TEXT, "--text", TEXT], "truncated or damaged"),
        (["generate", MODEL, "--prompt", "hi", "--temperature", "1", "--seed", "9" * 30], "seed is 999"),
        (
            ["generate", MODEL, "--prompt", "word " * 3000],
            "tokens leave no room for an answer, expected fewer than 1024",
        ),
        (["info", "/nowhere"], "plan /nowhere does not exist"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["-o", str(tmp_path / "plan")] if arguments[0] == "calibrate" else []
    assert complaint in refused([*arguments, *output], capsys)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output_is_found_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["calibrate", MODEL, "--text", TEXT, "-o", "/nowhere/plan"], capsys)
    assert "cannot write /nowhere/plan" in said


def test_a_plan_for_another_model_is_refused(
    plan_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    tiny_model().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / "swiglu" / name, tmp_path / name)
    capsys.readouterr()  # transformers writes a bar while saving
    said = refused(["ppl", str(tmp_path), "--plan", str(plan_path), "--text", HELD_OUT], capsys)
    assert "its layers is 6, the model's layers is 2" in said


def test_an_unsupported_family_is_refused_before_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    said = refused(["calibrate", str(tmp_path / "model"), "--text", TEXT, "-o", str(tmp_path / "plan")], capsys)
    assert "'gpt2' is not supported: its decoder has no list of layers; expected a family shaped like Llama" in said
    assert "llama" in said


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, actsparse.cli; actsparse.cli.main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "calibrate" in done.stdout


@pytest.mark.parametrize(("given", "spins"), [({}, "10000"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_threads_that_wait_sleep_soon_in_this_program_alone(given: dict[str, str], spins: str) -> None:
    code = "import os; from actsparse.cli import main; main(['models']); print('GOMP_SPINCOUNT' in os.environ)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = {**clean, **given, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "GOMP_" not in done.stderr:
        pytest.skip("torch brings another OpenMP library than libgomp")
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_info_shows_foreign_text_plainly(plan_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    path = tmp_path / "plan"
    replace(Plan.load(plan_path), settings={"note": "\x1b]0;title\x07" + "x" * 5000}).save(path)
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert len(said) < 20_000


def test_compare_leaves_a_foreign_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "about.json").write_text('{"name": "mine"}', encoding="utf-8")
    arguments = ["compare", MODEL, "--text", TEXT, "--methods", "cats", "--sparsity", "0.5", "-o", str(tmp_path)]
    assert "holds other files" in refused(arguments, capsys)
    assert (tmp_path / "about.json").read_text(encoding="utf-8") == '{"name": "mine"}'
    assert "not of a comparison" in refused(["report", str(tmp_path)], capsys)

"""Budgets: what a search finds meets them, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import actsparse
from actsparse.calibration.budget import Budget, search
from actsparse.calibration.collect import Calibration
from actsparse.cli import main
from actsparse.measure.evaluate import compare_perplexity, scorer
from actsparse.methods import make
from actsparse.methods.base import Targets
from actsparse.methods.statistics import CalibrationError
from actsparse.models import text
from actsparse.plan import Plan

OPTIONS = {"tokens": 1024, "window": 64}


@pytest.mark.parametrize("method", ["chess", "teal"])
def test_weights_read_is_met_closely(tiny: Any, tokenizer: Any, text_file: Path, method: str) -> None:
    model = tiny("llama", vocab_size=4096)
    windows = text.load_windows(str(text_file), tokenizer, **OPTIONS)
    plan = actsparse.calibrate(
        model, tokenizer, str(text_file), method=method, budget=Budget(weights_read=0.92), **OPTIONS
    )
    read = compare_perplexity(model, plan, windows).weights_read.fraction
    assert 0.91 < read <= 0.92
    assert 0 < plan.sparsity < 0.95


def test_perplexity_increase_is_met_and_not_wasted(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny("llama")
    windows = text.load_windows(str(text_file), tokenizer, **OPTIONS)
    method = make("teal")
    run = Calibration(model, windows, [method])
    stats = run.collect()["teal"]
    found = search(
        model, lambda s: run.solve(method, stats, Targets(s)), windows, Budget(max_ppl_increase=0.01), scorer
    )
    assert found.measured <= 0.01
    assert found.plan.sparsity > 0
    tried = {sparsity: value for sparsity, value in found.trace}
    above = [sparsity for sparsity, value in tried.items() if value > 0.01]
    assert min(above) - found.plan.sparsity < 0.01


def test_budgets_are_checked(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    for budget in ({}, {"weights_read": 0.5, "max_ppl_increase": 0.1}):
        with pytest.raises(CalibrationError, match="exactly one"):
            Budget(**budget)
    with pytest.raises(CalibrationError, match=r"weights read is 1\.5, expected 0 < w <= 1"):
        Budget(weights_read=1.5)
    with pytest.raises(CalibrationError, match=r"perplexity increase is -0\.1, expected 0 or more"):
        Budget(max_ppl_increase=-0.1)
    with pytest.raises(CalibrationError, match="is less than cats can read"):
        actsparse.calibrate(
            tiny("llama"), tokenizer, str(text_file), method="cats", budget=Budget(weights_read=0.1), **OPTIONS
        )


@pytest.mark.filterwarnings("ignore:.*holds fewer tokens:UserWarning")
def test_the_command_reports_on_evaluation_text(
    tiny: Any, tokenizer: Any, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[2000:9000])
    arguments = ["calibrate", str(tmp_path / "model"), "--text", str(text_file), "--tokens", "1024", "--window", "64"]
    arguments += ["--evaluation-text", str(other), "-o", str(tmp_path / "plan")]
    assert main([*arguments, "--method", "chess", "--weights-read", "95%"]) == 0
    out = capsys.readouterr().out
    assert "chess" in out
    assert f"tokens of {other}" in out.replace("\n", " ")
    assert "reads 9" in out
    assert main([*arguments, "--method", "teal", "--allocation", "greedy"]) == 0
    assert Plan.load(tmp_path / "plan").settings["allocation"] == "greedy"
    assert (tmp_path / "plan.allocation.json").is_file()
    capsys.readouterr()
    assert main([*arguments, "--allocation", "best"]) == 2
    assert "expected one of uniform, greedy" in capsys.readouterr().err
    assert main([*arguments, "--weights-read", "95%", "--sparsity", "0.3,0.5"]) == 2
    assert "expected no list" in capsys.readouterr().err

"""The forecast of theta: near what all tokens and columns give, and the one that codes are rounded for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import actsparse
from actsparse.calibration import pack as engine
from actsparse.calibration.forecast import forecast_theta, forecast_tokens, kept_theta
from actsparse.methods.base import HEAD
from actsparse.models import opening, text

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_it_is_near_what_the_whole_calibration_finds(bits: float) -> None:
    name, source = str(REFERENCE / "swiglu"), str(REFERENCE / "text" / "calibration.jsonl")
    model, tokenizer = opening.open_model(name), opening.open_tokenizer(name)
    options = {"tokens": 4096, "window": 256, "sparsity": 1 - bits / 16}
    plan = actsparse.calibrate(model, tokenizer, source, method="graded", **options)
    windows = text.load_windows(source, tokenizer, tokens=4096, window=256)
    part = forecast_tokens(windows.tokens)
    assert len(part) == len(windows.tokens) / 4
    assert forecast_theta(model, part, 6, bits) == pytest.approx(plan.settings["theta"], rel=0.15)


def test_it_is_made_once(tmp_path: Path) -> None:
    assert kept_theta(tmp_path / "theta.json", lambda: 0.1 + 0.2) == 0.1 + 0.2
    assert kept_theta(tmp_path / "theta.json", lambda: pytest.fail("made again")) == 0.1 + 0.2
    assert json.loads((tmp_path / "theta.json").read_text()) == {"theta": 0.1 + 0.2}


def test_codes_are_rounded_for_what_the_forecast_reads(
    tiny: Any, tokenizer: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=192, head_dim=32, num_attention_heads=4)
    windows = text.load_windows(str(text_file), tokenizer, tokens=512, window=64)
    seen: dict[int, list[torch.Tensor]] = {}
    rounded = engine.round_with_feedback

    def spy(weight: torch.Tensor, stored: int, curvature: Any, shares: torch.Tensor, prompts: float) -> Any:
        seen.setdefault(len(weight), []).append(shares)
        return rounded(weight, stored, curvature, shares, prompts)

    monkeypatch.setattr(engine, "round_with_feedback", spy)
    thetas: list[float] = []
    for bits in (2.5, 6.0):
        seen.clear()
        do = engine._Run._do

        def note(run: Any, activity: Any, theta: float, do: Any = do) -> None:
            if activity.layer == HEAD:
                thetas.append(theta)
            do(run, activity, theta)

        with monkeypatch.context() as patched:
            patched.setattr(engine._Run, "_do", note)
            settings = engine.Settings(6, bits)
            engine.pack_opened(model, tokenizer, windows, tmp_path / f"{bits:g}", settings)
        deep = torch.cat([shares[3] for many in seen.values() for shares in many]).mean()
        assert (deep < 0.4) if bits == 2.5 else (deep > 0.6)
    assert thetas[1] < thetas[0] / 2

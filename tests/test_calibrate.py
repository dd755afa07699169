"""Calibration: thresholds recomputed independently, interruption, bad input."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import actsparse
from actsparse.calibration import collect as engine
from actsparse.methods.base import MethodError
from actsparse.methods.statistics import CalibrationError
from actsparse.models.text import TextError, load_windows
from actsparse.plan import Plan, PlanError

TOKENS, WINDOW = 2048, 64


def activations(model: Any, tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """g, u and the inputs of q and o of every layer, by hooks of our own."""
    seen: list[dict[str, torch.Tensor]] = [{} for _ in model.model.layers]
    handles = []
    for layer, store in zip(model.model.layers, seen, strict=True):

        def keep_output(name: str, into: dict[str, torch.Tensor] = store) -> Callable[..., None]:
            return lambda module, args, output: into.__setitem__(name, output.flatten(0, 1).double())

        def keep_input(name: str, into: dict[str, torch.Tensor] = store) -> Callable[..., None]:
            return lambda module, args: into.__setitem__(name, args[0].flatten(0, 1).double())

        handles += [
            layer.mlp.act_fn.register_forward_hook(keep_output("g")),
            layer.mlp.up_proj.register_forward_hook(keep_output("u")),
            layer.self_attn.q_proj.register_forward_pre_hook(keep_input("q")),
            layer.self_attn.o_proj.register_forward_pre_hook(keep_input("o")),
        ]
    with torch.inference_mode():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("statistic", ["abs", "rms"])
def test_chess_thresholds_match_an_independent_computation(
    tiny: Any, tokenizer: Any, text_file: Path, statistic: str
) -> None:
    model = tiny()
    targets = [0.2, 0.5, 0.8]
    plans = actsparse.calibrate(
        model, tokenizer, str(text_file), sparsity=targets, tokens=TOKENS, window=WINDOW, statistic=statistic
    )
    windows = load_windows(str(text_file), tokenizer, tokens=TOKENS, window=WINDOW)
    for index, seen in enumerate(activations(model, windows.tokens)):
        u = seen["u"]
        mean = u.abs().mean(0) if statistic == "abs" else u.square().mean(0).sqrt()
        scores = seen["g"].abs() * mean
        for plan, target in zip(plans, targets, strict=True):
            rules, bound = plan.layer_rules(index), plan.settings["quantile_rank_error_bound"]
            level = (rules["ffn.threshold"].double() * mean).median()
            torch.testing.assert_close(rules["ffn.threshold"].double(), level / mean, rtol=1e-5, atol=0)
            assert bound < 0.05
            for values, threshold in (
                (scores, level),
                (seen["q"].abs(), rules["q.threshold"].double()),
                (seen["o"].abs(), rules["o.threshold"].double()),
            ):
                rank = float((values < threshold).double().mean())
                assert abs(rank - target) < 0.002 <= bound + 0.002


def test_cats_threshold_is_the_quantile_of_the_gate(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny("qwen2")
    plan = actsparse.calibrate(
        model, tokenizer, str(text_file), method="cats", sparsity=0.6, tokens=TOKENS, window=WINDOW
    )
    windows = load_windows(str(text_file), tokenizer, tokens=TOKENS, window=WINDOW)
    for index, seen in enumerate(activations(model, windows.tokens)):
        rank = float((seen["g"].abs() < plan.layer_rules(index)["ffn.threshold"].double()).double().mean())
        assert abs(rank - 0.6) < 0.002


def test_several_targets_cost_one_run_and_equal_single_runs(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model, options = tiny(), {"tokens": TOKENS, "window": WINDOW}
    passes: list[tuple[int, int]] = []
    together = actsparse.calibrate(
        model,
        tokenizer,
        str(text_file),
        sparsity=[0.3, 0.6],
        progress=lambda done, total: passes.append((done, total)),
        **options,
    )
    assert passes[-1] == (TOKENS, TOKENS)
    for plan, target in zip(together, [0.3, 0.6], strict=True):
        alone = actsparse.calibrate(model, tokenizer, str(text_file), sparsity=target, **options)
        assert alone.rules.keys() == plan.rules.keys()
        assert all(torch.equal(alone.rules[name], plan.rules[name]) for name in plan.rules)


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm", "kill"])
def test_an_interrupted_run_goes_on_to_the_identical_plan(
    tiny: Any, tokenizer: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model = tiny(dtype=torch.bfloat16)
    monkeypatch.setattr(engine, "BATCH_TOKENS", 256)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def run(output: Path, progress: Any = None) -> None:
        actsparse.calibrate(
            model, tokenizer, str(text_file), tokens=TOKENS, window=WINDOW, output=output, progress=progress
        )

    run(whole)
    steps = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            if how == "kill":
                raise MemoryError("as good as killed: nothing may be saved any more")
            signal.raise_signal(signal.SIGINT if how == "ctrl-c" else signal.SIGTERM)

    if how == "kill":
        monkeypatch.setattr(engine, "SAVE_EVERY_SECONDS", 0)
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
    try:
        with pytest.raises((KeyboardInterrupt, MemoryError)):
            run(resumed, interrupt)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert terminated == ([signal.SIGTERM] if how == "sigterm" else [])
    assert not resumed.exists()
    assert (tmp_path / "resumed.partial").is_file()
    again: list[int] = []
    run(resumed, lambda done, total: again.append(done))
    assert again[0] > 2 * 256, "the second run began anew"
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "text.txt", "whole"]


def test_progress_of_other_settings_is_not_continued(
    tiny: Any, tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "plan"
    (tmp_path / "plan.partial").write_bytes(b"something else")
    actsparse.calibrate(tiny(), tokenizer, str(text_file), tokens=TOKENS, window=WINDOW, output=output)
    assert Plan.load(output).text["tokens"] == TOKENS


def test_nan_in_activations_is_refused(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[5, 5] = float("nan")
    with pytest.raises(CalibrationError, match="layer 1 up: .*NaN"):
        actsparse.calibrate(model, tokenizer, str(text_file), tokens=TOKENS, window=WINDOW)


def test_less_text_than_asked_for_warns_and_says_how_much(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    with pytest.warns(UserWarning, match=r"fewer tokens than asked for: using \d+ of 10000000"):
        plan = actsparse.calibrate(tiny(), tokenizer, str(text_file), tokens=10_000_000, window=WINDOW)
    assert plan.text["tokens"] % WINDOW == 0


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"sparsity": 1.0}, CalibrationError, "sparsity is 1.0, expected 0 <= sparsity < 1"),
        ({"sparsity": [0.5, -0.1]}, CalibrationError, "sparsity is -0.1"),
        ({"sparsity": float("nan")}, CalibrationError, "sparsity is nan"),
        ({"tokens": 0}, TextError, "tokens is 0, expected at least 1"),
        ({"method": "magic"}, MethodError, "method 'magic' is unknown: expected one of chess"),
        ({"statistic": "max"}, MethodError, "statistic is 'max', expected one of abs, rms"),
        ({"rank": 3}, MethodError, "chess does not take the setting 'rank'"),
        ({"window": 100_000}, CalibrationError, "window is 100000 tokens, expected at most the model's context of 256"),
        ({"scope": "some"}, PlanError, "scope 'some' is unknown: expected one of all, decode, last_half"),
        ({"output": "/nonexistent/plan"}, PlanError, "cannot write /nonexistent/plan"),
    ],
)
def test_bad_settings_are_named(
    tiny: Any, tokenizer: Any, text_file: Path, options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint) as caught:
        actsparse.calibrate(tiny(), tokenizer, str(text_file), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n ", "holds no text"),
        ("binary.txt", b"\x00\x01text", "not text: it holds a zero byte"),
        ("latin.txt", b"caf\xe9 au lait", "not UTF-8 text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', "line 1 has no 'text' field"),
        ("short.txt", b"two words", "expected at least one window of 64"),
    ],
)
def test_bad_text_is_named(
    tiny: Any, tokenizer: Any, tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=complaint):
        actsparse.calibrate(tiny(), tokenizer, str(tmp_path / name), window=WINDOW)


def test_missing_text(tiny: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="does not exist"):
        actsparse.calibrate(tiny(), tokenizer, str(tmp_path / "none.txt"))
    with pytest.raises(TextError, match="is a directory"):
        actsparse.calibrate(tiny(), tokenizer, str(tmp_path))

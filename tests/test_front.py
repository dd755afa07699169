"""Comparisons on weights of several widths: one axis, bits read, and the front along it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actsparse.calibration.pack import Settings, pack_opened
from actsparse.calibration.rounded import rounded_copy
from actsparse.measure import report, table
from actsparse.measure.compare import compare
from actsparse.measure.evaluate import compare_perplexity
from actsparse.measure.grid import Grid, variant_of, weights_of
from actsparse.measure.results import Results
from actsparse.measure.stored import StoredModels
from actsparse.methods.base import MethodError
from actsparse.models import text
from actsparse.plan import Plan
from actsparse.runtime.swap import open_model, state_of

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture
def grid(text_file: Path) -> Grid:
    return Grid(
        ("cats", "teal", "plain", "gptq", "gptq-g32", "graded"), (0.3,), str(text_file),
        weights=(16, 8, 4), bits_read=(4.0,), tokens=512, evaluation_tokens=512, window=64, evaluation_window=32,
    )  # fmt: skip


def test_cells_on_packed_weights(tiny: Any, tokenizer: Any, grid: Grid, tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=192, head_dim=32, num_attention_heads=4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    results = compare(model, tokenizer, grid, tmp_path, name="tiny")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    cells = {cell["cell"]: cell for cell in results.cells}
    assert list(cells) == [
        "dense", "cats-0.3", "cats@8-0.3", "cats@4-0.3", "teal-0.3", "teal@8-0.3", "teal@4-0.3", "plain-8", "plain-4",
        "gptq-3", "gptq-4", "gptq-5", "gptq-6", "gptq-8",
        "gptq-g32-3", "gptq-g32-4", "gptq-g32-5", "gptq-g32-6", "gptq-g32-8", "graded-4",
    ]  # fmt: skip
    bits = {name: cell["bits_read"] for name, cell in cells.items()}
    assert bits["dense"] == 32  # float32
    assert 3.2 < bits["gptq-3"] < 3.4 < 4 < bits["plain-4"] < 4.4
    assert bits["gptq-g32-5"] == pytest.approx(5 + 21 / 32)
    assert bits["teal@4-0.3"] == pytest.approx(bits["plain-4"] * bits["teal-0.3"] / 32, rel=0.05)
    assert bits["graded-4"] == pytest.approx(4, abs=0.3)
    assert cells["graded-4"]["bits_stored"] > 8
    assert bits["cats-0.3"] / 32 < bits["cats@8-0.3"] / bits["plain-8"] < 1  # up is read whole
    assert abs(cells["plain-8"]["relative_increase"]) < abs(cells["plain-4"]["relative_increase"])
    assert abs(cells["gptq-8"]["relative_increase"]) < abs(cells["gptq-3"]["relative_increase"])
    bytes_read = {name: cell["weights_read_bytes"] for name, cell in cells.items()}
    assert bytes_read["gptq-3"] == pytest.approx(bytes_read["dense"] * bits["gptq-3"] / 32)
    assert bytes_read["teal@4-0.3"] < bytes_read["plain-4"] < bytes_read["plain-8"] < bytes_read["dense"]

    # What lies in the folder is what was scored.
    packed = open_model(str(tmp_path / "weights" / "graded-4"))
    state = state_of(packed)
    assert state is not None
    windows = text.Windows(
        text.load_windows(grid.text, tokenizer, tokens=1024, window=64).tokens[8:].reshape(-1, 32), "", ("",) * 16
    )
    plan = state.plan.with_scope("all")
    assert compare_perplexity(packed, plan, windows, reference=model).sparse.ppl == cells["graded-4"]["ppl"]
    packed = open_model(str(tmp_path / "weights" / "plain-4"))
    plan = Plan.load(tmp_path / "plans" / "teal@4-0.3.safetensors")
    assert compare_perplexity(packed, plan, windows, reference=model).sparse.ppl == cells["teal@4-0.3"]["ppl"]

    page = report.write(tmp_path, results).read_text(encoding="utf-8")
    assert "At equal bits read" in page
    found = table.markdown(results)
    assert f"| {bits['graded-4']:.2f} |" in found
    assert "Bits read are per weight" in found


def test_packed_weights_are_made_once(tiny: Any, tokenizer: Any, grid: Grid, tmp_path: Path) -> None:
    model = tiny("llama")
    small = Grid(**{**vars(grid), "methods": ("plain",), "weights": (4,)})
    compare(model, tokenizer, small, tmp_path)
    made = (tmp_path / "weights" / "plain-4" / "config.json").stat().st_mtime_ns
    more = Grid(**{**vars(small), "methods": ("plain", "teal"), "weights": (4,)})
    results = compare(model, tokenizer, more, tmp_path)
    assert [cell["cell"] for cell in results.cells] == ["dense", "plain-4", "teal@4-0.3"]
    assert (tmp_path / "weights" / "plain-4" / "config.json").stat().st_mtime_ns == made


def test_weights_that_store_other_bits_are_made_anew(
    tiny: Any, tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=192, head_dim=32, num_attention_heads=4)
    windows = text.load_windows(str(text_file), tokenizer, tokens=512, window=64)
    first = pack_opened(model, tokenizer, windows, tmp_path / "graded-4", Settings(6, 4.0))
    stored = StoredModels(model, tokenizer, windows, first, tmp_path)
    plan = stored.open("graded-4").plan
    assert plan is not None
    assert (first.settings["bits_stored"], plan.settings["bits_stored"]) == (6, 8)


def test_rounding_rows_with_feedback_beats_the_nearest(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny("llama")
    windows = text.load_windows(str(text_file), tokenizer, tokens=512, window=64)
    copy, bits = rounded_copy(model, windows.tokens, 4)
    assert bits == pytest.approx(4 + 20 / 64)
    weight, rounded = (one.model.layers[0].mlp.down_proj.weight for one in (model, copy))
    values = rounded[0, :64].unique()
    assert len(values) <= 16
    inputs: list[torch.Tensor] = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    with torch.no_grad():
        model(windows.tokens)
    handle.remove()
    x = inputs[0].flatten(0, 1)
    step = (weight.amax(1) - weight.amin(1)) / 15
    nearest = (weight / step[:, None]).round() * step[:, None]
    weight, rounded = weight.detach(), rounded.detach()
    errors = [float((x @ (one - weight).T).norm()) for one in (rounded, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_names_of_variants_and_their_weights() -> None:
    assert variant_of("teal@4").weights == 4
    assert variant_of("chess-greedy@8").allocation == "greedy"
    assert weights_of("teal@4", 0.5) == "plain-4"
    assert weights_of("teal", 0.5) == "dense"
    assert weights_of("graded", 2.5) == "graded-2.5"
    assert weights_of("gptq-g128", 5) == "gptq-g128-5"
    for name in ("teal@5", "svdp@4", "graded@4", "plain@4"):
        with pytest.raises(
            MethodError, match=f"variant {name!r} is unknown: expected one of chess, cats, teal, wina with @4"
        ):
            variant_of(name)
    with pytest.raises(MethodError, match="weights of 5 bits were asked for"):
        Grid(("teal",), (0.5,), "text", weights=(5,)).check()
    with pytest.raises(MethodError, match="bits read is 0"):
        Grid(("graded",), (0.5,), "text", bits_read=(0.2,)).check()


def cell(name: str, method: str, weights: str, bits: float, increase: float) -> dict[str, Any]:
    return {
        "cell": name, "method": method, "weights": weights, "bits_read": bits, "relative_increase": increase,
        "relative_increase_stderr": 0.0, "evaluation_only": False,
    }  # fmt: skip


def test_the_front_and_levels_between_cells() -> None:
    results = Results(
        {},
        [
            cell("dense", "dense", "dense", 16, 0.0),
            cell("plain-4", "plain", "plain-4", 4, 0.04),
            cell("plain-8", "plain", "plain-8", 8, 0.01),
            cell("teal@4-0.5", "teal@4", "plain-4", 2, 0.16),
            cell("teal-0.5", "teal", "dense", 8, 0.02),
            cell("graded-3", "graded", "graded-3", 3, 0.02),
            cell("graded-2", "graded", "graded-2", 2, 0.08),
        ],
        {},
    )
    assert table.front(results) == {"dense", "plain-8", "graded-3", "graded-2"}
    levels, rows = table.at_equal_reading(results)
    at_four = {row[0]: row[1 + levels.index(4)] for row in rows}
    assert at_four["teal@4"] == "+4.00% ± 0.00%"
    at_three = {row[0]: row[1 + levels.index(3)] for row in rows}
    assert at_three["teal@4"] == "+10.00% ± 0.00%"
    assert at_three["plain"] == "-"
    levels, rows = table.at_equal_quality(results)
    at_two = {row[0]: row[1 + levels.index(0.02)] for row in rows}
    assert (at_two["plain"], at_two["graded"]) == ("6.00", "3.00")

"""Comparisons: one protocol, resumed runs, same digits twice, and a page that stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from actsparse.cli import main
from actsparse.measure import compare as engine
from actsparse.measure import report
from actsparse.measure.bench.run import Settings
from actsparse.measure.compare import compare, measure_speed
from actsparse.measure.evaluate import compare_perplexity
from actsparse.measure.grid import Grid, variant_of
from actsparse.measure.results import load
from actsparse.measure.table import markdown
from actsparse.methods.base import MethodError
from actsparse.methods.statistics import CalibrationError
from actsparse.models.text import TextError
from actsparse.plan import Plan, PlanError

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

METHODS = ("cats", "chess", "chess-ffn", "chess-greedy", "teal", "oracle")


@pytest.fixture
def grid(text_file: Path) -> Grid:
    return Grid(METHODS, (0.3, 0.7), str(text_file), tokens=512, evaluation_tokens=512, window=64, evaluation_window=32)


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama")


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_cell_is_what_ppl_measures(model: Any, tokenizer: Any, grid: Grid, tmp_path: Path) -> None:
    results = compare(model, tokenizer, grid, tmp_path, name="tiny")
    assert [cell["cell"] for cell in results.cells] == ["dense", *(f"{m}-{s}" for m in METHODS for s in (0.3, 0.7))]
    dense = results.cells[0]
    assert dense["increase"] == 0
    assert (dense["divergence"], dense["agreement"]) == (0, 1)
    assert dense["weights_read"] == 1
    calibration, evaluation = engine._windows(model, tokenizer, grid)
    assert results.about["evaluation"]["sha256"] == evaluation.digest
    for cell in results.cells[1:4]:
        plan = Plan.load(tmp_path / "plans" / f"{cell['cell']}.safetensors")
        assert plan.text["sha256"] == calibration.digest
        found = compare_perplexity(model, plan, evaluation)
        assert found.sparse.ppl == cell["ppl"]
        assert found.delta_stderr == cell["increase_stderr"]
        assert found.weights_read.fraction == cell["weights_read"]
    read = {cell["cell"]: cell["weights_read"] for cell in results.cells}
    assert read["chess-0.7"] < read["chess-ffn-0.7"] < read["chess-ffn-0.3"] < 1
    assert load(tmp_path) == results


def test_twice_gives_the_same_files_and_an_interrupted_run_goes_on(
    model: Any, tokenizer: Any, grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    results = compare(model, tokenizer, grid, one, name="tiny")
    report.write(one, results)
    evaluated = engine.evaluate.compare_perplexity
    calls: list[Any] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluated(*arguments, **options)

    monkeypatch.setattr(engine.evaluate, "compare_perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(model, tokenizer, grid, two, name="tiny")
    assert len(list((two / "cells").iterdir())) == 3
    monkeypatch.setattr(engine.Calibration, "collect", lambda *a, **k: pytest.fail("calibrated again"))
    again = compare(model, tokenizer, grid, two, name="tiny")
    report.write(two, again)
    assert len(calls) == 4 + len(results.cells) - 3
    assert files(one) == files(two)


def test_more_methods_cost_only_their_own_cells(
    model: Any, tokenizer: Any, grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(model, tokenizer, Grid(**{**vars(grid), "methods": ("cats",)}), tmp_path)
    evaluated, seen = engine.evaluate.compare_perplexity, []

    def counted(model: Any, plan: Plan, *arguments: Any, **options: Any) -> Any:
        seen.append(plan.method)
        return evaluated(model, plan, *arguments, **options)

    monkeypatch.setattr(engine.evaluate, "compare_perplexity", counted)
    results = compare(model, tokenizer, Grid(**{**vars(grid), "methods": ("cats", "wina")}), tmp_path)
    assert seen == ["wina", "wina"]
    assert len(results.cells) == 5


def test_other_evaluation_text_needs_no_calibration(
    model: Any, tokenizer: Any, grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(**{**vars(grid), "methods": ("chess",), "evaluation_text": grid.text})
    before = compare(model, tokenizer, grid, tmp_path)
    monkeypatch.setattr(engine.Calibration, "collect", lambda *a, **k: pytest.fail("calibrated again"))
    after = compare(model, tokenizer, Grid(**{**vars(grid), "evaluation_tokens": 256}), tmp_path)
    assert after.cells[1]["ppl"] != before.cells[1]["ppl"]


class Page(HTMLParser):
    """Everything a page would fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(model: Any, tokenizer: Any, grid: Grid, tmp_path: Path) -> None:
    results = compare(model, tokenizer, grid, tmp_path, name="<tiny> & co")
    measure_speed(model, tmp_path, results, Settings(8, 4, 2, llama_cpp=False), say=lambda line: None)
    page = Page()
    source = report.write(tmp_path, results).read_text(encoding="utf-8")
    page.feed(source)
    assert page.tags.count("img") == 3
    assert all(value.startswith("data:image/svg+xml;base64,") for value in page.fetched)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "@import" not in source
    assert "<tiny> & co" in page.text
    for cell in results.cells:
        assert f"{cell['ppl']:.4f}" in page.text
    for cell in results.cells[1:]:
        assert cell["divergence"] > 0
        assert 0 < cell["agreement"] <= 1
        assert f"{cell['divergence']:.4f} ± {cell['divergence_stderr']:.4f}" in page.text
        assert f"{100 * cell['agreement']:.2f} % ± {100 * cell['agreement_stderr']:.2f}" in page.text
    assert "oracle is a bound" in page.text
    assert "oracle-0.3" not in results.speed["cells"]
    assert set(results.speed["cells"]) == {cell["cell"] for cell in results.cells if not cell["evaluation_only"]}
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table == markdown(results)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows[: len(results.cells) + 2]} == {13}
    assert re.search(r"^\| (\*\*)?cats(\*\*)? \| 0\.3 \|", table, re.MULTILINE)
    # Rendered again from the folder alone, it is the same.
    before = files(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert files(tmp_path) == before


def test_the_command_with_tasks(
    model: Any, tokenizer: Any, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["compare", str(tmp_path / "model"), "--methods", "cats,teal", "--sparsity", "0.5"]
    arguments += ["--text", str(text_file), "--tokens", "512", "--evaluation-tokens", "512", "--window", "64"]
    arguments += ["--tasks", "actsparse_man", "--limit", "4", "--no-speed", "-o", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "actsparse_man acc" in printed
    assert json.loads((out / "cells" / "teal-0.5.json").read_text())["tasks"][0]["samples"] == 4
    # A scope that the task would not see is refused before anything is computed.
    assert main([*arguments, "--scope", "decode"]) == 2
    assert "leaves task actsparse_man dense" in capsys.readouterr().err


def test_grids_are_checked(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="method 'chest' is unknown: expected one of chess"):
        variant_of("chest")
    with pytest.raises(MethodError, match="'chest' is unknown"):
        Grid(**{**vars(grid), "methods": ("chest",)}).check()
    with pytest.raises(CalibrationError, match=r"sparsity is 1\.5"):
        Grid(**{**vars(grid), "sparsities": (1.5,)}).check()
    with pytest.raises(PlanError, match="scope 'most' is unknown"):
        Grid(**{**vars(grid), "scope": "most"}).check()
    with pytest.raises(TextError, match="expected --evaluation-text"):
        Grid(**{**vars(grid), "methods": ("coreinfer",)}).check()
    with pytest.raises(PlanError, match="holds no comparison"):
        load(tmp_path)

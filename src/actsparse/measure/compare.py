"""Many methods, one protocol: the same model, text, tokens, scope and kernels for every cell of a grid.

A folder holds everything: one plan and one JSON document per cell, the Markdown table, the plots and the page that
:mod:`actsparse.measure.report` makes of them.  Every document carries a key of all that it depends on, so that a run that was
interrupted, or is given more methods or levels, computes only what is missing, and two runs give the same digits.  Timings
cannot, and lie in a file of their own.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from actsparse.calibration.allocation import allocate
from actsparse.calibration.collect import Calibration, check_sparsity, load_calibration_windows
from actsparse.measure import evaluate
from actsparse.methods import METHODS, Method, MethodError, make
from actsparse.methods.base import Calibrated, Targets
from actsparse.models import text
from actsparse.models.text import TextError, Windows
from actsparse.plan import SCOPES, Plan, PlanError, atomic_path

# Raise it when a cell's content changes for the same inputs.
_PROTOCOL = 1


class Progress(Protocol):
    """Told now and then how many tokens are done, of how many."""

    def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Variant:
    """A row of the grid: a method with its settings and the allocation of its sparsity."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    allocation: str = "uniform"


# Names for what papers compare but what is one method here; every method's own name is a variant too.
VARIANTS = {
    "chess-ffn": Variant("chess", {"attention": False}),
    "chess-rms": Variant("chess", {"statistic": "rms"}),
    "chess-greedy": Variant("chess", allocation="greedy"),
    "teal-greedy": Variant("teal", allocation="greedy"),
    "wina-greedy": Variant("wina", allocation="greedy"),
}


def variant_of(name: str) -> Variant:
    """The variant ``name``; MethodError, listing what is known, for any other."""
    if name in VARIANTS:
        return VARIANTS[name]
    if name not in METHODS:
        raise MethodError(f"method {name!r} is unknown: expected one of {', '.join([*METHODS, *VARIANTS])}")
    return Variant(name)


@dataclass(frozen=True)
class Grid:
    """What to compare, and on what.

    Attributes:
        methods: names of variants; ``dense`` is always there.
        sparsities: targets for each.
        text: calibration text.
        evaluation_text: what is scored; None holds back the end of ``text``.
        tokens: calibration tokens.
        evaluation_tokens: scored tokens.
        window: calibration window, None for 1024 or the model's context.
        evaluation_window: length of an evaluation window.
        scope: which tokens are sparsified and scored.
        tasks: tasks of lm-evaluation-harness to run in every cell, perhaps none.
        tasks_folder: where more task files are.
        limit: documents per task.
    """

    methods: Sequence[str]
    sparsities: Sequence[float]
    text: str
    evaluation_text: str | None = None
    tokens: int = 65536
    evaluation_tokens: int = 20480
    window: int | None = None
    evaluation_window: int = 512
    scope: str = "all"
    tasks: Sequence[str] = ()
    tasks_folder: str | None = None
    limit: int | None = None

    def check(self) -> None:
        """Refuse what can be refused before a model is read."""
        check_sparsity(list(self.sparsities))
        if self.scope not in SCOPES:
            raise PlanError(f"scope {self.scope!r} is unknown: expected one of {', '.join(SCOPES)}")
        for name in self.methods:
            variant = variant_of(name)
            method = make(variant.method, **variant.settings)
            if variant.allocation != "uniform" and not method.sites:
                raise MethodError(f"method {name} has no sites to allocate over")
            if (method.packing, method.window) != (Method.packing, Method.window) and self.evaluation_text is None:
                raise TextError(f"method {name} cuts the text in its own way: expected --evaluation-text with it")

    def scope_of(self, name: str) -> str:
        """The scope a variant is scored under: the grid's, unless its method knows only others."""
        scopes = METHODS[variant_of(name).method].scopes
        return self.scope if self.scope in scopes else scopes[0]

    def cells(self) -> list[tuple[str, float]]:
        """(variant, sparsity) of every cell, the dense one first."""
        rest = [(name, float(s)) for name in dict.fromkeys(self.methods) if name != "dense" for s in self.sparsities]
        return [("dense", 0.0), *rest]


@dataclass
class Results:
    """A grid's documents, as :func:`load` reads them.

    Attributes:
        about: model, texts, scope and versions.
        cells: one document per cell, in the grid's order; see :func:`compare`.
        speed: tokens per second by cell name; empty when none was measured.
    """

    about: dict[str, Any]
    cells: list[dict[str, Any]]
    speed: dict[str, Any]


def compare(
    model: Any,
    tokenizer: Any,
    grid: Grid,
    directory: Path,
    *,
    name: str = "",
    progress: Progress | None = None,
) -> Results:
    """Run the cells of ``grid`` that ``directory`` does not hold yet.

    A cell's document has ``cell``, ``method``, ``sparsity``, ``ppl`` and ``ppl_stderr``, ``increase`` over dense with its
    paired ``increase_stderr``, ``weights_read`` (bytes read per token, as a fraction of the dense model's),
    ``weights_read_bytes``, ``ffn_weights_read``, ``sparsity_by_site`` (what was skipped while scoring), and ``tasks``.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        grid: what to compare.
        directory: where everything is kept; made if it is not there.
        name: the model, for the record.
        progress: called now and then.

    Raises:
        MethodError, TextError, ModelError, CalibrationError, PlanError: with one line that names what was wrong.
    """
    grid.check()
    _check_folder(directory)
    tasks = _tasks(grid)
    run = _Run(model, tokenizer, grid, directory, tasks, progress)
    run.solve_plans()
    cells = run.evaluate_cells()
    about = {
        "model": name or getattr(model.config, "_name_or_path", ""),
        "fingerprint": run.identity.fingerprint,
        "family": run.identity.family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": run.identity.layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "scope": grid.scope,
        "calibration": run.calibration.describe(),
        "evaluation": run.evaluation.describe(),
        "scored_tokens": evaluate.scored_tokens(run.evaluation, grid.scope),
        "task_note": tasks.note(_NoRules(grid.scope)) if tasks else "",
        "limit": grid.limit,
        "cells": [cell_name(*cell) for cell in grid.cells()],
    }
    _write(directory / "about.json", about)
    return Results(about, cells, _read(directory / "speed.json") or {})


def load(directory: Path) -> Results:
    """What :func:`compare` left in ``directory``; PlanError when that is not a comparison."""
    about = _read(directory / "about.json")
    if about is None:
        raise PlanError(f"{directory} holds no comparison (no about.json): expected the folder of actsparse compare")
    if not _is_about(about):
        raise PlanError(f"{directory}/about.json is not of a comparison: expected the folder of actsparse compare")
    cells = []
    for cell in about["cells"]:
        document = _read(directory / "cells" / f"{cell}.json")
        if document is None:
            raise PlanError(f"{directory} lacks cells/{cell}.json: run actsparse compare again to complete it")
        cells.append(document)
    return Results(about, cells, _read(directory / "speed.json") or {})


def _is_about(about: dict[str, Any]) -> bool:
    cells = about.get("cells")
    return "fingerprint" in about and isinstance(cells, list) and all(isinstance(cell, str) for cell in cells)


def _check_folder(directory: Path) -> None:
    """PlanError when ``directory`` holds files of our names that are not of a comparison: they would be overwritten."""
    about = _read(directory / "about.json")
    ours = (
        about is not None and _is_about(about)
        if (directory / "about.json").exists()
        else (directory / "plans").is_dir()
    )
    taken = [name for name in _WRITTEN if (directory / name).exists()]
    if taken and not ours:
        raise PlanError(
            f"{directory} holds other files ({taken[0]}): expected a new folder or that of an earlier comparison"
        )


_WRITTEN = ("about.json", "cells", "table.md", "report.html", "quality.svg", "sparsity.svg", "speed.svg", "speed.json")


def measure_speed(model: Any, directory: Path, results: Results, settings: Any, *, say: Callable[[str], None]) -> None:
    """Time the cells that can be decoded natively, all in one interleaved run, into ``speed.json``.

    Args:
        model: the model, on the CPU.
        directory: the comparison's folder.
        results: its cells; their ``speed`` is filled in.
        settings: a :class:`actsparse.measure.bench.run.Settings`.
        say: told what is going on.
    """
    from actsparse.measure.bench.run import measure

    names, plans = [], []
    for cell in results.cells:
        if cell["cell"] != "dense" and not cell["evaluation_only"]:
            plan = Plan.load(directory / "plans" / f"{cell['cell']}.safetensors")
            names.append(cell["cell"])
            plans.append(plan)
    report = measure(model, plans, settings, say=say).document()
    rows = report["results"]
    fast = [row for row in rows if row["sparsity"] is not None]
    by_cell = {"dense": next(row for row in rows if row["name"] == "dense"), **dict(zip(names, fast, strict=True))}
    results.speed = {
        "threads": torch.get_num_threads(),
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "repeats": settings.repeats,
        "read_gb_s": report["read_gb_s"],
        "read_spread_gb_s": report["read_spread_gb_s"],
        "hf": next(row for row in rows if row["name"] == "hf-eager"),
        "cells": by_cell,
    }
    _write(directory / "speed.json", results.speed)


def cell_name(variant: str, sparsity: float) -> str:
    """The name of a cell's files."""
    return variant if variant == "dense" else f"{variant}-{sparsity:g}"


@dataclass(frozen=True)
class _NoRules:
    """A stand-in for a plan where only the scope matters."""

    scope: str


class _Run:
    """One call of :func:`compare`."""

    def __init__(
        self, model: Any, tokenizer: Any, grid: Grid, directory: Path, tasks: Any, progress: Progress | None
    ) -> None:
        self._model, self._tokenizer, self._grid, self._tasks = model, tokenizer, grid, tasks
        self._directory = directory
        self._progress = progress
        for folder in (directory, directory / "plans", directory / "cells"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PlanError(f"cannot write {folder}: {error.strerror}") from None
        self.calibration, self.evaluation = _windows(model, tokenizer, grid)
        # Needs no text of its own; it is where the model's identity comes from.
        self._dense = Calibration(model, self.calibration, [make("dense")])
        self.identity = self._dense.identity
        self._cells = grid.cells()
        self._plan_keys = {cell_name(*cell): self._plan_key(*cell) for cell in self._cells}
        self._cell_keys = {cell_name(*cell): self._cell_key(*cell) for cell in self._cells}
        known = _read(directory / "plans" / "keys.json") or {}
        self._solved = {cell: key for cell, key in known.items() if self._plan_path(cell).is_file()}
        self._open = [cell for cell in self._cells if not self._is_done(cell_name(*cell))]
        self._unsolved = [cell for cell in self._open if not self._is_solved(cell_name(*cell))]
        self._total = self._done = 0

    def solve_plans(self) -> None:
        """Calibrate what the open cells need, and keep their plans."""
        wanted = dict.fromkeys(name for name, _ in self._unsolved)
        variants = {name: variant_of(name) for name in wanted}
        methods = {name: make(variant.method, **variant.settings) for name, variant in variants.items()}
        # Methods that want the same windows share one pass, and their statistics.
        groups: dict[tuple[str, int], list[str]] = {}
        for name, method in methods.items():
            groups.setdefault((method.packing, method.window), []).append(name)
        self._total = len(self._open) * self.evaluation.count
        self._total += len({self._grid.scope_of(name) for name, _ in self._open}) * self.evaluation.count
        # A pass per group is a guess: methods with several phases take more.
        self._total += len(groups) * self.calibration.count
        self._total += sum(variant.allocation == "greedy" for variant in variants.values()) * self.calibration.count
        for (packing, length), names in groups.items():
            windows = self._windows_for(packing, length)
            run = Calibration(self._model, windows, [methods[name] for name in names])
            partial = self._directory / f"{packing}-{length}.partial"
            collected = run.collect(progress=self._advance(self.calibration.count), partial=partial)
            self._done += self.calibration.count
            for name in names:
                method = methods[name]
                self._solve(run, name, method, collected[method.name], variants[name].allocation, windows)
            run.discard(partial)

    def evaluate_cells(self) -> list[dict[str, Any]]:
        """The documents of all cells, computing those that are missing."""
        documents = []
        dense: dict[str, torch.Tensor] = {}
        for cell in self._cells:
            name = cell_name(*cell)
            path = self._directory / "cells" / f"{name}.json"
            if cell in self._open:
                scope = self._grid.scope_of(cell[0])
                if scope not in dense:
                    dense[scope] = self._dense_losses(scope)
                document = self._evaluate(*cell, dense[scope])
                _write(path, document)
                self._done += self.evaluation.count
                self._tick(0)
            documents.append(_read(path) or {})
        return documents

    def _solve(
        self, run: Calibration, name: str, method: Method, stats: list[Calibrated], allocation: str, windows: Windows
    ) -> None:
        found = None
        if allocation == "greedy":
            log = self._directory / "plans" / f"{name}.allocation.json"
            found = allocate(
                self._model, method, stats, windows.tokens, log=log, progress=self._advance(self.calibration.count)
            )
            self._done += self.calibration.count
        for variant, sparsity in self._unsolved:
            if variant != name:
                continue
            targets = found.targets(sparsity) if found else Targets(sparsity)
            plan = run.solve(method, stats, targets, scope=self._grid.scope_of(name))
            if found:
                plan = replace(plan, settings={**plan.settings, **found.describe()})
            cell = cell_name(variant, sparsity)
            plan.save(self._plan_path(cell))
            self._solved[cell] = self._plan_keys[cell]
            _write(self._directory / "plans" / "keys.json", self._solved)

    def _evaluate(self, variant: str, sparsity: float, dense: torch.Tensor) -> dict[str, Any]:
        name = cell_name(variant, sparsity)
        plan = Plan.load(self._plan_path(name))
        result = evaluate.compare_perplexity(
            self._model, plan, self.evaluation, progress=self._advance(self.evaluation.count), dense=dense
        )
        document = {
            "cell": name,
            "key": self._cell_keys[name],
            "method": variant,
            "sparsity": sparsity,
            "evaluation_only": plan.evaluation_only,
            "scope": result.scope,
            "ppl": result.sparse.ppl,
            "ppl_stderr": result.sparse.stderr,
            "increase": result.sparse.ppl - result.dense.ppl,
            "increase_stderr": result.delta_stderr,
            "relative_increase": result.sparse.ppl / result.dense.ppl - 1,
            "relative_increase_stderr": result.delta_stderr / result.dense.ppl,
            "weights_read": result.weights_read.fraction,
            "weights_read_bytes": result.weights_read.bytes,
            "ffn_weights_read": result.weights_read.ffn_fraction,
            "sparsity_by_site": result.sparsity,
            "sparsity_calibrated": dict(plan.achieved),
            "settings": dict(plan.settings),
            "tasks": [],
        }
        # Under a scope of its own, such as `decode`, a method's tasks would score as dense.
        if self._tasks and plan.scope == self._grid.scope:
            scores = self._tasks.run(self._model, self._tokenizer, None if variant == "dense" else plan)
            document["tasks"] = [score.document() for score in scores]
        return document

    def _dense_losses(self, scope: str) -> torch.Tensor:
        """The dense model's loss per window, kept so that it is computed once for all cells of all runs."""
        path = self._directory / f"dense-losses-{scope}.json"
        key = _digest([self.identity.fingerprint, str(self._model.dtype), self.evaluation.digest])
        known = _read(path)
        if known is None or known["key"] != key:
            progress = self._advance(self.evaluation.count)
            known = {
                "key": key,
                "losses": evaluate.window_losses(self._model, self.evaluation, scope, progress=progress).tolist(),
            }
            _write(path, known)
        self._done += self.evaluation.count
        return torch.tensor(known["losses"], dtype=torch.float64)

    def _windows_for(self, packing: str, length: int) -> Windows:
        """The calibration windows that a method asks for."""
        grid = self._grid
        if packing == "packed" and length == Method.window:
            return self.calibration
        return load_calibration_windows(
            self._model,
            self._tokenizer,
            grid.text,
            tokens=grid.tokens,
            window=grid.window,
            packing=packing,
            default=length,
        )

    def _plan_key(self, variant: str, sparsity: float) -> str:
        """What a plan depends on."""
        chosen = variant_of(variant)
        parts = [
            _PROTOCOL,
            importlib.metadata.version("actsparse"),
            self.identity.fingerprint,
            str(self._model.dtype),
            self.calibration.digest if variant != "dense" else "",
            [chosen.method, dict(chosen.settings), chosen.allocation, sparsity],
            self._grid.scope_of(variant),
        ]
        return _digest(parts)

    def _cell_key(self, variant: str, sparsity: float) -> str:
        """What a cell depends on."""
        tasks = [list(self._grid.tasks), self._grid.limit]
        return _digest([self._plan_key(variant, sparsity), self.evaluation.digest, tasks])

    def _plan_path(self, cell: str) -> Path:
        return self._directory / "plans" / f"{cell}.safetensors"

    def _is_done(self, cell: str) -> bool:
        document = _read(self._directory / "cells" / f"{cell}.json")
        return document is not None and document.get("key") == self._cell_keys[cell] and self._is_solved(cell)

    def _is_solved(self, cell: str) -> bool:
        return self._solved.get(cell) == self._plan_keys[cell]

    def _advance(self, count: int) -> Progress | None:
        """Progress of a part of ``count`` tokens, within the whole."""

        def advance(done: int, total: int) -> None:
            self._tick(round(done / total * count))

        return advance if self._progress else None

    def _tick(self, within: int) -> None:
        if self._progress:
            self._progress(self._done + within, self._total)


def _tasks(grid: Grid) -> Any:
    if not grid.tasks:
        return None
    from actsparse.measure.harness import Tasks

    tasks = Tasks(grid.tasks, folder=grid.tasks_folder, limit=grid.limit)
    tasks.check(_NoRules(grid.scope))  # type: ignore[arg-type]
    return tasks


def _windows(model: Any, tokenizer: Any, grid: Grid) -> tuple[Windows, Windows]:
    """Calibration and evaluation windows; without an evaluation text, the end of the calibration text is held back."""
    if grid.evaluation_text is not None:
        calibration = load_calibration_windows(
            model, tokenizer, grid.text, tokens=grid.tokens, window=grid.window, packing="packed"
        )
        evaluation = text.load_windows(
            grid.evaluation_text, tokenizer, tokens=grid.evaluation_tokens, window=grid.evaluation_window
        )
    else:
        both = load_calibration_windows(
            model,
            tokenizer,
            grid.text,
            tokens=grid.tokens + grid.evaluation_tokens,
            window=grid.window,
            packing="packed",
        )
        count, length = both.tokens.shape
        held = round(count * grid.evaluation_tokens / (grid.tokens + grid.evaluation_tokens))
        held = min(max(held, 1), count - 1)
        if count < 2:
            raise TextError(f"text {grid.text} gives one window of {length} tokens, expected more, to hold some back")
        short = min(grid.evaluation_window, length)
        rest = both.tokens[count - held :, : length - length % short].reshape(-1, short)
        calibration = replace(both, tokens=both.tokens[: count - held], domains=both.domains[: count - held])
        evaluation = Windows(rest, f"{both.source} (held back)", ("",) * len(rest))
    if len(evaluation.tokens) < 2:
        raise TextError(
            f"evaluation text gives one window of {evaluation.tokens.shape[1]} tokens, expected two or more for a "
            "standard error"
        )
    return calibration, evaluation


def markdown(results: Results) -> str:
    """The comparison as Markdown: every cell, then perplexity at equal weights read."""
    about = results.about
    tasks = [score["task"] for score in results.cells[0]["tasks"] if score["metric"] == "acc"]
    header = ["method", "sparsity", "weights read", "of the FFN", "perplexity", "increase (paired)"]
    header += [f"{task} acc" for task in tasks]
    header += ["tokens/s", "against dense"] if results.speed else []
    lines = [
        f"`{about['model']}` ({about['parameters'] / 1e6:.1f} M parameters, {about['dtype']}), "
        f"{about['scored_tokens']:,} evaluation tokens, calibrated on {about['calibration']['tokens']:,} tokens, "
        f"scope `{about['scope']}`. Increases are over the dense model on the same tokens, with their standard error.",
        "",
        *_table(header, [_row(results, cell, tasks) for cell in results.cells]),
    ]
    levels, rows = at_equal_reading(results)
    if rows:
        lines += ["", "Increase of perplexity at equal weights read (linear between the cells above):", ""]
        lines += _table(["method", *(f"{level:.0%} read" for level in levels)], rows)
    notes = []
    if any(cell["evaluation_only"] for cell in results.cells):
        notes.append("`oracle` is a bound, not a method: it is told for free which products are small.")
    if results.speed:
        speed = results.speed
        notes.append(
            f"tokens/s: median of {speed['repeats']} interleaved rounds of {speed['new_tokens']} tokens, "
            f"{speed['threads']} threads, native decode step; transformers' eager loop on the same model: "
            f"{speed['hf']['decode_tok_s']:.1f}."
        )
    if about["task_note"] and tasks:
        notes.append(about["task_note"] + ".")
    return "\n".join(lines + [line for note in notes for line in ("", note)]) + "\n"


def at_equal_reading(results: Results) -> tuple[list[float], list[list[str]]]:
    """Levels of weights read, and per method the relative increase there with its standard error."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for cell in results.cells:
        if cell["method"] != "dense":
            point = (cell["weights_read"], cell["relative_increase"], cell["relative_increase_stderr"])
            curves.setdefault(cell["method"], [(1.0, 0.0, 0.0)]).append(point)
    # Levels between the lowest that at least two methods reach and the dense model.
    floors = sorted(min(point[0] for point in curve) for curve in curves.values())
    if len(floors) < 2:
        return [], []
    levels = [level / 20 for level in range(19, 0, -1) if level / 20 >= floors[1]]
    levels = levels[:: max(1, math.ceil(len(levels) / 6))]
    rows = []
    for method, curve in curves.items():
        row = [method]
        for level in levels:
            found = _interpolate(sorted(curve), level)
            row.append("-" if found is None else f"{found[0]:+.2%} ± {found[1]:.2%}")
        rows.append(row)
    return levels, rows


def _interpolate(curve: Sequence[tuple[float, float, float]], level: float) -> tuple[float, float] | None:
    for (x0, y0, e0), (x1, y1, e1) in itertools.pairwise(curve):
        if x0 <= level <= x1 and x1 > x0:
            part = (level - x0) / (x1 - x0)
            return y0 + part * (y1 - y0), e0 + part * (e1 - e0)
    return None


def _row(results: Results, cell: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    dense = cell["method"] == "dense"
    own = "" if cell["scope"] == results.about["scope"] else f" (scope {cell['scope']})"
    row = [
        cell["method"] + own,
        "-" if dense else f"{cell['sparsity']:g}",
        f"{cell['weights_read']:.1%}",
        f"{cell['ffn_weights_read']:.1%}",
        f"{cell['ppl']:.4f} ± {cell['ppl_stderr']:.4f}",
        "-" if dense else f"{cell['relative_increase']:+.2%} ± {cell['relative_increase_stderr']:.2%}",
    ]
    accuracy = {score["task"]: score for score in cell["tasks"] if score["metric"] == "acc"}
    row += [_accuracy(accuracy.get(task)) for task in tasks]
    if results.speed:
        timing = results.speed["cells"].get(cell["cell"])
        if timing is None:
            row += ["-", "-"]
        else:
            low, high = timing["decode_spread"]
            ratio = timing["decode_tok_s"] / results.speed["cells"]["dense"]["decode_tok_s"]
            row += [f"{timing['decode_tok_s']:.1f} ({low:.1f} to {high:.1f})", f"{ratio:.2f}x"]
    return row


def _accuracy(score: Mapping[str, Any] | None) -> str:
    return "-" if score is None else f"{score['value']:.4f} ± {score['stderr'] or 0:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join([" :-- ", *[" --: "] * (len(header) - 1)]) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write(path: Path, document: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON document; None when there is none, or a damaged one (which is then made again)."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None

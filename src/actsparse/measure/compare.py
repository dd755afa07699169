"""Many methods, one protocol: the same model, text, tokens, scope and kernels for every cell of a grid.

A folder holds everything: one plan and one JSON document per cell, the Markdown table, the plots and the page that
:mod:`actsparse.measure.report` makes of them.  Every document carries a key of all that it depends on, so that a run that was
interrupted, or is given more methods or levels, computes only what is missing, and two runs give the same digits.  Timings
cannot, and lie in a file of their own.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from actsparse.calibration.allocation import allocate
from actsparse.calibration.collect import Calibration, load_calibration_windows
from actsparse.calibration.presets import stored_for
from actsparse.measure import evaluate
from actsparse.measure.grid import GRADED, OWN_WEIGHTS, Grid, cell_name, variant_of, weights_of
from actsparse.measure.results import Results, check_folder, read, write
from actsparse.measure.stored import StoredModels
from actsparse.methods import Method, make
from actsparse.methods.base import Calibrated, Targets
from actsparse.models import text
from actsparse.models.text import TextError, Windows
from actsparse.plan import Plan, PlanError

# Raise it when a cell's content changes for the same inputs.
_PROTOCOL = 5


class Progress(Protocol):
    """Told now and then how many tokens are done, of how many."""

    def __call__(self, done: int, total: int) -> None: ...


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

    A cell's document has ``cell``, ``method``, ``sparsity``, ``weights`` (what it was scored on: ``dense``, or the name of a
    folder under ``weights``), ``bits_read`` and ``bits_stored`` (per weight of the layers' matrices), ``ppl`` and
    ``ppl_stderr``, ``increase`` over dense with its paired ``increase_stderr``, ``divergence`` (KL(dense || sparse), nats a
    token) and ``agreement`` (of the most likely token) with theirs, ``weights_read`` (bytes read per token, as a fraction of
    the dense model's), ``weights_read_bytes``, ``ffn_weights_read``, ``sparsity_by_site`` (what was skipped while scoring),
    and ``tasks``.

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
    check_folder(directory)
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
    write(directory / "about.json", about)
    return Results(about, cells, read(directory / "speed.json") or {})


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
        if cell["cell"] != "dense" and cell["weights"] == "dense" and not cell["evaluation_only"]:
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
    write(directory / "speed.json", results.speed)


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
        known = read(directory / "plans" / "keys.json") or {}
        self._solved = {cell: key for cell, key in known.items() if self._plan_path(cell).is_file()}
        self._open = [cell for cell in self._cells if not self._is_done(cell_name(*cell))]
        self._unsolved = [cell for cell in self._open if not self._is_solved(cell_name(*cell))]
        self._total = self._done = 0
        plan = self._dense.solve(make("dense"), [], Targets(0.0))
        self._stored = StoredModels(model, tokenizer, self.calibration, plan, directory / "weights")

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
        dense: dict[str, torch.Tensor] = {}
        # Cells on the same weights one after the other: only one model is open beside the dense one.
        for cell in sorted(self._open, key=lambda cell: weights_of(*cell)):
            scope = self._grid.scope_of(cell[0])
            if scope not in dense:
                dense[scope] = self._dense_losses(scope)
            write(self._directory / "cells" / f"{cell_name(*cell)}.json", self._evaluate(*cell, dense[scope]))
            self._done += self.evaluation.count
            self._tick(0)
        return [read(self._directory / "cells" / f"{cell_name(*cell)}.json") or {} for cell in self._cells]

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
            write(self._directory / "plans" / "keys.json", self._solved)

    def _evaluate(self, variant: str, sparsity: float, dense: torch.Tensor) -> dict[str, Any]:
        name, weights = cell_name(variant, sparsity), weights_of(variant, sparsity)
        stored = self._stored.open(weights)
        own = variant in OWN_WEIGHTS
        plan = stored.plan.with_scope(self._grid.scope) if own and stored.plan else Plan.load(self._plan_path(name))
        result = evaluate.compare_perplexity(
            stored.model,
            plan,
            self.evaluation,
            progress=self._advance(self.evaluation.count),
            dense=dense,
            reference=self._model,
        )
        # A rounded copy is stored dense: what it stands for is known from its rounding.
        read = result.weights_read
        share = 1.0 if stored.bits is None else stored.bits / read.bits_read
        assert result.divergence is not None
        assert result.agreement is not None
        document = {
            "cell": name,
            "key": self._cell_keys[name],
            "method": variant,
            "sparsity": plan.sparsity if own else sparsity,
            "level": f"{sparsity:g} bits" if own else f"{sparsity:g}",
            "weights": weights,
            "bits_read": share * read.bits_read,
            "bits_stored": share * read.bits_stored,
            "evaluation_only": plan.evaluation_only,
            "scope": result.scope,
            "ppl": result.sparse.ppl,
            "ppl_stderr": result.sparse.stderr,
            "increase": result.sparse.ppl - result.dense.ppl,
            "increase_stderr": result.delta_stderr,
            "relative_increase": result.sparse.ppl / result.dense.ppl - 1,
            "relative_increase_stderr": result.delta_stderr / result.dense.ppl,
            "divergence": result.divergence.value,
            "divergence_stderr": result.divergence.stderr,
            "agreement": result.agreement.value,
            "agreement_stderr": result.agreement.stderr,
            "weights_read": share * read.fraction,
            "weights_read_bytes": share * read.bytes,
            "ffn_weights_read": share * read.ffn_fraction,
            "sparsity_by_site": result.sparsity,
            "sparsity_calibrated": dict(plan.achieved),
            "settings": dict(plan.settings),
            "tasks": [],
        }
        # Under a scope of its own, such as `decode`, a method's tasks would score as dense.
        if self._tasks and plan.scope == self._grid.scope:
            scores = self._tasks.run(stored.model, self._tokenizer, plan if plan.rules or plan.prompt else None)
            document["tasks"] = [score.document() for score in scores]
        return document

    def _dense_losses(self, scope: str) -> torch.Tensor:
        """The dense model's loss per window, kept so that it is computed once for all cells of all runs."""
        path = self._directory / f"dense-losses-{scope}.json"
        key = _digest([self.identity.fingerprint, str(self._model.dtype), self.evaluation.digest])
        known = read(path)
        if known is None or known["key"] != key:
            progress = self._advance(self.evaluation.count)
            known = {
                "key": key,
                "losses": evaluate.window_losses(self._model, self.evaluation, scope, progress=progress).tolist(),
            }
            write(path, known)
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
            [chosen.method, dict(chosen.settings), chosen.allocation, sparsity, weights_of(variant, sparsity)],
            self._grid.scope_of(variant),
        ]
        if variant == GRADED:
            parts.append(stored_for(sparsity))
        return _digest(parts)

    def _cell_key(self, variant: str, sparsity: float) -> str:
        """What a cell depends on."""
        tasks = [list(self._grid.tasks), self._grid.limit]
        return _digest([self._plan_key(variant, sparsity), self.evaluation.digest, tasks])

    def _plan_path(self, cell: str) -> Path:
        return self._directory / "plans" / f"{cell}.safetensors"

    def _is_done(self, cell: str) -> bool:
        document = read(self._directory / "cells" / f"{cell}.json")
        return document is not None and document.get("key") == self._cell_keys[cell] and self._is_solved(cell)

    def _is_solved(self, cell: str) -> bool:
        return cell.rpartition("-")[0] in OWN_WEIGHTS or self._solved.get(cell) == self._plan_keys[cell]

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


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

"""Tasks: lm-evaluation-harness on a dense or sparsified model, under one explicit scope.

A task whose score is a likelihood is one prefill and nothing else.  A plan that leaves the prefill dense would score as the
dense model there, and look lossless: such a pair of plan and task is refused, and a plan that sparsifies half of every
sequence carries a note wherever its score is shown.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from actsparse.models.text import TextError
from actsparse.plan import Plan, PlanError
from actsparse.runtime.finite import check_logits
from actsparse.runtime.swap import restore, sparsify

# The tasks of the CHESS paper (arXiv:2409.01366, section 4.1), all 0-shot.
ALIASES = {
    "chess8": ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "sciq", "winogrande"),
}
# Where the project's own tasks are: beside the caller, or in the checkout that this file belongs to.
TASK_FOLDERS = (Path("reference/tasks"), Path(__file__).resolve().parents[2] / "reference" / "tasks")
_GENERATION = "generate_until"


class TaskError(TextError):
    """A task that is not known or whose data cannot be had."""


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: its name.
        metric: ``acc``, ``acc_norm`` ...
        value: the metric.
        stderr: its standard error, with documents as independent samples (NaN where a document has no value).
        samples: how many documents were scored.
        each: the metric per document, where it has one (not for corpus metrics such as perplexity).
    """

    task: str
    metric: str
    value: float
    stderr: float
    samples: int
    each: tuple[float, ...] = field(default=(), repr=False)

    def document(self) -> dict[str, Any]:
        """For JSON, without the values per document."""
        stderr = None if math.isnan(self.stderr) else self.stderr
        return {
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "stderr": stderr,
            "samples": self.samples,
        }


def _stderr(values: Sequence[float]) -> float:
    """Standard error of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def paired(sparse: Score, dense: Score) -> tuple[float, float]:
    """Sparse minus dense and the standard error of that, paired by document where both have values per document."""
    difference = sparse.value - dense.value
    if not sparse.each or len(sparse.each) != len(dense.each):
        return difference, math.hypot(sparse.stderr, dense.stderr)
    return difference, _stderr([one - other for one, other in zip(sparse.each, dense.each, strict=True)])


def expand(names: Sequence[str]) -> list[str]:
    """Task names with :data:`ALIASES` replaced by what they stand for."""
    expanded = [task for name in names for task in ALIASES.get(name, (name,))]
    if not expanded:
        raise TaskError("no task given, expected at least one name")
    return list(dict.fromkeys(expanded))


def task_folder(given: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder with task files: the one given, else the project's own where it can be found."""
    if given is not None:
        if not Path(given).is_dir():
            raise TaskError(f"task folder {given} does not exist or is not a folder")
        return Path(given)
    return next((folder for folder in TASK_FOLDERS if folder.is_dir()), None)


class Tasks:
    """Tasks of the harness, loaded once, to be run on one or more models.

    Args:
        names: tasks, groups or tags of the harness or of ``folder``, or one of :data:`ALIASES`.
        folder: where more task files are; by default the project's own.
        limit: documents per task; None for all.
        batch_size: sequences in a forward.

    Raises:
        TaskError: unknown task, or data that cannot be loaded (no network, for instance).
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        folder: str | os.PathLike[str] | None = None,
        limit: int | None = None,
        batch_size: int = 16,
    ) -> None:
        self.names = expand(names)
        self.limit = limit
        self.batch_size = batch_size
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise TaskError("tasks need lm-evaluation-harness: pip install 'actsparse[eval]'") from None
        place = task_folder(folder)
        # The harness's own ten thousand files take many seconds to index: only when they are needed.
        with _quiet():
            self._manager = TaskManager(include_path=place, include_defaults=False) if place else None
            if self._manager is None or not set(self.names) <= set(self._manager.all_tasks):
                self._manager = TaskManager(include_path=place)
        unknown = sorted(set(self.names) - set(self._manager.all_tasks))
        if unknown:
            where = f" nor in {place}" if place else ""
            raise TaskError(f"task {unknown[0]!r} is unknown: it is not in lm-evaluation-harness{where}")
        try:
            with _quiet():
                self._tasks: Mapping[str, Any] = self._manager.load(list(self.names))["tasks"]
        except Exception as error:  # the harness and the datasets library raise many unrelated kinds
            line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise TaskError(f"tasks {', '.join(self.names)} cannot be loaded: {line}") from None

    def check(self, plan: Plan | None) -> None:
        """PlanError where ``plan`` would leave a task's every score dense."""
        if plan is None or plan.scope != "decode":
            return
        for name, task in self._tasks.items():
            if task.OUTPUT_TYPE != _GENERATION:
                raise PlanError(
                    f"scope decode leaves task {name} dense: its score is the likelihood of one prefill, expected scope "
                    "all or last_half"
                )

    def note(self, plan: Plan | None) -> str:
        """What has to be said beside the scores: the scope, in words."""
        if plan is None:
            return "dense"
        return {
            "all": "scope all: every token of every sequence is sparsified",
            "decode": "scope decode: the prompt is dense, generated tokens are sparsified",
            "last_half": "scope last_half: THE FIRST HALF OF EVERY SEQUENCE IS DENSE, which flatters the score",
        }[plan.scope]

    def run(self, model: Any, tokenizer: Any, plan: Plan | None = None) -> list[Score]:
        """Scores of ``model`` under ``plan`` (None: dense).  The model is left dense.

        Raises:
            PlanError: see :meth:`check`.
            ModelError: the model's logits are not finite.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        self.check(plan)
        restore(model)
        if plan is not None:
            sparsify(model, plan)
        try:
            # NaN loses every comparison: tasks would give a score as if it were an answer.
            with torch.no_grad():
                check_logits(model(input_ids=torch.arange(8, device=model.device)[None]).logits)
            with _quiet():
                wrapped = HFLM(
                    pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size, device=str(model.device)
                )
                results = simple_evaluate(
                    wrapped, tasks=list(self.names), task_manager=self._manager, limit=self.limit, bootstrap_iters=0
                )
        finally:
            restore(model)
        assert results is not None  # None on other ranks of a distributed run only
        return _scores(results, list(self._tasks))


def mean_accuracy(scores: Sequence[Score]) -> float | None:
    """Mean of ``acc`` over tasks; None when no task has it."""
    values = [score.value for score in scores if score.metric == "acc"]
    return sum(values) / len(values) if values else None


def _scores(results: Mapping[str, Any], tasks: Sequence[str]) -> list[Score]:
    scores = []
    for task in tasks:
        row = results["results"][task]
        samples = results.get("samples", {}).get(task, [])
        count = int(results["n-samples"][task]["effective"])
        for name, value in row.items():
            metric, _, filtered = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not filtered:
                continue
            values = [sample.get(metric) for sample in samples if sample.get("filter", "none") == filtered]
            each = tuple(float(v) for v in values) if all(isinstance(v, int | float) for v in values) else ()
            scores.append(Score(task, metric, float(value), _stderr(each), count, each))
    return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's log lines and bars off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)

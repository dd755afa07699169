"""What the cells of a comparison are scored on: the dense model, or one whose weights are stored in fewer bits.

Packed ones lie in the comparison's folder, ready for every verb; all are calibrated on the same windows, with the same error
feedback.  One is open at a time beside the dense model.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actsparse.calibration.activity import Progress
from actsparse.calibration.pack import RECIPE, Settings, pack_opened
from actsparse.calibration.rounded import rounded_copy
from actsparse.measure.grid import GPTQ, GRADED
from actsparse.models.directory import PLAN
from actsparse.models.text import Windows
from actsparse.plan import Plan, PlanError
from actsparse.runtime.packed import open_packed

# Enough for a small model's Hessians; activations of a layer are held at once.
MOST_TOKENS = 16384


@dataclass(frozen=True)
class Stored:
    """A model to score plans on.

    Attributes:
        model: the dense model itself, a packed one, or a rounded copy.
        plan: what it reads when no method decides; None for the dense model.
        bits: bits per weight that the rounded copy stands for; None where the model's own are counted.
    """

    model: Any
    plan: Plan | None = None
    bits: float | None = None


class StoredModels:
    """The models of one comparison by the names of :func:`actsparse.measure.grid.weights_of`.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        windows: calibration windows; the first :data:`MOST_TOKENS` tokens of them are used.
        dense_plan: a plan without rules for the model.
        folder: where packed models are kept.
    """

    def __init__(self, model: Any, tokenizer: Any, windows: Windows, dense_plan: Plan, folder: Path) -> None:
        rows = max(1, MOST_TOKENS // int(windows.tokens.shape[1]))
        self._windows = replace(windows, tokens=windows.tokens[:rows], domains=windows.domains[:rows])
        self._tokenizer, self._dense_plan, self._folder = tokenizer, dense_plan, folder
        self._dense = Stored(model)
        self._open = ("dense", self._dense)

    def open(self, name: str, progress: Progress | None = None) -> Stored:
        """The model ``name``, made where it is missing."""
        if name == "dense":
            return self._dense
        if self._open[0] != name:
            self._open = ("dense", self._dense)  # let the last one go first
            self._open = (name, self._make(name, progress))
        return self._open[1]

    def _make(self, name: str, progress: Progress | None) -> Stored:
        kind, _, level = name.rpartition("-")
        if kind in GPTQ:
            copy, bits = rounded_copy(
                self._dense.model, self._windows.tokens, int(level), group=GPTQ[kind], progress=progress
            )
            return Stored(copy, replace(self._dense_plan, method=kind), bits)
        path = self._folder / name
        settings = Settings(bits_read=float(level)) if kind == GRADED else Settings(int(level), None)
        if not self._is_sound(path, settings.stored):
            shutil.rmtree(path, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            pack_opened(self._dense.model, self._tokenizer, self._windows, path, settings, progress=progress)
        return Stored(*open_packed(str(path)))

    def _is_sound(self, path: Path, stored: int) -> bool:
        """Whether an earlier run left these very weights."""
        try:
            plan = Plan.load(path / PLAN)
        except PlanError:
            return False
        mine = [self._windows.digest, self._dense_plan.model.fingerprint, self._dense_plan.version, RECIPE, stored]
        made = [plan.settings.get(name) for name in ("recipe", "bits_stored")]
        return [plan.text.get("sha256"), plan.model.fingerprint, plan.version, *made] == mine

"""A comparison's folder: its documents, read and written so that nothing half-written or foreign is taken for one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actsparse.plan import PlanError, atomic_path


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


def load(directory: Path) -> Results:
    """What :func:`compare` left in ``directory``; PlanError when that is not a comparison."""
    about = read(directory / "about.json")
    if about is None:
        raise PlanError(f"{directory} holds no comparison (no about.json): expected the folder of actsparse compare")
    if not _is_about(about):
        raise PlanError(f"{directory}/about.json is not of a comparison: expected the folder of actsparse compare")
    cells = []
    for cell in about["cells"]:
        document = read(directory / "cells" / f"{cell}.json")
        if document is None:
            raise PlanError(f"{directory} lacks cells/{cell}.json: run actsparse compare again to complete it")
        cells.append(document)
    return Results(about, cells, read(directory / "speed.json") or {})


def _is_about(about: dict[str, Any]) -> bool:
    cells = about.get("cells")
    return "fingerprint" in about and isinstance(cells, list) and all(isinstance(cell, str) for cell in cells)


def check_folder(directory: Path) -> None:
    """PlanError when ``directory`` holds files of our names that are not of a comparison: they would be overwritten."""
    about = read(directory / "about.json")
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


def write(path: Path, document: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any] | None:
    """A JSON document; None when there is none, or a damaged one (which is then made again)."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None

"""Directories of this package's models: what stands in them, and what is refused before anything of it is read.

A sparse model's directory is a Hugging Face checkpoint, dense or packed (``docs/format.md``), with ``plan.safetensors`` beside
it and a ``quantization_config`` in its ``config.json`` whose ``quant_method`` is ``actsparse``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from actsparse.models.sites import ModelError

QUANT_METHOD = "actsparse"
FORMAT_VERSION = 2
PLAN = "plan.safetensors"
SHARDS = "actsparse-{:05d}.safetensors"
INDEX = "model.safetensors.index.json"
_KINDS = (".json", ".safetensors", ".py")


def description(name: str) -> dict[str, Any] | None:
    """The ``quantization_config`` of the model ``name`` (a directory or a hub id); None unless it is this package's."""
    try:
        if Path(name).is_dir():
            config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        else:
            from transformers import PreTrainedConfig

            config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError, RecursionError):
        return None
    return of_config(config)


def of_config(config: Any) -> dict[str, Any] | None:
    """The ``quantization_config`` of a configuration as JSON has it; None unless it is this package's."""
    about = config.get("quantization_config") if isinstance(config, dict) else None
    return about if isinstance(about, dict) and about.get("quant_method") == QUANT_METHOD else None


def is_packed(name: str) -> bool:
    """Whether ``name`` is a model of packed weights (:mod:`actsparse.runtime.packed`)."""
    about = description(name)
    return about is not None and holds_packed(about)


def holds_packed(about: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` of this package is that of packed weights."""
    return about.get("bits_stored") is not None


def check(directory: Path, about: dict[str, Any]) -> None:
    """ModelError for a directory of another format, whose plan lies elsewhere, or with a link that leads out of it.

    Links of the hub's cache lead into the same repository's blobs, and are let through.
    """
    version, plan = about.get("format_version"), about.get("plan", PLAN)
    if version not in ((1, FORMAT_VERSION) if holds_packed(about) else (FORMAT_VERSION,)):
        raise ModelError(f"{directory} has format {str(version)[:24]!r}, expected {FORMAT_VERSION}")
    if plan != PLAN:
        raise ModelError(f"{directory}/config.json names the plan {str(plan)[:60]!r}, expected {PLAN}")
    for name in sorted(_indexed(directory)):
        if name != Path(name).name:
            raise ModelError(f"{directory}/{INDEX} names {name[:60]!r}: weights lie elsewhere, expected them inside")
    inside = [directory.resolve()]
    if directory.parent.name == "snapshots":
        inside.append(directory.parent.parent.resolve() / "blobs")
    for file in sorted(directory.iterdir()):
        if file.suffix in _KINDS and file.is_symlink():
            target = file.resolve()
            if not any(target.is_relative_to(folder) for folder in inside):
                raise ModelError(f"{file} is a link that leads out of its directory, to {target}")


def _indexed(directory: Path) -> set[str]:
    """The files that the index names; none without one."""
    path = directory / INDEX
    if not path.is_file():
        return set()
    try:
        return set(map(str, json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{path} is damaged, expected the names of files by tensor") from None


def check_room(target: Path, needed: int) -> None:
    """ModelError unless the directory's disk has room; found out before the minutes of work, not after."""
    parent = target.parent
    if not parent.is_dir():
        raise ModelError(f"cannot write {target}: {parent} is no directory")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ModelError(f"{target} needs about {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free")

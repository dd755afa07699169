"""Which model vLLM is about to load, in the terms of a plan."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

from actsparse.models import opening, sites
from actsparse.models.sites import ModelError
from actsparse.plan import ModelIdentity, Plan


def of(model: str, config: Any, packed: Plan | None) -> ModelIdentity:
    """The identity of a checkpoint (directory or hub id) with its Hugging Face configuration.

    The weights' fingerprint is read off the files; packed weights go by the one that their plan was made with.

    Raises:
        ModelError: unsupported family, or weights that are not in safetensors files.
    """
    described = SimpleNamespace(config=config)
    family = sites.family_of(described)
    fingerprint = packed.model.fingerprint if packed is not None else _fingerprint(model, config, family)
    sites.set_fingerprint(described, fingerprint)
    return ModelIdentity(**sites.describe(described))


def _fingerprint(model: str, config: Any, family: sites.Family) -> str:
    """As :func:`actsparse.models.sites.fingerprint`, without opening the model."""
    directory = Path(opening.local_directory(model))
    names: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names |= dict.fromkeys(file.keys(), path)
    digest = hashlib.sha256()
    for index in range(config.num_hidden_layers):
        for projection, _ in family.projections:
            place = family.stored(projection)
            ending = re.compile(rf"(?:^|\.)layers\.{index}\.{re.escape(place)}\.weight$")
            name = next((name for name in names if ending.search(name)), None)
            if name is None:
                raise ModelError(f"model {model} lacks layers.{index}.{place}.weight in its safetensors files")
            with safe_open(names[name], framework="pt") as file:
                rows = file.get_slice(name)
                begin, count = _rows(projection, family.fused.get(place, ()), config, rows.get_shape()[0])
                chosen = (begin + torch.linspace(0, count - 1, 4).long()).tolist()
                sample = torch.cat([rows[row : row + 1, :64] for row in chosen]).to(torch.bfloat16).contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rows(projection: str, merged: tuple[str, ...], config: Any, stored: int) -> tuple[int, int]:
    """The first row of a projection in the layer that stores it, and how many it has."""
    if not merged:
        return 0, stored
    rows = sites.rows_of(config)
    return sum(rows[name] for name in merged[: merged.index(projection)]), rows[projection]

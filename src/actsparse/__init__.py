"""actsparse: decode language models faster by reading only the weights that each token needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from actsparse.runtime import registration

if TYPE_CHECKING:
    from actsparse.measure.calibrate import calibrate
    from actsparse.methods import METHODS
    from actsparse.plan import Plan
    from actsparse.runtime.swap import load, restore, sparsify

__all__ = ["METHODS", "Plan", "calibrate", "load", "restore", "sparsify"]

_HOMES = {
    "METHODS": "actsparse.methods",
    "Plan": "actsparse.plan",
    "calibrate": "actsparse.measure.calibrate",
    "load": "actsparse.runtime.swap",
    "restore": "actsparse.runtime.swap",
    "sparsify": "actsparse.runtime.swap",
}


def __getattr__(name: str) -> Any:
    # Torch and transformers take seconds to import: `actsparse --help` should not wait for them.
    if name not in _HOMES:
        raise AttributeError(f"module 'actsparse' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


registration.register()

"""Tells transformers about this package's checkpoints: ``import actsparse`` suffices, before or after ``import transformers``.

transformers has no entry points for quantizers: something must call its registration.  ``import actsparse`` imports neither
torch nor transformers (the command line would wait seconds for them), so the call waits until transformers' registry is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register now, or as soon as transformers' registry of quantizers is imported."""
    if _REGISTRY in sys.modules:
        _call()
    else:
        sys.meta_path.insert(0, _Waiting())


def _call() -> None:
    importlib.import_module("actsparse.runtime.pretrained")


class _Waiting(MetaPathFinder):
    """Finds one module, once, as everybody else does."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        _call()

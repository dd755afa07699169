"""Which tests may run code of transformers: derived from the imports, so that nobody can forget to mark one.

A test is marked ``transformers`` if its file reaches transformers by imports, directly or through other files of the tests and
the package, or if it asks for a fixture from such a file, as the models of ``conftest.py``. What the imports do not show counts
as reaching it: modules loaded by computed names, and subprocesses.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOTS = (TESTS.parent / "src", TESTS.parent)
OPAQUE = {"import_module", "importorskip", "__import__", "subprocess", "runpy"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the marker."""
    for item in items:
        definitions = itertools.chain.from_iterable(item._fixtureinfo.name2fixturedefs.values())
        files = {Path(each.func.__code__.co_filename) for each in definitions if hasattr(each.func, "__code__")}
        if any(reaches_transformers(file) for file in {item.path, *files} if file.is_relative_to(TESTS)):
            item.add_marker(pytest.mark.transformers)


@cache
def reaches_transformers(path: Path) -> bool:
    """Whether the imports of the file ``path`` lead to transformers."""
    waiting, seen = [path], set()
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        names = names_in(here)
        if any(name.split(".")[0] == "transformers" for name in names) or names & OPAQUE:
            return True
        waiting += [found for name in names for found in files_of(name)]
    return False


@cache
def names_in(path: Path) -> frozenset[str]:
    """Every module that ``path`` may import, anywhere in it, by its full name; and of OPAQUE the names that it uses."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else str(node.module)
            # `from package import name`: a module of the package where there is one, otherwise something that the package has.
            found |= {f"{base}.{alias.name}" if files_of(f"{base}.{alias.name}") else base for alias in node.names}
        elif isinstance(node, ast.Name | ast.Attribute):
            found |= {node.id if isinstance(node, ast.Name) else node.attr} & OPAQUE
    return frozenset(found)


def module_of(path: Path) -> str:
    """The full name that ``path`` is imported by; for files elsewhere, their own."""
    for root in ROOTS:
        if path.is_relative_to(root):
            return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    return path.stem


def files_of(name: str) -> list[Path]:
    """The files of ours that importing ``name`` runs; the outermost package, which only has names, if asked for itself."""
    parts = name.split(".")
    files = []
    for length in range(min(len(parts), 2), len(parts) + 1):
        files += existing(".".join(parts[:length]))
    return files if existing(name) else []


def existing(name: str) -> Iterable[Path]:
    """The file of the module or package ``name``, if it is ours."""
    places = [root.joinpath(*name.split(".")) for root in ROOTS]
    candidates = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return [file for file in candidates if file.is_file()]

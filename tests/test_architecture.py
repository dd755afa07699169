"""The direction of imports: who may know whom (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "actsparse"

# The rooms along the way the data goes, and what each may import: itself and what stands named. Nothing imports upwards.
ALLOWED: dict[str, set[str]] = {
    "plan": set(),
    "kernels": set(),
    "models": {"plan"},
    "methods": {"kernels", "plan"},
    "runtime": {"kernels", "methods", "models", "plan"},
    "calibration": {"kernels", "methods", "models", "plan", "runtime"},
    "measure": {"calibration", "kernels", "methods", "models", "plan", "runtime"},
    "cli": {"calibration", "kernels", "measure", "methods", "models", "plan", "runtime"},
}
# The modules on the hot path know the kernels and nothing else outside their room.
LAYERS = SOURCE / "runtime" / "layers.py"
HOT = (LAYERS, SOURCE / "runtime" / "graded.py")


def rooms_imported(path: Path) -> set[str]:
    """First part below ``actsparse`` of every import in ``path``, also inside functions."""
    package = ["actsparse", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if module.count(".") else [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("actsparse.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_follow_the_architecture(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room == "__init__":
        return  # the public names, resolved when used
    imported = rooms_imported(path) - {room}
    allowed = {"kernels"} if path in HOT else ALLOWED[room]
    assert imported <= allowed, f"{room} imports {sorted(imported - allowed)}"


def test_the_check_sees_imports(tmp_path: Path) -> None:
    assert rooms_imported(SOURCE / "methods" / "chess.py") == {"methods", "plan"}
    assert "kernels" in rooms_imported(LAYERS)
    assert "measure" in rooms_imported(SOURCE / "cli" / "ppl.py")

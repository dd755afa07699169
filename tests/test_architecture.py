"""The direction of imports: who may know whom (docs/architecture.md); and no file too long to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = REPOSITORY / "src" / "actsparse"

# The rooms along the way the data goes, and what each may import: itself and what stands named. Nothing imports upwards.
ALLOWED: dict[str, set[str]] = {
    "plan": set(),
    "kernels": set(),
    "models": {"plan"},
    "methods": {"kernels", "plan"},
    "runtime": {"kernels", "methods", "models", "plan"},
    "calibration": {"kernels", "methods", "models", "plan", "runtime"},
    "measure": {"calibration", "kernels", "methods", "models", "plan", "runtime"},
    "serve": {"kernels", "methods", "models", "plan", "runtime"},
    "cli": {"calibration", "kernels", "measure", "methods", "models", "plan", "runtime", "serve"},
}
# The modules on the hot path know the kernels and nothing else outside their room.
LAYERS = SOURCE / "runtime" / "layers.py"
HOT = (LAYERS, SOURCE / "runtime" / "graded.py")

# Of a source file: more are two rooms.
MOST_LINES = 450
ENDINGS = ("py", "cpp", "h", "inl", "cu", "cuh")


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


def too_long(*folders: Path) -> list[str]:
    """The source files below ``folders`` of more than :data:`MOST_LINES` lines."""
    files = [file for folder in folders for ending in ENDINGS for file in folder.rglob(f"*.{ending}")]
    lines = {str(file): len(file.read_bytes().splitlines()) for file in files}
    return sorted(f"{name}: {count} lines" for name, count in lines.items() if count > MOST_LINES)


def test_no_file_is_too_long() -> None:
    folders = [REPOSITORY / name for name in ("src", "tests", "benchmarks", "reference", "requirements")]
    assert all(folder.is_dir() for folder in folders)
    assert too_long(*folders) == []


@pytest.mark.parametrize("name", ["a.py", "deep/er/b.cpp", "c.h", "d.inl", "e.cu", "f.cuh"])
def test_the_check_sees_long_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x\n" * MOST_LINES)
    assert too_long(tmp_path) == []
    path.write_text("x\n" * (MOST_LINES + 1))
    assert too_long(tmp_path) == [f"{path}: 451 lines"]

"""An environment with vLLM's CPU build, this package and the plug-in, each from its wheel; for tests.

    .venv/bin/python integrations/vllm/environment.py FOLDER

The locked packages (requirements.txt here, and torch-cpu.txt of the main lock) are installed once: while the locks stay the
same, FOLDER is used again and only the two wheels are made anew.  Ends with code 75 and the reason where packages cannot be
had, which says nothing about the plug-in.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TORCH = ROOT / "requirements" / "torch-cpu.txt"
PACKAGES = HERE / "requirements.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOCKED = ["--no-deps", "--require-hashes", "-r"]
UNAVAILABLE = 75  # EX_TEMPFAIL


def main() -> None:
    """Three steps; the first that fails ends it with its own message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    if not sys.platform.startswith("linux"):
        raise SystemExit(f"vLLM's CPU build exists for Linux, this is {sys.platform}")
    stamp, key = folder / "locked", hashlib.sha256(TORCH.read_bytes() + PACKAGES.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != key:
        install_packages(folder)
        stamp.write_text(key, encoding="utf-8")
    install_ours(folder / "bin" / "python")


def install_packages(folder: Path) -> None:
    """What the locks name, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    uv = Path(sys.executable).parent / "uv"
    quick = (
        [[str(uv), "pip", "install", "--quiet", "--python", str(python), *LOCKED, str(PACKAGES)]] if uv.exists() else []
    )
    # What pip is set up with comes first, as in requirements/install.py.
    first([*pip, *LOCKED, str(TORCH)], [*pip, "--index-url", CPU_INDEX, *LOCKED, str(TORCH)])
    first(*quick, [*pip, *LOCKED, str(PACKAGES)])


def install_ours(python: Path) -> None:
    """The wheels of the tree as it is."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            folder,
        ]
        for source in (ROOT, HERE):
            subprocess.run([*wheel, str(source)], check=True, cwd=folder)
        wheels = sorted(str(path) for path in Path(folder).glob("*.whl"))
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "--disable-pip-version-check",
            "install",
            "--quiet",
        ]
        subprocess.run([*pip, "--no-deps", "--force-reinstall", *wheels], check=True)
    shutil.rmtree(HERE / "build", ignore_errors=True)


def first(*commands: list[str]) -> None:
    """Run one after the other until one succeeds; else end with what the last one said."""
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode == 0:
            return
    print((done.stderr or done.stdout).strip()[-2000:], file=sys.stderr)
    raise SystemExit(UNAVAILABLE)


if __name__ == "__main__":
    main()

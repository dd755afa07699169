"""Install the locked environment into the Python that runs this, every file checked by its hash.

    python requirements/install.py [--torch "ARGUMENTS OF PIP INSTALL"]

What is there in the locked version already is left alone. torch's CPU build is taken on Linux without an NVIDIA GPU, PyPI's
build elsewhere; ``--torch`` installs another one, whose files are not checked.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
# No dependency is resolved and nothing is fetched to build with: both would bring today's releases in.
LOCKED = ["--no-deps", "--require-hashes", "--no-build-isolation", "-r"]


def main() -> None:
    """Three steps; the first that fails ends it with its own message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="", help="arguments of `pip install` that install another torch")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (the reason for this line)
        raise SystemExit(f"Python is {sys.version.split()[0]}, expected 3.11 or newer")
    run([*PIP, *LOCKED, str(HERE / "build.txt")])
    install_torch(shlex.split(options.torch))
    install_packages(HERE / "packages.txt")


def install_torch(instead: list[str]) -> None:
    """torch of the locked release, or ``instead`` where no torch is installed yet."""
    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:
        installed = ""
    if instead:
        if not installed:
            run([*PIP, *instead])
    elif installed.partition("+")[0] != locked_torch():
        if not wants_cpu_build():
            run([*PIP, *LOCKED, str(HERE / "torch.txt")])
        # What pip is set up with comes first: it may have the build, and the build's own index may be out of reach.
        elif not succeeds([*PIP, *LOCKED, str(HERE / "torch-cpu.txt")]):
            run([*PIP, "--index-url", CPU_INDEX, *LOCKED, str(HERE / "torch-cpu.txt")])


def install_packages(lock: Path) -> None:
    """Everything else: by uv, which takes a quarter of pip's time, or by pip, which may know indexes that uv does not."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    command = [str(uv), "pip", "install", "--quiet", "--python", sys.executable, *LOCKED, str(lock)]
    if uv is None or not succeeds(command):
        run([*PIP, *LOCKED, str(lock)])


def locked_torch() -> str:
    """The release of torch in the lock."""
    found = re.search(r"(?m)^torch==(\S+)", (HERE / "torch.txt").read_text(encoding="utf-8"))
    if not found:
        raise SystemExit(f"{HERE / 'torch.txt'} names no torch; run `make lock`")
    return found[1]


def wants_cpu_build() -> bool:
    """Whether this is Linux without an NVIDIA GPU, where PyPI's build brings gigabytes of CUDA libraries for nothing."""
    if not sys.platform.startswith("linux"):
        return False
    return not (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"))


def succeeds(command: list[str]) -> bool:
    """Run ``command`` as a first try: nothing it says is worth the reader's time if the second succeeds."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(command: list[str]) -> None:
    """Run ``command``, and end with its exit code if that is not 0."""
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()

"""Write the lock: exact versions and hashes of everything that `make setup` installs, for every platform and Python at once.

    make lock

Four files come out of one resolution of pyproject.toml. ``build.txt`` installs and builds the rest. ``torch.txt`` is torch as
PyPI has it, with the CUDA libraries it wants on Linux; ``torch-cpu.txt`` is the same release built for CPUs. ``packages.txt``
is everything else. A fifth, ``integrations/vllm/requirements.txt``, is what the plug-in is tested with, beside
``torch-cpu.txt``.
Needs `uv` and the two package indexes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Packages that only torch's CUDA build asks for.
TORCH = re.compile(r"(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")
VLLM = ROOT / "integrations" / "vllm"
# vLLM pins torch's CPU build, which comes from its own lock, and asks for companions that text models never import.
NOT_WITH_VLLM = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")
TORCH_NEEDS = ("sympy", "networkx", "jinja2", "fsspec")
HEADER = "# Written by `make lock` (requirements/lock.py); do not edit.\n"


def main() -> None:
    """Resolve and write."""
    build = resolve("--group", "build")
    everything = resolve("pyproject.toml", "--extra", "dev", "--group", "build")
    names = {block.partition("==")[0] for block in build}
    torch = [block for block in everything if TORCH.match(block)]
    rest = [block for block in everything if not TORCH.match(block)]
    cpu = cpu_build(torch, HERE / "torch-cpu.txt")
    write("build.txt", [block for block in rest if block.partition("==")[0] in names])
    write("packages.txt", [block for block in rest if block.partition("==")[0] not in names])
    write("torch.txt", torch)
    write("torch-cpu.txt", cpu)
    (VLLM / "requirements.txt").write_text(HEADER + "".join(with_vllm()), encoding="utf-8")


def with_vllm() -> list[str]:
    """The closure of vLLM's CPU build and what this package and the plug-in's tests need, without torch."""
    ours, plugin = (
        tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"] for folder in (ROOT, VLLM)
    )
    extras = plugin["optional-dependencies"]
    wanted = [*ours["dependencies"], *extras["cpu"], *extras["test"], *TORCH_NEEDS]
    with tempfile.TemporaryDirectory() as folder:
        source, without = Path(folder) / "in.txt", Path(folder) / "without.txt"
        source.write_text("\n".join(each for each in wanted if not each.startswith("torch>")), encoding="utf-8")
        without.write_text("\n".join(f"{name}; sys_platform == 'never'" for name in NOT_WITH_VLLM), encoding="utf-8")
        found = resolve(str(source), "--override", str(without))
    return [block for block in found if block.partition("==")[0] not in NOT_WITH_VLLM]


def resolve(*what: str) -> list[str]:
    """One block of lines for each package in the closure of ``what``: name, version, marker, hashes."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "lock.txt"
        command = ["uv", "pip", "compile", *what, "--universal", "--fork-strategy", "fewest", "--upgrade"]
        command += ["--python-version", "3.11", "--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
        subprocess.run([*command, "--output-file", str(target)], check=True, cwd=ROOT)
        text = target.read_text(encoding="utf-8")
    return [block for block in re.split(r"(?m)^(?=[a-z0-9])", text) if block]


def cpu_build(torch: list[str], path: Path) -> list[str]:
    """torch's CPU build with its hashes, from its index; out of reach of it, from ``path`` if that has the same release."""
    release = next(block for block in torch if block.startswith("torch==")).split()[0]
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=60) as page:
            hashes = cpu_hashes(page.read().decode(), release.removeprefix("torch=="))
    except urllib.error.URLError as error:
        if path.is_file() and f"{release}+cpu " in path.read_text(encoding="utf-8"):
            print(f"{CPU_INDEX}: {error.reason}; {path.name} stays, it has {release} already", file=sys.stderr)
            return [path.read_text(encoding="utf-8").removeprefix(HEADER)]
        raise SystemExit(f"{CPU_INDEX}: {error.reason}; the hashes of {release}+cpu are needed") from None
    if not hashes:
        raise SystemExit(f"{CPU_INDEX} has no {release}+cpu for Linux")
    lines = [f"{release}+cpu", *(f"    --hash=sha256:{value}" for value in hashes)]
    return [" \\\n".join(lines) + "\n"]


def cpu_hashes(page: str, version: str) -> list[str]:
    """The SHA-256 of every Linux wheel of ``version`` for CPUs on the index ``page``, sorted."""
    link = rf"/torch-{re.escape(version)}(?:%2B|\+)cpu-cp3\d+-cp3\d+-manylinux\w+\.whl#sha256=([0-9a-f]{{64}})"
    return sorted(set(re.findall(link, page)))


def write(name: str, blocks: list[str]) -> None:
    """One file of the lock."""
    (HERE / name).write_text(HEADER + "".join(blocks), encoding="utf-8")


if __name__ == "__main__":
    main()

"""actsparse doctor."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from actsparse.cli.terminal import add_thread_argument, print_json, print_table, set_threads

OPTIONAL = {
    "llama-cpp-python": ("llama_cpp", "the llama.cpp rows of bench"),
    "gguf": ("gguf", "the llama.cpp rows of bench"),
    "lm_eval": ("lm_eval", "task scores"),
    "datasets": ("datasets", "text from the hub"),
    "matplotlib": ("matplotlib", "plots"),
}


# Whose releases decide whether results are right, and are therefore tested at both ends of the range that the package declares.
TESTED = ("torch", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_thread_argument(parser)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(options: argparse.Namespace) -> None:
    """Look around and report; nothing that is missing is an error."""
    set_threads(options)
    facts = examine()
    for package in TESTED:
        if untested := outside_tested_range(package):
            warnings.warn(f"{untested}; results may be wrong without a sign", stacklevel=1)
    print_table("actsparse doctor", ["what", "here"], [[name, str(value)] for name, value in facts.items()])
    if options.json:
        print_json(facts)


def examine() -> dict[str, Any]:
    """What there is, by name."""
    import torch

    from actsparse import kernels

    facts: dict[str, Any] = {
        "CPU": cpu_model(),
        "cores": f"{os.cpu_count()}, {usable_cores()} usable by this process",
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "transformers": metadata.version("transformers"),
        "tested with": tested_with(),
    }
    if kernels.cpu.missing:
        facts["native kernels"] = f"none: {kernels.cpu.missing}; everything runs on the reference path"
    else:
        facts["native kernels"] = f"cpu-{kernels.isa()}"
        names = ", ".join(kernels.available_isas())
        facts["instruction sets"] = f"{names} (best first; compiled in and supported here)"
        moved = kernels.use_huge_pages(torch.zeros(2048, 1024))
        facts["huge pages"] = "available for weights" if moved else "not available; small reads will be slower"
        facts["threads of the kernels"] = kernels.cpu.threads_note or "torch's own pool"
        median, least, greatest = kernels.read_bandwidth()
        spread = f"({least:.1f} to {greatest:.1f})"
        facts["read bandwidth"] = f"{median:.1f} GB/s {spread}, {torch.get_num_threads()} threads"
    for package, (module, purpose) in OPTIONAL.items():
        there = "installed" if importlib.util.find_spec(module) else "not installed"
        facts[package] = f"{there} ({purpose})"
    facts["GPU"] = gpus()
    return facts


def tested_range(package: str) -> SpecifierSet | None:
    """The releases of ``package`` that this installation declares; None where it is not installed, only on the path."""
    try:
        declared = metadata.requires("actsparse") or []
    except metadata.PackageNotFoundError:
        return None
    return next(wanted.specifier for wanted in map(Requirement, declared) if wanted.name == package)


def tested_with() -> str:
    """The declared ranges, lower bound first."""
    ranges = {package: tested_range(package) for package in TESTED}
    if None in ranges.values():
        return "unknown: actsparse itself is not installed"
    return ", ".join(f"{package} {_bounds(tested)}" for package, tested in ranges.items())


def outside_tested_range(package: str) -> str:
    """A sentence if the installed release of ``package`` is outside its tested range, otherwise nothing."""
    installed, tested = metadata.version(package), tested_range(package)
    if tested is None or tested.contains(installed, prereleases=True):
        return ""
    return f"{package} is {installed}, tested are {_bounds(tested)}"


def _bounds(tested: SpecifierSet | None) -> str:
    return ",".join(sorted(map(str, tested or ()), reverse=True))


def gpus() -> str:
    """Every CUDA GPU, torch's and the driver's CUDA versions, and which kernels run there and why."""
    import torch

    from actsparse import kernels

    if not torch.cuda.is_available():
        return "none that torch can use"
    found = []
    for index in range(torch.cuda.device_count()):
        obstacle = kernels.cuda.device_obstacle(index)
        runs = f"reference path: {obstacle}" if obstacle else f"kernels cuda-{kernels.cuda.architecture(index)}"
        versions = f"CUDA {torch.version.cuda}, driver for {kernels.cuda.driver_version()}"
        found.append(f"{torch.cuda.get_device_name(index)}, {versions}: {runs}")
    return "; ".join(found)


def cpu_model() -> str:
    """The processor's name, as well as the system knows it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

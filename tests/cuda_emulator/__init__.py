"""The CUDA kernels on a CPU: the same source, compiled by the C++ compiler behind stand-ins for what the hardware does."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from actsparse.kernels.cuda import compiler
from actsparse.kernels.cuda.machine import Machine, compiled_rows
from actsparse.kernels.cuda.structures import Launch, address

# So few values of keys that a short cache is read in several lots.
MACHINE = Machine(processors=3, shared_bytes=227 << 10, lot=512)
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@cache
def library(dtype: torch.dtype, rows: int, head_dim: int) -> ctypes.CDLL:
    """The kernels compiled for one type, number of rows and size of an attention head."""
    folder = Path(tempfile.mkdtemp(prefix="actsparse-emulator-"))
    target = folder / "kernels.so"
    here = Path(__file__).parent
    sources = Path(compiler.__file__).parent / "csrc"
    defines = [
        f"-DAS_DTYPE={compiler.DTYPES[dtype]}",
        f"-DAS_ROWS={rows}",
        f"-DAS_HEAD_DIM={head_dim}",
        f"-DAS_RING={MACHINE.ring}",
        f"-DAS_LOT={MACHINE.lot}",
    ]
    command = [str(CXX), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *defines, f"-I{sources}", "-o", str(target)]
    subprocess.run([*command, str(here / "emulate.cpp")], check=True)
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return loaded


def run(launches: list[Launch], device: torch.device, dtype: torch.dtype, rows: int, head_dim: int = 128) -> None:
    """As the compiler module's ``run``."""
    kernels = library(dtype, compiled_rows(rows), head_dim)
    for launch in launches:
        x, y = launch.grid
        getattr(kernels, launch.kernel)(
            ctypes.c_void_p(address(launch.parameters)), x, y, launch.threads, launch.shared_bytes
        )

"""CUDA compiled at run time: NVRTC, the driver's launch function, and a cache of compiled kernels on disk.

Nothing of a CUDA toolkit is needed beyond what a CUDA build of torch brings along.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from .machine import Machine, compiled_rows
from .structures import Launch, address

SOURCES = (
    "primitives.cuh",
    "sums.cuh",
    "selection.cuh",
    "rows.cuh",
    "columns.cuh",
    "several.cuh",
    "sixteen.cuh",
    "attention.cuh",
    "depths.cuh",
    "planes.cuh",
    "unpack.cuh",
    "rounding.cuh",
    "cut.cuh",
    "cores.cuh",
)
KERNELS = (
    "rows", "columns", "finish", "attention", "embedding", "planes", "unpack", "rounding", "descent", "cut", "levels", "cores",
)  # fmt: skip
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
OLDEST = 80  # compute capability: bfloat16 arithmetic
_SHARED_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class CudaError(RuntimeError):
    """NVRTC or the driver refused something; the message says what."""


class _Attribute(Structure):
    _fields_ = [("id", c_int), ("pad", c_int), ("value", c_int * 16)]


class _Config(Structure):
    _fields_ = [
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("count", c_uint),
    ]


@cache
def source() -> str:
    """The kernels as one text."""
    folder = Path(__file__).parent / "csrc"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in SOURCES)


@cache
def missing() -> str:
    """Why nothing can be compiled here; empty when it can."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device"
    try:
        _nvrtc()
        _driver()
    except OSError as error:
        return f"NVRTC is not there: {error}"
    return ""


@cache
def device_obstacle(index: int) -> str:
    """Why a GPU cannot run the kernels; empty when it can."""
    major, minor = torch.cuda.get_device_capability(index)
    if 10 * major + minor < OLDEST:
        return f"compute capability {major}.{minor}, expected {OLDEST // 10}.{OLDEST % 10} or later"
    return missing()


@cache
def architecture(index: int) -> str:
    """A GPU's architecture as the compiler names it, such as sm_90."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


@cache
def machine(index: int) -> Machine:
    """What a GPU's launches are cut for."""
    value = c_int()
    _check(_driver().cuDeviceGetAttribute(byref(value), _SHARED_OPTIN, index), "cuDeviceGetAttribute")
    made = Machine(torch.cuda.get_device_properties(index).multi_processor_count, value.value)
    return made if made.ring == Machine().ring else replace(made, lot=made.lot // 2)


def run(launches: list[Launch], device: torch.device, dtype: torch.dtype, rows: int, head_dim: int = 128) -> None:
    """Launch in order on torch's current stream; each may start while the one before it ends."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    functions = _functions(index, DTYPES[dtype], compiled_rows(rows), head_dim)
    dependent = _starts_early(index)
    stream = torch.cuda.current_stream(device).cuda_stream
    driver = _driver()
    attribute = _Attribute(_STREAM_SERIALIZATION)
    attribute.value[0] = 1
    with torch.cuda.device(index):
        for launch in launches:
            config = _Config(
                (c_uint * 3)(*launch.grid, 1), (c_uint * 3)(launch.threads, 1, 1), launch.shared_bytes, stream,
                ctypes.pointer(attribute), int(dependent),
            )  # fmt: skip
            parameters = (c_void_p * 1)(address(launch.parameters))
            result = driver.cuLaunchKernelEx(byref(config), functions[launch.kernel], parameters, None)
            if result:
                _check(result, f"launch of {launch.kernel} {launch.grid}")


@cache
def _starts_early(index: int) -> bool:
    """Whether a GPU knows programmatic dependent launch."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


@cache
def _functions(index: int, dtype: int, rows: int, head_dim: int) -> dict[str, c_void_p]:
    binary = compiled((architecture(index), dtype, rows, head_dim, machine(index)))
    driver, module = _driver(), c_void_p()
    with torch.cuda.device(index):
        torch.cuda.current_stream(index).synchronize()  # makes the device's context the current one
        _check(driver.cuModuleLoadData(byref(module), binary), "cuModuleLoadData")
        functions = {}
        for name in KERNELS:
            function = c_void_p()
            _check(driver.cuModuleGetFunction(byref(function), module, f"{name}_kernel".encode()), name)
            limit = machine(index).shared_bytes
            _check(driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, limit), f"shared memory of {name}")
            # One division of L1 for all: a multiprocessor has to be empty to change it, and kernels are to overlap.
            _check(driver.cuFuncSetAttribute(function, _CARVEOUT, 100), f"shared memory of {name}")
            functions[name] = function
    return functions


def compiled(key: tuple[str, int, int, int, Machine]) -> bytes:
    """The machine code, from the disk where it was compiled before."""
    architecture, dtype, rows, head_dim, machine = key
    options = [
        f"--gpu-architecture={architecture}", "--std=c++17", "--use_fast_math", f"-DAS_DTYPE={dtype}", f"-DAS_ROWS={rows}",
        f"-DAS_HEAD_DIM={head_dim}", f"-DAS_RING={machine.ring}", f"-DAS_LOT={machine.lot}",
    ]  # fmt: skip
    major, minor = c_int(), c_int()
    _nvrtc().nvrtcVersion(byref(major), byref(minor))
    named = "\n".join([f"{major.value}.{minor.value}", *options, source()])
    path = cache_directory() / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    binary = compile_text(source(), options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(binary)
        os.replace(file.name, path)
    except OSError:
        return binary  # a read-only home costs a compilation per process, no more
    return binary


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actsparse" / "cuda"


def compile_text(text: str, options: list[str]) -> bytes:
    """CUDA source to machine code; CudaError with the compiler's log."""
    nvrtc, program = _nvrtc(), c_void_p()
    given = (c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCreateProgram(byref(program), text.encode(), b"actsparse.cu", 0, None, None):
        raise CudaError("NVRTC did not take the source")
    failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
    size = c_size_t()
    try:
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, byref(size))
            log = (c_char * max(size.value, 1))()
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaError(f"the CUDA kernels did not compile: {log.value.decode(errors='replace')}")
        nvrtc.nvrtcGetCUBINSize(program, byref(size))
        binary = (c_char * size.value)()
        nvrtc.nvrtcGetCUBIN(program, binary)
        return binary.raw
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


@cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC: torch's own, from its wheel's neighbours or wherever the loader finds it."""
    major = (torch.version.cuda or "").partition(".")[0]
    name = f"libnvrtc.so.{major}" if sys.platform != "win32" else f"nvrtc64_{major}0_0.dll"
    try:
        return ctypes.CDLL(name)
    except OSError:
        nearby = sorted((Path(torch.__file__).parent.parent / "nvidia").glob(f"*/lib/{name}"))
        if not nearby:
            raise
        return ctypes.CDLL(str(nearby[0]))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def driver_version() -> str:
    """The newest CUDA that the driver serves, such as ``13.0``."""
    version = ctypes.c_int()
    _check(_driver().cuDriverGetVersion(byref(version)), "cuDriverGetVersion")
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _check(result: int, what: str) -> None:
    if result:
        text = c_char_p()
        _driver().cuGetErrorString(result, byref(text))
        raise CudaError(f"{what}: {(text.value or b'unknown error').decode()}")

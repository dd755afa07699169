"""The compiled library: loading it, its threads and instruction set, and what its calls have in common."""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
import sys
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p

import torch

from .structures import FFN, Call, Decoder, Matrix, Rounding, Stats

ABI_VERSION = 11
MAX_BATCH = 8


def _load() -> tuple[ctypes.CDLL | None, str]:
    # find_spec instead of a path beside this file: an editable install keeps the library elsewhere.
    spec = importlib.util.find_spec(f"{__package__}._kernels")
    if spec is None or spec.origin is None:
        return (
            None,
            "the compiled library actsparse/kernels/cpu/_kernels is missing: install actsparse with a C++ compiler",
        )
    try:
        lib = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"the compiled library {spec.origin} does not load: {error}"
    lib.as_abi_version.restype = c_int32
    if lib.as_abi_version() != ABI_VERSION:
        return None, f"{spec.origin} has ABI {lib.as_abi_version()}, this package needs {ABI_VERSION}: rebuild it"
    lib.as_set_threads.argtypes = [c_void_p, c_void_p]
    lib.as_set_threads.restype = None
    lib.as_isa.restype = lib.as_isa_available.restype = c_char_p
    lib.as_isa_select.argtypes = [c_char_p]
    lib.as_isa_select.restype = c_int32
    lib.as_pages_followed.restype = lib.as_pages_select.restype = c_int32
    lib.as_pages_select.argtypes = [c_int32]
    pointer, i32, i64 = c_void_p, c_int32, c_int64
    for name, arguments, result in (
        ("as_linear", [POINTER(Matrix), pointer, pointer, pointer, i64, i32, POINTER(Stats)], i32),
        ("as_linear_rows", [POINTER(Matrix), pointer, i64, pointer, pointer, i64, i32, POINTER(Stats)], i32),
        ("as_ffn_forward", [POINTER(FFN), pointer, pointer, i64, i32, POINTER(Stats)], i32),
        ("as_unpack", [POINTER(Matrix), i64, i64, i32, pointer, i32], i32),
        ("as_many_rows", [POINTER(Matrix), pointer, pointer, i64], i32),
        ("as_has_many_rows", [], i32),
        ("as_round_block", [POINTER(Rounding), pointer, pointer, pointer], i32),
        ("as_code_errors", [POINTER(Rounding), pointer, pointer, pointer], i32),
        ("as_descend_block", [POINTER(Rounding), c_float, *[pointer] * 6], i32),
        ("as_decode_step", [POINTER(Decoder), i64, i64, pointer, POINTER(Stats)], i32),
        ("as_decode_together", [pointer, pointer, pointer, i64, pointer, POINTER(Stats)], i32),
        (
            "as_channel_statistics",
            [pointer, i32, i64, i64, i64, pointer, i64, i32, i32, pointer, pointer],
            i64,
        ),
        (
            "as_core_statistics",
            [pointer, i32, i64, i64, i64, i64, c_float, i32, pointer, pointer, pointer],
            i32,
        ),
        ("as_huge_pages", [pointer, i64], i64),
        ("as_read", [pointer, i64], c_double),
        ("as_time_calls", [POINTER(Call), i64, i32], c_double),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib, ""


def _torch_pool() -> tuple[int, int] | None:
    """Addresses of torch's stable threading functions, None before torch 2.10."""
    try:
        libtorch = ctypes.CDLL(_torch_library())
        parallel_for = ctypes.cast(libtorch.torch_parallel_for, c_void_p).value
        num_threads = ctypes.cast(libtorch.torch_get_num_threads, c_void_p).value
    except (OSError, AttributeError):
        return None
    return (parallel_for, num_threads) if parallel_for and num_threads else None


def _torch_library() -> str:
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    return str(pathlib.Path(torch.__file__).parent / "lib" / name)


_lib, missing = _load()
threads_note = ""
pool: tuple[int, int] | None = None
if _lib is not None:
    pool = _torch_pool()
    if pool is None:
        threads_note = f"one thread only: torch {torch.__version__} lacks torch_parallel_for (needs 2.10)"
    else:
        _lib.as_set_threads(*pool)

_stats = Stats()
stats_reference = ctypes.byref(_stats)


def library() -> ctypes.CDLL:
    """The loaded library; ImportError with the reason when there is none."""
    if _lib is None:
        raise ImportError(missing)
    return _lib


def check(code: int, what: str) -> None:
    if code == -2:
        raise MemoryError(f"{what}: out of memory")
    if code:
        raise ValueError(f"{what}: invalid arguments (a dimension, type, stride or index does not fit)")


def isa() -> str:
    """Instruction set in use."""
    return str(library().as_isa().decode())


def available_isas() -> tuple[str, ...]:
    """Instruction sets compiled in that this CPU runs, best first."""
    return tuple(library().as_isa_available().decode().split(","))


def select_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process; ValueError when it is not available."""
    if library().as_isa_select(name.encode()):
        raise ValueError(f"instruction set {name!r} is not one of {', '.join(available_isas())}")


def pages_followed() -> int:
    """On how many pages of 4 KB at a time packed products expect this machine to follow what is read; 0: unknown."""
    return int(library().as_pages_followed())


def select_pages(pages: int) -> None:
    """Expect so many from now on, in the whole process; ValueError outside 0 to 256.  Results do not change."""
    if library().as_pages_select(pages):
        raise ValueError(f"{pages} pages, expected 0 to 256")


def stats() -> dict[str, int]:
    """Work done since :func:`reset_stats` by the process's native calls that were given no counters; see :meth:`Stats.counts`.

    All threads count here together: a decoder has counters of its own.
    """
    return _stats.counts()


def reset_stats() -> None:
    """Zero the counters of :func:`stats`."""
    ctypes.memset(ctypes.addressof(_stats), 0, ctypes.sizeof(_stats))

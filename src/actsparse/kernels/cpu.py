"""The CPU kernels: the C interface through ctypes, and the helpers that turn tensors into its structures.

Nothing here decides whether a call may run natively: that is :mod:`actsparse.kernels`' part. Structures made by the
``*_of`` helpers hold the tensors that they point into in an attribute ``keep``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import time
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 5
MAX_BATCH = 8
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "relu": 1, "relu2": 2, "gelu": 3, "gelu_tanh": 4, "identity": 5}
ROWS, COLUMNS = 0, 1
NORMS = {"rms": 0, "layer": 1}


_nothing = c_int64()
_NOWHERE = ctypes.addressof(_nothing)  # torch gives an empty tensor the address 0, which would mean "no list"


class Matrix(Structure):
    """``as_matrix``: a logical [out, in] weight; all zeros means absent."""

    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        ("out", c_int64),
        ("in_", c_int64),
        ("stride", c_int64),
        ("dtype", c_int32),
        ("layout", c_int32),
    ]
    keep: tuple[Any, ...]


class Stats(Structure):
    """``as_stats``: work done, summed over calls."""

    _fields_ = [
        ("gate_rows", c_int64),
        ("up_rows", c_int64),
        ("down_rows", c_int64),
        ("bytes", c_int64),
        ("product_ns", c_int64),
    ]


class FFN(Structure):
    """``as_ffn``: one feed-forward block."""

    _fields_ = [
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("activation", c_int32),
        ("up_activation", c_int32),
        ("gate_in_threshold", c_void_p),
        ("up_in_threshold", c_void_p),
        ("gate_threshold", c_void_p),
        ("value_threshold", c_void_p),
        ("mean", c_void_p),
        ("predictor_a", Matrix),
        ("predictor_b", Matrix),
        ("neurons", c_void_p),
        ("neuron_count", c_int64),
    ]
    keep: tuple[Any, ...]


class Norm(Structure):
    """``as_norm``: RMSNorm (kind 0) or LayerNorm (kind 1)."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("kind", c_int32)]
    keep: tuple[Any, ...]


class Layer(Structure):
    """``as_layer``: one decoder layer with its caches."""

    _fields_ = [
        ("input_norm", Norm),
        ("post_norm", Norm),
        ("q", Matrix),
        ("k", Matrix),
        ("v", Matrix),
        ("o", Matrix),
        ("q_threshold", c_void_p),
        ("k_threshold", c_void_p),
        ("v_threshold", c_void_p),
        ("o_threshold", c_void_p),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("ffn", FFN),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
    ]
    keep: tuple[Any, ...]


class Decoder(Structure):
    """``as_decoder``: a whole Llama-kind decoder, batch 1."""

    _fields_ = [
        ("layers", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("cache_length", c_int64),
        ("window", c_int64),
        ("layer", POINTER(Layer)),
        ("embedding", Matrix),
        ("lm_head", Matrix),
        ("final_norm", Norm),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("attention_scale", c_float),
        ("embedding_scale", c_float),
        ("logit_scale", c_float),
        ("residual_scale", c_float),
        ("cache_dtype", c_int32),
    ]
    keep: tuple[Any, ...]


class Call(Structure):
    """``as_call``: one product or block at batch 1, for :func:`time_calls`."""

    _fields_ = [
        ("ffn", POINTER(FFN)),
        ("w", POINTER(Matrix)),
        ("threshold", c_void_p),
        ("rows", c_void_p),
        ("row_count", c_int64),
        ("x", c_void_p),
        ("y", c_void_p),
    ]


def _load() -> tuple[ctypes.CDLL | None, str]:
    # find_spec instead of a path beside this file: an editable install keeps the library elsewhere.
    spec = importlib.util.find_spec(f"{__package__}._kernels")
    if spec is None or spec.origin is None:
        return None, "the compiled library actsparse/kernels/_kernels is missing: install actsparse with a C++ compiler"
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
    pointer, i32, i64 = c_void_p, c_int32, c_int64
    for name, arguments, result in (
        ("as_linear", [POINTER(Matrix), pointer, pointer, pointer, i64, i32, POINTER(Stats)], i32),
        ("as_linear_rows", [POINTER(Matrix), pointer, i64, pointer, pointer, i64, i32, POINTER(Stats)], i32),
        ("as_ffn_forward", [POINTER(FFN), pointer, pointer, i64, i32, POINTER(Stats)], i32),
        ("as_decode_step", [POINTER(Decoder), i64, i64, pointer, POINTER(Stats)], i32),
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
    import pathlib
    import sys

    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    return str(pathlib.Path(torch.__file__).parent / "lib" / name)


_lib, missing = _load()
threads_note = ""
if _lib is not None:
    _pool = _torch_pool()
    if _pool is None:
        threads_note = f"one thread only: torch {torch.__version__} lacks torch_parallel_for (needs 2.10)"
    else:
        _lib.as_set_threads(*_pool)

_stats = Stats()
_stats_ref = ctypes.byref(_stats)


def library() -> ctypes.CDLL:
    """The loaded library; ImportError with the reason when there is none."""
    if _lib is None:
        raise ImportError(missing)
    return _lib


def _check(code: int, what: str) -> None:
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


def stats() -> dict[str, int]:
    """Work done by native calls since :func:`reset_stats`.

    Stored rows or columns read per matrix, bytes of weights, and nanoseconds inside the parallel regions that multiply (with
    waking and joining threads): what a call takes beyond them is overhead.
    """
    return {field[0]: int(getattr(_stats, field[0])) for field in Stats._fields_}


def reset_stats() -> None:
    """Zero the counters of :func:`stats`."""
    ctypes.memset(ctypes.addressof(_stats), 0, ctypes.sizeof(_stats))


def time_calls(calls: list[Call], io_dtype: torch.dtype) -> float:
    """Seconds that the calls take one after the other, as a decode step makes them; ValueError when one is refused."""
    seconds = float(library().as_time_calls((Call * len(calls))(*calls), len(calls), DTYPES[io_dtype]))
    if seconds < 0:
        raise ValueError("time_calls: a call was refused (a dimension, type, stride or index does not fit)")
    return seconds


def layout_of(weight: Tensor) -> tuple[int, int] | None:
    """(layout, stride) of a logical [O, I] weight, None when neither its rows nor its columns lie contiguous."""
    row, column = weight.stride()
    out, inn = weight.shape
    if column == 1 and row >= inn:
        return ROWS, row
    if row == 1 and column >= out:
        return COLUMNS, column
    # Strides along a dimension of one element mean nothing.
    if out == 1 and column == 1:
        return ROWS, inn
    if inn == 1 and row == 1:
        return COLUMNS, out
    return None


def _vector(values: Tensor | None, size: int, name: str) -> Tensor | None:
    if values is None:
        return None
    if values.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected ({size},)")
    if values.dtype is torch.float32 and values.is_cpu and values.is_contiguous():
        return values
    return values.detach().to(device="cpu", dtype=torch.float32).contiguous()


def _pointer(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()


def matrix_of(weight: Tensor | None, bias: Tensor | None = None, name: str = "weight") -> Matrix:
    """The structure for a logical [O, I] weight and a bias [O]; an absent one for None.

    Raises ValueError for a type other than float32, bfloat16 and float16, another device, or strides that are neither
    row-contiguous nor a transposed view of contiguous storage.
    """
    if weight is None:
        return Matrix()
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected two dimensions")
    layout = layout_of(weight)
    dtype = DTYPES.get(weight.dtype)
    if layout is None or dtype is None or not weight.is_cpu:
        raise ValueError(
            f"{name} ({weight.dtype}, {weight.device}, strides {weight.stride()}) is no contiguous or transposed "
            "float32, bfloat16 or float16 CPU matrix"
        )
    out, inn = weight.shape
    bias = _vector(bias, out, f"{name}'s bias")
    matrix = Matrix(weight.data_ptr(), _pointer(bias), out, inn, layout[1], dtype, layout[0])
    matrix.keep = (weight, bias)
    return matrix


def ffn_of(
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    *,
    activation: str,
    up_activation: str = "identity",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_in_threshold: Tensor | None = None,
    up_in_threshold: Tensor | None = None,
    gate_threshold: Tensor | None = None,
    value_threshold: Tensor | None = None,
    mean: Tensor | None = None,
    predictor_a: Tensor | None = None,
    predictor_b: Tensor | None = None,
    predictor_bias: Tensor | None = None,
    neurons: Tensor | None = None,
) -> FFN:
    """The structure for one feed-forward block; arguments as in :func:`actsparse.kernels.gated_ffn`."""
    size, hidden = up.shape
    vectors = (
        _vector(gate_in_threshold, hidden, "gate_in_threshold"),
        _vector(up_in_threshold, hidden, "up_in_threshold"),
        _vector(gate_threshold, size, "gate_threshold"),
        _vector(value_threshold, size, "value_threshold"),
        _vector(mean, size, "mean"),
    )
    if neurons is not None:
        if neurons.dim() != 1 or neurons.dtype != torch.int32:
            raise ValueError(f"neurons must be int32 [count], got {neurons.dtype} {tuple(neurons.shape)}")
        neurons = neurons.contiguous()
    a, b = matrix_of(predictor_a, None, "predictor_a"), matrix_of(predictor_b, predictor_bias, "predictor_b")
    g, u, d = matrix_of(gate, gate_bias, "gate"), matrix_of(up, up_bias, "up"), matrix_of(down, down_bias, "down")
    ffn = FFN(
        g, u, d,
        activation_code(activation), activation_code(up_activation),
        *(_pointer(v) for v in vectors),
        a, b,
        _NOWHERE if neurons is not None and not len(neurons) else _pointer(neurons), 0 if neurons is None else len(neurons),
    )  # fmt: skip
    ffn.keep = (g, u, d, a, b, vectors, neurons)
    return ffn


def activation_code(name: str) -> int:
    """The C constant of an activation; ValueError naming the choices for an unknown one."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}") from None


def norm_of(weight: Tensor | None, *, eps: float, kind: str = "rms", bias: Tensor | None = None) -> Norm:
    """The structure for a norm of kind "rms" or "layer"; weight None: no scaling (for q_norm and k_norm: no norm)."""
    if kind not in NORMS:
        raise ValueError(f"unknown norm {kind!r}; choose one of {', '.join(NORMS)}")
    weight = None if weight is None else _vector(weight, weight.shape[0], "norm weight")
    bias = None if bias is None else _vector(bias, bias.shape[0], "norm bias")
    norm = Norm(_pointer(weight), _pointer(bias), eps, NORMS[kind])
    norm.keep = (weight, bias)
    return norm


def layer_of(
    *,
    input_norm: Norm,
    post_norm: Norm,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    ffn: FFN,
    k_cache: Tensor,
    v_cache: Tensor,
    q_threshold: Tensor | None = None,
    k_threshold: Tensor | None = None,
    v_threshold: Tensor | None = None,
    o_threshold: Tensor | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> Layer:
    """The structure for one layer; caches are contiguous [kv_heads, cache_length, head_dim], thresholds [in]."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and k_cache.shape == v_cache.shape):
        raise ValueError("k_cache and v_cache must be contiguous and of one shape [kv_heads, cache_length, head_dim]")
    thresholds = (
        _vector(q_threshold, q.in_, "q_threshold"),
        _vector(k_threshold, k.in_, "k_threshold"),
        _vector(v_threshold, v.in_, "v_threshold"),
        _vector(o_threshold, o.in_, "o_threshold"),
    )
    layer = Layer(
        input_norm, post_norm, q, k, v, o, *(_pointer(t) for t in thresholds), q_norm or Norm(), k_norm or Norm(), ffn,
        k_cache.data_ptr(), v_cache.data_ptr(),
    )  # fmt: skip
    layer.keep = (input_norm, post_norm, q, k, v, o, thresholds, q_norm, k_norm, ffn, k_cache, v_cache)
    return layer


def decoder_of(
    layers: list[Layer],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    embedding: Matrix,
    lm_head: Matrix | None,
    final_norm: Norm,
    cosine: Tensor | None,
    sine: Tensor | None,
    attention_scale: float,
    window: int = 0,
    embedding_scale: float = 1.0,
    logit_scale: float = 1.0,
    residual_scale: float = 1.0,
) -> Decoder:
    """The structure for a decoder over ``layers``; lm_head None means tied to the embedding.

    cosine and sine are float32 [cache_length, head_dim / 2] (None: no rotary embedding). Raises ValueError when the
    caches, tables and head counts do not fit together; the C side checks the matrices at every step.
    """
    if not layers:
        raise ValueError("a decoder needs at least one layer")
    first = layers[0].keep[-2]
    length = first.shape[1]
    for layer in layers:
        for cache in layer.keep[-2:]:
            if tuple(cache.shape) != (kv_heads, length, head_dim) or cache.dtype != first.dtype:
                raise ValueError(
                    f"a cache is {cache.dtype} {tuple(cache.shape)}, expected {kv_heads, length, head_dim}"
                )
    if first.dtype not in DTYPES:
        raise ValueError(f"caches of {first.dtype} are not supported")
    tables: list[Tensor | None] = []
    for table in (cosine, sine):
        if table is None:
            tables.append(None)
        elif tuple(table.shape) != (length, head_dim // 2):
            raise ValueError(f"rotary table has shape {tuple(table.shape)}, expected {(length, head_dim // 2)}")
        else:
            tables.append(table.to(torch.float32).contiguous())
    array = (Layer * len(layers))(*layers)
    decoder = Decoder(
        len(layers), embedding.in_, heads, kv_heads, head_dim, length, window, array, embedding, lm_head or Matrix(),
        final_norm, _pointer(tables[0]), _pointer(tables[1]), attention_scale, embedding_scale, logit_scale,
        residual_scale, DTYPES[first.dtype],
    )  # fmt: skip
    decoder.keep = (layers, array, embedding, lm_head, final_norm, tables)
    return decoder


def decode_step(decoder: Decoder, token: int, position: int, logits: Tensor) -> None:
    """One token: appends to the caches at ``position`` and writes float32 logits [vocab] in place."""
    head = decoder.lm_head if decoder.lm_head.data else decoder.embedding
    if logits.dtype != torch.float32 or not logits.is_contiguous() or logits.numel() != head.out:
        raise ValueError(f"logits must be contiguous float32 [{head.out}], got {logits.dtype} {tuple(logits.shape)}")
    _check(
        library().as_decode_step(ctypes.byref(decoder), token, position, logits.data_ptr(), _stats_ref), "decode_step"
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
    """Native linear; the caller has made sure that the path applies."""
    out, inn = weight.shape
    if x.shape[-1] != inn:
        raise ValueError(f"x has {x.shape[-1]} features, weight {tuple(weight.shape)} takes {inn}")
    x = x.contiguous()
    matrix = matrix_of(weight, bias)
    threshold = _vector(threshold, inn, "threshold")
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype, device="cpu")
    code = library().as_linear(
        ctypes.byref(matrix),
        _pointer(threshold),
        x.data_ptr(),
        y.data_ptr(),
        x.numel() // inn,
        matrix.dtype,
        _stats_ref,
    )
    if code:
        _check(code, "linear")
    return y


def linear_rows(x: Tensor, weight: Tensor, rows: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Writes y[..., i] = weight[i] . x + bias[i] into ``out`` [..., O] for the rows i named (int32, ascending) only.

    weight [O, I] must be stored by rows; x [..., I] and out contiguous and of one type, 1 to 8 rows of activations.
    """
    if rows.dtype != torch.int32 or rows.dim() != 1 or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous int32 [count], got {rows.dtype} {tuple(rows.shape)}")
    matrix = matrix_of(weight, bias)
    count = x.numel() // x.shape[-1]
    if x.shape[-1] != matrix.in_ or out.numel() != count * matrix.out or out.dtype != x.dtype:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and out {tuple(out.shape)} do not fit")
    if not (x.is_contiguous() and out.is_contiguous() and x.dtype in DTYPES):
        raise ValueError("x and out must be contiguous float32, bfloat16 or float16")
    code = library().as_linear_rows(
        ctypes.byref(matrix), rows.data_ptr(), rows.shape[0], x.data_ptr(), out.data_ptr(), count, DTYPES[x.dtype],
        _stats_ref,
    )  # fmt: skip
    _check(code, "linear_rows")


def gated_ffn(x: Tensor, ffn: FFN) -> Tensor:
    """Native feed-forward block; the caller has made sure that the path applies."""
    if x.shape[-1] != ffn.up.in_:
        raise ValueError(f"x has {x.shape[-1]} features, the block takes {ffn.up.in_}")
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], ffn.down.out), dtype=x.dtype, device="cpu")
    code = library().as_ffn_forward(
        ctypes.byref(ffn), x.data_ptr(), y.data_ptr(), x.numel() // ffn.up.in_, DTYPES[x.dtype], _stats_ref
    )
    if code:
        _check(code, "gated_ffn")
    return y


def channel_statistics(
    x: Tensor,
    counts: Tensor | None,
    min_exponent: int,
    sub_bits: int,
    sum_abs: Tensor | None,
    sum_square: Tensor | None,
) -> int:
    """Native :func:`actsparse.kernels.reference.channel_statistics`; x [T, C] with any row stride."""
    if x.dim() != 2 or x.dtype not in DTYPES or x.device.type != "cpu":
        raise ValueError(f"x must be a float32, bfloat16 or float16 CPU matrix, got {x.dtype} {tuple(x.shape)}")
    tokens, channels = x.shape
    if x.stride(1) != 1 and channels > 1:
        x = x.contiguous()
    if counts is not None and (
        counts.dim() != 2 or counts.shape[0] != channels or counts.element_size() != 4 or not counts.is_contiguous()
    ):
        raise ValueError(
            f"counts must be contiguous 32-bit [{channels}, bins], got {counts.dtype} {tuple(counts.shape)}"
        )
    for total in (sum_abs, sum_square):
        if total is not None and (total.dtype != torch.float64 or tuple(total.shape) != (channels,)):
            raise ValueError(f"sums must be float64 [{channels}], got {total.dtype} {tuple(total.shape)}")
    bad = library().as_channel_statistics(
        x.data_ptr(), DTYPES[x.dtype], tokens, channels, x.stride(0), _pointer(counts),
        0 if counts is None else counts.shape[1], min_exponent, sub_bits, _pointer(sum_abs), _pointer(sum_square),
    )  # fmt: skip
    if bad < 0:
        _check(bad, "channel_statistics")
    return int(bad)


def core_statistics(x: Tensor, count: int, share: float, *, positive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Native :func:`actsparse.kernels.reference.core_statistics`; x [T, C] with any row stride."""
    if x.dim() != 2 or x.dtype not in DTYPES or x.device.type != "cpu" or not x.shape[1]:
        raise ValueError(f"x must be a float32, bfloat16 or float16 CPU matrix, got {x.dtype} {tuple(x.shape)}")
    x = x.contiguous() if x.stride(1) != 1 else x
    tokens, channels = x.shape
    levels, counts, sums = (torch.empty(size, device="cpu") for size in (tokens, channels, channels))
    code = library().as_core_statistics(
        x.data_ptr() or levels.data_ptr(), DTYPES[x.dtype], tokens, channels, x.stride(0), count, share, positive,
        levels.data_ptr() or counts.data_ptr(), counts.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    _check(code, "core_statistics")
    return levels, counts, sums


def use_huge_pages(*tensors: Tensor | None) -> int:
    """Move weights onto 2 MiB pages; returns how many of their bytes lie on such pages then.

    Rows scattered over 4 KiB pages each miss the TLB, which costs up to a third of the bandwidth at low densities. Values,
    addresses and memory use do not change, and a second call finds the work done. Linux 6.1 or newer moves ordinary memory;
    anything else (a file's mapping, whose pages are the page cache's, other devices, under 2 MiB) is left alone and counts
    0. It never fails.
    """
    if _lib is None:
        return 0
    moved = 0
    for tensor in tensors:
        # Contiguous in either order: then the bytes from its address on are all its own.
        if tensor is None or tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.dim() != 2:
            continue
        if tensor.is_contiguous() or tensor.t().is_contiguous():
            moved += int(_lib.as_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size()))
    return moved


class ReadTest:
    """The machine's read bandwidth: plain reads of one buffer far larger than any cache, on all torch threads."""

    def __init__(self, bytes: int = 512 << 20) -> None:
        # Real data: untouched pages would all map to one zero page and read from cache.
        self._data = torch.arange(bytes // 8, dtype=torch.int64, device="cpu")
        # The weights that this is the ceiling for lie on such pages too; it makes 4 to 6 % of the rate.
        library().as_huge_pages(self._data.data_ptr(), self._data.nbytes)
        self.gb_s()

    def gb_s(self) -> float:
        """GB/s of one read."""
        size = self._data.nbytes
        start = time.perf_counter()
        library().as_read(self._data.data_ptr(), size)
        return size / (time.perf_counter() - start) / 1e9


def read_bandwidth(repeats: int = 7) -> tuple[float, float, float]:
    """Median, least and greatest GB/s over ``repeats`` reads of a :class:`ReadTest`."""
    test = ReadTest()
    rates = [test.gb_s() for _ in range(repeats)]
    return statistics.median(rates), min(rates), max(rates)

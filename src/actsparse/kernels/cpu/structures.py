"""The C interface's structures, as ``csrc/actsparse.h`` lays them out, and the helpers that turn tensors into them.

Structures made by the ``*_of`` helpers hold the tensors that they point into in an attribute ``keep``.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..rules import Rules

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "relu": 1, "relu2": 2, "gelu": 3, "gelu_tanh": 4, "identity": 5}
PACKED = 3  # ``AS_PACKED``, beside DTYPES
ROWS, COLUMNS = 0, 1
NORMS = {"rms": 1, "layer": 2}  # 0: no norm
HEADS_NORMS = {"alike": 0, "each": 1, "all": 2}

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


class Rounding(Structure):
    """``as_rounding``: a block of columns that is rounded to nested codes."""

    _fields_ = [
        ("columns", c_int64),
        ("outputs", c_int64),
        ("groups", c_int64),
        ("stored", c_int32),
        ("half_range", c_void_p),
        ("shares", c_void_p),
        ("shares_stride", c_int64),
        ("gain", c_void_p),
        ("matrix", c_void_p),
        ("matrix_stride", c_int64),
        ("codes", c_void_p),
    ]


class Stats(Structure):
    """``as_stats``: work done, summed over the calls that are given it."""

    _fields_ = [
        ("gate_rows", c_int64),
        ("up_rows", c_int64),
        ("down_rows", c_int64),
        ("bytes", c_int64),
        ("packed_planes", c_int64),
        ("packed_weights", c_int64),
        ("product_ns", c_int64),
    ]

    def counts(self) -> dict[str, int]:
        """The counters by name.

        Stored rows or columns read per matrix, bytes of weights, planes of packed columns, the weights of the packed matrices
        multiplied (8 bytes / packed_weights are the bits read of each, where only packed ones were), and nanoseconds inside
        the parallel regions that multiply (with waking and joining threads): what a call takes beyond them is overhead.
        """
        return {field[0]: int(getattr(self, field[0])) for field in self._fields_}


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
    """``as_norm``: one of :data:`NORMS`; all zeros means no norm."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("kind", c_int32)]
    keep: tuple[Any, ...]


class Layer(Structure):
    """``as_layer``: one decoder layer with its caches."""

    _fields_ = [
        ("input_norm", Norm),
        ("post_norm", Norm),
        ("attention_out_norm", Norm),
        ("ffn_out_norm", Norm),
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
        ("heads_norm", c_int32),
        ("parallel", c_int32),
        ("ffn", FFN),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("rotary", c_int64),
        ("window", c_int64),
    ]
    keep: tuple[Any, ...]


class Decoder(Structure):
    """``as_decoder``: a whole Llama-kind decoder and the caches of one sequence."""

    _fields_ = [
        ("layers", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("cache_length", c_int64),
        ("layer", POINTER(Layer)),
        ("embedding", Matrix),
        ("lm_head", Matrix),
        ("positions", Matrix),
        ("final_norm", Norm),
        ("query_scale", c_void_p),
        ("attention_scale", c_float),
        ("embedding_scale", c_float),
        ("logit_scale", c_float),
        ("residual_scale", c_float),
        ("attention_cap", c_float),
        ("logit_cap", c_float),
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


def layout_of(weight: Tensor, prefer: int = ROWS) -> tuple[int, int] | None:
    """(layout, stride) of a logical [O, I] weight, None when neither its rows nor its columns lie contiguous.

    A contiguous vector (O or I is 1) lies in both layouts: ``prefer`` is the one whose parts the caller skips.
    """
    row, column = weight.stride()
    out, inn = weight.shape
    # Strides along a dimension of one element mean nothing.
    found = {}
    if (column == 1 or inn == 1) and (row >= inn or out == 1):
        found[ROWS] = row if out > 1 else inn
    if (row == 1 or out == 1) and (column >= out or inn == 1):
        found[COLUMNS] = column if inn > 1 else out
    if not found:
        return None
    layout = prefer if prefer in found else next(iter(found))
    return layout, found[layout]


def skipped_by(threshold: Tensor | None) -> int:
    """The layout to prefer for a product: an input threshold skips columns, everything else rows."""
    return ROWS if threshold is None else COLUMNS


def vector_of(values: Tensor | None, size: int, name: str) -> Tensor | None:
    if values is None:
        return None
    if values.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected ({size},)")
    if values.dtype is torch.float32 and values.is_cpu and values.is_contiguous():
        return values
    return values.detach().to(device="cpu", dtype=torch.float32).contiguous()


def pointer_to(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()


def matrix_of(weight: Tensor | None, bias: Tensor | None = None, name: str = "weight", prefer: int = ROWS) -> Matrix:
    """The structure for a logical [O, I] weight and a bias [O]; an absent one for None.

    ``prefer`` settles the layout of a weight that lies in both (see :func:`layout_of`).

    Raises ValueError for a type other than float32, bfloat16 and float16, another device, or strides that are neither
    row-contiguous nor a transposed view of contiguous storage.
    """
    if weight is None:
        return Matrix()
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected two dimensions")
    layout = layout_of(weight, prefer)
    dtype = DTYPES.get(weight.dtype)
    if layout is None or dtype is None or not weight.is_cpu:
        raise ValueError(
            f"{name} ({weight.dtype}, {weight.device}, strides {weight.stride()}) is no contiguous or transposed "
            "float32, bfloat16 or float16 CPU matrix"
        )
    out, inn = weight.shape
    bias = vector_of(bias, out, f"{name}'s bias")
    matrix = Matrix(weight.data_ptr(), pointer_to(bias), out, inn, layout[1], dtype, layout[0])
    matrix.keep = (weight, bias)
    return matrix


def ffn_of(gate: Tensor | Matrix | None, up: Tensor | Matrix, down: Tensor | Matrix, rules: Rules) -> FFN:
    """The structure for one block of [N, H], [N, H] and [H, N] under ``rules``; ValueError when they do not fit."""
    size, hidden = (up.out, up.in_) if isinstance(up, Matrix) else up.shape
    vectors = (
        vector_of(rules.gate_in_threshold, hidden, "gate_in_threshold"),
        vector_of(rules.up_in_threshold, hidden, "up_in_threshold"),
        vector_of(rules.gate_threshold, size, "gate_threshold"),
        vector_of(rules.value_threshold, size, "value_threshold"),
        vector_of(rules.mean, size, "mean"),
    )
    neurons = rules.neurons
    if neurons is not None:
        if neurons.dim() != 1 or neurons.dtype != torch.int32:
            raise ValueError(f"neurons must be int32 [count], got {neurons.dtype} {tuple(neurons.shape)}")
        neurons = neurons.contiguous()
    a = matrix_of(rules.predictor_a, None, "predictor_a")
    b = matrix_of(rules.predictor_b, rules.predictor_bias, "predictor_b")
    # A structure made beforehand (of packed weights) brings its own bias.
    g, u, d = (
        weight if isinstance(weight, Matrix) else matrix_of(weight, bias, name, prefer)
        for weight, bias, name, prefer in (
            (gate, rules.gate_bias, "gate", skipped_by(rules.gate_in_threshold)),
            (up, rules.up_bias, "up", skipped_by(rules.up_in_threshold)),
            (down, rules.down_bias, "down", COLUMNS),
        )
    )
    ffn = FFN(
        g, u, d,
        activation_code(rules.activation), activation_code(rules.up_activation),
        *(pointer_to(v) for v in vectors),
        a, b,
        _NOWHERE if neurons is not None and not len(neurons) else pointer_to(neurons), 0 if neurons is None else len(neurons),
    )  # fmt: skip
    ffn.keep = (g, u, d, a, b, vectors, neurons)
    return ffn


def activation_code(name: str) -> int:
    """The C constant of an activation; ValueError naming the choices for an unknown one."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}") from None

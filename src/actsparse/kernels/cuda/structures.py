"""The kernels' parameters, as ``csrc/`` lays them out; and one launch.

Letters: B rows of x, I inputs, O outputs, N neurons, S splits.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RAW, ACTIVATED, PAIRED, TIMES_SOURCE = range(4)


class Input(Structure):
    """The vector x: 16-bit [B, I], or float32 parts [S, B, I] to add up; then residual and RMSNorm."""

    _fields_ = [
        ("x", c_void_p),
        ("parts", c_void_p),
        ("residual", c_void_p),
        ("residual_out", c_void_p),
        ("norm", c_void_p),
        ("splits", c_int32),
        ("size", c_int32),
        ("eps", c_float),
    ]


class Chosen(Structure):
    """Rows to take: those with a value in what a product left, or by number."""

    _fields_ = [
        *((name, c_void_p) for name in ("value", "start", "count", "index")),
        *((name, c_int32) for name in ("size", "segments")),
    ]


class Passing(Structure):
    """Results that pass, with zeros for the others; and how many each block has, from where on."""

    _fields_ = [
        *((name, c_void_p) for name in ("value", "start", "count", "threshold", "mean")),
        *((name, c_int32) for name in ("size", "positive")),
    ]


class Job(Structure):
    """One matrix of a launch."""

    _fields_ = [
        ("w", c_void_p),
        ("bias", c_void_p),
        ("threshold", c_void_p),
        ("y", c_void_p),
        ("rounded", c_void_p),
        ("stride", c_int64),
        ("out", c_int32),
        ("begin", c_int32),
    ]


class Rows(Structure):
    """A product by rows."""

    _fields_ = [
        ("input", Input),
        ("chosen", Chosen),
        ("job", Job * 3),
        ("passing", Passing),
        ("jobs", c_int32),
        ("units", c_int32),
        ("mode", c_int32),
        ("activation", c_int32),
        ("second_activation", c_int32),
        ("rows", c_int32),
        ("prefetch_rows", c_int32),
        ("beside", c_int32),
        ("known", c_int32),
    ]


class Columns(Structure):
    """A product by columns."""

    _fields_ = [
        ("input", Input),
        ("job", Job * 3),
        ("passing", Passing),
        ("column", c_void_p),
        *((name, c_int32) for name in ("jobs", "splits", "rows", "bits", "tiles")),
        ("inverse", c_uint32),
        *((name, c_int32) for name in ("slice", "staged", "activation", "second_activation")),
    ]  # fmt: skip


class Finish(Structure):
    """The sum over splits, rounded."""

    _fields_ = [("parts", c_void_p), ("y", c_void_p), ("size", c_int64), ("splits", c_int32)]


class Attention(Structure):
    """One token's attention in one layer."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "q", "k", "v", "q_norm", "k_norm", "cosine", "sine", "state", "keys", "values", "y", "partial", "arrived",
        )),
        *((name, c_int32) for name in (
            "q_splits", "k_splits", "v_splits", "heads", "kv_heads", "length", "window", "splits", "subgroups", "group",
        )),
        ("scale", c_float),
        ("q_eps", c_float),
        ("k_eps", c_float),
    ]  # fmt: skip


class Embedding(Structure):
    """One row of the embedding."""

    _fields_ = [
        *((name, c_void_p) for name in ("w", "state", "y", "sum", "squares")),
        ("stride", c_int64),
        ("size", c_int32),
    ]  # fmt: skip


@dataclass
class Launch:
    """One kernel launch; ``keep`` holds the tensors that the parameters point into."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    parameters: Structure
    keep: tuple[Any, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Parts:
    """A float32 vector in parts [S, B, size] that are to be added up; with S = 0 one vector of sums, int64."""

    values: Tensor
    splits: int
    size: int

    def total(self, rows: int) -> Tensor:
        """The sum, float32 [B, size]."""
        return self.values[: self.splits * rows * self.size].view(self.splits, rows, self.size).sum(0)


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first value; None for none."""
    return None if tensor is None else tensor.data_ptr()


def vector(values: Tensor | None, device: torch.device) -> Tensor | None:
    """A float32 vector on ``device``, contiguous; the same tensor where it is one."""
    return None if values is None else values.detach().to(device, torch.float32).contiguous()


def address(structure: Structure) -> int:
    """Address of a structure."""
    return ctypes.addressof(structure)

"""The native decode step: a whole decoder as one structure, one call per token of one sequence or of several together."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .loading import MAX_BATCH, check, library, stats_reference
from .structures import DTYPES, FFN, NORMS, Decoder, Layer, Matrix, Norm, Stats, pointer_to, vector_of


def norm_of(weight: Tensor | None, *, eps: float, kind: str = "rms", bias: Tensor | None = None) -> Norm:
    """The structure for a norm of kind "rms" or "layer"; weight None: no scaling (for q_norm and k_norm: no norm)."""
    if kind not in NORMS:
        raise ValueError(f"unknown norm {kind!r}; choose one of {', '.join(NORMS)}")
    weight = None if weight is None else vector_of(weight, weight.shape[0], "norm weight")
    bias = None if bias is None else vector_of(bias, bias.shape[0], "norm bias")
    norm = Norm(pointer_to(weight), pointer_to(bias), eps, NORMS[kind])
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
        vector_of(q_threshold, q.in_, "q_threshold"),
        vector_of(k_threshold, k.in_, "k_threshold"),
        vector_of(v_threshold, v.in_, "v_threshold"),
        vector_of(o_threshold, o.in_, "o_threshold"),
    )
    layer = Layer(
        input_norm, post_norm, q, k, v, o, *(pointer_to(t) for t in thresholds), q_norm or Norm(), k_norm or Norm(), ffn,
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
        final_norm, pointer_to(tables[0]), pointer_to(tables[1]), attention_scale, embedding_scale, logit_scale,
        residual_scale, DTYPES[first.dtype],
    )  # fmt: skip
    decoder.keep = (layers, array, embedding, lm_head, final_norm, tables)
    return decoder


def decode_step(decoder: Decoder, token: int, position: int, logits: Tensor, stats: Any = stats_reference) -> None:
    """One token: appends to the caches at ``position`` and writes float32 logits [vocab] in place.

    ``stats``: ``ctypes.byref`` of the :class:`Stats` to add to; by default those of the process.
    """
    head = decoder.lm_head if decoder.lm_head.data else decoder.embedding
    if logits.dtype != torch.float32 or not logits.is_contiguous() or logits.numel() != head.out:
        raise ValueError(f"logits must be contiguous float32 [{head.out}], got {logits.dtype} {tuple(logits.shape)}")
    check(
        library().as_decode_step(ctypes.byref(decoder), token, position, logits.data_ptr(), stats),
        "decode_step",
    )


def decode_together(
    decoders: Sequence[Decoder],
    tokens: Sequence[int],
    positions: Sequence[int],
    logits: Tensor,
    stats: ctypes.Array[Stats],
) -> None:
    """One token of each of up to 8 sequences, whose decoders point at the same weights and have their own caches.

    Each appends to its caches at its position; row b of ``logits``, float32 [B, vocab], gets the bits that
    :func:`decode_step` gives for that sequence alone.  What is read is counted once, by layer, in ``stats`` [layers + 1]
    (the last: the output head).  Raises ValueError for decoders of different weights, or with neurons chosen for one text.
    """
    count = len(decoders)
    head = decoders[0].lm_head if decoders[0].lm_head.data else decoders[0].embedding
    if not 1 <= count <= MAX_BATCH or not count == len(tokens) == len(positions):
        raise ValueError(
            f"{count} decoders, {len(tokens)} tokens and {len(positions)} positions, expected as many, 1 to {MAX_BATCH}"
        )
    if logits.dtype != torch.float32 or not logits.is_contiguous() or tuple(logits.shape) != (count, head.out):
        raise ValueError(
            f"logits must be contiguous float32 [{count}, {head.out}], got {logits.dtype} {tuple(logits.shape)}"
        )
    if len(stats) != decoders[0].layers + 1:
        raise ValueError(f"{len(stats)} counters, expected {decoders[0].layers + 1}")
    numbers = ctypes.c_int64 * count
    check(
        library().as_decode_together(
            (ctypes.c_void_p * count)(*(ctypes.addressof(decoder) for decoder in decoders)), numbers(*tokens),
            numbers(*positions), count, logits.data_ptr(), stats,
        ),
        "decode_together",
    )  # fmt: skip

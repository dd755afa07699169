"""The native decode step: a whole decoder as one structure, one call per token of one sequence or of several together."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .loading import MAX_BATCH, check, library, stats_reference
from .structures import DTYPES, FFN, HEADS_NORMS, NORMS, Decoder, Layer, Matrix, Norm, Stats, pointer_to, vector_of


def norm_of(weight: Tensor | None, *, eps: float, kind: str = "rms", bias: Tensor | None = None) -> Norm:
    """The structure for a norm of kind "rms" or "layer"; weight None: no scaling."""
    if kind not in NORMS:
        raise ValueError(f"unknown norm {kind!r}; choose one of {', '.join(NORMS)}")
    weight = None if weight is None else vector_of(weight.flatten(), weight.numel(), "norm weight")
    bias = None if bias is None else vector_of(bias.flatten(), bias.numel(), "norm bias")
    norm = Norm(pointer_to(weight), pointer_to(bias), eps, NORMS[kind])
    norm.keep = (weight, bias)
    return norm


def layer_of(
    *,
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
    input_norm: Norm | None = None,
    post_norm: Norm | None = None,
    attention_out_norm: Norm | None = None,
    ffn_out_norm: Norm | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    heads_norm: str = "alike",
    parallel: bool = False,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    window: int = 0,
) -> Layer:
    """The structure for one layer; caches are contiguous [kv_heads, cache_length, head_dim], thresholds [in].

    Norms: input_norm and post_norm before the attention and the feed-forward block, the out norms of what these give; q_norm,
    k_norm with one weight [head_dim] for all heads ("alike"), a row of [heads, head_dim] for each ("each"), or of all heads at
    once, [heads * head_dim] ("all").  None: no norm.  A parallel layer's block reads what q, k and v read.

    cosine and sine: [cache_length, rotary / 2], which rotate the first ``rotary`` channels of a head (None: nothing).
    window: sliding attention window in positions, 0 for none.

    Raises ValueError when caches or tables do not fit.
    """
    if heads_norm not in HEADS_NORMS:
        raise ValueError(f"unknown heads_norm {heads_norm!r}; choose one of {', '.join(HEADS_NORMS)}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and k_cache.shape == v_cache.shape):
        raise ValueError("k_cache and v_cache must be contiguous and of one shape [kv_heads, cache_length, head_dim]")
    thresholds = (
        vector_of(q_threshold, q.in_, "q_threshold"),
        vector_of(k_threshold, k.in_, "k_threshold"),
        vector_of(v_threshold, v.in_, "v_threshold"),
        vector_of(o_threshold, o.in_, "o_threshold"),
    )
    tables = tuple(_table(table, k_cache.shape[1], k_cache.shape[2]) for table in (cosine, sine))
    norms = tuple(n or Norm() for n in (input_norm, post_norm, attention_out_norm, ffn_out_norm, q_norm, k_norm))
    layer = Layer(
        *norms[:4], q, k, v, o, *(pointer_to(t) for t in thresholds), *norms[4:], HEADS_NORMS[heads_norm], int(parallel),
        ffn, k_cache.data_ptr(), v_cache.data_ptr(), *(pointer_to(t) for t in tables),
        0 if tables[0] is None else 2 * tables[0].shape[1], window,
    )  # fmt: skip
    layer.keep = (norms, q, k, v, o, thresholds, ffn, tables, k_cache, v_cache)
    return layer


def _table(table: Tensor | None, length: int, head_dim: int) -> Tensor | None:
    if table is None:
        return None
    if table.dim() != 2 or table.shape[0] != length or not 0 < 2 * table.shape[1] <= head_dim:
        raise ValueError(f"rotary table has shape {tuple(table.shape)}, expected {(length, head_dim // 2)} or narrower")
    return table.to(torch.float32).contiguous()


def decoder_of(
    layers: list[Layer],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    embedding: Matrix,
    lm_head: Matrix | None,
    final_norm: Norm | None,
    attention_scale: float,
    embedding_scale: float = 1.0,
    logit_scale: float = 1.0,
    residual_scale: float = 1.0,
    attention_cap: float = 0.0,
    logit_cap: float = 0.0,
    positions: Matrix | None = None,
    query_scale: Tensor | None = None,
) -> Decoder:
    """The structure for a decoder over ``layers``; lm_head None means tied to the embedding.

    Scores and logits s become cap * tanh(s / cap) where a cap is not 0.  ``positions`` [cache_length or more, hidden] is added
    to the embedding, ``query_scale`` [cache_length] multiplies ``attention_scale`` at each position.  Raises ValueError when
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
    query_scale = vector_of(query_scale, length, "query_scale")
    array = (Layer * len(layers))(*layers)
    decoder = Decoder(
        len(layers), embedding.in_, heads, kv_heads, head_dim, length, array, embedding, lm_head or Matrix(),
        positions or Matrix(), final_norm or Norm(), pointer_to(query_scale), attention_scale, embedding_scale, logit_scale,
        residual_scale, attention_cap, logit_cap, DTYPES[first.dtype],
    )  # fmt: skip
    decoder.keep = (layers, array, embedding, lm_head, positions, final_norm, query_scale)
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

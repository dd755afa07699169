"""The decode step on a GPU: a whole decoder as a list of launches, captured once as a CUDA graph and replayed per token.

Token and position lie in device memory, so that a growing context needs no new capture.  Between kernels go float32 vectors,
some in parts that the next kernel adds up.  The functions have the names and meanings of the CPU's.

Shape letters: H hidden, V vocabulary, K key/value heads, L cache length, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rules import Rules
from . import compiler, graded
from .graded import PlaneInput, PlaneMatrix
from .launches import ACTIVATIONS, Builder, Matrix, input_of
from .machine import MOST_GROUP, MOST_SPLITS, Machine, attention_bytes, attention_warps
from .obstacles import ffn_obstacle, layout_obstacle
from .structures import Attention, Embedding, Input, Launch, Parts, pointer, vector

MOST_HEAD_DIM = 256
_IDENTITY = ACTIVATIONS["identity"]


@dataclass(frozen=True)
class Norm:
    """RMSNorm."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class FFN:
    """One feed-forward block under its rules."""

    gate: Matrix | PlaneMatrix | None
    up: Matrix | PlaneMatrix
    down: Matrix | PlaneMatrix
    rules: Rules


@dataclass
class Layer:
    """One decoder layer with its caches [K, L, D]; thresholds float32 [in]."""

    input_norm: Norm
    post_norm: Norm
    q: Matrix | PlaneMatrix
    k: Matrix | PlaneMatrix
    v: Matrix | PlaneMatrix
    o: Matrix | PlaneMatrix
    ffn: FFN
    k_cache: Tensor
    v_cache: Tensor
    q_threshold: Tensor | None = None
    k_threshold: Tensor | None = None
    v_threshold: Tensor | None = None
    o_threshold: Tensor | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None


def matrix_of(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """A logical [O, I] weight and a bias [O]; ValueError for a layout that the kernels cannot read."""
    obstacle = layout_obstacle(weight)
    if obstacle:
        raise ValueError(obstacle)
    return Matrix(weight, bias)


def norm_of(weight: Tensor, *, eps: float) -> Norm:
    """An RMSNorm with a float32 copy of its weight [H]."""
    converted = vector(weight, weight.device)
    assert converted is not None
    return Norm(converted, eps)


# Rules that skip rows, columns or neurons: packed matrices have levels instead.
_SPARSE = (
    "gate_in_threshold", "up_in_threshold", "gate_threshold", "value_threshold", "mean", "predictor_a", "neurons",
)  # fmt: skip
_Weight = Tensor | Matrix | PlaneMatrix


def ffn_of(gate: _Weight | None, up: _Weight, down: _Weight, rules: Rules) -> FFN:
    """One block, of weights (whose biases are the rules') or of matrices; ValueError for what does not go together."""
    g, u, d = (
        matrix_of(weight, bias) if isinstance(weight, Tensor) else weight
        for weight, bias in ((gate, rules.gate_bias), (up, rules.up_bias), (down, rules.down_bias))
    )
    assert u is not None
    assert d is not None
    kinds = {type(matrix) for matrix in (g, u, d) if matrix is not None}
    if PlaneMatrix in kinds:
        if len(kinds) > 1 or any(getattr(rules, name) is not None for name in _SPARSE):
            raise ValueError(
                "a feed-forward block has packed and plain matrices, or rules beside the levels of packed ones"
            )
        return FFN(g, u, d, rules)
    assert isinstance(u, Matrix)
    assert isinstance(d, Matrix)
    assert g is None or isinstance(g, Matrix)
    obstacle = ffn_obstacle(u.weight[:1], None if g is None else g.weight, u.weight, d.weight, rules)
    if obstacle:
        raise ValueError(obstacle)
    return FFN(g, u, d, rules)


def layer_of(**parts: Any) -> Layer:
    """One layer; the arguments are :class:`Layer`'s attributes."""
    return Layer(**parts)


class Decoder:
    """A Llama-kind decoder, batch 1, on one GPU; made by :func:`decoder_of`.

    The feed-forward blocks of ``layer`` may be exchanged between steps: the next one captures anew.
    """

    def __init__(
        self,
        layers: list[Layer],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        embedding: Matrix,
        lm_head: Matrix | PlaneMatrix,
        final_norm: Norm,
        cosine: Tensor | None,
        sine: Tensor | None,
        attention_scale: float,
        window: int = 0,
        machine: Machine | None = None,
        run: Callable[..., None] | None = None,
    ) -> None:
        self.layer, self.embedding, self.lm_head, self.final_norm = layers, embedding, lm_head, final_norm
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.attention_scale = attention_scale
        self.device, self.dtype = embedding.weight.device, embedding.weight.dtype
        self.cosine, self.sine = vector(cosine, self.device), vector(sine, self.device)
        self.machine = machine or compiler.machine(self.device.index)
        shared = heads // kv_heads
        # Query heads that one block of the attention kernel serves: they share what it reads.
        self.group = next(size for size in range(min(MOST_GROUP, shared), 0, -1) if shared % size == 0)
        self.state = torch.zeros(2, dtype=torch.int32, device=self.device)
        self.logits = torch.empty(lm_head.out, dtype=torch.float32, device=self.device)
        self.launches: list[Launch] = []
        self._run = run or compiler.run
        self._built: tuple[FFN, ...] = ()
        self._graph: Any = None

    def prepare(self) -> None:
        """Arrange the launches for the blocks as they are now; the graph is captured after the next step."""
        built = tuple(layer.ffn for layer in self.layer)
        if len(built) == len(self._built) and all(a is b for a, b in zip(built, self._built, strict=True)):
            return
        self._built, self._graph = built, None
        self.launches = _Step(self).launches

    def step(self) -> None:
        """One token, as ``state`` says; the logits come into ``logits``."""
        self.prepare()
        if self._graph is not None:
            self._graph.replay()
            return
        try:
            # The first step also loads the kernels, which a capture must not.
            self._launch()
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
                graph = torch.cuda.CUDAGraph()
                # A stream of this device: torch's own for captures is on the device that was current when it was first used.
                with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(self.device)):
                    self._launch()
                self._graph = graph
        except BaseException:
            self._built = ()  # what a step that was cut off has added to is made anew
            raise

    def _launch(self) -> None:
        self._run(self.launches, self.device, self.dtype, 1, self.head_dim)


def decoder_of(layers: list[Layer], **options: Any) -> Decoder:
    """The decoder over ``layers``; the arguments are :class:`Decoder`'s.

    cosine and sine are float32 [L, D / 2] (None: no rotary embedding).
    """
    if not layers:
        raise ValueError("a decoder needs at least one layer")
    return Decoder(layers, **options)


def decode_step(decoder: Decoder, token: int, position: int) -> Tensor:
    """One token: appends to the caches at ``position``; returns float32 logits [V] on the device, valid until the next step."""
    decoder.state.copy_(torch.tensor([token, position], dtype=torch.int32))
    decoder.step()
    return decoder.logits


def decoder_obstacle(head_dim: int, *weights: Tensor) -> str:
    """Why a model has no decode step on CUDA, in words; empty when it has one."""
    if head_dim % 8 or head_dim > MOST_HEAD_DIM:
        return f"heads have {head_dim} channels, expected a multiple of 8 up to {MOST_HEAD_DIM}"
    for weight in weights:
        obstacle = layout_obstacle(weight)
        if obstacle:
            return obstacle
    return ""


class _Arena:
    """Scratch for one layer, used again two layers later: what a layer leaves is read by the next one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._at, self._parity = 0, 0

    def turn(self) -> None:
        """The next layer begins."""
        self._parity, self._at = 1 - self._parity, 0

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """Four-byte values."""
        given, count = self._given[self._parity], max(count, 1)
        if self._at == len(given):
            given.append(torch.empty(count, dtype=torch.float32, device=self._device))
        elif given[self._at].numel() < count:
            # Launches keep what they point into alive.
            given[self._at] = torch.empty(count, dtype=torch.float32, device=self._device)
        self._at += 1
        return given[self._at - 1][:count].view(dtype)


class _Step:
    """Builds the launches of one token."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._arena = _Arena(decoder.device)
        self._build = Builder(decoder.machine, decoder.device, 1, self._arena.empty)
        hidden = decoder.embedding.inn
        self._hidden = hidden
        self._streams = [torch.empty(hidden, dtype=torch.float32, device=decoder.device) for _ in range(2)]
        self._pending: Parts | None = None
        # Packed layers come first. Vectors of sums: their stream, and what q, k and v and gate and up add to.
        self._packed = [isinstance(layer.q, PlaneMatrix) for layer in decoder.layer]
        self._packed.append(isinstance(decoder.lm_head, PlaneMatrix))
        if self._packed != sorted(self._packed, reverse=True):
            raise ValueError("packed matrices come after plain ones, expected one kind, or plain ones last")
        self._stream = graded.zero_sums(hidden, decoder.device)
        self._squares = graded.zero_sums(graded.SQUARES, decoder.device)
        self._sums = [self._zero_sums(("q", "k", "v")), self._zero_sums(("gate", "up"))]
        blocks = decoder.kv_heads * (decoder.heads // decoder.kv_heads // decoder.group)
        self._splits = max(1, min(MOST_SPLITS, decoder.machine.processors // blocks))
        room = blocks * self._splits * decoder.group * (decoder.head_dim + 4)
        self._partial = torch.empty(room, dtype=torch.float32, device=decoder.device)
        self._arrived = torch.zeros(blocks, dtype=torch.int32, device=decoder.device)
        self._embed()
        for number, layer in enumerate(decoder.layer):
            self._arena.turn()
            self._attention(layer)
            self._ffn(layer, last=not self._packed[number + 1])
        self._arena.turn()
        if isinstance(decoder.lm_head, PlaneMatrix):
            stream, sums = self._plane_input(decoder.final_norm), graded.zero_sums(decoder.lm_head.out, decoder.device)
            graded.product(self._build, stream, [decoder.lm_head], [sums], out=decoder.logits, clear=self._sums[1])
        else:
            x = self._normalised(decoder.final_norm)
            self._build.rows_product(x, [decoder.lm_head], out=decoder.logits, keep=(self._streams,))
        self.launches = self._build.launches

    def _zero_sums(self, names: tuple[str, ...]) -> Tensor:
        """Vectors of sums in a row, for these matrices of any layer."""
        found = [
            [getattr(layer if hasattr(layer, name) else layer.ffn, name) for name in names]
            for layer in self._decoder.layer
        ]
        sizes = [sum(matrix.out for matrix in row if isinstance(matrix, PlaneMatrix)) for row in found]
        return graded.zero_sums(max(sizes), self._decoder.device)

    def _embed(self) -> None:
        decoder, matrix = self._decoder, self._decoder.embedding
        p = Embedding(
            pointer(matrix.weight), pointer(decoder.state), pointer(self._streams[0]), stride=matrix.stride, size=self._hidden
        )  # fmt: skip
        if self._packed[0]:
            p.sum, p.squares = pointer(self._stream), pointer(self._squares)
        keep = (matrix, self._streams, self._stream, self._squares, decoder.state)
        self._build.launch("embedding", 256, 0, p, keep)

    def _normalised(self, norm: Norm) -> Input:
        """The residual stream with what is pending added, under a norm; the sum becomes the stream."""
        if self._pending is None:  # what the embedding left is no residual: that is read before its kernel has ended
            return input_of(Parts(self._streams[0], 1, self._hidden), self._hidden, norm=(norm.weight, norm.eps))
        before, after = self._streams
        x = input_of(self._pending, self._hidden, residual=before, residual_out=after, norm=(norm.weight, norm.eps))
        self._streams = [after, before]
        self._pending = None
        return x

    def _plane_input(self, norm: Norm) -> PlaneInput:
        """The residual stream under a norm, for packed matrices."""
        return PlaneInput(
            sum=pointer(self._stream), squares=pointer(self._squares), norm=pointer(norm.weight), activation=_IDENTITY,
            second_activation=_IDENTITY, size=self._hidden, eps=norm.eps,
        )  # fmt: skip

    def _plane_product(
        self, x: PlaneInput, matrices: list[PlaneMatrix], which: int, clear: Tensor | None
    ) -> list[Tensor]:
        """Products that are added to vectors of sums: those, one after the other in their place."""
        parts, begin = [], 0
        for matrix in matrices:
            parts.append(self._sums[which][begin : begin + matrix.out])
            begin += matrix.out
        graded.product(self._build, x, matrices, parts, clear=clear)
        return parts

    def _add_product(self, x: PlaneInput, matrix: PlaneMatrix, **options: Any) -> None:
        """A packed matrix's product with x becomes part of the residual stream."""
        graded.product(self._build, x, [matrix], [self._stream], kept=True, squares=self._squares, **options)

    def _ffn(self, layer: Layer, *, last: bool) -> None:
        ffn, build = layer.ffn, self._build
        if isinstance(ffn.up, Matrix):
            assert isinstance(ffn.down, Matrix)
            assert ffn.gate is None or isinstance(ffn.gate, Matrix)
            self._pending = build.ffn(self._normalised(layer.post_norm), ffn.gate, ffn.up, ffn.down, ffn.rules, None)
            return
        first = [matrix for matrix in (ffn.gate, ffn.up) if isinstance(matrix, PlaneMatrix)]
        parts = self._plane_product(self._plane_input(layer.post_norm), first, 1, None)
        inner = PlaneInput(
            sum=pointer(parts[0]), second=pointer(parts[1]) if len(parts) > 1 else None,
            activation=ACTIVATIONS[ffn.rules.activation], second_activation=ACTIVATIONS[ffn.rules.up_activation],
            size=ffn.up.out,
        )  # fmt: skip
        assert isinstance(ffn.down, PlaneMatrix)
        # Plain matrices go on with a float32 stream.
        out = self._streams[0] if last else None
        self._add_product(inner, ffn.down, out=out, keep=(self._sums,))

    def _attention(self, layer: Layer) -> None:
        decoder, build = self._decoder, self._build
        packed = [matrix for matrix in (layer.q, layer.k, layer.v) if isinstance(matrix, PlaneMatrix)]
        if packed:
            parts = self._plane_product(self._plane_input(layer.input_norm), packed, 0, self._sums[1])
            q, k, v = (Parts(part, 0, matrix.out) for part, matrix in zip(parts, packed, strict=True))
        else:
            x = self._normalised(layer.input_norm)
            sites = {
                "q": (layer.q, layer.q_threshold), "k": (layer.k, layer.k_threshold), "v": (layer.v, layer.v_threshold),
            }  # fmt: skip
            results = self._products(x, sites)
            q, k, v = (results[name] for name in "qkv")
        y = build.scratch(decoder.heads * decoder.head_dim)
        q_norm, k_norm = layer.q_norm, layer.k_norm
        length = layer.k_cache.shape[1]
        subgroups = decoder.heads // decoder.kv_heads // decoder.group
        p = Attention(
            pointer(q.values), pointer(k.values), pointer(v.values), pointer(q_norm.weight if q_norm else None),
            pointer(k_norm.weight if k_norm else None), pointer(decoder.cosine), pointer(decoder.sine),
            pointer(decoder.state), pointer(layer.k_cache), pointer(layer.v_cache), pointer(y), pointer(self._partial),
            pointer(self._arrived), q.splits, k.splits, v.splits, decoder.heads, decoder.kv_heads, length,
            decoder.window, self._splits, subgroups, decoder.group, decoder.attention_scale, q_norm.eps if q_norm else 0.0,
            k_norm.eps if k_norm else 0.0,
        )  # fmt: skip
        size, machine = decoder.head_dim, decoder.machine
        build.launch(
            "attention", 32 * attention_warps(machine, size), attention_bytes(machine, size, decoder.group), p,
            (layer, q, k, v, y, self._partial, self._arrived), decoder.kv_heads * subgroups * self._splits,
        )  # fmt: skip
        attended = Parts(y, 1, decoder.heads * size)
        if isinstance(layer.o, PlaneMatrix):
            inner = PlaneInput(value=pointer(y), size=attended.size)
            self._add_product(inner, layer.o, clear=self._sums[0], keep=(y,))
            return
        self._pending = self._products(
            input_of(attended, attended.size), {"o": (layer.o, layer.o_threshold)}, prefetch=True
        )["o"]

    def _products(
        self, x: Input, sites: dict[str, tuple[Any, Tensor | None]], prefetch: bool = False
    ) -> dict[str, Parts]:
        """Matrices of one input, by columns in one launch and by rows in another."""
        results: dict[str, Parts] = {}
        for name, (matrix, threshold) in sites.items():
            if threshold is not None and not matrix.columns:
                raise ValueError(f"{name} has a threshold, but is stored by rows")
        by_columns = {name: site for name, site in sites.items() if site[0].columns}
        by_rows = {name: site for name, site in sites.items() if not site[0].columns}
        if by_columns:
            columns = self._build.columns_product(x, list(by_columns.values()))
            assert isinstance(columns, list)
            results |= zip(by_columns, columns, strict=True)
        if by_rows:
            got = self._build.rows_product(
                x, [matrix for matrix, _ in by_rows.values()], prefetch=prefetch, beside=bool(by_columns)
            )
            assert isinstance(got, list)
            results |= zip(by_rows, got, strict=True)
        return results

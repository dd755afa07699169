"""The native decode step against a decoder written in float64."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse import kernels
from actsparse.kernels import cpu, reference

from .bounds import U32, assert_within, stored


class Llama:
    """A tiny random decoder with every option, stepped in plain PyTorch at any precision."""

    def __init__(
        self, *, window: int, biases: bool, kind: str, q_norms: str = "", more: bool = False, parallel: bool = False
    ) -> None:
        self.heads, self.kv_heads, self.dim, self.hidden, self.neurons = 6, 2, 16, 40, 70
        self.vocabulary, self.length, self.window, self.kind = 50, 24, window, kind
        # Norms of what blocks give, half a head rotated, caps, positions, a scale by position.
        self.q_norms, self.more, self.parallel = q_norms, more, parallel
        self.rotary = self.dim // 2 if more else self.dim
        wide, narrow = self.heads * self.dim, self.kv_heads * self.dim
        shapes = {"q": (wide, self.hidden), "k": (narrow, self.hidden), "v": (narrow, self.hidden),
                  "o": (self.hidden, wide), "gate": (self.neurons, self.hidden), "up": (self.neurons, self.hidden),
                  "down": (self.hidden, self.neurons)}  # fmt: skip
        self.layers = []
        for _ in range(3):
            layer = {name: torch.randn(o, i) / math.sqrt(i) for name, (o, i) in shapes.items()}
            layer |= {f"{name}_bias": torch.randn(o) / 4 for name, (o, _) in shapes.items() if biases}
            layer |= {"n1": torch.rand(self.hidden) + 0.5, "n2": torch.rand(self.hidden) + 0.5}
            if kind == "layer":
                layer |= {"n1_bias": torch.randn(self.hidden), "n2_bias": torch.randn(self.hidden)}
            if q_norms:
                rows = {"alike": (1, 1), "each": (self.heads, self.kv_heads), "all": (self.heads, self.kv_heads)}[
                    q_norms
                ]
                layer |= {n: torch.rand(count, self.dim) + 0.5 for n, count in zip(("qn", "kn"), rows, strict=True)}
            if more:
                layer |= {n: torch.rand(self.hidden) + 0.5 for n in ("n3", "n4")}
            layer |= {
                "q_t": torch.rand(self.hidden) / 2,
                "o_t": torch.rand(wide) / 4,
                "g_t": torch.rand(self.neurons) / 4,
            }
            self.layers.append(layer)
        self.embedding, self.norm = torch.randn(self.vocabulary, self.hidden), torch.rand(self.hidden) + 0.5
        angle = torch.outer(torch.arange(self.length).double(), 100.0 ** -(torch.arange(self.rotary // 2) / 8.0))
        self.positions = torch.randn(self.length, self.hidden) if more else torch.zeros(self.length, self.hidden)
        self.query_scale = 1 + torch.rand(self.length) if more else torch.ones(self.length)
        self.attention_cap, self.logit_cap = (1.5, 2.0) if more else (0.0, 0.0)
        self.cosine, self.sine = angle.cos().float(), angle.sin().float()

    def widen(self, neurons: int) -> None:
        """More neurons, as random as the others."""
        self.neurons = neurons
        for layer in self.layers:
            for name in ("gate", "up", "down"):
                layer[name] = torch.randn((self.hidden, neurons) if name == "down" else (neurons, self.hidden)) / 6
                layer.pop(f"{name}_bias", None)
            layer["g_t"] = torch.rand(neurons) / 2

    def native(self) -> cpu.Decoder:
        def columns(layer: dict[str, Tensor], name: str) -> Tensor:
            # Stored once, however many decoders point at it.
            if f"{name}_columns" not in layer:
                layer[f"{name}_columns"] = stored(layer[name], "columns", torch.float32)
            return layer[f"{name}_columns"]

        def matrix(layer: dict[str, Tensor], name: str) -> cpu.Matrix:
            weight = columns(layer, name) if name in ("q", "o") else layer[name]
            return kernels.matrix_of(weight, layer.get(f"{name}_bias"))

        def norm(layer: dict[str, Tensor], name: str) -> cpu.Norm:
            return kernels.norm_of(layer[name], eps=1e-5, kind=self.kind, bias=layer.get(f"{name}_bias"))

        layers = []
        for layer in self.layers:
            ffn = kernels.ffn_of(
                layer["gate"], layer["up"], columns(layer, "down"),
                kernels.Rules("silu", gate_bias=layer.get("gate_bias"), up_bias=layer.get("up_bias"),
                              down_bias=layer.get("down_bias"), gate_threshold=layer["g_t"]),
            )  # fmt: skip
            caches = torch.full((2, self.kv_heads, self.length, self.dim), math.nan)
            heads = {
                n: kernels.norm_of(layer[w], eps=1e-5) for n, w in (("q_norm", "qn"), ("k_norm", "kn")) if w in layer
            }
            entry = kernels.layer_of(
                input_norm=norm(layer, "n1"), post_norm=norm(layer, "n2"), ffn=ffn, k_cache=caches[0],
                attention_out_norm=norm(layer, "n3") if self.more else None, parallel=self.parallel,
                ffn_out_norm=norm(layer, "n4") if self.more else None, heads_norm=self.q_norms or "alike",
                v_cache=caches[1], q_threshold=layer["q_t"], o_threshold=layer["o_t"], **heads,
                cosine=self.cosine, sine=self.sine, window=self.window,
                **{name: matrix(layer, name) for name in "qkvo"},
            )  # fmt: skip
            layers.append(entry)
        return kernels.decoder_of(
            layers, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.dim,
            embedding=kernels.matrix_of(self.embedding), lm_head=None, final_norm=kernels.norm_of(self.norm, eps=1e-5),
            attention_scale=self.dim**-0.5, attention_cap=self.attention_cap, logit_cap=self.logit_cap,
            positions=kernels.matrix_of(self.positions) if self.more else None,
            query_scale=self.query_scale if self.more else None, embedding_scale=1.5, logit_scale=0.5, residual_scale=0.75,
        )  # fmt: skip

    def step(self, token: int, past: list[list[Tensor]], dtype: torch.dtype) -> Tensor:
        """Logits after one more token; ``past`` is one list of [2, kv_heads, dim] per layer and grows."""

        def rms(x: Tensor, weight: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.to(dtype)

        def norm(layer: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
            if self.kind == "rms":
                return rms(x, layer[name])
            return F.layer_norm(x, (self.hidden,), layer[name].to(dtype), layer[f"{name}_bias"].to(dtype), 1e-5)

        def product(layer: dict[str, Tensor], name: str, x: Tensor, threshold: Tensor | None = None) -> Tensor:
            bias = layer.get(f"{name}_bias")
            return reference.linear(x, layer[name].to(dtype), None if bias is None else bias.to(dtype), threshold)

        def rotate(x: Tensor, position: int) -> Tensor:
            cosine, sine = self.cosine[position].to(dtype).repeat(2), self.sine[position].to(dtype).repeat(2)
            x, rest = x[..., : self.rotary], x[..., self.rotary :]
            turned = torch.cat([-x[..., self.rotary // 2 :], x[..., : self.rotary // 2]], -1)
            return torch.cat([x * cosine + turned * sine, rest], -1)

        def heads_norm(x: Tensor, weight: Tensor) -> Tensor:
            return rms(x.flatten(), weight.flatten()).view_as(x) if self.q_norms == "all" else rms(x, weight)

        def capped(x: Tensor, cap: float) -> Tensor:
            return cap * (x / cap).tanh() if cap else x

        h = 1.5 * self.embedding[token].to(dtype) + self.positions[len(past[0])].to(dtype)
        for layer, cache in zip(self.layers, past, strict=True):
            position = len(cache)
            x = norm(layer, "n1", h)
            q = product(layer, "q", x, layer["q_t"]).view(self.heads, self.dim)
            k, v = (product(layer, name, x).view(self.kv_heads, self.dim) for name in "kv")
            if "qn" in layer:
                q, k = heads_norm(q, layer["qn"]), heads_norm(k, layer["kn"])
            q, k = rotate(q, position), rotate(k, position)
            cache.append(torch.stack([k, v]))
            seen = torch.stack(cache[-self.window :] if self.window else cache)  # [T, 2, kv_heads, dim]
            keys, values = (
                seen[:, i].repeat_interleave(self.heads // self.kv_heads, 1).transpose(0, 1) for i in range(2)
            )
            scale = self.dim**-0.5 * self.query_scale[position].to(dtype)
            weights = capped(keys @ q[..., None] * scale, self.attention_cap).softmax(1)
            mixed = (weights * values).sum(1).flatten()
            mixed = product(layer, "o", mixed, layer["o_t"])
            h = h + 0.75 * (norm(layer, "n3", mixed) if self.more else mixed)
            x = x if self.parallel else norm(layer, "n2", h)
            gate = F.silu(product(layer, "gate", x))
            gate = torch.where(reference.keep(gate, layer["g_t"]), gate, 0.0)
            made = product(layer, "down", gate * product(layer, "up", x))
            h = h + 0.75 * (norm(layer, "n4", made) if self.more else made)
        return capped(0.5 * F.linear(rms(h, self.norm), self.embedding.to(dtype)), self.logit_cap)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0, "biases": False, "kind": "rms"},
        {"window": 7, "q_norms": "alike", "biases": True, "kind": "rms"},
        {"window": 0, "biases": True, "kind": "layer"},
        {"window": 5, "q_norms": "all", "biases": False, "kind": "rms", "more": True},
        {"window": 0, "q_norms": "each", "biases": False, "kind": "rms", "parallel": True},
    ],
    ids=["llama", "window-qknorm-bias", "layernorm", "norms-caps-positions", "parallel-norm-of-each-head"],
)
def test_decode_step(isa: str, threads: int, options: dict[str, object]) -> None:
    model = Llama(**options)  # type: ignore[arg-type]
    decoder = model.native()
    exact: list[list[Tensor]] = [[] for _ in model.layers]
    single: list[list[Tensor]] = [[] for _ in model.layers]
    for position in range(model.length):
        token = int(torch.randint(model.vocabulary, ()))
        found = torch.full((model.vocabulary,), math.nan)
        kernels.decode_step(decoder, token, position, found)
        expected = model.step(token, exact, torch.float64)
        # No worse than a few times plain float32 PyTorch, whose error shows how well conditioned this step is.
        error = (model.step(token, single, torch.float32) - expected).abs().max()
        assert_within(found, expected, 8 * error + 64 * U32 * expected.abs().max() + torch.zeros_like(expected))
    with pytest.raises(ValueError, match="decode_step"):
        kernels.decode_step(decoder, 0, model.length, torch.empty(model.vocabulary))
    with pytest.raises(ValueError, match="decode_step"):
        kernels.decode_step(decoder, model.vocabulary, 0, torch.empty(model.vocabulary))


OPTIONS = {"window": 7, "q_norms": "alike", "biases": True, "kind": "rms"}


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_sequences_decoded_together_keep_the_bits_they_have_alone(isa: str, threads: int, count: int) -> None:
    """Whoever else is there, at whatever position: rows that keep other channels must not move a row's sums."""
    model = Llama(**OPTIONS)  # type: ignore[arg-type]
    model.widen(700)  # so that several tasks share the neurons
    together, alone = ([model.native() for _ in range(count)] for _ in range(2))
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(model.vocabulary, (count, model.length), generator=generator).tolist()
    begins = torch.randint(model.length // 2, (count,), generator=generator).tolist()
    position = [0] * count
    stats = (cpu.Stats * 4)()
    while any(p < model.length for p in position):
        # They come and go: sequence i joins late and ends where its cache does.
        rows = [i for i in range(count) if position[i] or begins[i] <= max(position)]
        rows = [i for i in rows if position[i] < model.length] or [min(range(count), key=position.__getitem__)]
        found = torch.full((len(rows), model.vocabulary), math.nan)
        kernels.decode_together(
            [together[i] for i in rows],
            [tokens[i][position[i]] for i in rows],
            [position[i] for i in rows],
            found,
            stats,
        )
        for row, i in zip(found, rows, strict=True):
            expected = torch.full((model.vocabulary,), math.nan)
            kernels.decode_step(alone[i], tokens[i][position[i]], position[i], expected)
            assert torch.equal(row, expected)
            position[i] += 1
    assert all(each.bytes > 0 for each in stats)


def test_what_is_read_together_counts_once_and_by_layer() -> None:
    model = Llama(**OPTIONS)  # type: ignore[arg-type]
    first, second = model.native(), model.native()
    logits, stats = torch.empty(1, model.vocabulary), (cpu.Stats * 4)()
    kernels.decode_together([first], [5], [0], logits, stats)
    single = cpu.Stats()
    kernels.decode_step(second, 5, 0, logits[0], ctypes.byref(single))
    assert sum(each.bytes for each in stats) == single.bytes
    assert stats[3].bytes == 4 * model.vocabulary * model.hidden
    twice = (cpu.Stats * 4)()
    kernels.decode_together([first, second], [5, 5], [1, 1], torch.empty(2, model.vocabulary), twice)
    once = (cpu.Stats * 4)()
    kernels.decode_together([first], [5], [1], logits, once)
    assert [each.bytes for each in twice] == [each.bytes for each in once]


def test_sequences_that_cannot_go_together_are_refused() -> None:
    model = Llama(**OPTIONS)  # type: ignore[arg-type]
    one, two, other = model.native(), model.native(), Llama(**OPTIONS).native()  # type: ignore[arg-type]
    stats = (cpu.Stats * 4)()

    def logits(rows: int) -> Tensor:
        return torch.empty(rows, model.vocabulary)

    for decoders, tokens, positions in (
        ([one, one], [1, 1], [0, 0]),  # one cache twice
        ([one, other], [1, 1], [0, 0]),  # another model's weights
        ([one, two], [1, model.vocabulary], [0, 0]),
        ([one, two], [1, 1], [0, model.length]),
    ):
        with pytest.raises(ValueError, match="decode_together"):
            kernels.decode_together(decoders, tokens, positions, logits(2), stats)
    with pytest.raises(ValueError, match="9 decoders"):
        kernels.decode_together([model.native() for _ in range(9)], [1] * 9, [0] * 9, logits(9), stats)
    with pytest.raises(ValueError, match="logits must be"):
        kernels.decode_together([one], [1], [0], logits(2), stats)
    with pytest.raises(ValueError, match="3 counters"):
        kernels.decode_together([one], [1], [0], logits(1), (cpu.Stats * 3)())

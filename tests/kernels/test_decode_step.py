"""The native decode step against a decoder written in float64."""

from __future__ import annotations

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

    def __init__(self, *, window: int, q_norms: bool, biases: bool, kind: str) -> None:
        self.heads, self.kv_heads, self.dim, self.hidden, self.neurons = 6, 2, 16, 40, 70
        self.vocabulary, self.length, self.window, self.kind = 50, 24, window, kind
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
                layer |= {"qn": torch.rand(self.dim) + 0.5, "kn": torch.rand(self.dim) + 0.5}
            layer |= {
                "q_t": torch.rand(self.hidden) / 2,
                "o_t": torch.rand(wide) / 4,
                "g_t": torch.rand(self.neurons) / 4,
            }
            self.layers.append(layer)
        self.embedding, self.norm = torch.randn(self.vocabulary, self.hidden), torch.rand(self.hidden) + 0.5
        angle = torch.outer(torch.arange(self.length).double(), 100.0 ** -(torch.arange(self.dim // 2) / 8.0))
        self.cosine, self.sine = angle.cos().float(), angle.sin().float()

    def native(self) -> cpu.Decoder:
        def matrix(layer: dict[str, Tensor], name: str) -> cpu.Matrix:
            columns = name in ("q", "o", "down")
            return kernels.matrix_of(stored(layer[name], "columns" if columns else "rows", torch.float32),
                                     layer.get(f"{name}_bias"))  # fmt: skip

        def norm(layer: dict[str, Tensor], name: str) -> cpu.Norm:
            return kernels.norm_of(layer[name], eps=1e-5, kind=self.kind, bias=layer.get(f"{name}_bias"))

        layers = []
        for layer in self.layers:
            ffn = kernels.ffn_of(
                layer["gate"], layer["up"], stored(layer["down"], "columns", torch.float32),
                kernels.Rules("silu", gate_bias=layer.get("gate_bias"), up_bias=layer.get("up_bias"),
                              down_bias=layer.get("down_bias"), gate_threshold=layer["g_t"]),
            )  # fmt: skip
            caches = torch.full((2, self.kv_heads, self.length, self.dim), math.nan)
            heads = {
                n: kernels.norm_of(layer[w], eps=1e-5) for n, w in (("q_norm", "qn"), ("k_norm", "kn")) if w in layer
            }
            entry = kernels.layer_of(
                input_norm=norm(layer, "n1"), post_norm=norm(layer, "n2"), ffn=ffn, k_cache=caches[0],
                v_cache=caches[1], q_threshold=layer["q_t"], o_threshold=layer["o_t"], **heads,
                **{name: matrix(layer, name) for name in "qkvo"},
            )  # fmt: skip
            layers.append(entry)
        return kernels.decoder_of(
            layers, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.dim,
            embedding=kernels.matrix_of(self.embedding), lm_head=None, final_norm=kernels.norm_of(self.norm, eps=1e-5),
            cosine=self.cosine, sine=self.sine, attention_scale=self.dim**-0.5, window=self.window,
            embedding_scale=1.5, logit_scale=0.5, residual_scale=0.75,
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
            return x * cosine + torch.cat([-x[..., self.dim // 2 :], x[..., : self.dim // 2]], -1) * sine

        h = 1.5 * self.embedding[token].to(dtype)
        for layer, cache in zip(self.layers, past, strict=True):
            position = len(cache)
            x = norm(layer, "n1", h)
            q = product(layer, "q", x, layer["q_t"]).view(self.heads, self.dim)
            k, v = (product(layer, name, x).view(self.kv_heads, self.dim) for name in "kv")
            if "qn" in layer:
                q, k = rms(q, layer["qn"]), rms(k, layer["kn"])
            q, k = rotate(q, position), rotate(k, position)
            cache.append(torch.stack([k, v]))
            seen = torch.stack(cache[-self.window :] if self.window else cache)  # [T, 2, kv_heads, dim]
            keys, values = (
                seen[:, i].repeat_interleave(self.heads // self.kv_heads, 1).transpose(0, 1) for i in range(2)
            )
            weights = (keys @ q[..., None] * self.dim**-0.5).softmax(1)
            mixed = (weights * values).sum(1).flatten()
            h = h + 0.75 * product(layer, "o", mixed, layer["o_t"])
            x = norm(layer, "n2", h)
            gate = F.silu(product(layer, "gate", x))
            gate = torch.where(reference.keep(gate, layer["g_t"]), gate, 0.0)
            h = h + 0.75 * product(layer, "down", gate * product(layer, "up", x))
        return 0.5 * F.linear(rms(h, self.norm), self.embedding.to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0, "q_norms": False, "biases": False, "kind": "rms"},
        {"window": 7, "q_norms": True, "biases": True, "kind": "rms"},
        {"window": 0, "q_norms": False, "biases": True, "kind": "layer"},
    ],
    ids=["llama", "window-qknorm-bias", "layernorm"],
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

"""The reference model in plain PyTorch, with the parameter names of transformers, and its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The shape of the model; about 13 million parameters."""

    vocab: int = 4096
    hidden: int = 384
    ffn: int = 1344
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 1024
    rope_theta: float = 10_000.0
    eps: float = 1e-5

    def config(self, activation: str) -> dict[str, object]:
        """``config.json`` of the model."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": activation,
            "hidden_size": self.hidden, "intermediate_size": self.ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocab, "max_position_embeddings": self.context, "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": True, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
            "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.02, "use_cache": True, "dtype": "bfloat16",
        }  # fmt: skip


class Norm(nn.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight.to(x.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions over the two halves of each head, as transformers lays them out."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention with fewer key/value heads than query heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        groups = self.shape.heads // self.shape.kv_heads
        q = self.q_proj(x).view(batch, length, self.shape.heads, -1).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.shape.kv_heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.shape.kv_heads, -1).transpose(1, 2)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """The gated feed-forward network; returns the gate's activation too."""

    def __init__(self, shape: Shape, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)
        self.act = F.relu if activation == "relu" else F.silu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.act(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x)), gate


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape, activation: str) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape, activation)
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)


class Body(nn.Module):
    """Everything under the name ``model`` in transformers."""

    def __init__(self, shape: Shape, activation: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, activation) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)


class Llama(nn.Module):
    """The language model, with the parameter names of ``LlamaForCausalLM``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, activation: str) -> None:
        super().__init__()
        self.shape, self.activation = shape, activation
        self.low_precision = False
        self.model = Body(shape, activation)
        inverse = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.context).float(), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers) if residual else 0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits; mean absolute gate activation of each layer; share of exact zeros among them."""
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.model.embed_tokens(ids)
        if self.low_precision:
            x = x.to(torch.bfloat16)
        magnitudes, zeros = [], []
        for layer in self.model.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), cos, sin)
            y, gate = layer.mlp(layer.post_attention_layernorm(x))
            x = x + y
            if self.activation == "relu":
                magnitudes.append(gate.float().mean())
                zeros.append((gate.detach() == 0).float().mean())
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        empty = logits.new_zeros(())
        return (logits, torch.stack(magnitudes) if magnitudes else empty, torch.stack(zeros) if zeros else empty)


class Objective(nn.Module):
    """The loss: cross entropy, and for relu the weighted L1 penalty."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Total loss, cross entropy, share of zeros by layer."""
        logits, magnitudes, zeros = self.model(ids)
        entropy = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100)
        total = entropy + (weights * magnitudes).sum() if self.model.activation == "relu" else entropy
        return total, entropy.detach(), zeros

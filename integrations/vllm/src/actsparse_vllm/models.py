"""Llama with ReLU in its gated block, which vLLM's own class refuses: exact ReLU sparsity and SVDP are for such models.

Chosen by its name, for example with ``--hf-overrides '{"architectures": ["ReluLlamaForCausalLM"], ...}'``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

ARCHITECTURE = "ReluLlamaForCausalLM"


def register() -> None:
    """Make vLLM know the architecture."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:{ARCHITECTURE}")


class ReluAndMul(nn.Module):
    """relu(gate) * up of [..., 2 N]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.relu(gate) * up


class ReluLlamaDecoderLayer(LlamaDecoderLayer):
    """Its block's activation replaced, once it has been built as if it were SiLU."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None, **options: Any) -> None:
        config = config or vllm_config.model_config.hf_config
        if config.hidden_act != "relu":
            raise ValueError(f"hidden_act is {config.hidden_act!r}, {ARCHITECTURE} expects 'relu'")
        as_silu = copy.copy(config)
        as_silu.hidden_act = "silu"
        super().__init__(vllm_config, prefix, as_silu, **options)
        self.mlp.act_fn = ReluAndMul()


class ReluLlamaForCausalLM(LlamaForCausalLM):
    """As LlamaForCausalLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=ReluLlamaDecoderLayer)

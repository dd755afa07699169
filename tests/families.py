"""A tiny random model of every family, with what is peculiar to it switched on."""

from __future__ import annotations

from typing import Any

from tests.test_decode import random_model

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3],
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.3,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_MIXED = ["full_attention", "sliding_attention", "sliding_attention"]
_IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}

# The family of each case and what its configuration says beyond the shape.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "prosparse": ("llama", {"hidden_act": "relu"}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 6, "layer_types": _MIXED}),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": _YARN}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24, "layer_types": _MIXED},
    ),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi4": ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": _LONGROPE}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {"embedding_multiplier": 6.0, "logits_scaling": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1},
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-12b": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "opt": ("opt", {"ffn_dim": 112, "word_embed_proj_dim": 64, "num_key_value_heads": 4, "dropout": 0.0}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}),
}
EXPERTS = ("mixtral", "qwen3-moe")
DENSE = [name for name in CASES if name not in EXPERTS]


def family_model(case: str, **changes: Any) -> Any:
    """The tiny model of a case."""
    family, options = CASES[case]
    return random_model(family, **{**_IDS, **options, **changes})

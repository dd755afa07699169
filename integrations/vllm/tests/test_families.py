"""Every family that vLLM merges the usual way, tiny and random: logits under a plan are those of ``actsparse.sparsify``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Wanted, arguments, same
from transformers import AutoConfig, AutoModelForCausalLM

import actsparse

SHAPE = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
HEADS = {"head_dim": 32}
CASES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": HEADS,
    "phi3": {},
    "granite": {
        "embedding_multiplier": 6.0, "logits_scaling": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1,
    },
    "gemma": {**HEADS, "tie_word_embeddings": True},
    "olmo2": {},
    "opt": {
        "num_key_value_heads": 4, "ffn_dim": 224, "word_embed_proj_dim": 128, "dropout": 0.0, "activation_function": "gelu",
    },
}  # fmt: skip


def build(family: str, folder: Path) -> Any:
    """A random model of the family, every parameter away from its trivial value, saved to ``folder``."""
    config = AutoConfig.for_model(family, **{**SHAPE, **CASES[family]})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("method", ["chess", "teal"])
def test_families(
    method: str, tokenizer: Any, calibration: str, run_engines: Callable[..., Any], tmp_path: Path
) -> None:
    requests, known = [], []
    for family in CASES:
        model = build(family, tmp_path / family)
        plan = actsparse.calibrate(model, tokenizer, calibration, method=method, sparsity=0.5, tokens=512)
        plan.save(tmp_path / family / "plan")
        known.append(Wanted(actsparse.sparsify(model, plan)))
        engine = arguments(tmp_path / family, method, tmp_path / family / "plan", enforce_eager=True)
        requests.append((engine, known[-1].prompts))
    for family, results, wanted in zip(CASES, run_engines(requests), known, strict=True):
        same(results, wanted, family)

"""Models for the tests: tiny random ones of every family, and the project's reference models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

# Hooks, which pytest finds by their names.
from tests.deprecations import pytest_configure  # noqa: F401
from tests.touching import pytest_collection_modifyitems  # noqa: F401

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = REPOSITORY / "reference"

# Odd sizes on purpose: nothing may depend on a multiple of a vector's width.
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 132,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random-weight model of ``family`` with well-spread activations."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**SHAPE, "initializer_range": 0.15, **changes})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """:func:`tiny_model`."""
    return tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The reference models' tokenizer (4096 tokens)."""
    return AutoTokenizer.from_pretrained(REFERENCE / "swiglu")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Some thousand tokens of text."""
    path = tmp_path / "text.txt"
    words = (REPOSITORY / "LICENSE").read_text(encoding="utf-8").split()[:200]
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(words), (3000,), generator=generator).tolist()
    path.write_text(" ".join(words[pick] for pick in picks), encoding="utf-8")
    return path

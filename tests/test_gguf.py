"""Packing a GGUF file, as llama.cpp's converter writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actsparse.cli import main
from actsparse.models import opening
from actsparse.models.sites import ModelError
from actsparse.runtime.swap import open_model
from tests.conftest import REFERENCE

gguf = pytest.importorskip("gguf")

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(path: Path, model: Any, architecture: str = "llama") -> None:
    """The model with the reference tokenizer."""
    config = model.config
    tokenizer = json.loads((REFERENCE / "swiglu" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in sorted(tokenizer["vocab"].items(), key=lambda item: item[1])])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {
        f"model.layers.{i}.{a}": f"blk.{i}.{b}" for i in range(config.num_hidden_layers) for a, b in _NAMES.items()
    }
    for name, tensor in model.state_dict().items():
        name = name.removesuffix(".weight")
        tensor = tensor.float()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if name.endswith(projection):  # pairs of a rotation lie together in llama.cpp, half a head apart here
                tensor = tensor.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names[name]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Any:
    wide = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_attention_heads": 4}
    return tiny("llama", torch.bfloat16, tie_word_embeddings=False, **wide)


def test_a_gguf_file_is_packed_like_its_model(
    model: Any, tokenizer: Any, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "model.gguf", model)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    model = opening.open_model(str(tmp_path / "dense"))  # its rotary frequencies are no longer rounded
    opened, words = opening.open_gguf(str(tmp_path / "model.gguf"))
    tokens = torch.tensor([tokenizer("The function returns a value").input_ids])
    assert words("The function returns a value").input_ids == tokens[0].tolist()
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, model(tokens).logits)
    options = ["--text", str(text_file), "--tokens", "512", "--bits-read", "3.5"]
    assert main(["pack", str(tmp_path / "model.gguf"), "-o", str(tmp_path / "packed"), *options]) == 0
    assert main(["pack", str(tmp_path / "dense"), "-o", str(tmp_path / "same"), *options]) == 0
    packed, same = (open_model(str(tmp_path / name)) for name in ("packed", "same"))
    with torch.no_grad():
        assert torch.equal(packed(tokens).logits, same(tokens).logits)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "packed"), "--prompt", "The function", "--max-new-tokens", "4"]) == 0


def test_what_cannot_be_opened_is_one_line(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=r"absent\.gguf does not exist"):
        opening.open_gguf(str(tmp_path / "absent.gguf"))
    (tmp_path / "junk.gguf").write_bytes(b"GGUF but not really" * 10)
    write(tmp_path / "other.gguf", model, "mamba")
    write(tmp_path / "whole.gguf", model)
    (tmp_path / "short.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:-4000])
    for name in ("junk", "other", "short"):
        assert main(["pack", str(tmp_path / f"{name}.gguf"), "-o", str(tmp_path / "packed")]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1
        named = (
            "model family 'mamba' is not supported: "
            if name == "other"
            else f"{tmp_path}/{name}.gguf cannot be loaded: "
        )
        assert lines[0].startswith(f"actsparse: {named}")
        assert not (tmp_path / "packed").exists()

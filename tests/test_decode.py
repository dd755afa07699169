"""The native decode step against the Hugging Face model's own forward."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from actsparse.models.caches import cache_argument
from actsparse.models.sites import ModelError, describe
from actsparse.plan import ModelIdentity, Plan
from actsparse.runtime.decode import Decoder
from actsparse.runtime.swap import restore, sparsify

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "llama-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1}),
    "llama-yarn-relu": ("llama", {"rope_parameters": YARN_ROPE, "hidden_act": "relu"}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 32, "attention_bias": True}),
}
VOCABULARY = 97


def random_model(family: str, seed: int = 0, **options):
    """A small random model; every parameter, biases and norms too, differs from its trivial value."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**shape | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def random_plan(model, *, sparsity: float = 0.5, predictor: bool = False) -> Plan:
    """Thresholds of about the right size at every site, so that each rule skips something and keeps something."""
    identity = ModelIdentity(**describe(model))
    generator = torch.Generator().manual_seed(1)
    rules = {}
    for layer in range(identity.layers):
        for projection in ("q", "k", "v", "o"):
            rules[f"layers.{layer}.{projection}.threshold"] = torch.full((1,), 0.3 if projection != "o" else 0.1)
        rules[f"layers.{layer}.ffn.threshold"] = 0.2 * torch.rand(identity.neurons, generator=generator)
        rules[f"layers.{layer}.down.threshold"] = torch.full((1,), 0.02)
        if predictor:
            rank = 8
            rules[f"layers.{layer}.ffn.predictor_a"] = torch.randn(rank, identity.hidden, generator=generator)
            rules[f"layers.{layer}.ffn.predictor_b"] = torch.randn(identity.neurons, rank, generator=generator)
            rules[f"layers.{layer}.ffn.predictor_bias"] = torch.randn(identity.neurons, generator=generator)
    return Plan("chess", sparsity, identity, rules)


def module_logits(model, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """What the model itself gives after the prompt and after each further token alone, float32 [T - prompt + 1, V]."""
    cache, rows = DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in [tokens[:prompt], *(tokens[at : at + 1] for at in range(prompt, len(tokens)))]:
            logits = model(input_ids=part[None], **cache_argument(model.forward, cache), use_cache=True).logits
            rows.append(logits[0, -1].float())
    return torch.stack(rows)


def native_logits(model, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    decoder = Decoder(model, len(tokens))
    rows = [decoder.prefill(tokens[:prompt])]
    rows += [decoder.step(int(token)) for token in tokens[prompt:]]
    assert decoder.position == len(tokens)
    return torch.stack(rows)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm(dim=-1).div(want.norm(dim=-1)).max())


def tokens_of(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


# A few hundred roundings along the deepest path through three layers, in units of the type's epsilon, relative to the
# norm: float32 adds them up like sqrt(n), and so does bfloat16, whose Hugging Face side rounds between operations.
FLOAT32_TOLERANCE = 2e-5
BFLOAT16_TOLERANCE = 3e-2


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", CONFIGS)
def test_step_gives_the_models_own_logits(name: str, sparse: bool) -> None:
    family, options = CONFIGS[name]
    model = random_model(family, **options)
    if sparse:
        sparsify(model, random_plan(model))
    tokens = tokens_of(24)
    assert error(native_logits(model, tokens, 9), module_logits(model, tokens, 9)) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen3"])
def test_half_precision_agrees_to_rounding(name: str, dtype: torch.dtype) -> None:
    family, options = CONFIGS[name]
    model = random_model(family, **options).to(dtype)
    tokens = tokens_of(20)
    assert error(native_logits(model, tokens, 6), module_logits(model, tokens, 6)) < BFLOAT16_TOLERANCE


def test_predictor_and_relu() -> None:
    model = random_model("llama", hidden_act="relu")
    sparsify(model, random_plan(model, predictor=True))
    tokens = tokens_of(16)
    assert error(native_logits(model, tokens, 5), module_logits(model, tokens, 5)) < FLOAT32_TOLERANCE


def test_sparse_steps_read_less_and_decode_scope_prefills_densely() -> None:
    model = random_model("llama")
    tokens = tokens_of(12)
    dense_prefill = Decoder(model, 12).prefill(tokens)
    dense = Decoder(model, 12)
    dense.prefill(tokens[:8])
    for token in tokens[8:]:
        dense.step(int(token))
    dense_bytes = dense.stats()["bytes"]
    sparsify(model, random_plan(model), scope="decode")
    decoder = Decoder(model, 16)
    assert torch.allclose(decoder.prefill(tokens), dense_prefill, atol=1e-5)
    for token in tokens[8:]:
        decoder.step(int(token))
    assert 0 < decoder.stats()["bytes"] < 0.9 * dense_bytes


def test_two_decoders_at_once_count_their_own_reads() -> None:
    models = [random_model("llama"), random_model("llama")]
    sparsify(models[1], random_plan(models[1]))

    def decode(model: Any, barrier: threading.Barrier | None) -> int:
        decoder = Decoder(model, 80)
        decoder.prefill(tokens_of(8))
        if barrier:
            barrier.wait()
        for step in range(64):
            decoder.step(step % 8)
        return decoder.stats()["bytes"]

    alone = [decode(model, None) for model in models]
    assert alone[1] < alone[0]
    barrier = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda model: decode(model, barrier), models)) == alone


def test_a_chat_can_go_on() -> None:
    model = random_model("mistral", sliding_window=6)
    tokens = tokens_of(30)
    decoder = Decoder(model, 30)
    decoder.prefill(tokens[:10])
    for token in tokens[10:14]:
        decoder.step(int(token))
    got = decoder.prefill(tokens[14:20])
    assert error(got[None], module_logits(model, tokens[:20], 20)) < FLOAT32_TOLERANCE
    # Rewind, take another way, and come back.
    decoder.rewind(12)
    decoder.step(1)
    decoder.rewind(12)
    got = decoder.prefill(tokens[12:20])
    assert error(got[None], module_logits(model, tokens[:20], 20)) < FLOAT32_TOLERANCE
    decoder.reset()
    assert error(decoder.prefill(tokens[:4])[None], module_logits(model, tokens[:4], 4)) < FLOAT32_TOLERANCE


def test_no_weight_is_copied() -> None:
    model = random_model("qwen2")
    native = Decoder(model, 4).native
    layer = model.model.layers[1]
    assert native.layer[1].q.data == layer.self_attn.q_proj.weight.data_ptr()
    assert native.layer[1].ffn.down.data == layer.mlp.down_proj.weight.data_ptr()
    assert native.lm_head.data == model.lm_head.weight.data_ptr()
    assert native.embedding.data == model.model.embed_tokens.weight.data_ptr()


def test_a_changed_model_is_noticed() -> None:
    model = random_model("llama")
    decoder = Decoder(model, 8)
    decoder.prefill(tokens_of(3))
    sparsify(model, random_plan(model))
    with pytest.raises(ModelError, match="sparsified or restored after"):
        decoder.step(1)
    restore(model)
    decoder.step(1)


def test_wrong_use_is_refused() -> None:
    decoder = Decoder(random_model("llama"), 4)
    with pytest.raises(ModelError, match="cache_length is 0"):
        Decoder(decoder.model, 0)
    with pytest.raises(ModelError, match="5 tokens do not fit the cache of 4"):
        decoder.prefill(tokens_of(5))
    with pytest.raises(ModelError, match=r"shape \[0\]"):
        decoder.prefill(tokens_of(0))
    with pytest.raises(ModelError, match="token is 97, expected 0 to 96"):
        decoder.step(VOCABULARY)
    with pytest.raises(ModelError, match="position is 3, expected 0 to 0"):
        decoder.rewind(3)
    decoder.prefill(tokens_of(4))
    with pytest.raises(ModelError, match="5 tokens do not fit"):
        decoder.step(1)


def test_supports_names_the_obstacle() -> None:
    assert Decoder.supports(random_model("llama")) is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "rope type dynamic" in str(Decoder.supports(random_model("llama", rope_parameters=dynamic)))
    assert "mixtral has no native decode step" in str(Decoder.supports(random_model("mixtral")))
    norms_after = random_model("opt", ffn_dim=112, num_key_value_heads=4, do_layer_norm_before=False)
    assert "norms stand after the sums" in str(Decoder.supports(norms_after))
    assert "float64" in str(Decoder.supports(random_model("llama").double()))
    assert "meta" in str(Decoder.supports(random_model("llama").to("meta")))
    with pytest.raises(ModelError, match="no native decode step for this model"):
        Decoder(random_model("llama").double(), 4)

"""A small model, plans of it, and what the dense model computes, to compare with."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actsparse import calibrate
from actsparse.models.caches import cache_argument
from actsparse.runtime.swap import state_of

N, LAYERS = 96, 3


class Words:
    """A tokenizer: one token per character."""

    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 64 for letter in text]}


def make(seed=0, activation="silu", **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=N, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, hidden_act=activation,
        tie_word_embeddings=False, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def stability(model, sparsity=0.5, **options):
    return calibrate(model, None, None, method="coreinfer", mode="stability", sparsity=sparsity, **options)


def texts(count=24, length=48, seed=0):
    """Documents of two kinds that use different characters."""
    generator = np.random.default_rng(seed)
    return ["".join(chr(64 + 32 * (i % 2) + x) for x in generator.integers(0, 32, length)) for i in range(count)]


def values_of(model, tokens):
    """The inputs of every down projection of the dense model, [layers, B, T, N]."""
    seen = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        for layer in model.model.layers
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def over(model, tokens, cache, **options):
    """The model's output for tokens that follow what the cache holds."""
    return model(tokens, **cache_argument(model.forward, cache), **options)


def session_of(model, cache):
    return state_of(model).prompts.session(cache)


def masked_logits(model, tokens, prompt, sets):
    """The dense model's logits with the FFNs of positions >= prompt restricted to ``sets`` (per layer)."""
    hooks = []
    for layer, neurons in sets.items():

        def mask(_, args, neurons=neurons):
            keep = torch.zeros(N).index_fill_(0, neurons.long(), 1.0)
            value = args[0].clone()
            value[:, prompt:] *= keep
            return (value,)

        hooks.append(model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(mask))
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return logits


def generated(model, tokens, **options):
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False,
                          pad_token_id=0, **options).tolist()  # fmt: skip

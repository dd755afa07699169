"""GRIFFIN: its scores and sets against a plain computation, and decoding on them against a masked dense model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actsparse import calibrate, restore, sparsify
from actsparse.methods.griffin import GriffinRule
from actsparse.models.caches import cache_of
from actsparse.plan import PlanError
from actsparse.runtime.swap import state_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def values_of(model, tokens):
    """The inputs of every down projection, [layers, T, N], by hooks on the dense model."""
    seen = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
        for layer in model.model.layers
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def test_sets_are_the_largest_norms_of_normalised_rows(model):
    tokens = torch.randint(0, 64, (1, 20))
    values = values_of(model, tokens)
    sparsify(model, calibrate(model, None, None, method="griffin", sparsity=0.5, layers=(0, 2)))
    session = state_of(model).prompts.session(cache_of(model(tokens, use_cache=True)))
    for layer in range(3):
        score = (values[layer] / values[layer].norm(dim=1, keepdim=True)).norm(dim=0)
        assert session.neurons(layer).tolist() == sorted(score.topk(24).indices.tolist())


def test_scores_add_up_over_texts():
    rule = GriffinRule({"layers": [0, 0], "counts": [2]}, {})
    values = torch.randn(9, 5)
    torch.testing.assert_close(rule.score(values[:4]) + rule.score(values[4:]), rule.score(values))
    # A token of no activity counts for nothing, and does not divide by zero.
    assert torch.equal(rule.score(torch.zeros(3, 5)), torch.zeros(1, 5))


def test_needs_no_text_and_runs_prompts_dense(model):
    tokens = torch.randint(0, 64, (1, 20))
    dense = model(tokens).logits
    plan = calibrate(model, None, None, method="griffin", sparsity=0.5)
    assert plan.scope == "decode"
    assert plan.prompt["layers"] == [1, 2]
    sparsify(model, plan)
    assert torch.equal(model(tokens).logits, dense)
    with pytest.raises(PlanError, match="scope is 'all', expected 'decode'"):
        plan.with_scope("all")
    restore(model)
    assert torch.equal(model(tokens).logits, dense)
    assert not model.model._forward_pre_hooks

"""Sparsify and restore inside a user's own model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

import actsparse
from actsparse import kernels
from actsparse.models.sites import FAMILIES, ModelError
from actsparse.models.text import load_windows
from actsparse.plan import Plan, PlanError
from actsparse.runtime.layers import Meter, SparseFFN, SparseLinear, is_columns
from actsparse.runtime.swap import attach_meter, path_of, state_of

TEXT_OPTIONS = {"tokens": 1024, "window": 64}
# Families that transformers itself can build, whose block has a gate and whose projections are layers of their own.
GATED = [name for name, family in FAMILIES.items() if name in CONFIG_MAPPING and family.gated and not family.fused]


def plan_for(model: Any, tokenizer: Any, text_file: Path, **options: Any) -> Plan:
    return actsparse.calibrate(model, tokenizer, str(text_file), **{**TEXT_OPTIONS, **options})


def by_hand(model: Any, plan: Plan) -> Any:
    """A copy of ``model`` whose layers mask activations by the plan's thresholds, written without the package."""
    masked = copy.deepcopy(model)
    for index, layer in enumerate(masked.model.layers):
        rules = plan.layer_rules(index)

        def mask_input(module: Any, args: Any, threshold: torch.Tensor) -> tuple[torch.Tensor]:
            return (args[0] * (args[0].abs() >= threshold),)

        for name in ("q", "o"):
            if f"{name}.threshold" in rules:
                linear = getattr(layer.self_attn, f"{name}_proj")
                linear.register_forward_pre_hook(
                    lambda module, args, t=rules[f"{name}.threshold"]: mask_input(module, args, t)
                )
        layer.mlp.act_fn.register_forward_hook(
            lambda module, args, out, t=rules["ffn.threshold"]: out * (out.abs() >= t)
        )
    return masked


@pytest.mark.parametrize("family", GATED)
@pytest.mark.parametrize("attention", [True, False])
def test_logits_are_the_methods_exact_arithmetic(
    tiny: Any, tokenizer: Any, text_file: Path, family: str, attention: bool
) -> None:
    model = tiny(family)
    plan = plan_for(model, tokenizer, text_file, sparsity=0.5, attention=attention)
    expected_model = by_hand(model, plan)
    actsparse.sparsify(model, plan)
    for shape in ((1, 1), (1, 8), (2, 4), (3, 17)):  # native path up to 8 rows, masked dense beyond
        tokens = torch.randint(1, 4096, shape)
        with torch.inference_mode():
            torch.testing.assert_close(model(tokens).logits, expected_model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restore_is_bit_exact_and_weights_are_never_doubled(
    tiny: Any, tokenizer: Any, text_file: Path, dtype: torch.dtype
) -> None:
    model = tiny(dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    bytes_before = sum(p.numel() * p.element_size() for p in model.parameters())
    actsparse.sparsify(model, plan_for(model, tokenizer, text_file))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == bytes_before
    assert isinstance(model.model.layers[0].mlp, SparseFFN)
    assert is_columns(model.model.layers[0].mlp.down_proj.weight)
    actsparse.restore(model)
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: tensor.stride() for name, tensor in after.items()} == strides
    assert state_of(model) is None
    actsparse.restore(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsity_zero_reproduces_the_dense_logits(
    tiny: Any, tokenizer: Any, text_file: Path, dtype: torch.dtype
) -> None:
    model = tiny(dtype=dtype)
    plan = plan_for(model, tokenizer, text_file, sparsity=0)
    tokens = torch.randint(1, 4096, (1, 40))
    with torch.inference_mode():
        dense = model(tokens).logits.float()
        actsparse.sparsify(model, plan)
        sparse = model(tokens).logits.float()
    scale = float(dense.abs().max())
    assert float((dense - sparse).abs().max()) <= scale * (1e-5 if dtype == torch.float32 else 2e-2)


def test_achieved_sparsity_is_near_the_target(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny()
    plan = plan_for(model, tokenizer, text_file, sparsity=0.6, tokens=4096)
    windows = load_windows(str(text_file), tokenizer, tokens=5888, window=64).tokens[64:]
    meter = Meter()
    actsparse.sparsify(model, plan)
    attach_meter(model, meter)
    with torch.inference_mode():
        model(windows)
    achieved = meter.sparsity()
    assert {site for site in achieved if site.endswith((".ffn", ".q", ".o"))} == plan.achieved.keys()
    # The first layer sees unchanged activations; later ones see those that sparsity has moved.
    assert all(abs(achieved[f"layers.0.{site}"] - 0.6) < 0.03 for site in ("ffn", "q"))
    assert all(abs(achieved[site] - 0.6) < 0.1 for site in plan.achieved)


def test_scopes_choose_tokens(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny()
    plan = plan_for(model, tokenizer, text_file, sparsity=0.7)
    tokens = torch.randint(1, 4096, (1, 20))
    with torch.inference_mode():
        dense = model(tokens).logits
        everything = actsparse.sparsify(model, plan, scope="all")(tokens).logits
        decode = actsparse.sparsify(model, plan, scope="decode")(tokens).logits
        half = actsparse.sparsify(model, plan, scope="last_half")(tokens).logits
        step = model(tokens[:, :1]).logits
    assert not torch.allclose(everything, dense)
    torch.testing.assert_close(decode, dense)
    torch.testing.assert_close(half[:, :10], dense[:, :10])
    assert not torch.allclose(half[:, 10:], dense[:, 10:])
    torch.testing.assert_close(step, everything[:, :1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"do_sample": True, "top_k": 5}])
def test_generate_keeps_working(tiny: Any, tokenizer: Any, text_file: Path, options: dict[str, Any]) -> None:
    model = tiny()
    plan = plan_for(model, tokenizer, text_file)
    tokens = torch.randint(1, 4096, (1, 9))
    common = {"max_new_tokens": 12, "eos_token_id": None, **options}

    def generate(target: Any) -> torch.Tensor:
        torch.manual_seed(11)
        return target.generate(tokens, attention_mask=torch.ones_like(tokens), **common)

    expected = generate(by_hand(model, plan))
    assert torch.equal(generate(actsparse.sparsify(model, plan)), expected)


def test_batch_with_left_padding_equals_single_prompts(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny()
    actsparse.sparsify(model, plan_for(model, tokenizer, text_file))
    long, short = torch.randint(1, 4096, (1, 9)), torch.randint(1, 4096, (1, 5))
    padded = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    together = model.generate(padded, attention_mask=mask, **options)[:, 9:]
    for row, prompt in zip(together, (long, short), strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        assert torch.equal(row, alone)


def test_compiles_without_graph_breaks(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny()
    actsparse.sparsify(model, plan_for(model, tokenizer, text_file))
    tokens = torch.randint(1, 4096, (1, 6))
    with torch.inference_mode():
        eager = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, use_cache=False).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_training_mode_gives_gradients_of_the_masked_arithmetic(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny()
    plan = plan_for(model, tokenizer, text_file)
    expected_model = by_hand(model, plan)
    actsparse.sparsify(model, plan).train()
    expected_model.train()
    tokens = torch.randint(1, 4096, (1, 7))
    for each in (model, expected_model):
        each(tokens, labels=tokens).loss.backward()
    name = "model.layers.0.mlp.up_proj.weight"
    mine, theirs = (dict(each.named_parameters())[name].grad for each in (model, expected_model))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_thresholds_stay_float32_when_the_model_changes_type(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny()
    plan = plan_for(model, tokenizer, text_file)
    actsparse.sparsify(model, plan).to(torch.bfloat16)
    layer = model.model.layers[1]
    assert torch.equal(layer.mlp.gate_threshold, plan.rules["layers.1.ffn.threshold"])
    assert isinstance(layer.self_attn.q_proj, SparseLinear)
    assert layer.self_attn.q_proj.threshold.dtype == torch.float32
    with torch.inference_mode():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_the_path_in_use_is_named(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny()
    assert path_of(model) == "dense: not sparsified"
    actsparse.sparsify(model, plan_for(model, tokenizer, text_file))
    with torch.inference_mode():
        assert path_of(model).startswith(f"cpu-{kernels.isa()}")


def test_a_plan_for_another_model_is_refused_and_nothing_changes(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    plan = plan_for(tiny(), tokenizer, text_file)
    other = tiny(seed=1)
    with pytest.raises(PlanError, match="plan is for another model: its weights is .*, the model's weights is"):
        actsparse.sparsify(other, plan)
    with pytest.raises(PlanError, match="its layers is 2, the model's layers is 3"):
        actsparse.sparsify(tiny(num_hidden_layers=3), plan)
    assert state_of(other) is None
    own = actsparse.sparsify(tiny(), plan)
    with pytest.raises(PlanError):
        actsparse.sparsify(own, plan_for(other, tokenizer, text_file))
    assert state_of(own) is not None, "a refused plan leaves the model as it was"


def test_an_unsupported_family_is_refused_with_the_supported_ones(tokenizer: Any, text_file: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=4096, n_positions=64))
    with pytest.raises(
        ModelError, match="family 'gpt2' is not supported: its decoder has no list of layers; expected .*llama"
    ):
        plan_for(model, tokenizer, text_file)


def test_calibrating_a_sparsified_model_is_refused(tiny: Any, tokenizer: Any, text_file: Path) -> None:
    model = tiny()
    plan = plan_for(model, tokenizer, text_file)
    actsparse.sparsify(model, plan)
    with pytest.raises(ModelError, match="already sparsified"):
        plan_for(model, tokenizer, text_file)

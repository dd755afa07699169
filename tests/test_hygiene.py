"""A sparsified model does what users do to models: train it, copy it, send it, move it, adapt it, export it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import actsparse
from actsparse import kernels
from actsparse.calibration.pack import Settings, pack
from actsparse.models.sites import ModelError
from actsparse.plan import Plan
from actsparse.runtime import generate as engine
from actsparse.runtime.layers import SparseFFN, SparseLinear, is_columns
from actsparse.runtime.swap import open_model, restore, state_of
from tests.test_pretrained import calibrated, logits

TOKENS = torch.arange(1, 21).view(2, 10) * 7 % 4096
STEP = TOKENS[:, :1]


@pytest.fixture
def dense(tiny: Callable[..., Any], tmp_path: Path) -> Any:
    """A model as transformers opens it."""
    tiny("llama").save_pretrained(tmp_path / "dense")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


@pytest.fixture
def plan(dense: Any, tokenizer: Any, text_file: Path) -> Plan:
    """With thresholds in attention and in the feed-forward blocks."""
    return calibrated(dense, tokenizer, text_file)


@pytest.fixture(params=["sparse", "packed", "rounded"])
def model(request: Any, tiny: Callable[..., Any], tokenizer: Any, text_file: Path, tmp_path: Path) -> Any:
    """A sparsified model of each kind."""
    tiny("llama", hidden_size=128, head_dim=32, num_attention_heads=4).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    if request.param == "packed":
        settings = Settings(bits_read=3.2, text=str(text_file), tokens=512)
        pack(str(tmp_path / "dense"), tmp_path / "packed", settings)
        return open_model(str(tmp_path / "packed"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    options = {"method": "graded", "sparsity": 1 - 3.5 / 16} if request.param == "rounded" else {"method": "chess"}
    return actsparse.sparsify(opened, calibrated(opened, tokenizer, text_file, **options), scope="all")


def test_copies_are_equal_and_independent(model: Any, tmp_path: Path) -> None:
    expected = logits(model, TOKENS), logits(model, STEP)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, TOKENS), expected[0])
        assert torch.equal(logits(other, STEP), expected[1])
        # What it is saved as is its own, too.
        with torch.no_grad():
            other.get_input_embeddings().weight.zero_()
        other.save_pretrained(tmp_path / "copy")
        assert not AutoModelForCausalLM.from_pretrained(tmp_path / "copy").get_input_embeddings().weight.any()
        restore(other)
        assert state_of(other) is None
        assert state_of(model) is not None
        assert torch.equal(logits(model, TOKENS), expected[0])


def test_a_copy_keeps_the_layout_that_skipping_needs(dense: Any, plan: Plan) -> None:
    actsparse.sparsify(dense, plan)
    for other in (copy.deepcopy(dense), pickle.loads(pickle.dumps(dense)), dense.to(torch.float64).to(torch.float32)):
        ffn, query = other.model.layers[0].mlp, other.model.layers[0].self_attn.q_proj
        assert isinstance(ffn, SparseFFN)
        assert isinstance(query, SparseLinear)
        assert is_columns(ffn.projection("down").weight)
        assert is_columns(query.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_another_type_and_back(model: Any, dtype: torch.dtype) -> None:
    before = logits(model, TOKENS)
    model.to(dtype)
    lower = logits(model, TOKENS)
    assert lower.dtype == dtype
    assert float((lower.float() - before).norm() / before.norm()) < 0.3  # thresholds let other channels pass
    assert logits(model.to("cpu").to(torch.float32), TOKENS).isfinite().all()


def test_train_and_eval_change_nothing_without_dropout(model: Any) -> None:
    before = logits(model, TOKENS)
    model.train()
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(model, TOKENS), before)
    model.eval()
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model, TOKENS), before)


def test_gradient_checkpointing_gives_the_same_gradients(dense: Any, plan: Plan) -> None:
    actsparse.sparsify(dense, plan).train()
    dense(TOKENS, labels=TOKENS).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in dense.named_parameters()}
    assert expected["model.layers.0.mlp.down_proj.weight"].any()
    dense.zero_grad()
    # Its name since transformers 5.24, before and after.
    getattr(dense, "activation_checkpointing_enable", dense.gradient_checkpointing_enable)()
    dense(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for name, parameter in dense.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


def test_device_map_auto(dense: Any, plan: Plan, tmp_path: Path) -> None:
    actsparse.sparsify(dense, plan).save_pretrained(tmp_path / "saved")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="auto")
    assert torch.equal(logits(opened, TOKENS.to(opened.device)).cpu(), logits(dense, TOKENS))
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="spread over cpu, disk, expected one device"):
            AutoModelForCausalLM.from_pretrained(
                tmp_path / "saved",
                device_map={"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                            "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
                offload_folder=tmp_path / "offload",
            )  # fmt: skip


def test_torch_export(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config.use_cache = False
    del model.model.layers[1]  # a layer takes seconds to trace
    for tokens in (TOKENS, STEP):
        with torch.no_grad():
            program = torch.export.export(model, (), {"input_ids": tokens, "use_cache": False}, strict=False)
            exported = program.module()(input_ids=tokens, use_cache=False).logits
        with monkeypatch.context() as patched:
            # Packed matrices are exported as their definition: in floating point, not in the kernels' whole numbers.
            patched.setattr(kernels, "graded_linear", kernels.planes.linear)
            expected = logits(model, tokens)
        assert float((exported - expected).norm() / expected.norm()) < 1e-4
        if isinstance(model.model.layers[0].self_attn.q_proj, SparseLinear):
            assert torch.equal(exported, expected)
            assert any("actsparse" in str(node.target) for node in program.graph.nodes)


def test_a_prompt_chosen_plan_refuses_export(dense: Any, tokenizer: Any, text_file: Path) -> None:
    actsparse.sparsify(dense, calibrated(dense, tokenizer, text_file, method="griffin"))
    with pytest.raises(ModelError, match="chosen per prompt cannot be exported"), torch.no_grad():
        torch.export.export(dense, (), {"input_ids": TOKENS, "use_cache": False}, strict=False)


def adapted(model: Any) -> Any:
    """``model`` with LoRA on every attention projection, not at zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], r=4, init_lora_weights=False)
    )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
def test_adapters_on_attention(dense: Any, tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plan = calibrated(dense, tokenizer, text_file, method="cats")
    sparse = logits(actsparse.sparsify(dense, plan), TOKENS)
    model = adapted(dense)
    with_adapter = logits(model, TOKENS)
    assert not torch.equal(with_adapter, sparse)
    # Gradients reach the adapter and nothing else.
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    model.eval()
    # Decoding goes through the adapter, too: no native step that would read the weights behind it alone.
    answer = model.generate(input_ids=TOKENS[:1], max_new_tokens=6, do_sample=False)
    ours = engine.generate(dense, tokenizer, tokenizer.decode(TOKENS[0]), max_new_tokens=2)
    assert "q_proj" in ours.path or "layer 0" in ours.path
    # Saving saves the adapter, and it comes back onto the sparse model.
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    dense = model.unload()
    assert torch.equal(logits(dense, TOKENS), sparse)
    again = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")
    assert torch.equal(logits(again, TOKENS), with_adapter)
    assert torch.equal(again.generate(input_ids=TOKENS[:1], max_new_tokens=6, do_sample=False), answer)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
def test_adapters_on_sparsified_projections_are_refused_in_one_line(dense: Any, plan: Plan) -> None:
    pytest.importorskip("peft")
    actsparse.sparsify(dense, plan)
    with pytest.raises(ValueError, match="Target module SparseLinear.* is not supported"):
        adapted(dense)
    restore(dense)
    adapted(dense)
    with pytest.raises(ModelError, match="layer 0 q carries an adapter"):
        actsparse.sparsify(dense, plan)

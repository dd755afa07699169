"""Every family: equal to dense where nothing is skipped, the method's arithmetic where something is, natively and packed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import actsparse
from actsparse.calibration import pack
from actsparse.cli import main
from actsparse.measure.reading import weights_read
from actsparse.methods.base import MethodError
from actsparse.models import sites
from actsparse.models.families import FAMILIES, ModelError
from actsparse.models.fused import SplitLinear
from actsparse.plan import ModelIdentity, Plan
from actsparse.runtime.decode import Decoder
from actsparse.runtime.layers import Meter, SparseFFN
from actsparse.runtime.swap import attach_meter, open_model, restore, sparsify
from tests.families import CASES, DENSE, EXPERTS, family_model
from tests.svdp.cases import drelu_model
from tests.test_decode import (
    FLOAT32_TOLERANCE,
    error,
    module_logits,
    native_logits,
    random_model,
    tokens_of,
)

TEXT = {"tokens": 512, "window": 32}


def thresholds(model: Any, scale: float) -> Plan:
    """An input threshold at every projection and, where there is a block, one for its neurons; none skips at scale 0."""
    identity = ModelIdentity(**sites.describe(model))
    rules = {}
    for layer in sites.layers_of(model):
        names = [name for name, _ in layer.family.projections] + ["ffn"] * layer.family.has_ffn
        for name in names:
            # Of the block's input, which no norm precedes in some families.
            size = {"gate": 0.1, "up": 0.1, "down": 0.01, "ffn": 0.05, "o": 0.05}.get(name, 0.2)
            rules[f"layers.{layer.index}.{name}.threshold"] = torch.full((1,), size * scale)
    return Plan("teal", 0.0, identity, rules)


def logits_of(model: Any, shape: tuple[int, int]) -> torch.Tensor:
    tokens = torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(sum(shape)))
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits.float()


def masked(model: Any, plan: Plan) -> Any:
    """A copy of a dense model whose projections see thresholded inputs: the rules, written without the package's modules."""
    model = copy.deepcopy(model)
    for layer in sites.layers_of(model):
        rules = plan.layer_rules(layer.index)
        for name, _ in layer.family.projections:
            limit = rules[f"{name}.threshold"]
            layer.linear(name).register_forward_pre_hook(lambda module, args, t=limit: args[0] * (args[0].abs() >= t))
        if layer.family.has_ffn:
            layer.module.get_submodule(layer.family.activation_module).register_forward_hook(
                lambda module, args, out, t=rules["ffn.threshold"]: out * (out.abs() >= t)
            )
    return model


@pytest.mark.parametrize("case", CASES)
def test_nothing_skipped_is_dense_and_restored_to_the_bit(case: str) -> None:
    model = family_model(case)
    shapes = ((1, 1), (1, 8), (2, 17))  # natively up to 8 rows, masked dense products beyond
    want = [logits_of(model, shape) for shape in shapes]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    size = sum(parameter.nbytes for parameter in model.parameters())
    sparsify(model, thresholds(model, 0.0))
    for shape, logits in zip(shapes, want, strict=True):
        torch.testing.assert_close(logits_of(model, shape), logits, rtol=2e-5, atol=2e-5)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == size
    restore(model)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model, (2, 17)), want[2])


@pytest.mark.parametrize("case", CASES)
def test_what_is_skipped_is_the_methods_arithmetic(case: str) -> None:
    model = family_model(case)
    plan = thresholds(model, 1.0)
    expected = masked(model, plan)
    dense = logits_of(model, (1, 8))
    sparsify(model, plan)
    meter = Meter()
    for shape in ((1, 8), (2, 17)):
        torch.testing.assert_close(logits_of(model, shape), logits_of(expected, shape), rtol=1e-4, atol=1e-4)
    assert error(logits_of(model, (1, 8))[0], dense[0]) > 1e-3
    attach_meter(model, meter)
    logits_of(model, (1, 4))
    assert all(0 < value < 1 for value in meter.sparsity().values())
    assert weights_read(model, meter).fraction < weights_read(model).fraction <= 1


@pytest.mark.parametrize("case", DENSE)
def test_the_native_step_gives_the_modules_logits(case: str) -> None:
    model, tokens = family_model(case), tokens_of(24)
    assert error(native_logits(model, tokens, 9), module_logits(model, tokens, 9)) < FLOAT32_TOLERANCE
    sparsify(model, thresholds(model, 1.0))
    assert error(native_logits(model, tokens, 9), module_logits(model, tokens, 9)) < FLOAT32_TOLERANCE
    restore(model)
    half = model.to(torch.bfloat16)
    exact = module_logits(copy.deepcopy(half).float(), tokens, 9)[1:]
    # Neither rounds more than the other: the step keeps float32 between its products, the modules do not.
    allowed = 1.25 * error(module_logits(half, tokens, 9)[1:], exact) + torch.finfo(torch.bfloat16).eps
    assert error(native_logits(half, tokens, 9)[1:], exact) < allowed


def test_the_native_step_of_two_relus() -> None:
    model = drelu_model()
    tokens = torch.randint(4096, (24,), generator=torch.Generator().manual_seed(0))
    assert error(native_logits(model, tokens, 9), module_logits(model, tokens, 9)) < FLOAT32_TOLERANCE


# One of each kind of layer: the others' are made of the same parts.
@pytest.mark.parametrize("case", ["gemma2", "phi4", "olmo2", "opt"])
def test_packed_models_decode_natively(case: str, tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    model = family_model(case, vocab_size=4096, num_hidden_layers=3)
    source, target = tmp_path / "dense", tmp_path / "packed"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    pack.pack(str(source), target, pack.Settings(bits_stored=8, bits_read=7.0, text=str(text_file), tokens=512))
    found = open_model(str(target))
    tokens = tokens_of(20)
    got = native_logits(found, tokens, 9)
    # A prompt's last row is the head's only one in the step, and one of many in the modules: those read every plane.
    want = module_logits(found, tokens, 9)[1:]
    assert error(got[1:], want) < 1e-2
    again = AutoModelForCausalLM.from_pretrained(target)
    assert error(module_logits(again, tokens, 9)[1:], want) < 1e-3
    # The codes stand for the model's own weights.
    assert error(got[:1], module_logits(model, tokens[:9], 9)[:1]) < 0.25


@pytest.mark.parametrize("method", ["chess", "cats", "teal", "wina", "griffin", "coreinfer", "graded", "relu", "svdp"])
def test_fused_layers_are_calibrated_like_separate_ones(method: str, tokenizer: Any, text_file: Path) -> None:
    """Phi-3 and a Llama of the same weights get the same thresholds, and skip the same."""
    fused = family_model("phi3", sliding_window=None, vocab_size=4096, hidden_act="relu")
    plain = random_model("llama", vocab_size=4096, hidden_act="relu", rms_norm_eps=fused.config.rms_norm_eps)
    state = fused.state_dict()
    for index in range(3):
        layer = f"model.layers.{index}"
        q, k, v = state.pop(f"{layer}.self_attn.qkv_proj.weight").split([64, 32, 32])
        gate, up = state.pop(f"{layer}.mlp.gate_up_proj.weight").chunk(2)
        state |= {f"{layer}.self_attn.{n}_proj.weight": w for n, w in (("q", q), ("k", k), ("v", v))}
        state |= {f"{layer}.mlp.{n}_proj.weight": w for n, w in (("gate", gate), ("up", up))}
    plain.load_state_dict(state)
    # CoreInfer takes windows from the beginnings of documents, of which this text is one.
    settings: dict[str, Any] = {"svdp": {"rank": 8}, "coreinfer": {"tokens": 32, "mode": "stability"}}.get(method, {})
    plans = [
        actsparse.calibrate(m, tokenizer, str(text_file), method=method, **{**TEXT, **settings}) for m in (fused, plain)
    ]
    assert not any(isinstance(module, SplitLinear) for module in fused.modules())
    assert plans[0].rules.keys() == plans[1].rules.keys()
    for name, rule in plans[0].rules.items():
        torch.testing.assert_close(rule, plans[1].rules[name], rtol=1e-3, atol=1e-4)
    tokens = tokens_of(16)
    logits = []
    for model, plan in zip((fused, plain), plans, strict=True):
        sparsify(model, plan)
        logits.append(native_logits(model, tokens, 9))
    assert error(*logits) < 2e-2


def test_a_fused_layer_that_is_not_linear_is_refused() -> None:
    model = family_model("phi3")
    model.model.layers[1].self_attn.qkv_proj = nn.Sequential(model.model.layers[1].self_attn.qkv_proj)
    with pytest.raises(ModelError, match="qkv_proj is a Sequential, expected nn.Linear"):
        sites.layers_of(model)


def test_split_layers_load_save_and_copy_as_the_fused_ones() -> None:
    model, other = family_model("phi3"), family_model("phi3", seed=1)
    sites.layers_of(model)
    assert isinstance(model.model.layers[0].mlp.gate_up_proj, SplitLinear)
    assert model.state_dict().keys() == other.state_dict().keys()
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits_of(copy.deepcopy(model), (1, 5)), logits_of(model, (1, 5)))
    torch.testing.assert_close(logits_of(model, (1, 5)), logits_of(other, (1, 5)))
    halved = restore(model.half())
    assert torch.equal(halved.state_dict()["model.layers.0.mlp.gate_up_proj.weight"],
                       other.state_dict()["model.layers.0.mlp.gate_up_proj.weight"].half())  # fmt: skip


@pytest.mark.parametrize("method", ["teal", "graded"])
def test_a_saved_model_has_the_fused_tensors(method: str, tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    model = family_model("phi3", vocab_size=4096)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsify(model, actsparse.calibrate(model, tokenizer, str(text_file), method=method, **TEXT))
    logits = logits_of(model, (1, 1))
    model.save_pretrained(tmp_path / "saved")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits_of(found, (1, 1)), logits, rtol=1e-5, atol=1e-5)
    state = restore(found).state_dict()
    assert state.keys() == want.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_stay_dense_and_say_why(case: str, tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    model = family_model(case, vocab_size=4096)
    with pytest.raises(MethodError, match=r"chess works on feed-forward blocks.* experts are stacked tensors"):
        actsparse.calibrate(model, tokenizer, str(text_file), method="chess", **TEXT)
    plan = actsparse.calibrate(model, tokenizer, str(text_file), method="teal", **TEXT)
    assert {name.split(".")[2] for name in plan.rules} == {"q", "k", "v", "o"}
    read = weights_read(model)
    attention = sum(layer.weight(name).nbytes for layer in sites.layers_of(model) for name in "qkvo")
    experts = sum(p.nbytes for layer in model.model.layers for p in layer.mlp.parameters() if p.dim() == 3) // 2
    router = sum(p.nbytes for layer in model.model.layers for p in layer.mlp.parameters() if p.dim() == 2)
    assert read.bytes == attention + experts + router + model.lm_head.weight.nbytes
    assert read.fraction == pytest.approx(1)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match="cannot be packed.*experts are stacked tensors"):
        pack.pack(str(tmp_path / "dense"), tmp_path / "packed", pack.Settings(text=str(text_file), tokens=512))


def test_a_family_that_is_not_listed_is_found_by_its_structure(tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    model = random_model(
        "cohere", vocab_size=4096, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    )
    assert "cohere" not in FAMILIES
    model.save_pretrained(tmp_path / "cohere")
    opened = open_model(str(tmp_path / "cohere"))
    want = logits_of(opened, (1, 6))
    plan = actsparse.calibrate(opened, tokenizer, str(text_file), method="teal", sparsity=0.4, **TEXT)
    sparsify(opened, plan)
    assert isinstance(opened.model.layers[0].mlp, SparseFFN)
    assert "family cohere has no native decode step" in str(Decoder.supports(opened))
    restore(opened)
    assert torch.equal(logits_of(opened, (1, 6)), want)


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("gpt2", "its decoder has no list of layers"),
        ("olmoe", r"layer 0 mlp.gate_proj is missing in a OlmoeSparseMoeBlock, not nn.Linear"),
        ("glm4", r"layer 0 mlp.gate_proj is missing in a Glm4MLP, not nn.Linear"),
    ],
)
def test_others_are_refused_with_the_module_that_is_not_understood(family: str, what: str) -> None:
    model = random_model(family, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0))
    with pytest.raises(ModelError, match=f"family '{family}' is not supported: {what}"):
        sites.layers_of(model)


def test_a_block_that_computes_something_else_is_refused() -> None:
    model = random_model("cohere", **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0))
    block = model.model.layers[1].mlp
    block.forward = lambda x: 2 * type(block).forward(block, x)
    with pytest.raises(ModelError, match=r"layer 1 mlp, a CohereMLP, is not down\(act\(gate x\) \* up x\)"):
        sites.layers_of(model)


def test_caches_longer_than_the_tables_are_refused() -> None:
    assert Decoder.supports(family_model("phi4"), 64) is None
    assert "longer than 64: rope type longrope" in str(Decoder.supports(family_model("phi4"), 65))
    opt = family_model("opt", max_position_embeddings=32)
    assert Decoder.supports(opt, 32) is None
    assert "longer than 32: its learned positions" in str(Decoder.supports(opt, 33))


def test_every_family_is_tried_here_and_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    tried = {family for family, _ in CASES.values()} | {"bamboo"}
    assert tried == set(FAMILIES)
    assert all(name in CONFIG_MAPPING for name in tried - {"bamboo"})
    assert main(["models", "--json"]) == 0
    rows = {row["family"]: row for row in json.loads(capsys.readouterr().out)["families"]}
    assert rows.keys() == set(FAMILIES)
    for case, (family, _) in CASES.items():
        assert rows[family]["cpu"] == (Decoder.supports(family_model(case)) is None)
    assert {name for name, row in rows.items() if row["cuda"]} >= {"llama", "mistral", "qwen2", "qwen3"}
    assert main(["models"]) == 0
    assert "meta-llama/Llama-3.2-1B" in capsys.readouterr().out

"""What every method must keep to, one test per clause, run over all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import actsparse
from actsparse import kernels
from actsparse.calibration.collect import Calibration
from actsparse.measure.bench.run import Settings, measure
from actsparse.measure.evaluate import compare_perplexity, window_losses
from actsparse.methods import METHODS as ALL
from actsparse.methods import make
from actsparse.methods.base import MethodError, Targets
from actsparse.models import text
from actsparse.models.caches import cache_argument, cache_of
from actsparse.plan import Plan, PlanError
from actsparse.runtime.decode import Decoder
from actsparse.runtime.generate import Session
from actsparse.runtime.layers import SparseFFN, SparseLinear
from actsparse.runtime.swap import state_of

# Exact zeros, for the methods that live on them.
RELU = ("relu", "svdp")
# Graded plans say how many bits of packed weights are read, not what is skipped of 16: test_graded and test_pack hold them.
METHODS = {name: method for name, method in ALL.items() if name != "graded"}
# Rules that act at every token, whatever came before.
THRESHOLDS = [name for name in METHODS if METHODS[name].scopes[0] == "all" and name != "dense"]
# What a sparsity means for the method is the share of something else than its sites.
OWN_TARGET = ("relu", "svdp", "dense")
SKIPPING = [name for name in METHODS if name not in OWN_TARGET]
SMALL: dict[str, dict[str, Any]] = {"svdp": {"rank": 8}}


@pytest.fixture
def model_for(tiny: Callable[..., Any]) -> Callable[[str], Any]:
    return lambda method: tiny("llama", hidden_act="relu" if method in RELU else "silu")


@pytest.fixture
def documents(text_file: Path) -> list[str]:
    """Some documents, each longer than a window."""
    words = text_file.read_text(encoding="utf-8").split()
    return [" ".join(words[at : at + 100]) for at in range(0, len(words), 100)]


@pytest.fixture
def calibrate(tokenizer: Any, documents: list[str]) -> Callable[..., Any]:
    def run(model: Any, method: str, sparsity: float | list[float] = 0.5, **options: Any) -> Any:
        options = {"tokens": 1024, "window": 64, **SMALL.get(method, {}), **options}
        return actsparse.calibrate(model, tokenizer, documents, method=method, sparsity=sparsity, **options)

    return run


@pytest.fixture
def windows(tokenizer: Any, documents: list[str]) -> text.Windows:
    """The text that the plans are calibrated on."""
    return text.load_windows(documents, tokenizer, tokens=1024, window=64)


def target_of(method: str) -> float:
    """A target that the method takes; those without one of their own end at 0."""
    return 0.0 if method in ("dense", "relu") else 0.5


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_is_the_dense_model(method: str, model_for: Any, calibrate: Any, windows: text.Windows) -> None:
    model = model_for(method)
    plan = calibrate(model, method, 0.0)
    dense = window_losses(model, windows, plan.scope)
    actsparse.sparsify(model, plan)
    sparse = window_losses(model, windows, plan.scope)
    # SVDP promises no false negative only on the tokens that set its biases, the second half.
    scored = slice(len(dense) // 2, None) if method == "svdp" else slice(None)
    # float32 sums in another order: a few thousand terms in each of a few products.
    assert torch.allclose(sparse[scored], dense[scored], rtol=1e-5)


@pytest.mark.parametrize("method", SKIPPING)
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_the_target_is_met_on_the_same_kind_of_data(
    method: str, target: float, model_for: Any, calibrate: Any, windows: text.Windows
) -> None:
    model = model_for(method)
    plan = calibrate(model, method, target)
    assert plan.achieved
    for site, value in plan.achieved.items():
        assert value == pytest.approx(target, abs=0.02), site
    found = compare_perplexity(model, plan, windows).sparsity
    for site in set(found) & set(plan.achieved):
        # What comes before a site is sparsified now, so that it sees other values than in calibration.
        first = site in ("layers.0.q", "layers.0.k", "layers.0.v")
        assert found[site] == pytest.approx(target, abs=0.02 if first else 0.2), site


@pytest.mark.parametrize("method", METHODS)
def test_plans_validate_and_survive_a_file(method: str, model_for: Any, calibrate: Any, tmp_path: Path) -> None:
    plan = calibrate(model_for(method), method, target_of(method))
    plan.validate()
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert again.rules.keys() == plan.rules.keys()
    assert all(torch.equal(again.rules[name], rule) for name, rule in plan.rules.items())
    for field in dataclasses.fields(Plan):
        if field.name != "rules":
            ours, theirs = getattr(plan, field.name), getattr(again, field.name)
            assert ours == theirs, field.name
    assert plan.method == method
    assert plan.sparsity == target_of(method)


@pytest.mark.parametrize("method", THRESHOLDS)
def test_native_kernels_do_what_the_reference_path_does(method: str, model_for: Any, calibrate: Any) -> None:
    model = model_for(method)
    actsparse.sparsify(model, calibrate(model, method, target_of(method)))
    tokens = torch.arange(5, 5 + 12)[None]
    with torch.no_grad():
        whole = model(tokens).logits[0]
        cache, single = None, []
        for token in tokens[0]:
            step = model(token.reshape(1, 1), **cache_argument(model.forward, cache), use_cache=True)
            cache = cache_of(step)
            single.append(step.logits[0, 0])
    assert "cpu-" in kernels.path_for(torch.zeros(1, 4), torch.zeros(4, 4)) or kernels.cpu.missing
    # Two layers of float32 sums over at most 132 terms in two orders; a flipped decision would show at 1e-2.
    assert torch.allclose(torch.stack(single), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("method", THRESHOLDS)
def test_skipped_weights_are_not_read(method: str, model_for: Any, calibrate: Any) -> None:
    if kernels.cpu.missing:
        pytest.skip(kernels.cpu.missing)
    model = model_for(method)
    actsparse.sparsify(model, calibrate(model, method, target_of(method)))
    state = state_of(model)
    assert state is not None
    assert state.modules
    poisoned = 0
    for module in state.modules:
        with torch.no_grad():
            if isinstance(module, SparseLinear):
                x = torch.randn(1, module.in_features)
                before = module(x)
                poisoned += poison(module.weight, kernels.reference.keep(x, module.threshold), columns=True)
            else:
                assert isinstance(module, SparseFFN)
                weights = {name: module.projection(name).weight for name in ("gate", "up", "down")}
                x = torch.randn(1, weights["up"].shape[1])
                before = module(x)
                rules = module.rules()
                read = kernels.reference.ffn_keep(x, weights["gate"], weights["up"], rules)
                by_input = {"gate": "gate_in_threshold", "up": "up_in_threshold"}
                for name, weight in weights.items():
                    if name not in read:
                        continue  # read whole
                    columns = name == "down" or getattr(rules, by_input[name]) is not None
                    poisoned += poison(weight, read[name], columns=columns)
            after = module(x)
        assert torch.isfinite(after).all()
        assert torch.equal(after, before)
    assert poisoned > 0


def poison(weight: torch.nn.Parameter, keep: torch.Tensor, *, columns: bool) -> int:
    """Overwrite what need not be read with NaN; returns how many rows or columns that were."""
    skipped = ~keep.reshape(-1)
    if columns:
        weight.data[:, skipped] = torch.nan
    else:
        weight.data[skipped] = torch.nan
    return int(skipped.sum())


@pytest.mark.parametrize("method", METHODS)
def test_restore_is_bit_exact(method: str, model_for: Any, calibrate: Any) -> None:
    model = model_for(method)
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    actsparse.restore(actsparse.sparsify(model, calibrate(model, method, target_of(method))))
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, (tensor, stride) in before.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].stride() == stride, name


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("dense", "relu")])
def test_one_pass_serves_several_targets(method: str, model_for: Any, calibrate: Any) -> None:
    model = model_for(method)
    together = calibrate(model, method, [0.3, 0.6])
    alone = calibrate(model, method, 0.6)
    assert [plan.sparsity for plan in together] == [0.3, 0.6]
    assert together[1].prompt == alone.prompt
    assert all(torch.equal(together[1].rules[name], rule) for name, rule in alone.rules.items())


def test_methods_share_one_pass(tiny: Any, windows: text.Windows) -> None:
    model = tiny("llama")
    methods = [make(name) for name in ("cats", "chess", "teal", "wina", "oracle")]
    together = Calibration(model, windows, methods)
    calibrated = together.collect()
    for method in methods:
        run = Calibration(model, windows, [method])
        own = run.solve(method, run.collect()[method.name], Targets(0.5))
        shared = together.solve(method, calibrated[method.name], Targets(0.5))
        assert all(torch.equal(own.rules[name], rule) for name, rule in shared.rules.items())


def test_the_oracle_counts_as_its_ideal_and_is_not_decoded_with(
    tiny: Any, tokenizer: Any, calibrate: Any, windows: text.Windows
) -> None:
    model = tiny("llama")
    plan = calibrate(model, "oracle", 0.5)
    assert plan.evaluation_only
    assert compare_perplexity(model, plan, windows).weights_read.ffn_fraction == pytest.approx(0.5, abs=0.05)
    actsparse.sparsify(model, plan)
    with pytest.raises(PlanError, match="evaluation only"):
        Decoder(model, 8)
    with pytest.raises(PlanError, match="evaluation only"):
        Session(model, tokenizer, 8)
    with pytest.raises(PlanError, match="evaluation only"):
        measure(model, [plan], Settings(4, 4, 1, llama_cpp=False), say=lambda line: None)


def test_dense_takes_no_sparsity(tiny: Any, calibrate: Any) -> None:
    with pytest.raises(MethodError, match=r"sparsity is 0\.5, expected 0"):
        calibrate(tiny("llama"), "dense", 0.5)

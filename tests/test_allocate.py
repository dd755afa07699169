"""Greedy allocation: against an exhaustive greedy written from the paper, budgets met, logs resumed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from actsparse.calibration import allocation as engine
from actsparse.calibration.allocation import Allocation, Step, allocate, climb, sample_windows, site_bytes
from actsparse.calibration.collect import Calibration
from actsparse.methods import make
from actsparse.methods.base import Calibrated, Method, MethodError
from actsparse.models import text
from actsparse.plan import PlanError

STEPS = 12


@pytest.fixture
def windows() -> text.Windows:
    tokens = torch.randint(4096, (16, 64), generator=torch.Generator().manual_seed(3))
    return text.Windows(tokens, "random", ("",) * 16)


def statistics(model: Any, method: Method, windows: text.Windows) -> tuple[Calibration, list[Calibrated]]:
    run = Calibration(model, windows, [method])
    return run, run.collect()[method.name]


def exhaustive(error: Any, raises: Mapping[str, float], shares: Mapping[str, float]) -> tuple[float, float]:
    """(share skipped, error) of the greedy that measures every site at every step, near a share of one half."""
    level = dict.fromkeys(raises, 0.0)
    while sum(shares[site] * value for site, value in level.items()) < 0.5:
        now = error(level)
        costs = {
            site: (error({**level, site: value + raises[site]}) - now) / (shares[site] * raises[site])
            for site, value in level.items()
            if value + raises[site] < 0.99
        }
        best = min(costs, key=lambda site: costs[site])
        level[best] += raises[best]
    return sum(shares[site] * value for site, value in level.items()), error(level)


@pytest.mark.parametrize("name", ["teal", "chess"])
def test_lazy_search_is_as_good_as_measuring_everything(tiny: Any, windows: text.Windows, name: str) -> None:
    model, method = tiny("llama"), make(name)
    _, stats = statistics(model, method, windows)
    sizes = site_bytes(model, method)[0]
    total = sum(sizes.values())
    shares = {site: size / total for site, size in sizes.items()}
    raises = {site: min(0.15, 1 / STEPS / share) for site, share in shares.items()}
    layer = engine.sites.layers_of(model)[0]
    block = engine._Block(model, layer, engine._Rules(method, stats[0]), sample_windows(windows.tokens))
    skipped, error = exhaustive(block.error, raises, shares)
    log = climb(block.error, raises, shares)
    ours = Allocation(name, "layer", "", [total], [log]).targets(skipped)
    assert block.error({site: value for (_, site), value in ours.overrides.items()}) <= 1.05 * error
    uniform = block.error(dict.fromkeys(sizes, skipped))
    assert error < uniform


def test_climb_takes_the_cheapest_site_first() -> None:
    # Squared errors that add up; a step skips as many bytes of `a` as of `b`, which is half as large.
    log = climb(lambda level: level["a"] ** 2 + level["b"] ** 2, {"a": 0.05, "b": 0.1}, {"a": 2 / 3, "b": 1 / 3})
    assert log[0] == Step(0.0, 0.0, {"a": 0.0, "b": 0.0})
    assert log[1].sparsity == {"a": 0.05, "b": 0.0}
    assert all(before.skipped < after.skipped for before, after in itertools.pairwise(log))
    assert log[-1].skipped >= 0.9
    middle = log[len(log) // 2]
    # At the optimum both cost the same per byte: 2 a / (2/3) = 2 b / (1/3).
    assert middle.sparsity["a"] == pytest.approx(2 * middle.sparsity["b"], abs=0.11)
    assert middle.error == pytest.approx(middle.sparsity["a"] ** 2 + middle.sparsity["b"] ** 2)


@pytest.mark.parametrize("name", ["teal", "chess"])
def test_budgets_are_met_to_the_byte(tiny: Any, windows: text.Windows, name: str) -> None:
    model, method = tiny("llama"), make(name)
    _, stats = statistics(model, method, windows)
    sizes = site_bytes(model, method)
    totals = [sum(layer.values()) for layer in sizes]
    found = allocate(model, method, stats, windows.tokens, steps=STEPS)
    for sparsity in (0.0, 0.3, 0.55, 0.95):
        targets = found.targets(sparsity)
        skipped = [sum(size * targets(layer, site) for site, size in sizes[layer].items()) for layer in range(2)]
        if method.budget == "layer":
            assert skipped == pytest.approx([sparsity * total for total in totals])
        assert sum(skipped) == pytest.approx(sparsity * sum(totals))
        assert all(0 <= value < 1 for value in targets.overrides.values())


def test_a_model_budget_goes_where_it_hurts_least() -> None:
    def log(cost: float) -> list[Step]:
        return [Step(s / 10, cost * (s / 10) ** 2, {"ffn": s / 10}) for s in range(10)]

    found = Allocation("chess", "model", "", [100, 100], [log(1.0), log(4.0)], [1.0, 1.0])
    targets = found.targets(0.25)
    assert targets(0, "ffn") + targets(1, "ffn") == pytest.approx(0.5)
    assert targets(0, "ffn") == pytest.approx(4 * targets(1, "ffn"), abs=0.11)
    # What a unit of error does to the predictions counts as much as the error.
    found.effects = [4.0, 1.0]
    assert found.targets(0.25)(0, "ffn") == pytest.approx(0.25, abs=0.051)


def test_a_log_is_continued_and_gives_the_same(tiny: Any, windows: text.Windows, tmp_path: Path) -> None:
    model, method = tiny("llama"), make("chess")
    _, stats = statistics(model, method, windows)
    path = tmp_path / "log.json"
    whole = allocate(model, method, stats, windows.tokens, steps=STEPS, log=path)
    half = Allocation.load(path)
    assert half == whole
    half.layers, half.sizes, half.effects = half.layers[:1], half.sizes[:1], half.effects[:1]
    half.save(path)
    seen: list[int] = []
    again = allocate(
        model, method, stats, windows.tokens, steps=STEPS, log=path, progress=lambda done, total: seen.append(done)
    )
    assert again == whole
    assert len(seen) == 1
    # Other settings start anew.
    other = allocate(model, method, stats, windows.tokens, steps=STEPS - 2, log=path)
    assert other.key != whole.key
    assert len(other.layers) == 2


def test_a_damaged_log_is_refused_when_read_and_replaced_when_searching(
    tiny: Any, windows: text.Windows, tmp_path: Path
) -> None:
    path = tmp_path / "log.json"
    path.write_text('{"method": "chess"')
    with pytest.raises(PlanError, match=r"log\.json cannot be read"):
        Allocation.load(path)
    method = make("chess")
    model = tiny("llama")
    _, stats = statistics(model, method, windows)
    allocate(model, method, stats, windows.tokens, steps=STEPS, log=path)
    assert len(Allocation.load(path).layers) == 2


def test_the_model_is_left_as_it_was(tiny: Any, windows: text.Windows) -> None:
    model, method = tiny("llama"), make("teal")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(windows.tokens[:1]).logits
        _, stats = statistics(model, method, windows)
        allocate(model, method, stats, windows.tokens, steps=STEPS)
        assert torch.equal(model(windows.tokens[:1]).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_methods_without_sites_are_refused(tiny: Any, windows: text.Windows) -> None:
    model = tiny("llama")
    method = make("dense")
    _, stats = statistics(model, method, windows)
    with pytest.raises(MethodError, match="no sites to allocate"):
        allocate(model, method, stats, windows.tokens)


def test_allocations_reach_the_plan(tiny: Any, windows: text.Windows) -> None:
    model, method = tiny("llama"), make("teal")
    run, stats = statistics(model, method, windows)
    found = allocate(model, method, stats, windows.tokens, steps=STEPS)
    targets = found.targets(0.5)
    plan = run.solve(method, stats, targets)
    for (layer, site), value in targets.overrides.items():
        assert plan.achieved[f"layers.{layer}.{site}"] == pytest.approx(value, abs=0.02)
    assert dataclasses.asdict(found)["budget"] == "layer"
    assert found.describe()["allocation"] == "greedy"

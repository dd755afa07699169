"""Graded reading: thresholds are water-filling, theta meets its budget, and rules do what they promise."""

from __future__ import annotations

import itertools

import pytest
import torch

import actsparse
from actsparse.kernels import planes
from actsparse.measure.evaluate import compare_perplexity
from actsparse.methods.base import MethodError
from actsparse.methods.graded import (
    HEAD,
    Reading,
    center_of,
    choose_theta,
    most_bits,
    reading_of,
    solution_of,
    unit_of,
    unit_thresholds,
)
from actsparse.methods.rounding import residuals, round_nearest
from actsparse.models import text
from actsparse.runtime.decode import Decoder


def test_thresholds_find_the_best_level_by_brute_force() -> None:
    left = torch.rand(4, 200, generator=torch.Generator().manual_seed(0)).sort(0, descending=True).values
    left[0] += 1
    cost = (40, 32, 32)
    unit = unit_thresholds(left, cost)
    total = torch.tensor([0, *cost]).cumsum(0)
    assert bool((unit[1:] >= unit[:-1]).all())
    for theta, x in itertools.product((0.05, 0.1, 0.3), (0.3, 1.0, 4.0)):
        level = (x >= unit * theta).sum(0)
        price = x**2 * left + theta**2 * total[:, None]
        chosen = price.gather(0, level[None])[0]
        torch.testing.assert_close(chosen, price.min(0).values, rtol=1e-5, atol=1e-7)


def test_a_level_that_brings_nothing_is_never_read() -> None:
    unit = unit_thresholds(torch.tensor([[4.0, 4.0, 0.0], [1.0, 4.0, 0.0], [1.0, 4.0, 0.0]]), (10, 10))
    assert unit[0, 0] < torch.inf
    assert bool(unit[1, 0].isinf())
    assert bool(unit[:, 1:].isinf().all())


def reading(x: torch.Tensor, weight: torch.Tensor, packed: planes.Packed, sensitivity: torch.Tensor) -> Reading:
    return reading_of(x, unit_of(weight, packed, sensitivity), packed, x.mean(0))


@pytest.fixture
def products() -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, planes.Packed, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for layer, name in ((0, "q"), (0, "down"), (HEAD, "head")):
        weight = torch.randn(100, 80, generator=generator)
        x = torch.randn(400, 80, generator=generator) * torch.rand(80, generator=generator) + 0.3
        found[layer, name] = x, weight, round_nearest(weight, 6), torch.rand(100, generator=generator)
    return found


def test_theta_meets_the_budget_that_is_then_read(products) -> None:
    readings = {key: reading(*values) for key, values in products.items()}
    for bits in (1.5, 3.0, 4.5):
        solution = solution_of(readings, bits)
        assert solution.facts["bits_read"] == pytest.approx(bits, abs=1e-6)
        read = weights = 0.0
        for (layer, name), (x, weight, packed, _) in products.items():
            if layer == HEAD:
                assert "head.level_threshold" in solution.rules
                continue
            site = f"layers.{layer}.{name}"
            levels = planes.levels_read(
                x, solution.rules[f"{site}.level_threshold"], solution.rules[f"{site}.center"]
            ).long()
            cost = torch.tensor([0, *packed.level_bytes]).cumsum(0)
            read += float(cost[levels].double().sum()) * 8 / len(x)
            weights += weight.numel()
        assert read / weights == pytest.approx(bits, abs=0.03)


def test_more_sensitive_outputs_get_more_bits(products) -> None:
    x, weight, packed, sensitivity = products[0, "q"]
    readings = {
        (0, "q"): reading(x, weight, packed, sensitivity),
        (0, "k"): reading(x, weight, packed, 100 * sensitivity),
    }
    theta = choose_theta(readings, 3.0)
    assert readings[0, "k"].bits(theta) > readings[0, "q"].bits(theta) + 1


def test_budgets_out_of_reach_are_refused(products) -> None:
    readings = {key: reading(*values) for key, values in products.items()}
    for bits in (0.0, 9.9, float("nan")):
        with pytest.raises(MethodError, match="bits read is"):
            choose_theta(readings, bits)


def test_a_search_for_a_budget_may_begin_at_every_plane(products) -> None:
    readings = {key: reading(*values) for key, values in products.items()}
    most = most_bits(readings)
    assert most == pytest.approx(choose_bits(readings, most), abs=1e-6)
    with pytest.raises(MethodError, match="bits read is"):
        choose_theta(readings, most + 0.1)


def choose_bits(readings: dict[tuple[int, str], Reading], bits: float) -> float:
    return float(solution_of(readings, bits).facts["bits_read"])


def test_residuals_at_level_zero_are_the_column(products) -> None:
    _, weight, packed, sensitivity = products[0, "q"]
    torch.testing.assert_close(residuals(weight, packed, sensitivity)[0], (weight**2 * sensitivity[:, None]).sum(0))


def test_centers_lie_where_values_are_skipped() -> None:
    """A channel of small values around 0.2 with rare large ones: its mean is no place to deviate from."""
    generator = torch.Generator().manual_seed(5)
    x = 0.2 + 0.05 * torch.randn(2000, 64, generator=generator)
    x[::20] += 10
    weight = torch.randn(64, 64, generator=generator)
    packed = round_nearest(weight, 6)
    center = center_of(x, [(unit_of(weight, packed, torch.ones(64)), packed)], 0.5)
    assert bool((x.mean(0) > 0.6).all())
    assert bool(((center > 0.1) & (center < 0.25)).all())


def test_a_plan_rounds_the_model_it_meets_and_restores_it(tiny, tokenizer, text_file) -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=256, head_dim=32, num_attention_heads=4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plan = actsparse.calibrate(
        model, tokenizer, str(text_file), method="graded", sparsity=1 - 4 / 16, tokens=512, window=64, scope="all"
    )
    assert plan.settings["bits_read"] == pytest.approx(4)
    windows = text.load_windows(str(text_file), tokenizer, tokens=512, window=64)
    result = compare_perplexity(model, plan, windows)
    assert result.weights_read.bits_read == pytest.approx(4, abs=0.3)
    assert result.sparse.ppl < 1.3 * result.dense.ppl
    actsparse.sparsify(model, plan)
    tokens = torch.arange(5, 25)
    decoder = Decoder(model, 32)
    native = [decoder.prefill(tokens[:1])] + [decoder.step(int(token)) for token in tokens[1:]]
    with torch.no_grad():
        modules = model(tokens[None]).logits[0]
    # Native coefficients have 8 bits, and a value near a threshold may be read to the next level.
    error = (torch.stack(native) - modules).norm() / modules.norm()
    assert float(error) < 0.15
    actsparse.restore(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_an_interrupted_calibration_goes_on_layer_by_layer(
    tiny, tokenizer, text_file, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=256, head_dim=32, num_attention_heads=4)
    options = {"method": "graded", "sparsity": 1 - 4 / 16, "tokens": 512, "window": 64}
    actsparse.calibrate(model, tokenizer, str(text_file), output=tmp_path / "whole", **options)
    method, observe = actsparse.METHODS["graded"], actsparse.METHODS["graded"].observe
    seen: list[int] = []

    def stop(self, layer, *arguments):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(layer.index)
        return observe(self, layer, *arguments)

    monkeypatch.setattr(method, "observe", stop)
    with pytest.raises(KeyboardInterrupt):
        actsparse.calibrate(model, tokenizer, str(text_file), output=tmp_path / "again", **options)
    assert seen == [HEAD, 1]
    monkeypatch.setattr(
        method, "observe", lambda self, layer, *a: (seen.append(layer.index), observe(self, layer, *a))[1]
    )
    actsparse.calibrate(model, tokenizer, str(text_file), output=tmp_path / "again", **options)
    assert seen == [HEAD, 1, 0]
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "text.txt", "whole"]

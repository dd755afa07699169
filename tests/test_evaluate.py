"""Two models on the same windows: losses, divergence and agreement against a computation that keeps every logit."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from actsparse.measure import evaluate
from actsparse.models.text import Windows
from actsparse.plan import PlanError


@pytest.fixture
def windows() -> Windows:
    tokens = torch.randint(0, 100, (5, 16), generator=torch.Generator().manual_seed(3))
    return Windows(tokens, "random", ("",) * 5)


def ready(model: Any) -> evaluate.Ready:
    return lambda: contextlib.nullcontext(model)


@pytest.mark.parametrize("scope", ["all", "last_half", "decode"])
@pytest.mark.parametrize("held", [1, 1 << 30])
def test_divergence_and_agreement_are_those_of_all_logits(
    tiny: Any, windows: Windows, scope: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 32)
    monkeypatch.setattr(evaluate, "HELD_BYTES", held)
    monkeypatch.setattr(evaluate, "COMPARED_POSITIONS", 3)
    one, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ticks: list[tuple[int, int]] = []
    found = evaluate.paired_losses(
        ready(one), ready(other), windows, scope, progress=lambda done, total: ticks.append((done, total))
    )
    with torch.no_grad():
        first = 0 if scope == "all" else 8
        p, q = (model(windows.tokens).logits[:, first:-1].double().log_softmax(-1) for model in (one, other))
    divergence = (p.exp() * (p - q)).sum(-1).mean(-1)
    assert divergence.min() > 1e-4
    torch.testing.assert_close(found.divergence, divergence, rtol=1e-3, atol=1e-6)
    assert torch.equal(found.agreement, (p.argmax(-1) == q.argmax(-1)).double().mean(-1))
    assert 0 < found.agreement.mean() < 1
    assert torch.equal(found.reference, evaluate.window_losses(one, windows, scope))
    assert torch.equal(found.candidate, evaluate.window_losses(other, windows, scope))
    assert ticks[-1] == (160, 160)


def test_a_model_agrees_with_itself(tiny: Any, windows: Windows) -> None:
    model = tiny("llama")
    found = evaluate.paired_losses(ready(model), ready(model), windows)
    assert torch.equal(found.divergence, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(found.agreement, torch.ones(5, dtype=torch.float64))
    assert torch.equal(found.reference, found.candidate)


def test_what_the_reference_excludes_adds_nothing() -> None:
    reference = torch.tensor([[0.0, -torch.inf, -1e4]])
    candidate = torch.tensor([[0.0, 0.0, -torch.inf]])
    found = evaluate._compare(reference, candidate, torch.tensor([0]))
    assert found.tolist() == pytest.approx([0.0, 0.6931472, 0.6931472, 1.0])


def test_other_vocabularies_are_refused(tiny: Any, windows: Windows) -> None:
    one, other = tiny("llama"), tiny("llama")
    other.resize_token_embeddings(other.config.vocab_size + 8)
    with pytest.raises(PlanError, match="expected one vocabulary"):
        evaluate.paired_losses(ready(one), ready(other), windows)

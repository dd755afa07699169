"""Budgets that users think in: find the sparsity that reads a given share of the weights, or costs a given perplexity.

A search by bisection over the sparsity of one calibration: only rules are solved again, and the sparsified model is measured
on windows of the calibration text.  What a plan achieves on other text has to be measured there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from actsparse.methods.statistics import CalibrationError
from actsparse.models.text import Windows
from actsparse.plan import Plan

# What rounding alone may change of a perplexity.
NOTHING = 1e-4
# A search ends when the sparsity is known this closely.
RESOLUTION = 1 / 256
# Weights read is a mean over thousands of decisions a token: a few thousand tokens give it to a part in a thousand.
READING_TOKENS = 4096


# Of a plan: the fraction of the dense model's weight bytes read per token, and the relative increase of perplexity.
Score = Callable[[Plan], tuple[float, float]]
# Makes the score of plans for a dense model on windows of text; ``actsparse.measure.evaluate.scorer`` is one.
Scorer = Callable[[Any, Windows], Score]


class Progress(Protocol):
    """Told now and then how much is done, of how much (in tokens)."""

    def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Budget:
    """What a plan may use: exactly one of the two.

    Attributes:
        weights_read: at most this fraction of the dense model's weight bytes per token, 0 to 1.
        max_ppl_increase: at most this relative increase of perplexity (0.01 for 1 %).
    """

    weights_read: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        if (self.weights_read is None) == (self.max_ppl_increase is None):
            raise CalibrationError("a budget is either weights_read or max_ppl_increase, expected exactly one of them")
        if self.weights_read is not None and not 0 < self.weights_read <= 1:
            raise CalibrationError(f"weights read is {self.weights_read:g}, expected 0 < w <= 1")
        if self.max_ppl_increase is not None and not 0 <= self.max_ppl_increase < float("inf"):
            raise CalibrationError(
                f"perplexity increase is {self.max_ppl_increase:g}, expected 0 or more (0.01 for 1%)"
            )


@dataclass
class Found:
    """The plan a search ended at, and every (sparsity, measured value) on the way."""

    plan: Plan
    measured: float
    trace: list[tuple[float, float]] = field(default_factory=list)


def percent(value: float) -> str:
    """An increase as people read it: two decimals, or three digits where these would be too few."""
    return f"{value:.2%}" if abs(value) >= 0.01 else f"{100 * value:.3g}%"


def search(
    model: Any,
    solve: Callable[[float], Plan],
    windows: Windows,
    budget: Budget,
    scorer: Scorer,
    *,
    begin: float = 0.0,
    highest: float = 0.95,
    progress: Progress | None = None,
) -> Found:
    """The plan that spends ``budget``: the least sparsity that reads little enough, or the most that costs little enough.

    Args:
        model: the model that plans are for; it is left dense.
        solve: the plan for a sparsity.
        windows: windows of the calibration text to measure on.
        budget: what to meet.
        scorer: what measures a plan.
        begin: the least sparsity that is tried.
        highest: the greatest.
        progress: called after every measurement.

    Raises:
        CalibrationError: no sparsity up to ``highest`` reads as little as asked, or already ``begin`` costs more.
    """
    reading = budget.weights_read is not None
    rows = max(2, READING_TOKENS // int(windows.tokens.shape[1])) if reading else len(windows.tokens)
    sample = Windows(windows.tokens[:rows], windows.source, windows.domains[:rows])
    score = scorer(model, sample)
    trace: list[tuple[float, float]] = []
    rounds = 2 + int((highest - begin) / RESOLUTION).bit_length()

    def measure(sparsity: float) -> tuple[Plan, float]:
        plan = solve(sparsity)
        value = score(plan)[0 if reading else 1]
        trace.append((sparsity, value))
        if progress:
            progress(min(len(trace), rounds) * sample.count, rounds * sample.count)
        return plan, value

    limit = budget.weights_read if budget.weights_read is not None else budget.max_ppl_increase
    assert limit is not None
    # `good` meets the budget; for reading it is the upper end of the bracket, for perplexity the lower one.
    low, high = begin, highest
    if reading:
        good = measure(high)
        if good[1] > limit:
            raise CalibrationError(
                f"{limit:.1%} of the weights is less than {good[0].method} can read: "
                f"sparsity {highest:g} reads {good[1]:.1%}"
            )
    else:
        good = measure(low)
        if good[1] > limit + NOTHING:
            raise CalibrationError(
                f"the perplexity increase is {percent(good[1])} at the least that {good[0].method} can skip, expected at most "
                f"the {percent(limit)} asked for (more bits stored cost less)"
            )
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        plan, value = measure(middle)
        meets = value <= limit
        if meets:
            good = plan, value
        if meets == reading:
            high = middle
        else:
            low = middle
    if progress:
        progress(rounds * sample.count, rounds * sample.count)
    return Found(good[0], good[1], trace)

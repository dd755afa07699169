"""What a method is: the statistics it asks calibration for, and how it turns them into a plan's rules.

A method sees plain tensors only.  It never meets a model, a tokenizer or a kernel: calibration feeds its statistics,
decoding obeys its rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from actsparse.methods.statistics import Statistic
from actsparse.plan import SCOPES, ModelIdentity

# The output head where layers are counted.
HEAD = -1


class MethodError(ValueError):
    """Unknown method, or settings that a method cannot use."""


@dataclass(frozen=True)
class Layer:
    """One layer as a method sees it: its index, the model's shapes, and its weights on demand.

    ``weight(projection)`` gives the logical [out, in] weight of ``q k v o gate up down`` (not a copy), ``bias(projection)``
    its bias or None.  A plain feed-forward block has no gate: ``gated`` is False, and ``up`` is what its activation sees.
    ``has_ffn`` is False where the block (of experts) has no projections that can be sparsified.
    """

    index: int
    model: ModelIdentity
    weight: Callable[[str], torch.Tensor]
    bias: Callable[[str], torch.Tensor | None] = lambda projection: None
    gated: bool = True
    has_ffn: bool = True


@dataclass
class Calibrated:
    """One layer after calibration: its statistics by the keys under which the method asked for them."""

    layer: Layer
    statistics: dict[str, Statistic]


@dataclass(frozen=True)
class Targets:
    """Target sparsity per site: ``default``, unless ``overrides`` names (layer, site)."""

    default: float
    overrides: Mapping[tuple[int, str], float] = field(default_factory=dict)

    def __call__(self, layer: int, site: str) -> float:
        return self.overrides.get((layer, site), self.default)


@dataclass
class Solution:
    """Rules (tensors by the plan's names), predicted sparsity per site, and facts worth keeping in the plan's settings.

    ``target`` is set by a method whose own settings take the place of the caller's target sparsity, ``prompt`` by one that
    chooses neurons per prompt (see :class:`actsparse.plan.Plan`).
    """

    rules: dict[str, torch.Tensor] = field(default_factory=dict)
    achieved: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    target: float | None = None
    prompt: dict[str, Any] = field(default_factory=dict)

    def threshold(self, layer: int, projection: str, value: torch.Tensor | float, achieved: float) -> None:
        """Record a threshold (scalar or per channel) and the sparsity it is expected to give."""
        tensor = torch.as_tensor(value, dtype=torch.float32).reshape(-1).cpu()
        self.rules[f"layers.{layer}.{projection}.threshold"] = tensor
        self.achieved[f"layers.{layer}.{projection}"] = achieved


class Method(ABC):
    """One published method.

    Class attributes:
        name: as on the command line.
        source: paper and section.
        phases: token ranges, as fractions of the text, that calibration runs one after the other; none where the method
            needs no text.
        packing: how text becomes windows (see :mod:`actsparse.models.text`).
        window: tokens per window unless the caller says otherwise.
        sparsity: target unless the caller says otherwise.
        highest: the sparsity at which a search for a budget ends.
        sites: the sites whose sparsity a caller may set one by one (see :class:`Targets`).
        scopes: the scopes its plans can have; the first is the usual one.
        packable: whether its rules are thresholds alone, which packed weights take as well.
        activity: whether it needs the inputs of all products together with the loss's gradients, a layer at a time
            (``observe``), instead of statistics of taps.
        attention_alone: whether it can work where only the attention's projections are to be had.
        budget: what a greedy allocation keeps within its share of skipped weights: each ``layer``, or the whole ``model``.
        options: the settings that the command line offers, as keyword arguments of ``add_argument`` by name; methods that
            offer one of the same name share it.

    Settings are keyword arguments of ``__init__`` and stand in ``settings``.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    phases: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    packing: ClassVar[str] = "packed"
    window: ClassVar[int] = 1024
    sparsity: ClassVar[float] = 0.5
    highest: ClassVar[float] = 0.95
    sites: ClassVar[tuple[str, ...]] = ("ffn",)
    scopes: ClassVar[tuple[str, ...]] = SCOPES
    packable: ClassVar[bool] = False
    activity: ClassVar[bool] = False
    attention_alone: ClassVar[bool] = False
    budget: ClassVar[str] = "model"
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in use, as the plan records them."""
        return dict(vars(self))

    def check_target(self, sparsity: float) -> None:  # noqa: B027
        """MethodError for a target, 0 <= s < 1, that the method cannot meet whatever the model."""

    @abstractmethod
    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        """New statistics of ``layer`` for ``phase``; ``earlier`` holds those of the phases before.

        Equal keys of different methods must mean the same statistic: calibration shares them.
        """

    def observe(
        self, layer: Layer, inputs: Mapping[str, torch.Tensor], sensitivity: Mapping[str, torch.Tensor]
    ) -> dict[str, Statistic]:
        """Statistics of ``layer`` (of the output head, for index -1) from its activity; for methods with ``activity``.

        Args:
            layer: the layer.
            inputs: float32 [T, I] by projection.
            sensitivity: float32 [O] by projection: the mean squared gradient of the loss by each output.
        """
        raise NotImplementedError

    def observed(self, state: Mapping[str, torch.Tensor]) -> Statistic:
        """A statistic of :meth:`observe` from its ``state()``."""
        raise NotImplementedError

    @abstractmethod
    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        """Turn the statistics into rules."""


def pooled_threshold(solution: Solution, calibrated: Calibrated, key: str, projection: str, sparsity: float) -> None:
    """One scalar threshold for ``projection``: the ``sparsity``-quantile of the pooled histogram ``key``."""
    found = calibrated.statistics[key].quantile(sparsity)  # type: ignore[attr-defined]
    solution.threshold(calibrated.layer.index, projection, found.value, found.achieved)
    note_rank_error(solution, found.rank_error)


def note_rank_error(solution: Solution, rank_error: float) -> None:
    """Keep the largest bound on the quantiles' rank error among the solution's facts."""
    solution.facts["quantile_rank_error_bound"] = max(rank_error, solution.facts.get("quantile_rank_error_bound", 0.0))

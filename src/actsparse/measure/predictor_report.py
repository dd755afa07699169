"""How good a plan's predictors are, layer by layer, on some text.

Shape letters: T tokens, H hidden, N neurons.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from actsparse.models import sites, text
from actsparse.plan import ModelIdentity, Plan, PlanError
from actsparse.runtime.swap import restore

BATCH_TOKENS = 2048
# Scores are ranked by the upper half of their float32 pattern: 128 bins a power of two. Pairs that share a bin count half.
_RANK_BITS = 16


class Progress(Protocol):
    """Told after every batch how many tokens are done, of how many."""

    def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class LayerQuality:
    """One layer's predictor against the exact gate, over all pairs of a token and a neuron.

    Attributes:
        recall: share of the active neurons that were predicted active.
        precision: share of the neurons predicted active that were active.
        predicted_sparsity: share predicted inactive.
        true_sparsity: share that was inactive.
        roc_auc: probability that an active neuron scores above an inactive one (thresholds included, ties count half);
            0.5 is chance.
        energy_lost: share of the sum of (g_i u_i |W_down column i|)^2 that was predicted inactive.
        tokens: how many tokens were looked at.
    """

    layer: int
    recall: float
    precision: float
    predicted_sparsity: float
    true_sparsity: float
    roc_auc: float
    energy_lost: float
    tokens: int


@dataclass
class _Counts:
    """Sums over the tokens of one layer."""

    hits: int = 0
    predicted: int = 0
    active: int = 0
    pairs: int = 0
    tokens: int = 0
    lost: float = 0.0
    energy: float = 0.0
    ranks: list[torch.Tensor] = field(default_factory=lambda: [torch.zeros(1 << _RANK_BITS).long() for _ in range(2)])

    def quality(self, layer: int) -> LayerQuality:
        idle, busy = (ranks.double() for ranks in self.ranks)
        below = idle.cumsum(0) - idle
        pairs = float(idle.sum() * busy.sum())
        return LayerQuality(
            layer=layer,
            recall=self.hits / max(1, self.active),
            precision=self.hits / max(1, self.predicted),
            predicted_sparsity=1 - self.predicted / max(1, self.pairs),
            true_sparsity=1 - self.active / max(1, self.pairs),
            roc_auc=float((busy * (below + idle / 2)).sum()) / pairs if pairs else float("nan"),
            energy_lost=self.lost / self.energy if self.energy else 0.0,
            tokens=self.tokens,
        )


def measure(model: Any, plan: Plan, windows: text.Windows, *, progress: Progress | None = None) -> list[LayerQuality]:
    """Compare the plan's predictors with the exact gates of the dense model; the model is left dense.

    Raises:
        PlanError: the plan is for another model, or has no predictor.
    """
    restore(model)
    plan.check_model(ModelIdentity(**sites.describe(model)))
    watched = [layer for layer in sites.layers_of(model) if "ffn.predictor_a" in plan.layer_rules(layer.index)]
    if not watched:
        raise PlanError(f"plan of method {plan.method} has no predictors, expected one made by svdp or imported")
    counts = {layer.index: _Counts() for layer in watched}
    handles = [handle for layer in watched for handle in _watch(layer, plan, counts[layer.index])]
    try:
        size = max(1, BATCH_TOKENS // windows.tokens.shape[1])
        with torch.inference_mode():
            for at in range(0, len(windows.tokens), size):
                tokens = windows.tokens[at : at + size].to(model.device)
                model.get_decoder()(input_ids=tokens, use_cache=False)
                if progress:
                    progress(min(windows.count, (at + size) * windows.tokens.shape[1]), windows.count)
    finally:
        for handle in handles:
            handle.remove()
    return [count.quality(layer) for layer, count in counts.items()]


def plot(qualities: Sequence[LayerQuality], path: str | os.PathLike[str]) -> None:
    """Draw the report, one curve per measure over the layers.

    Raises:
        PlanError: matplotlib is missing, or the path cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlanError("a plot needs matplotlib: pip install 'actsparse[plot]'") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    layers = [quality.layer for quality in qualities]
    curves = {
        "recall": "-o",
        "precision": "-s",
        "roc_auc": "-^",
        "true_sparsity": "--",
        "predicted_sparsity": "-.",
        "energy_lost": ":",
    }
    for name, style in curves.items():
        axes.plot(layers, [getattr(quality, name) for quality in qualities], style, label=name.replace("_", " "))
    axes.set(xlabel="layer", ylim=(0, 1.02), title=f"predictors on {qualities[0].tokens:,} tokens")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot write the plot {path}: {error}") from None


def _watch(layer: sites.LayerSites, plan: Plan, counts: _Counts) -> list[Any]:
    """Hooks that count one layer: x comes first, then the gate, then what goes into down."""
    rules = plan.layer_rules(layer.index)
    down = layer.linear("down").weight.detach()
    norms = down.float().norm(dim=0)
    a, b, bias = (rules[f"ffn.predictor_{part}"].to(down.device) for part in ("a", "b", "bias"))
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        def take(value: torch.Tensor) -> None:
            seen[name] = value.reshape(-1, value.shape[-1])

        return take

    def finish(value: torch.Tensor) -> None:
        score = seen["ffn_in"].float() @ a.T @ b.T + bias
        active, predicted = seen["gate"] > 0, score > 0
        energy = (value.reshape(score.shape).float() * norms).square()
        counts.hits += int((active & predicted).sum())
        counts.predicted += int(predicted.sum())
        counts.active += int(active.sum())
        counts.pairs += score.numel()
        counts.tokens += len(score)
        counts.lost += float(energy.masked_fill(predicted, 0.0).double().sum())
        counts.energy += float(energy.double().sum())
        rank = _rank(score)
        for which, mask in enumerate((~active, active)):
            counts.ranks[which] += torch.bincount(rank[mask], minlength=1 << _RANK_BITS).cpu()
        seen.clear()

    return [layer.tap("ffn_in", keep("ffn_in")), layer.tap("gate", keep("gate")), layer.tap("value", finish)]


def _rank(score: torch.Tensor) -> torch.Tensor:
    """Bins in the order of the scores: the float's bits as an integer, negative ones turned around."""
    bits = score.contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered >> (32 - _RANK_BITS)).long() + (1 << (_RANK_BITS - 1))

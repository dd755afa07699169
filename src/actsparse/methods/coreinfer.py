"""CoreInfer: sentence-level core neurons, from the prompt itself or from the cluster of texts that it belongs to.

Wang et al., "CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse Activation",
arXiv:2410.18311, sections 3 (core neurons) and 4 (stability- and similarity-guided prediction).

A token's core neurons are the top fraction alpha of its active neurons by ``|g u|``; a text's are the top fraction beta of
the neurons by how many of its tokens have them among theirs.  Three things the paper leaves open or that differ here:

- Tied counts (the rule in short prompts) go to the neuron of larger summed ``|g u|``, every token in units of its own
  alpha-level.  Equal sums go to the lower index.
- ``auto`` compares the two modes on the prompt: each chooses from the first half of its tokens, and the prompt's own set
  wins if it leads by more than :data:`LEAD` * (n ** -0.5 - :data:`ENOUGH` ** -0.5) in the share that it covers of what the
  best set of its size would cover of the second half's counts, n the tokens of that half.  A lead over few tokens is easily
  chance, and what follows is longer than they are; over many the whole prompt's set is better than its first half's and
  may trail here.
- ``blend`` (ours, not in the paper) adds the cluster's frequencies to the prompt's counts as if the cluster had shown
  :data:`PRIOR_TOKENS` tokens.

Shape letters: W windows, T tokens, N neurons, K clusters, L sparsified layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from actsparse import kernels
from actsparse.methods.base import Calibrated, Layer, Method, MethodError, Solution, Targets
from actsparse.methods.prompt import Choice, PromptRule, best, layer_range, prompt_solution, setting
from actsparse.methods.statistics import Batch, CalibrationError, Statistic, core_count, core_statistics
from actsparse.plan import PlanError

MODES = ("auto", "stability", "similarity", "blend")
RANKINGS = ("magnitude", "positive")
CLUSTERINGS = ("elbow", "silhouette", "domains")
MOST_CLUSTERS = 16
# Between 16 and 64 the choice hardly matters on the reference models; a short prompt gains more from 64.
PRIOR_TOKENS = 64
# Fitted on half of the calibration text with the other half's clusters (docs/coreinfer.md).
LEAD, ENOUGH = 2.0, 48
_RELU = ("relu", "relu2")


class CoreInfer(Method):
    """Decode on the prompt's core neurons.

    Args:
        alpha: fraction of a token's active neurons that are its core neurons.  The paper's is 0.4; on the reference models
            0.02 was better at every beta and prompt length.
        mode: ``stability`` (the prompt's own neurons), ``similarity`` (those of its cluster), ``auto`` or ``blend``.
        ranking: ``magnitude`` ranks by ``|g u|``, ``positive`` by ``g u`` where it is above 0 (the paper, for ReLU).
        clusters: ``elbow`` or ``silhouette`` (k-means), ``domains`` (the text's labels), or a number of clusters.
        layers: the layers sparsified, (first, last) or ``"FIRST-LAST"``; by default all but the first eighth (at least one),
            as in the paper.
    """

    name = "coreinfer"
    source = "arXiv:2410.18311"
    packing = "documents"
    window = 256
    scopes = ("decode",)
    options = {  # noqa: RUF012
        "alpha": {"type": float, "help": "fraction of a token's neurons that count as its core (default: 0.02)"},
        "mode": {"choices": MODES, "help": "where a prompt's neurons come from (default: auto)"},
        "ranking": {
            "choices": RANKINGS,
            "help": "rank |g u| (magnitude, default) or positive values only (ReLU models)",
        },
        "clusters": {"help": f"{', '.join(CLUSTERINGS)} or a number (default: elbow)"},
        "layers": {"metavar": "FIRST-LAST", "help": "layers to sparsify (default: all but the first eighth)"},
    }

    def __init__(
        self,
        alpha: float = 0.02,
        mode: str = "auto",
        ranking: str = "magnitude",
        clusters: str | int = "elbow",
        layers: str | Sequence[int] | None = None,
    ) -> None:
        if not 0 < alpha <= 1:
            raise MethodError(f"alpha is {alpha}, expected 0 < alpha <= 1")
        for name, value, known in (("mode", mode, MODES), ("ranking", ranking, RANKINGS)):
            if value not in known:
                raise MethodError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        if isinstance(clusters, str) and clusters.isdigit():
            clusters = int(clusters)
        if clusters not in CLUSTERINGS and not (isinstance(clusters, int) and clusters >= 1):
            raise MethodError(f"clusters is {clusters!r}, expected {', '.join(CLUSTERINGS)} or a number from 1 on")
        self.alpha = alpha
        self.mode = mode
        self.ranking = ranking
        self.clusters = clusters
        self.layers = layer_range(layers)

    @property
    def phases(self) -> tuple[tuple[float, float], ...]:  # type: ignore[override]
        """None where the prompt alone decides: then calibration needs no text."""
        return () if self.mode == "stability" else ((0.0, 1.0),)

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        self._check_activation(layer)
        counts = CoreCounts(self.alpha, self.ranking, sparse=layer.model.activation in _RELU)
        return {f"core/{self.alpha:g}/{self.ranking}": counts}

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        self._check_activation(layers[0].layer)
        settings = {
            "rule": self.name,
            "alpha": self.alpha,
            "mode": self.mode,
            "ranking": self.ranking,
            "sparse": layers[0].layer.model.activation in _RELU,
        }
        solution = prompt_solution(layers, targets, self.layers, settings)
        first, last = solution.prompt["layers"]
        if self.mode == "stability":
            return solution
        counts: list[CoreCounts] = [
            next(iter(calibrated.statistics.values()))  # type: ignore[misc]
            for calibrated in layers[first : last + 1]
        ]
        middle = (last - first) // 2
        labels, names = cluster(counts[middle].frequency, counts[middle].domains, self.clusters)
        frequency = torch.stack([per_cluster(layer.frequency, labels) for layer in counts])
        solution.rules["prompt.frequency"] = frequency
        solution.prompt["feature_layer"] = first + middle
        solution.prompt["clusters"] = names
        solution.facts["windows_per_cluster"] = torch.bincount(labels).tolist()
        return solution

    def _check_activation(self, layer: Layer) -> None:
        if self.ranking == "positive" and layer.model.activation not in _RELU:
            raise MethodError(f"ranking positive is for ReLU models, this one's activation is {layer.model.activation}")


class CoreCounts(Statistic):
    """Per window, how many tokens have each neuron among their core neurons; memory grows by N * 4 bytes a window."""

    def __init__(self, alpha: float, ranking: str, *, sparse: bool) -> None:
        self.taps = ("value",)
        self._settings = (alpha, ranking, sparse)
        self._counts: list[torch.Tensor] = []
        self._tokens = 0
        self.domains: tuple[str, ...] = ()

    def update(self, values: Mapping[str, torch.Tensor], batch: Batch) -> None:
        x = values["value"]
        if not bool(x.isfinite().all()):
            raise CalibrationError(
                f"{int((~x.isfinite()).sum())} activations are NaN or infinite, expected finite values"
            )
        self._tokens = x.shape[1]
        for window in x:
            alpha, ranking, sparse = self._settings
            self._counts.append(core_sums(window, alpha, ranking, sparse=sparse)[0].cpu())
        self.domains = (*self.domains, *batch.domains)

    def state(self) -> dict[str, torch.Tensor]:
        labels = json.dumps([self._tokens, self.domains]).encode()
        return {
            "counts": torch.stack(self._counts) if self._counts else torch.zeros(0, 0),
            "labels": torch.tensor(list(labels), dtype=torch.uint8),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self._counts = list(state["counts"])
        self._tokens, domains = json.loads(bytes(state["labels"].tolist()))
        self.domains = tuple(domains)

    @property
    def frequency(self) -> torch.Tensor:
        """Fraction of each window's tokens, float32 [W, N]."""
        return torch.stack(self._counts) / self._tokens


def strengths(values: torch.Tensor, ranking: str) -> torch.Tensor:
    """What neurons are ranked by, float32 [T, N], 0 where one is not active."""
    return values.float().abs() if ranking == "magnitude" else values.float().clamp(min=0)


def core_level(values: torch.Tensor, alpha: float, ranking: str, *, sparse: bool) -> torch.Tensor:
    """Per token, the strength of the last of its core neurons, float32 [T, 1].

    Arguments as for :func:`actsparse.methods.statistics.core_statistics`, ``ranking`` as for :class:`CoreInfer`.
    """
    return core_statistics(values, alpha, positive=ranking == "positive", sparse=sparse)[0][:, None]


def core_sums(values: torch.Tensor, alpha: float, ranking: str, *, sparse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all tokens: how many have each neuron in their core, and its strengths in units of their levels, float32 [N]."""
    if not len(values):
        empty = values.new_zeros(2, values.shape[1], dtype=torch.float32)
        return empty[0], empty[1]
    return core_statistics(values, alpha, positive=ranking == "positive", sparse=sparse)[1:]


def cluster(features: torch.Tensor, domains: Sequence[str], clusters: str | int) -> tuple[torch.Tensor, list[str]]:
    """Labels [W] of the windows and the clusters' names.

    Args:
        features: float32 [W, N].
        domains: the windows' labels.
        clusters: as for :class:`CoreInfer`.
    """
    if clusters == "domains":
        names = sorted(set(domains))
        if names == [""]:
            raise MethodError("clusters is 'domains', but the text has no domain labels (a 'domain' field in .jsonl)")
        return torch.tensor([names.index(domain) for domain in domains]), names
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
    except ImportError:
        raise MethodError("clustering needs scikit-learn: pip install 'actsparse[cluster]'") from None
    points = features.numpy()
    if isinstance(clusters, int):
        if clusters > len(points):
            raise MethodError(f"clusters is {clusters}, expected at most the text's {len(points)} windows")
        choices = [clusters]
    else:
        choices = list(range(2, min(MOST_CLUSTERS, len(points) - 1) + 1)) or [1]
    fits = [KMeans(k, n_init=4, random_state=0).fit(points) for k in choices]
    chosen = fits[0]
    if len(fits) > 1 and clusters == "silhouette":
        chosen = max(fits, key=lambda fit: silhouette_score(points, fit.labels_))
    elif len(fits) > 1:
        chosen = fits[elbow([fit.inertia_ for fit in fits])]
    return torch.from_numpy(chosen.labels_).long(), [str(index) for index in range(chosen.n_clusters)]


def elbow(inertias: Sequence[float]) -> int:
    """Index of the point of a falling curve that lies furthest below the line between its ends."""
    y = np.asarray(inertias)
    line = np.linspace(y[0], y[-1], len(y))
    return int(np.argmax(line - y))


def per_cluster(frequency: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean frequency of each cluster's windows, float32 [K, N]."""
    return torch.stack([frequency[labels == label].mean(0) for label in range(int(labels.max()) + 1)])


class CoreRule(PromptRule):
    """Scores are float32 [2, N + 1]: core counts and summed strengths.  The last column counts the tokens."""

    def __init__(self, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(settings, tensors)
        self.alpha = float(setting(settings, "alpha", (int, float)))
        self.mode = setting(settings, "mode", str)
        self.ranking = setting(settings, "ranking", str)
        self.sparse = settings.get("sparse") is True
        if not 0 < self.alpha <= 1 or self.mode not in MODES or self.ranking not in RANKINGS:
            raise PlanError(
                f"plan's prompt settings are alpha {self.alpha}, mode {self.mode!r}, ranking {self.ranking!r}"
            )
        self.halves = self.mode == "auto"
        self.frequency: torch.Tensor | None = None
        if self.mode == "stability":
            return
        self.frequency = tensors.get("prompt.frequency")
        self.feature_layer = int(setting(settings, "feature_layer", int))
        self.names = setting(settings, "clusters", list)
        want = (len(self.layers), len(self.names))
        if self.frequency is None or self.frequency.dim() != 3 or tuple(self.frequency.shape[:2]) != want:
            shape = None if self.frequency is None else list(self.frequency.shape)
            raise PlanError(f"prompt.frequency has shape {shape}, expected [{want[0]}, {want[1]}, neurons]")
        if self.feature_layer not in self.layers:
            raise PlanError(f"feature_layer is {self.feature_layer}, expected a layer of {self.layers}")

    def score(self, values: torch.Tensor) -> torch.Tensor:
        rows = core_sums(values, self.alpha, self.ranking, sparse=self.sparse)
        total = values.new_full((2, 1), len(values), dtype=torch.float32)
        return torch.cat([torch.stack(rows), total], 1)

    def score_parts(self, values: torch.Tensor, stops: Sequence[int]) -> torch.Tensor:
        if values.is_cpu:
            return super().score_parts(values, stops)
        count = core_count(values.shape[1], self.alpha, sparse=self.sparse)
        return kernels.core_parts(values, stops, count, self.alpha, positive=self.ranking == "positive")

    def choose(self, scores: Mapping[int, torch.Tensor]) -> Choice:
        # All layers in one operation each: on a GPU a prompt is read in less time than a thousand of these take.
        device = scores[self.layers.start].device  # of a model over several, the first layer's
        layers = torch.stack([scores[layer].to(device) for layer in self.layers])
        whole = _keys(layers.sum(1))
        if self.mode == "stability":
            return self._choice(whole, {"mode": "stability"})
        cluster = self._nearest(layers.sum(1))
        facts: dict[str, Any] = {"mode": self.mode, "cluster": self.names[cluster]}
        if self.mode == "auto":
            own, other = self._coverage(layers)
            tokens = max(float(layers[0, 1, 0, -1]), 1.0)  # a sequence may be padding alone
            chosen = "stability" if own - other > LEAD * (tokens**-0.5 - ENOUGH**-0.5) else "similarity"
            facts |= {"mode": chosen, "own": own, "cluster_coverage": other}
        if facts["mode"] == "stability":
            return self._choice(whole, facts)
        of_cluster = self._frequencies(layers.device)[:, cluster]
        return self._choice(whole + PRIOR_TOKENS * of_cluster if facts["mode"] == "blend" else of_cluster, facts)

    def _choice(self, scores: torch.Tensor, facts: Mapping[str, Any]) -> Choice:
        """Of scores [L, N]."""
        return Choice(dict(zip(self.layers, self._sets(scores), strict=True)), facts)

    def _sets(self, scores: torch.Tensor) -> list[torch.Tensor]:
        """The best of scores [L, N], per layer."""
        counts = list(self.counts.values())
        if len(set(counts)) == 1:
            return list(best(scores, counts[0]).unbind(0))
        return [best(score, count) for score, count in zip(scores, counts, strict=True)]

    def _frequencies(self, device: torch.device) -> torch.Tensor:
        """Float32 [L, K, N], sent to a device once."""
        assert self.frequency is not None
        if self.frequency.device != device:
            self.frequency = self.frequency.to(device)
        return self.frequency

    def _nearest(self, layers: torch.Tensor) -> int:
        """The cluster whose mean frequencies are nearest (Euclidean) to those of [L, S, N + 1], at the feature layer."""
        place = self.feature_layer - self.layers.start
        counts, centres = layers[place, 0], self._frequencies(layers.device)[place]
        return int(torch.cdist(counts[None, :-1] / counts[-1].clamp(min=1), centres)[0].argmin())

    def _coverage(self, layers: torch.Tensor) -> tuple[float, float]:
        """How much of the second half's counts the first half's own set covers, and its cluster's set (0 to 1)."""
        first, counted = layers[:, 0], layers[:, 1, 0, :-1]
        if not first[0, 0, -1]:
            return 0.0, 1.0  # one token has no halves
        cluster = self._nearest(first)
        by = [_keys(first), self._frequencies(layers.device)[:, cluster], counted]
        by_own, by_other, total = torch.stack([self._covered(scores, counted) for scores in by]).tolist()
        return (by_own / total, by_other / total) if total else (0.0, 1.0)  # nothing active: the prompt says nothing

    def _covered(self, scores: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """How much of ``counted`` [L, N] the sets of best scores [L, N] have together."""
        order = torch.sort(scores, descending=True, stable=True).indices
        counts = torch.tensor(list(self.counts.values()), device=scores.device)
        chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
        return (counted.gather(1, order) * chosen).sum(dtype=torch.float64)


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """Counts of [L, 2, N + 1] with their ties broken by strength, float64 [L, N]: the fraction must not be lost beside them."""
    counts, fraction = scores[:, 0, :-1].double(), scores[:, 1, :-1].double()
    return counts + fraction / (1 + fraction.amax(1, keepdim=True))

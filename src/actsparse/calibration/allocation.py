"""Greedy allocation: where in a model a given amount of skipping hurts least.

TEAL's block-wise algorithm (Liu et al., arXiv:2408.14690, section 4.2) per decoder layer: all sparsities start at 0; again
and again the one site is raised whose raise adds least, per weight byte that it skips, to the squared error of the layer's
output; this is logged until 0.9 of the layer's bytes are skipped.

What is done with the log depends on the method's ``budget``.  ``layer`` (TEAL): every layer skips the same share of its
bytes, split over its sites as its log says.  ``model`` (CHESS and the others): one budget for all layers; their logs are
merged by always advancing the layer whose next step costs least, each layer's error weighted with what one unit of it does
to the model's predictions (the Kullback-Leibler divergence from the dense model, measured once per layer).

A sparsity s is the share of the bytes at the method's sites that is skipped, so that it means the same, byte for byte,
as s at every site.

Three departures from TEAL.  A raise that was rejected is tried again only when its last known cost says that it could win
now: squared errors of different sites nearly add up, so costs age slowly, and a step takes two forwards instead of seven.
Small matrices are raised in smaller steps than large ones of the same number of bytes would be (0.15 at most).  And the
error is a plain sum of squares over tokens and channels, without each window's first token, on which models park outliers
that would drown everything else.

Shape letters: W windows, L tokens in a window, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from actsparse.methods.base import Calibrated, Method, MethodError, Targets
from actsparse.models import caches, sites
from actsparse.models.sites import ModelError
from actsparse.plan import PlanError, atomic_path

ALLOCATIONS = ("uniform", "greedy")
TOKENS = 1024
WINDOW = 256
LIMIT = 0.9
# A step is so large a part of a layer's weights, but never raises a site by more than this. In a layer of the usual shape
# that is 0.06 for gate, up and down; the authors' step is 4 times finer, and takes 4 times as long.
STEPS = 65
LARGEST_RAISE = 0.15
# Sites are raised at most so far: a quantile of 1 would skip everything that calibration saw.
HIGHEST = 0.99
# The level at which a layer's effect on the predictions is measured.
_REFERENCE_LEVEL = 0.5


class Progress(Protocol):
    """Told after every layer how many tokens' worth of work is done, of how much."""

    def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Step:
    """One line of a layer's log.

    Attributes:
        skipped: share of the bytes at the layer's sites that is skipped.
        error: squared error of the layer's output over the squared norm of what the layer adds to its input.
        sparsity: per site.
    """

    skipped: float
    error: float
    sparsity: Mapping[str, float]


@dataclass
class Allocation:
    """The log of every layer, and how to read targets from it.

    Attributes:
        method: name of the method.
        budget: ``layer`` or ``model``.
        key: what the log depends on.
        sizes: bytes at the sites of one layer, per layer.
        layers: the log, per layer.
        effects: per layer, divergence of the predictions per unit of error (``model`` budgets only).
    """

    method: str
    budget: str
    key: str
    sizes: list[int] = field(default_factory=list)
    layers: list[list[Step]] = field(default_factory=list)
    effects: list[float] = field(default_factory=list)

    def targets(self, sparsity: float) -> Targets:
        """The sparsity of every site of every layer when ``sparsity`` of the bytes at the sites is skipped in all."""
        shares = self._shares(sparsity)
        return Targets(
            sparsity,
            {
                (layer, site): value
                for layer, (log, share) in enumerate(zip(self.layers, shares, strict=True))
                for site, value in _at(log, share).items()
            },
        )

    def describe(self) -> dict[str, Any]:
        """What a plan's settings record."""
        return {"allocation": "greedy", "allocation_budget": self.budget, "allocation_sha256": self.key}

    def save(self, path: Path) -> None:
        """Write the log as JSON."""
        with atomic_path(path) as temporary:
            Path(temporary).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Allocation:
        """Read a log; PlanError when it is not one."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            document["layers"] = [[Step(**step) for step in log] for log in document["layers"]]
            return cls(**document)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise PlanError(f"allocation log {path} cannot be read: {error}") from None

    def _shares(self, sparsity: float) -> list[float]:
        """Share skipped per layer."""
        if self.budget == "layer":
            return [sparsity] * len(self.layers)
        wanted = sparsity * sum(self.sizes)
        place = [0] * len(self.layers)
        shares = [0.0] * len(self.layers)
        spent = 0.0

        def price(layer: int) -> float:
            now, then = self.layers[layer][place[layer]], self.layers[layer][place[layer] + 1]
            return self.effects[layer] * (then.error - now.error) / ((then.skipped - now.skipped) * self.sizes[layer])

        heap = [(price(layer), layer) for layer in range(len(self.layers)) if len(self.layers[layer]) > 1]
        heapq.heapify(heap)
        while heap and spent < wanted:
            _, layer = heapq.heappop(heap)
            place[layer] += 1
            gained = (self.layers[layer][place[layer]].skipped - shares[layer]) * self.sizes[layer]
            # The last step is taken in part, so that the budget is met exactly.
            part = min(1.0, (wanted - spent) / gained)
            shares[layer] += part * gained / self.sizes[layer]
            spent += part * gained
            if part == 1 and place[layer] + 1 < len(self.layers[layer]):
                heapq.heappush(heap, (price(layer), layer))
        # Past the logs: every layer by the same part of what it still reads.
        rest = max(0.0, wanted - spent) / max(1.0, sum(self.sizes) - spent)
        return [share + rest * (1 - share) for share in shares]


def _at(log: Sequence[Step], share: float) -> dict[str, float]:
    """The sites' sparsity where ``share`` of the bytes is skipped, linear between the log's lines."""
    for before, after in itertools.pairwise(log):
        if share <= after.skipped:
            part = (share - before.skipped) / (after.skipped - before.skipped)
            return {site: low + part * (after.sparsity[site] - low) for site, low in before.sparsity.items()}
    # Past the log: every site by the same part of what it still computes, which again meets the share.
    last = log[-1]
    part = (share - last.skipped) / (1 - last.skipped) if share > last.skipped else 0.0
    return {site: value + part * (1 - value) for site, value in last.sparsity.items()}


def allocate(
    model: Any,
    method: Method,
    calibrated: Sequence[Calibrated],
    tokens: torch.Tensor,
    *,
    steps: int = STEPS,
    log: Path | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Run the greedy search over every layer of the dense ``model``.

    Args:
        model: the dense model the statistics are from.
        method: a method whose rules are thresholds at its ``sites``.
        calibrated: its statistics, per layer.
        tokens: calibration windows, int64 [W, L]; a sample of them is used.
        steps: how many equal parts of a layer's bytes there are; one step skips at most one part.
        log: where the log is kept; layers that are in it already, from the same settings, are not searched again.
        progress: called after every layer.

    Raises:
        MethodError: the method has no sites, or rules that are not thresholds.
    """
    sample = sample_windows(tokens)
    layers = sites.layers_of(model)
    sizes = site_bytes(model, method)
    key = _key(method, calibrated, sample, steps, str(model.dtype))
    found = Allocation(method.name, method.budget, key)
    if log is not None and log.is_file():
        with contextlib.suppress(PlanError):
            earlier = Allocation.load(log)
            found = earlier if earlier.key == key else found
    for layer, stats in list(zip(layers, calibrated, strict=True))[len(found.layers) :]:
        block = _Block(model, layer, _Rules(method, stats), sample)
        path = _search(block, sizes[layer.index], steps)
        found.layers.append(path)
        found.sizes.append(sum(sizes[layer.index].values()))
        if method.budget == "model":
            found.effects.append(block.effect(_at(path, _REFERENCE_LEVEL)))
        if log is not None:
            found.save(log)
        if progress:
            progress((layer.index + 1) * sample.numel(), len(layers) * sample.numel())
    return found


def sample_windows(tokens: torch.Tensor) -> torch.Tensor:
    """About :data:`TOKENS` tokens of [W, L], evenly spread: int64 [W', L'] with L' at most :data:`WINDOW`."""
    length = min(WINDOW, int(tokens.shape[1]))
    count = min(max(1, TOKENS // length), len(tokens))
    rows = torch.linspace(0, len(tokens) - 1, count).round().long()
    return tokens[rows, :length]


def site_bytes(model: Any, method: Method) -> list[dict[str, int]]:
    """Per layer, the weight bytes that each of the method's sites decides about (``ffn``: up, if there is a gate, and down)."""
    if not method.sites:
        raise MethodError(f"method {method.name} has no sites to allocate over: expected --allocation uniform")
    sizes = []
    for layer in sites.layers_of(model):
        weights = {name: layer.linear(name).weight for name, _ in layer.family.projections}
        one = {name: weight.numel() * weight.element_size() for name, weight in weights.items()}
        # Without a gate it is up that decides, and is read in full.
        if layer.family.has_ffn:
            one["ffn"] = one["up"] + one["down"] if layer.family.gated else one["down"]
        sizes.append({site: one[site] for site in method.sites if site in one})
    return sizes


def _key(method: Method, calibrated: Sequence[Calibrated], sample: torch.Tensor, steps: int, dtype: str) -> str:
    """SHA-256 of all that a log depends on; the statistics enter through the rules they give at one level."""
    digest = hashlib.sha256(json.dumps([method.name, method.settings, method.budget, steps, dtype]).encode())
    digest.update(calibrated[0].layer.model.fingerprint.encode())
    digest.update(sample.numpy().tobytes())
    rules = method.solve(calibrated, Targets(_REFERENCE_LEVEL)).rules
    for name in sorted(rules):
        digest.update(name.encode() + rules[name].numpy().tobytes())
    return digest.hexdigest()


class _Rules:
    """Thresholds of one layer by site and level, solved when they are first asked for."""

    def __init__(self, method: Method, calibrated: Calibrated) -> None:
        self._method = method
        self._calibrated = calibrated
        self._known: dict[tuple[str, float], torch.Tensor] = {}

    def __call__(self, site: str, level: float) -> torch.Tensor:
        known = self._known.get((site, level))
        if known is None:
            index = self._calibrated.layer.index
            solution = self._method.solve([self._calibrated], Targets(0.0, {(index, site): level}))
            name = f"layers.{index}.{site}.threshold"
            others = [rule for rule in solution.rules if not rule.endswith(".threshold")]
            if name not in solution.rules or others:
                raise MethodError(
                    f"method {self._method.name} has rules other than thresholds: only those can be allocated"
                )
            known = self._known[site, level] = solution.rules[name]
        return known


class _Block:
    """One decoder layer on a fixed sample: its output error, and its effect on the predictions, under thresholds."""

    def __init__(self, model: Any, layer: sites.LayerSites, rules: _Rules, sample: torch.Tensor) -> None:
        self._model, self._layer, self._rules = model, layer, rules
        self._sample = sample.to(model.device)
        self._arguments = _capture(model, layer, self._sample)
        self._dense = self._forward()
        hidden = self._arguments[0][0] if self._arguments[0] else self._arguments[1]["hidden_states"]
        self._norm = _square(self._dense - hidden)

    def error(self, sparsity: Mapping[str, float]) -> float:
        """Squared error of the output with these sparsities, relative to what the layer adds to its input."""
        with self._under(sparsity):
            return _square(self._forward() - self._dense) / self._norm

    def effect(self, sparsity: Mapping[str, float]) -> float:
        """Mean divergence (nats) of the model's predictions when this layer alone is sparsified, per unit of error."""
        total = 0.0
        for window in self._sample.split(1):
            with torch.inference_mode():
                dense = F.log_softmax(self._model(input_ids=window, use_cache=False).logits.float(), -1)
                with self._under(sparsity):
                    sparse = F.log_softmax(self._model(input_ids=window, use_cache=False).logits.float(), -1)
            total += float(F.kl_div(sparse, dense, reduction="sum", log_target=True))
        return total / self._sample.numel() / max(self.error(sparsity), torch.finfo(torch.float32).tiny)

    def _forward(self) -> torch.Tensor:
        """The layer's output [W, L, H]."""
        args, kwargs = self._arguments
        with torch.inference_mode():
            output = self._layer.module(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextlib.contextmanager
    def _under(self, sparsity: Mapping[str, float]) -> Iterator[None]:
        """Apply thresholds inside the dense layer: masks make the same values as skipping, at dense cost."""
        handles = [_mask(self._layer, site, self._rules(site, level)) for site, level in sparsity.items() if level > 0]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _mask(layer: sites.LayerSites, site: str, threshold: torch.Tensor) -> Any:
    """Hook ``site`` so that values under ``threshold`` become 0."""

    def masked(value: torch.Tensor) -> torch.Tensor:
        return torch.where(value.abs() < threshold.to(value.device), 0, value)

    if site == "ffn":
        activation = layer.module.get_submodule(layer.family.activation_module)
        return activation.register_forward_hook(lambda module, args, output: masked(output))
    return layer.linear(site).register_forward_pre_hook(lambda module, args: (masked(args[0]),))


class _Captured(Exception):
    pass


def _capture(model: Any, layer: sites.LayerSites, sample: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which the dense model calls ``layer`` on ``sample`` [W, L]; later layers do not run."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Captured

    handle = layer.module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with torch.inference_mode(), contextlib.suppress(_Captured):
            model.get_decoder()(input_ids=sample, use_cache=False)
    finally:
        handle.remove()
    args, kwargs = seen[0]
    if caches.cache_in([*args, *kwargs.values()]) is not None:
        # Called again and again, the layer would look at what it left there the time before.
        raise ModelError("a forward with use_cache=False hands its layers a key/value cache, expected none")
    return args, kwargs


def _square(values: torch.Tensor) -> float:
    """Sum of squares of [W, L, H] without each window's first token."""
    return float(values[:, 1:].double().square().sum())


def _search(block: _Block, sizes: Mapping[str, int], steps: int) -> list[Step]:
    """One layer's log, from nothing skipped to :data:`LIMIT` of its bytes."""
    total = sum(sizes.values())
    raises = {site: min(LARGEST_RAISE, total / steps / size) for site, size in sizes.items()}
    return climb(block.error, raises, {site: size / total for site, size in sizes.items()})


def climb(
    error: Callable[[Mapping[str, float]], float], raises: Mapping[str, float], shares: Mapping[str, float]
) -> list[Step]:
    """The greedy log of ``error`` over sites: always the raise that costs least per byte.

    Args:
        error: squared error for given sparsities; 0 when all are 0.
        raises: what one step adds to the sparsity of each site.
        shares: each site's share of the bytes.
    """
    level = dict.fromkeys(raises, 0.0)
    log = [Step(0.0, 0.0, dict(level))]
    # (cost per byte as last measured, site, length of the log when it was measured), cheapest first.
    heap: list[tuple[float, str, int]] = [(-math.inf, site, 0) for site in raises]
    while heap and log[-1].skipped < LIMIT:
        cost, site, measured = heapq.heappop(heap)
        raised = min(HIGHEST, level[site] + raises[site])
        gained = shares[site] * (raised - level[site])
        if measured != len(log):
            if gained > 0:
                increase = error({**level, site: raised}) - log[-1].error
                heapq.heappush(heap, (increase / gained, site, len(log)))
            continue
        level[site] = raised
        log.append(Step(log[-1].skipped + gained, log[-1].error + cost * gained, dict(level)))
        # The site's next raise is taken to cost as much, until it is measured.
        heapq.heappush(heap, (cost, site, 0))
    return log

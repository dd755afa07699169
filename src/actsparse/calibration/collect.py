"""Calibration: stream text through the dense model, feed the methods' statistics, write plans.

The model runs once over each phase's tokens, without its output head.  Progress is saved beside the plan now and then
(and on Ctrl-C); the next run with the same settings goes on from there and ends in the identical plan.

Shape letters: B windows in a batch, L tokens in a window.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from actsparse.calibration.allocation import ALLOCATIONS, Allocation, allocate
from actsparse.calibration.budget import Budget, Scorer, search
from actsparse.calibration.observing import observe
from actsparse.calibration.signals import DeferredSignals
from actsparse.methods import Method, make
from actsparse.methods.base import HEAD, Calibrated, Layer, MethodError, Targets
from actsparse.methods.statistics import MAX_TOKENS, Batch, CalibrationError, Statistic
from actsparse.models import fused, sites, text
from actsparse.plan import SCOPES, ModelIdentity, Plan, PlanError, atomic_path

BATCH_TOKENS = 2048
SAVE_EVERY_SECONDS = 30.0


class Progress(Protocol):
    """Told after every batch how many tokens are done, of how many."""

    def __call__(self, done: int, total: int) -> None: ...


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str] | None,
    *,
    method: str = "chess",
    sparsity: float | Sequence[float] | None = None,
    tokens: int | None = 65536,
    window: int | None = None,
    scope: str | None = None,
    allocation: str = "uniform",
    budget: Budget | None = None,
    scorer: Scorer | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Any:
    """Calibrate ``method`` on ``texts`` and return its plan.

    Args:
        model: a Hugging Face causal language model of a supported family.
        tokenizer: its tokenizer.
        texts: a file, a hub dataset (see :func:`actsparse.models.text.read_documents`) or a list of strings;
            None for a method that needs no text.
        method: name of the method.
        sparsity: target, 0 <= sparsity < 1; None for the method's own (0.5, svdp 0.4); a sequence costs one calibration and
            returns a list of plans.
        tokens: how many tokens to use; None for the whole text.
        window: tokens per window; by default the method's (mostly 1024) or the model's context if shorter.
        scope: which tokens the plan sparsifies, ``all``, ``decode`` or ``last_half``; by default ``all``, or ``decode`` for
            a method that chooses neurons per prompt.
        allocation: ``uniform``, or ``greedy`` to spend the sparsity where it hurts least (:mod:`.allocation`).
        budget: find the sparsity that meets it instead of taking ``sparsity`` (:mod:`.budget`).
        scorer: what measures plans for ``budget``; ``actsparse.calibrate`` hands in :func:`actsparse.measure.evaluate.scorer`.
        output: where the plan is written (with several targets: one file each, see :func:`plan_paths`), and beside it
            the progress of an interrupted run and the log of a greedy allocation (``.allocation.json``).
        progress: called after every batch.
        **settings: the method's own options, for instance ``attention=False``.

    Raises:
        MethodError, TextError, ModelError, CalibrationError, PlanError: with one line that names what was wrong.
    """
    chosen = make(method, **settings)
    if sparsity is None:
        sparsity = chosen.sparsity
    targets = [sparsity] if isinstance(sparsity, int | float) else list(sparsity)
    check_sparsity(targets)
    for target in targets if budget is None else ():
        chosen.check_target(target)
    if allocation not in ALLOCATIONS:
        raise CalibrationError(f"allocation {allocation!r} is unknown: expected one of {', '.join(ALLOCATIONS)}")
    if budget is not None and scorer is None:
        raise CalibrationError("a budget was given without a scorer, expected both (actsparse.calibrate hands one in)")
    scope = check_scope(chosen, scope)
    if chosen.scopes == ("decode",) and allocation != "uniform":
        raise CalibrationError(f"allocation is {allocation!r}, {method} chooses neurons per prompt: expected uniform")
    if output is not None:
        check_writable(output)
    needs_text = bool(chosen.phases) or chosen.activity or budget is not None
    if texts is None and needs_text:
        raise text.TextError(f"no text given, {method} needs some to calibrate on")
    if texts is None or not needs_text:
        windows = text.NO_TEXT
    else:
        windows = load_calibration_windows(
            model, tokenizer, texts, tokens=tokens, window=window, packing=chosen.packing, default=chosen.window
        )
    run = Calibration(model, windows, [chosen])
    partial = None if output is None else Path(f"{output}.partial")
    calibrated = run.collect(progress=progress, partial=partial)[chosen.name]
    log = None if output is None else Path(f"{output}.allocation.json")
    found: Allocation | None = None
    if allocation == "greedy":
        found = allocate(model, chosen, calibrated, windows.tokens, log=log, progress=progress)

    def solve(target: float) -> Plan:
        plan = run.solve(chosen, calibrated, found.targets(target) if found else Targets(target), scope=scope)
        return replace(plan, settings={**plan.settings, **found.describe()}) if found else plan

    if budget is None or scorer is None:
        plans = [solve(target) for target in targets]
    else:
        spent = search(model, solve, windows, budget, scorer, highest=chosen.highest, progress=progress)
        plans, targets = [spent.plan], [spent.plan.sparsity]
    if output is not None:
        for plan, path in zip(plans, plan_paths(output, targets), strict=True):
            plan.save(path)
        run.discard(Path(f"{output}.partial"))
    fused.fuse(model)
    return plans[0] if isinstance(sparsity, int | float) or budget is not None else plans


def check_sparsity(targets: Sequence[float]) -> None:
    """CalibrationError unless there is at least one target and each is in [0, 1)."""
    if not targets:
        raise CalibrationError("no sparsity given, expected at least one value")
    for target in targets:
        if not 0 <= target < 1:
            raise CalibrationError(f"sparsity is {target}, expected 0 <= sparsity < 1")


def check_scope(method: Method, scope: str | None) -> str:
    """The scope to use for ``method``: ``scope``, or the method's default for None; PlanError for one it cannot have."""
    if scope is None:
        return method.scopes[0]
    if scope not in SCOPES:
        raise PlanError(f"scope {scope!r} is unknown: expected one of {', '.join(SCOPES)}")
    if scope not in method.scopes:
        raise PlanError(f"scope is {scope!r}, expected {' or '.join(method.scopes)}: {method.name} runs prompts dense")
    return scope


def check_writable(output: str | os.PathLike[str]) -> None:
    """PlanError unless a file can be made at ``output``: found out before the minutes of work, not after."""
    with contextlib.suppress(_Abandon), atomic_path(output):
        raise _Abandon


class _Abandon(Exception):
    pass


def plan_paths(output: str | os.PathLike[str], targets: Sequence[float]) -> list[Path]:
    """Where the plans go: ``output`` itself for one target, else ``NAME-0.3.SUFFIX``, ``NAME-0.5.SUFFIX`` ..."""
    path = Path(output)
    if len(targets) == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{target:g}{path.suffix}") for target in targets]


def load_calibration_windows(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    tokens: int | None,
    window: int | None,
    packing: str,
    default: int = 1024,
) -> text.Windows:
    """The windows to calibrate on; the default window is ``default`` tokens or the model's context if that is shorter."""
    context = getattr(model.config, "max_position_embeddings", None) or 1024
    if window is not None and window > context:
        raise CalibrationError(f"window is {window} tokens, expected at most the model's context of {context}")
    return text.load_windows(texts, tokenizer, tokens=tokens, window=window or min(default, context), packing=packing)


@dataclass
class _Group:
    """Methods that share their phases, and therefore their statistics."""

    phases: tuple[tuple[float, float], ...]
    methods: list[Method]


class Calibration:
    """Statistics of several methods over one text, in as few passes as their phases need.

    Args:
        model: the dense model.
        windows: what to run over it.
        methods: they share statistics of equal key.
    """

    def __init__(self, model: Any, windows: text.Windows, methods: Sequence[Method]) -> None:
        if windows.count > MAX_TOKENS:
            raise CalibrationError(f"{windows.count} tokens were asked for, expected at most {MAX_TOKENS}")
        self.identity = ModelIdentity(**sites.describe(model))
        self.windows = windows
        self._model = model
        self._layers = sites.layers_of(model)
        self._views = [_view(layer, self.identity) for layer in self._layers]
        family = self._layers[0].family
        for method in methods:
            if not family.has_ffn and not method.attention_alone:
                raise MethodError(
                    f"method {method.name} works on feed-forward blocks, which {self.identity.family} keeps out of reach: "
                    f"{family.notes}"
                )
        groups: dict[tuple[tuple[float, float], ...], _Group] = {}
        for method in methods:
            groups.setdefault(method.phases, _Group(method.phases, [])).methods.append(method)
        self._groups = list(groups.values())

    def collect(self, *, progress: Progress | None = None, partial: Path | None = None) -> dict[str, list[Calibrated]]:
        """Run the model and return, per method name, every layer with its statistics.

        Args:
            progress: called after every batch.
            partial: where to keep the state of an unfinished run; one that is there and fits is continued.
        """
        steps = list(self._steps())
        window = int(self.windows.tokens.shape[1])
        total = sum(len(batch) for _, _, batch in steps) * window
        start, state = self._resume(partial) if partial else (0, {})
        per_group: list[list[dict[str, Statistic]]] = [[{} for _ in self._layers] for _ in self._groups]
        done, last_saved, current = 0, time.monotonic(), (-1, -1)
        live: list[dict[str, Statistic]] = []
        with DeferredSignals() as stop:
            for number, (group, phase, batch) in enumerate(steps):
                if (group, phase) != current:
                    live = self._open(self._groups[group], phase, per_group[group])
                    self._load(state, group, live)
                    current = (group, phase)
                done += len(batch) * window
                if number < start:
                    continue
                self._forward(live, batch)
                if progress:
                    progress(done, total)
                if partial and (stop.asked or time.monotonic() - last_saved > SAVE_EVERY_SECONDS):
                    self._save(partial, number + 1, per_group)
                    last_saved = time.monotonic()
                if stop.asked:
                    break
        stop.act()
        found = {
            method.name: [Calibrated(view, stats) for view, stats in zip(self._views, per_group[index], strict=True)]
            for index, group in enumerate(self._groups)
            for method in group.methods
        }
        observing = [method for group in self._groups for method in group.methods if method.activity]
        return found | self._observe(observing, progress, partial) if observing else found

    def _observe(
        self, methods: list[Method], progress: Progress | None, partial: Path | None
    ) -> dict[str, list[Calibrated]]:
        """What methods that need whole activities make of them; the output head comes last, as layer -1."""
        head = self._model.get_output_embeddings()
        views = {view.index: view for view in self._views}
        views[HEAD] = Layer(HEAD, self.identity, lambda name: head.weight.detach(), gated=views[0].gated)
        tokens = self.windows.tokens
        return observe(self._model, tokens, methods, views, key=self._key(), partial=partial, progress=progress)

    def solve(
        self, method: Method, calibrated: list[Calibrated], targets: Targets, *, scope: str | None = None
    ) -> Plan:
        """The plan of ``method`` for ``targets``."""
        solution = method.solve(calibrated, targets)
        return Plan(
            method=method.name,
            sparsity=float(targets.default if solution.target is None else solution.target),
            model=self.identity,
            rules=solution.rules,
            settings={**method.settings, **solution.facts},
            text=self.windows.describe(),
            achieved=solution.achieved,
            scope=check_scope(method, scope),
            prompt=solution.prompt,
            version=importlib.metadata.version("actsparse"),
        )

    def discard(self, partial: Path) -> None:
        """Remove the state of a run that is complete."""
        partial.unlink(missing_ok=True)

    def _steps(self) -> Iterator[tuple[int, int, range]]:
        """(group, phase, windows of one batch), in the order they run."""
        count, window = self.windows.tokens.shape
        size = max(1, BATCH_TOKENS // window)
        for index, group in enumerate(self._groups):
            for phase, (begin, end) in enumerate(group.phases):
                first, last = round(begin * count), round(end * count)
                if first >= last:
                    names = ", ".join(method.name for method in group.methods)
                    raise CalibrationError(
                        f"text gives {count} window of {window} tokens, {names} needs more: pass more"
                    )
                for at in range(first, last, size):
                    yield index, phase, range(at, min(at + size, last))

    def _open(self, group: _Group, phase: int, seen: list[dict[str, Statistic]]) -> list[dict[str, Statistic]]:
        """New statistics of a phase, per layer; they join ``seen``."""
        live: list[dict[str, Statistic]] = []
        for view, earlier in zip(self._views, seen, strict=True):
            fresh: dict[str, Statistic] = {}
            for method in group.methods:
                for key, statistic in method.statistics(view, phase, earlier).items():
                    fresh.setdefault(key, statistic)
            live.append(fresh)
        for earlier, fresh in zip(seen, live, strict=True):
            earlier.update(fresh)
        return live

    def _forward(self, live: list[dict[str, Statistic]], batch: range) -> None:
        """Run one batch of windows and let every layer's statistics take in what they asked for."""
        where = Batch(batch.start, self.windows.domains[batch.start : batch.stop])
        handles: list[Any] = []
        try:
            for layer, statistics in zip(self._layers, live, strict=True):
                handles += _listen(layer, statistics, where)
            tokens = self.windows.tokens[batch.start : batch.stop].to(self._model.device)
            with torch.inference_mode():
                self._model.get_decoder()(input_ids=tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _key(self) -> str:
        """What an interrupted run must share with this one to be continued."""
        methods = [[[m.name, m.settings] for m in group.methods] for group in self._groups]
        parts = [self.identity.fingerprint, self.windows.digest, methods, BATCH_TOKENS, str(self._model.dtype)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _save(self, partial: Path, steps_done: int, per_group: list[list[dict[str, Statistic]]]) -> None:
        tensors = {
            f"{group}.{layer}.{key}.{name}": tensor.contiguous()
            for group, layers in enumerate(per_group)
            for layer, statistics in enumerate(layers)
            for key, statistic in statistics.items()
            for name, tensor in statistic.state().items()
        }
        with atomic_path(partial) as temporary:
            save_file(tensors, temporary, metadata={"key": self._key(), "steps_done": str(steps_done)})

    def _resume(self, partial: Path) -> tuple[int, dict[str, torch.Tensor]]:
        """Steps already done and their state; nothing when there is none, or it belongs to other settings."""
        if not partial.is_file():
            return 0, {}
        try:
            with safe_open(partial, framework="pt") as file:
                meta = file.metadata() or {}
                if meta.get("key") != self._key():
                    return 0, {}
                return int(meta["steps_done"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError):
            return 0, {}

    @staticmethod
    def _load(state: Mapping[str, torch.Tensor], group: int, live: list[dict[str, Statistic]]) -> None:
        for layer, statistics in enumerate(live):
            for key, statistic in statistics.items():
                prefix = f"{group}.{layer}.{key}."
                saved = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
                if saved:
                    statistic.load_state(saved)


def _view(layer: sites.LayerSites, identity: ModelIdentity) -> Layer:
    """A layer as methods see it."""
    return Layer(
        layer.index,
        identity,
        lambda name: layer.linear(name).weight.detach(),
        lambda name: layer.linear(name).bias,
        gated=layer.family.gated,
        has_ffn=layer.family.has_ffn,
    )


def _listen(layer: sites.LayerSites, statistics: Mapping[str, Statistic], where: Batch) -> list[Any]:
    """Hook the taps that ``statistics`` need; each is updated as soon as its last tap has been seen."""
    waiting: dict[str, tuple[Statistic, dict[str, torch.Tensor]]] = {key: (s, {}) for key, s in statistics.items()}

    def observer(tap: str) -> Callable[[torch.Tensor], None]:
        def observe(value: torch.Tensor) -> None:
            for key, (statistic, seen) in waiting.items():
                if tap not in statistic.taps:
                    continue
                seen[tap] = value
                if len(seen) == len(statistic.taps):
                    try:
                        statistic.update(seen, where)
                    except CalibrationError as error:
                        raise CalibrationError(f"layer {layer.index} {key.split('/')[0]}: {error}") from None
                    seen.clear()

        return observe

    wanted = sorted({tap for statistic in statistics.values() for tap in statistic.taps})
    return [layer.tap(tap, observer(tap)) for tap in wanted]

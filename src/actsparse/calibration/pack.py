"""Packing: from a Hugging Face model to a directory of nested low-bit codes and the plan to read them, in one run.

The model's files are mapped, and its layers visited from the last to the first with the loss's gradients
(:mod:`.activity`): each layer's matrices are rounded, with the error fed back to the columns not yet rounded, and written
before the next is touched.  What every threshold hangs on, theta, is known when all layers are done,
or is searched for then, by measuring what plans cost.

A run that was killed goes on after the last whole layer, and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from actsparse.calibration.activity import Activity, Progress, activities, within
from actsparse.calibration.budget import Budget, Score, search
from actsparse.calibration.collect import load_calibration_windows
from actsparse.calibration.forecast import forecast_theta, forecast_tokens, kept_theta
from actsparse.calibration.presets import DEFAULT_SOURCE, DEFAULT_TEXT, QUALITIES, default_tokens, stored_for
from actsparse.kernels.planes import STORED
from actsparse.methods.base import HEAD, MethodError
from actsparse.methods.feedback import DESCRIPTION, curvature_of, energy_shares, round_with_feedback
from actsparse.methods.graded import (
    DENSE_BITS,
    HEAD_WEIGHT,
    LEAST_BITS,
    Reading,
    by_input,
    center_of,
    check_bits,
    most_bits,
    reading_of,
    solution_of,
    unit_of,
)
from actsparse.methods.rounding import round_nearest
from actsparse.methods.statistics import CalibrationError
from actsparse.models import directory, opening, sites, text
from actsparse.models.sites import ModelError
from actsparse.plan import ModelIdentity, Plan, atomic_path, one_line
from actsparse.runtime import saving
from actsparse.runtime.lowmemory import mapped_weights, open_mapped
from actsparse.runtime.packed import digest_of, open_packed, tensors_of

WINDOW = 512
# What rounding makes good is a mixture of the error as read and, so much of it, of the error of every plane. The first alone
# serves decoding on paper; the codes then stray from the weights, which prompts that read every plane pay for (docs/graded.md).
PROMPTS = 0.5
_COPIED = (".json", ".jinja", ".model", ".txt")
# Raise it when the same inputs give other bytes.
RECIPE = 4
# Where an unfinished run keeps its forecast.
_THETA = "theta.json"
# The name of plans that read every plane: quantisation and nothing else.
PLAIN = "plain"
# Measures plans on a packed model beside the dense one: (packed, windows, dense); ``actsparse.measure.evaluate.scorer`` is one.
Scorer = Callable[[Any, text.Windows, Any], Score]


@dataclass(frozen=True)
class Settings:
    """How to pack.

    Attributes:
        bits_stored: 4, 6 or 8; None for what :func:`.presets.stored_for` gives.
        bits_read: bits read per weight of the decoder layers' matrices, scales included; None for every plane, always: plain
            quantisation, which other methods' thresholds may be put on.
        max_ppl_increase: find the fewest bits that cost at most this relative increase of perplexity on the calibration text
            (0.01 for 1 %); ``bits_read`` is then what codes are rounded for (:func:`.presets.quality_for` says what suits).
        text: calibration text; None for the one that comes with the package.
        tokens: how many of its tokens; None for what some minutes of two cores allow, 2,048 to 16,384 (see
            :func:`.presets.default_tokens`).
    """

    bits_stored: int | None = None
    bits_read: float | None = QUALITIES["balanced"]
    max_ppl_increase: float | None = None
    text: str | None = None
    tokens: int | None = None

    @property
    def stored(self) -> int:
        """Bits of a code."""
        return stored_for(self.bits_read) if self.bits_stored is None else self.bits_stored

    def check(self) -> None:
        """MethodError for values out of range."""
        if self.stored not in STORED:
            raise MethodError(f"bits stored is {self.stored}, expected 4, 6 or 8")
        if self.bits_read is not None:
            check_bits(self.bits_read, self.stored)
        if self.max_ppl_increase is not None:
            Budget(max_ppl_increase=self.max_ppl_increase)


def pack(
    name: str,
    output: str | os.PathLike[str],
    settings: Settings,
    *,
    device: str = "cpu",
    scorer: Scorer | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Pack the model ``name`` (a directory or a hub id) into the directory ``output``; returns the plan in it.

    Args:
        name: a dense model.
        output: a directory that does not exist yet; it appears whole or not at all.  Beside it lies ``.NAME.packing`` with the
            layers that are done, until then.
        settings: how.
        device: where calibration and rounding run, and the whole model lies meanwhile.
        scorer: what measures plans where ``max_ppl_increase`` is asked for.
        progress: called after every batch.

    Raises:
        ModelError, MethodError, TextError, CalibrationError, PlanError: with one line that names what was wrong.
    """
    settings.check()
    if settings.max_ppl_increase is not None and scorer is None:
        raise CalibrationError("a budget was given without a scorer, expected both (actsparse pack hands one in)")
    target = Path(output)
    if target.exists():
        raise ModelError(f"{target} exists, expected a new directory")
    if directory.is_packed(name):
        raise ModelError(f"model {name} is packed already, expected a dense one")
    opening.check_unquantised(name)
    place = opening.device_of(device)
    model, tokenizer, source, release = _open(name, place)
    windows = load_calibration_windows(
        model,
        tokenizer,
        settings.text or str(DEFAULT_TEXT),
        tokens=settings.tokens or default_tokens(sum(p.numel() for p in model.parameters()), place.type),
        window=None,
        packing="packed",
        default=WINDOW,
    )
    if not settings.text:
        windows = replace(windows, source=DEFAULT_SOURCE)
    return pack_opened(
        model, tokenizer, windows, target, settings, scorer=scorer, source=source, release=release, progress=progress
    )


def pack_opened(
    model: Any,
    tokenizer: Any,
    windows: text.Windows,
    target: Path,
    settings: Settings,
    *,
    scorer: Scorer | None = None,
    source: Path | None = None,
    release: Callable[[int], None] = lambda index: None,
    progress: Progress | None = None,
) -> Plan:
    """:func:`pack` of a model in memory, on given windows, into a directory that does not exist.

    ``source`` is where configuration and tokenizer are copied from (None: they are saved anew), ``release`` is called with the
    index of a layer whose weights are not needed for a while.
    """
    run = _Run(model, windows, settings, target.parent / f".{target.name}.packing")
    directory.check_room(target, run.expected_bytes())
    readings = run.layers(release, progress)
    plan = run.plan(readings)
    run.complete(source, tokenizer, plan)
    if settings.max_ppl_increase is not None and scorer is not None:
        plan = run.within_budget(readings, scorer, progress)
    run.publish(plan, target)
    return plan


def _open(name: str, device: torch.device) -> tuple[Any, Any, Path | None, Callable[[int], None]]:
    """Model, tokenizer, the directory they came from (None for a GGUF file), and what lets a layer's weights go.

    Weights in safetensors files are views of their mapping.
    """
    if name.endswith(".gguf"):
        model, tokenizer = opening.open_gguf(name)
        return model.to(device), tokenizer, None, lambda index: None
    source = Path(opening.local_directory(name))
    tokenizer = opening.open_tokenizer(str(source))
    if device.type != "cpu" or not any(source.glob("*.safetensors")):
        return opening.open_model(str(source), device=str(device)), tokenizer, source, lambda index: None
    model = open_mapped(str(source), everything=True)
    mapped = mapped_weights(model)
    assert mapped is not None
    releasers = [mapped.releaser(list(layer.module.parameters())) for layer in sites.layers_of(model)]
    return model, tokenizer, source, lambda index: releasers[index]()


class _Run:
    """The layers of one model, done one by one in a folder of their own."""

    def __init__(self, model: Any, windows: text.Windows, settings: Settings, folder: Path) -> None:
        self._model, self._windows, self._settings, self._folder = model, windows, settings, folder
        self._layers = sites.layers_of(model)
        self.identity = ModelIdentity(**sites.describe(model))
        self._names = {module: name for name, module in model.named_modules()}
        # ModelError for anything but dense linear layers.
        if not self._layers[0].family.has_ffn:
            raise ModelError(f"{model.config.model_type} models cannot be packed: {self._layers[0].family.notes}")
        self._products: dict[int, dict[str, Any]] = {HEAD: {"head": model.get_output_embeddings()}}
        for layer in self._layers:
            self._products[layer.index] = {name: layer.linear(name) for name, _ in layer.family.projections}

    def expected_bytes(self) -> int:
        """About what the packed directory takes."""
        return sum(p.numel() for p in self._model.parameters()) * (self._settings.stored + 1) // 8

    def layers(self, release: Callable[[int], None], progress: Progress | None) -> dict[tuple[int, str], Reading]:
        """Every product's reading, rounding and writing the layers that are not done yet."""
        self._folder.mkdir(parents=True, exist_ok=True)
        key = self._folder / "key.json"
        if not key.is_file() or key.read_text(encoding="utf-8") != self._key():
            shutil.rmtree(self._folder)
            self._folder.mkdir()
            with atomic_path(key) as temporary:
                Path(temporary).write_text(self._key(), encoding="utf-8")
        order = [HEAD, *reversed(range(len(self._layers)))]
        done = 0
        while done < len(order) and self._state(order[done]).is_file():
            done += 1
        if done < len(order):
            start = None if done == 0 else (order[done - 1], self._gradients(order[done - 1]))
            try:
                theta, progress = self._forecast(release, progress)
                found = activities(self._model, self._windows.tokens, start=start, done_with=release, progress=progress)
                for activity in found:
                    self._do(activity, theta)
            except BaseException:
                if not self._state(HEAD).is_file():  # nothing that a later run could go on from
                    shutil.rmtree(self._folder)
                raise
        return {key: reading for index in order for key, reading in self._readings(index)}

    def _forecast(
        self, release: Callable[[int], None], progress: Progress | None
    ) -> tuple[float | None, Progress | None]:
        """About what theta will be, None where every plane is read; and what is told of the progress after that."""
        bits, tokens = self._settings.bits_read, forecast_tokens(self._windows.tokens)
        if bits is None:
            return None, progress
        whole, part = self._windows.count, tokens.numel()
        first = progress and within(progress, 0, part, whole + part)
        known = partial(forecast_theta, self._model, tokens, self._settings.stored, bits)
        theta = kept_theta(self._folder / _THETA, partial(known, done_with=release, progress=first))
        return theta, progress and within(progress, part, whole, whole + part)

    def plan(self, readings: dict[tuple[int, str], Reading]) -> Plan:
        """The plan that reads the settings' bits."""
        bits = self._settings.bits_read
        if bits is not None:
            return self._graded(readings, bits)
        return self._plan(PLAIN, 0.0, {"bits_read": most_bits(readings)}, scope="all")

    def within_budget(
        self, readings: dict[tuple[int, str], Reading], scorer: Scorer, progress: Progress | None
    ) -> Plan:
        """The plan of the fewest bits that stays within the settings' budget, measured in the folder as it is."""
        packed, _ = open_packed(str(self._folder))
        most = most_bits(readings)

        def solve(sparsity: float) -> Plan:
            return self._graded(readings, min(DENSE_BITS * (1 - sparsity), most)).with_scope("all")

        limit = self._settings.max_ppl_increase
        try:
            found = search(
                packed, solve, self._windows, Budget(max_ppl_increase=limit),
                lambda model, windows: scorer(model, windows, self._model),
                begin=1 - most / DENSE_BITS, highest=1 - LEAST_BITS / DENSE_BITS, progress=progress,
            )  # fmt: skip
        except CalibrationError as error:
            kept = "the rounded layers stay for another budget, remove them if none follows, in"
            raise CalibrationError(f"{error}; {kept} {self._folder}") from None
        facts = {"max_ppl_increase": limit, "measured_ppl_increase": found.measured}
        return replace(found.plan.with_scope("decode"), settings={**found.plan.settings, **facts})

    def _graded(self, readings: dict[tuple[int, str], Reading], bits: float) -> Plan:
        ordered = dict(sorted(readings.items(), key=lambda item: (item[0][0] == HEAD, item[0])))
        solution = solution_of(ordered, bits)
        plan = self._plan("graded", 1 - bits / DENSE_BITS, solution.facts, scope="decode")
        return replace(plan, rules=solution.rules, achieved=solution.achieved)

    def _plan(self, method: str, sparsity: float, facts: dict[str, Any], *, scope: str) -> Plan:
        return Plan(
            method=method,
            sparsity=sparsity,
            model=self.identity,
            rules={},
            settings={"bits_stored": self._settings.stored, "rounding": DESCRIPTION, "recipe": RECIPE, **facts},
            text=self._windows.describe(),
            scope=scope,
            version=importlib.metadata.version("actsparse"),
        )

    def complete(self, source: Path | None, tokenizer: Any, plan: Plan) -> None:
        """Put what a model directory has besides weights into the folder."""
        if source is None:
            self._model.config.save_pretrained(self._folder)
            tokenizer.save_pretrained(self._folder)
        else:
            for file in source.iterdir():
                if file.is_file() and file.suffix in _COPIED and "safetensors" not in file.name:
                    shutil.copyfile(file, self._folder / file.name)
        files, digests, size = {}, {}, 0
        for index in (HEAD, *range(len(self._layers))):
            file = self._shard(index)
            with safe_open(file, framework="pt") as tensors:
                files[file.name] = list(tensors.keys())
                scales = [name for name in files[file.name] if name.endswith((".scale", ".gain"))]
                digests[file.name] = digest_of({name: tensors.get_tensor(name) for name in scales})
            size += file.stat().st_size
        saving.write_index(self._folder, files, size)
        about = {
            "bits_stored": self._settings.stored,
            "shards": len(self._layers) + 1,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "digests": digests,
        }
        saving.complete(self._folder, plan, about)

    def publish(self, plan: Plan, target: Path) -> None:
        """Remove what only an unfinished run needs, and give the folder its name."""
        plan.save(self._folder / directory.PLAN)
        for index in (HEAD, *range(len(self._layers))):
            self._state(index).unlink()
        (self._folder / "key.json").unlink()
        (self._folder / _THETA).unlink(missing_ok=True)
        os.replace(self._folder, target)

    def _do(self, activity: Activity, theta: float | None) -> None:
        """Round, write and remember one layer; the head's file also takes what is not packed."""
        tensors: dict[str, torch.Tensor] = {}
        state: dict[str, torch.Tensor] = {}
        stored = self._settings.stored
        for names, x in by_input(activity.inputs):
            weights = [self._weight(activity.layer, name) for name in names]
            nearest = [round_nearest(weight, stored) for weight in weights]
            counts = HEAD_WEIGHT if activity.layer == HEAD else 1.0
            sensitive = [counts * activity.sensitivity[name] for name in names]
            units = [unit_of(*one) for one in zip(weights, nearest, sensitive, strict=True)]
            # Who skips by magnitude alone, or not at all, multiplies x itself.
            center = (
                torch.zeros_like(x[0])
                if theta is None
                else center_of(x, list(zip(units, nearest, strict=True)), theta=theta)
            )
            deviation = x - center
            curvature = curvature_of(deviation.T @ deviation / len(deviation))
            for name, weight, unit, sensitivity in zip(names, weights, units, sensitive, strict=True):
                shares = torch.zeros(stored // 2 + 1, len(center), device=x.device)
                shares[-1] = 1
                if theta is not None:
                    shares = energy_shares(deviation, unit * theta)
                packed, stood = round_with_feedback(weight, stored, curvature, shares, PROMPTS)
                reading = reading_of(x, unit_of(stood, packed, sensitivity), packed, center)
                path = self._path(activity.layer, name)
                tensors |= {f"{path}.{part}": tensor for part, tensor in tensors_of(packed).items()}
                tensors |= {
                    f"{path}.center": center.clone(),
                    f"{path}.start": self._start(activity.layer, name, weight, center),
                }
                state |= {f"{name}.{part}": tensor for part, tensor in reading.state().items()}
        tensors |= self._unpacked(activity.layer)
        state |= {f"gradient.{number}": gradient for number, gradient in enumerate(activity.gradients)}
        # The state last: it is what says that the layer is done.
        for path_, content in ((self._shard(activity.layer), tensors), (self._state(activity.layer), state)):
            whole = {name: tensor.cpu().contiguous() for name, tensor in content.items()}
            try:
                with atomic_path(path_) as temporary:
                    save_file(whole, temporary, {"format": "pt"})
            except (SafetensorError, OSError) as error:
                raise ModelError(f"cannot write {path_}: {one_line(error)}") from None

    def _weight(self, layer: int, name: str) -> torch.Tensor:
        weight: torch.Tensor = self._products[layer][name].weight.detach().float()
        return weight

    def _start(self, layer: int, name: str, weight: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        """What the product gives at the inputs' center."""
        bias = self._products[layer][name].bias
        start = weight @ center
        return start if bias is None else start + bias.detach().float()

    def _path(self, layer: int, name: str) -> str:
        """The name of a product's module in the model."""
        return self._names[self._products[layer][name]]

    def _unpacked(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer, or of everything outside the layers, that are not packed matrices."""
        packed = {self._names[product] for products in self._products.values() for product in products.values()}
        inside = tuple(f"{self._names[one.module]}." for one in self._layers)
        # Fused layers stand as one in the state dict, and are packed by their parts.
        packed |= {f"{prefix}{path}" for prefix in inside for path in self._layers[0].family.fused}
        return {
            name: tensor.detach().clone()
            for name, tensor in self._model.state_dict().items()
            if name.rpartition(".")[0] not in packed
            and (name.startswith(inside[layer]) if layer != HEAD else not name.startswith(inside))
        }

    def _shard(self, layer: int) -> Path:
        return self._folder / directory.SHARDS.format(layer + 1)

    def _state(self, layer: int) -> Path:
        return self._folder / f"state-{layer + 1:05d}.safetensors"

    def _readings(self, layer: int) -> Iterator[tuple[tuple[int, str], Reading]]:
        with safe_open(self._state(layer), framework="pt") as file:
            for name in self._products[layer]:
                parts = {part: file.get_tensor(f"{name}.{part}") for part in ("center", "unit", "counts", "size")}
                yield (layer, name), Reading(**parts)

    def _gradients(self, layer: int) -> list[torch.Tensor]:
        try:
            with safe_open(self._state(layer), framework="pt") as file:
                count = sum(name.startswith("gradient.") for name in file.keys())  # noqa: SIM118
                return [file.get_tensor(f"gradient.{number}").to(self._model.device) for number in range(count)]
        except SafetensorError as error:
            raise ModelError(
                f"{self._state(layer)} is damaged ({error}): remove {self._folder} and start again"
            ) from None

    def _key(self) -> str:
        """What an unfinished run must share with this one to be continued; a budget that could not be met may be another."""
        settings = self._settings
        parts: Sequence[Any] = [
            RECIPE, self.identity.fingerprint, self._windows.digest, settings.stored, settings.bits_read,
            str(self._model.dtype), importlib.metadata.version("actsparse"),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest() + "\n"

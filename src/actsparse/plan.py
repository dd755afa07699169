"""The plan: one safetensors file between calibration and decoding.

A plan names its method only for the record. What decoding obeys are its *rules*, tensors with fixed names:

=====================================  ==============  =======================================================
name (``layers.{i}.`` in front)        shape           meaning
=====================================  ==============  =======================================================
``q|k|v|o|gate|up.threshold``          [1] or [I]      input threshold: skip column i of W when ``|x_i| < t_i``
``ffn.threshold``                      [1] or [N]      gate threshold: skip neuron i when ``|g_i| < t_i``
``down.threshold``                     [1] or [N]      value threshold: skip column i of W_down when ``|g_i u_i| < t_i``
``ffn.predictor_a``                    [R, H]          low-rank predictor: compute neuron i when
``ffn.predictor_b``                    [N, R]          ``(B A x + b)_i > 0``
``ffn.predictor_bias``                 [N]
``q|k|v|o|gate|up|down``               [L, I]          nested low-bit weights: read level k of column i when
``.level_threshold``                                   ``|x_i - center_i| >= t_{k,i}``
``q|k|v|o|gate|up|down.center``        [I]             taken off the input; W center is added to the output
=====================================  ==============  =======================================================

Level thresholds and centers of the output head are named ``head.`` instead of ``layers.{i}.{projection}.``.

Shape letters: H hidden, N neurons, I input features, R rank, L levels (half the bits stored).
All tensors are float32, thresholds are >= 0 and may be
``inf`` ("always skip").  Methods that choose neurons per prompt keep their settings under ``prompt`` and may add tensors
whose names start with ``prompt.``, float32 or int32 [..., N].
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "actsparse-plan"
FORMAT_VERSION = 1
MOST_LAYERS = 9999
# The smallest threshold that skips exact zeros and nothing that matters: ReLU's exact sparsity.
SKIP_ZEROS = float(torch.finfo(torch.float32).tiny)
SCOPES = ("all", "decode", "last_half")
_LONGEST_LINE = 300
_MARK = ".actsparse-"
_TEMPORARY = re.compile(r"\..*\.actsparse-[a-z0-9_]{8}", re.DOTALL)
_THRESHOLD = re.compile(r"layers\.([0-9]{1,6})\.(q|k|v|o|gate|up|down|ffn)\.threshold")
_LEVELS = re.compile(r"(?:layers\.([0-9]{1,6})\.(q|k|v|o|gate|up|down)|head)\.(level_threshold|center)")
_PREDICTOR = re.compile(r"layers\.([0-9]{1,6})\.ffn\.predictor_(a|b|bias)")


class PlanError(ValueError):
    """A plan that cannot be read, is malformed, or belongs to another model."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a plan remembers of the model it was made for.

    ``fingerprint`` is a SHA-256 over a fixed sample of the weights rounded to bfloat16, so that one checkpoint loaded in
    float32 or bfloat16 has one identity.
    """

    family: str
    layers: int
    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    fingerprint: str

    def features(self, projection: str) -> int:
        """Number of input features of ``projection`` (for ``ffn``: of neurons)."""
        return {"o": self.heads * self.head_dim, "down": self.neurons, "ffn": self.neurons}.get(projection, self.hidden)


@dataclass(frozen=True)
class Plan:
    """Rules for one model at one target sparsity.

    Attributes:
        method: name of the method that made it.
        sparsity: target fraction skipped, 0 <= sparsity < 1.
        model: identity and shapes of the model.
        rules: tensors by name, as in the module docstring.
        settings: the method's options.
        text: source, SHA-256 and token count of the calibration text.
        achieved: fraction skipped on the calibration text, per site (``layers.{i}.ffn`` ...).
        scope: which tokens are sparsified: ``all``, ``decode`` or ``last_half``.
        prompt: settings of a method that chooses neurons per prompt, else empty.
        version: version of the package that wrote it.
    """

    method: str
    sparsity: float
    model: ModelIdentity
    rules: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    achieved: Mapping[str, float] = field(default_factory=dict)
    scope: str = "all"
    prompt: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    def layer_rules(self, layer: int) -> dict[str, torch.Tensor]:
        """The rules of one layer without their ``layers.{i}.`` prefix."""
        prefix = f"layers.{layer}."
        return {name[len(prefix) :]: tensor for name, tensor in self.rules.items() if name.startswith(prefix)}

    @property
    def evaluation_only(self) -> bool:
        """Whether the rules need to know what they skip: such a plan bounds quality, and must not be decoded with."""
        return self.settings.get("evaluation_only") is True

    def check_decodable(self) -> None:
        """Raise PlanError for a plan that is for evaluation only."""
        if self.evaluation_only:
            raise PlanError(
                f"plan of method {self.method} is for evaluation only (it reads what it skips): use it with ppl, eval or "
                "compare"
            )

    def with_scope(self, scope: str) -> Plan:
        """The same plan for other tokens."""
        if scope not in SCOPES:
            raise PlanError(f"scope {scope!r} is unknown: expected one of {', '.join(SCOPES)}")
        self._check_prompt_scope(scope)
        return replace(self, scope=scope)

    def _check_prompt_scope(self, scope: str) -> None:
        # Under any other scope a prompt-sized forward would run dense and be scored as if it were sparse.
        if self.prompt and scope != "decode":
            raise PlanError(f"scope is {scope!r}, expected 'decode': {self.method} runs prompts dense")

    def check_model(self, identity: ModelIdentity) -> None:
        """Raise PlanError, naming both values, unless the plan was made for a model of this identity."""
        for name, mine in asdict(self.model).items():
            theirs = getattr(identity, name)
            if mine != theirs:
                what = "weights" if name == "fingerprint" else name
                raise PlanError(
                    f"plan is for another model: its {what} is {_short(mine)}, the model's {what} is {_short(theirs)}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan; the file appears whole or not at all."""
        self.validate()
        meta = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "sparsity": self.sparsity,
            "model": asdict(self.model),
            "settings": dict(self.settings),
            "text": dict(self.text),
            "achieved": dict(self.achieved),
            "scope": self.scope,
            "prompt": dict(self.prompt),
            "version": self.version,
        }
        tensors = {name: tensor.detach().contiguous() for name, tensor in sorted(self.rules.items())}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"actsparse": json.dumps(meta, sort_keys=True)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and validate a plan; PlanError (one line) for anything else than a sound one."""
        path = Path(path)
        if not path.is_file():
            raise PlanError(f"plan {path} does not exist or is not a file")
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("actsparse", "null"))
                names = list(file.keys())
                if not isinstance(meta, dict) or meta.get("format") != FORMAT:
                    raise PlanError(f"{path} is not an actsparse plan (no {FORMAT} metadata)")
                if meta.get("format_version") != FORMAT_VERSION:
                    raise PlanError(
                        f"plan {path} has format version {_short(meta.get('format_version'))}, expected {FORMAT_VERSION}"
                    )
                rules = {name: file.get_tensor(name) for name in names}
        except PlanError:
            raise
        except (SafetensorError, ValueError, RecursionError) as error:
            raise PlanError(f"plan {path} is truncated or damaged: {one_line(error)}") from None
        try:
            plan = cls(
                method=_typed(meta, "method", str),
                sparsity=float(_typed(meta, "sparsity", (int, float))),
                model=ModelIdentity(**_typed(meta, "model", dict)),
                rules=rules,
                settings=_typed(meta, "settings", dict),
                text=_typed(meta, "text", dict),
                achieved=_typed(meta, "achieved", dict),
                scope=_typed(meta, "scope", str),
                prompt=_typed(meta, "prompt", dict),
                version=_typed(meta, "version", str),
            )
            plan.validate()
        except (TypeError, ValueError, OverflowError) as error:
            raise PlanError(f"plan {path} is damaged: {one_line(error)}") from None
        return plan

    def validate(self) -> None:
        """Raise PlanError unless every value and tensor is of the form described in the module docstring."""
        if not 0 <= self.sparsity < 1:
            raise PlanError(f"sparsity is {self.sparsity}, expected 0 <= sparsity < 1")
        if self.scope not in SCOPES:
            raise PlanError(f"scope is {_short(self.scope)!r}, expected one of {', '.join(SCOPES)}")
        if self.prompt:
            self._validate_prompt()
        for name in ("layers", "hidden", "neurons", "heads", "kv_heads", "head_dim"):
            value = getattr(self.model, name)
            most = MOST_LAYERS if name == "layers" else (1 << 31) - 1
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
                raise PlanError(f"model.{name} is {_short(value)}, expected an integer from 1 to {most}")
        for name in ("family", "activation", "fingerprint"):
            if not isinstance(getattr(self.model, name), str):
                raise PlanError(f"model.{name} is {_short(getattr(self.model, name))}, expected text")
        for site, value in self.achieved.items():
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise PlanError(f"achieved sparsity of {_short(site)} is {_short(value)}, expected 0 to 1")
        for name, tensor in self.rules.items():
            self._validate_rule(name, tensor)
        for layer in sorted({int(name.split(".")[1]) for name in self.rules if _PREDICTOR.fullmatch(name)}):
            parts = [f"layers.{layer}.ffn.predictor_{part}" in self.rules for part in ("a", "b", "bias")]
            if any(parts) and not all(parts):
                raise PlanError(f"layers.{layer}.ffn has an incomplete predictor, expected a, b and bias")
            if all(parts):
                rank_a = self.rules[f"layers.{layer}.ffn.predictor_a"].shape[0]
                rank_b = self.rules[f"layers.{layer}.ffn.predictor_b"].shape[1]
                if rank_a != rank_b:
                    raise PlanError(f"layers.{layer}.ffn predictor ranks differ: a has {rank_a}, b has {rank_b}")

    def _validate_prompt(self) -> None:
        self._check_prompt_scope(self.scope)
        span, counts = self.prompt.get("layers"), self.prompt.get("counts")
        if not _integers(span) or len(span) != 2 or not 0 <= span[0] <= span[1] < self.model.layers:
            raise PlanError(
                f"prompt.layers is {_short(span)}, expected [first, last] within {self.model.layers} layers"
            )
        if not _integers(counts) or len(counts) != span[1] - span[0] + 1:
            raise PlanError(f"prompt.counts is {_short(counts)}, expected {span[1] - span[0] + 1} numbers of neurons")
        if not all(1 <= count <= self.model.neurons for count in counts):
            raise PlanError(f"prompt.counts is {_short(counts)}, expected 1 to {self.model.neurons} each")
        for layer in range(span[0], span[1] + 1):
            other = [
                name for name in self.layer_rules(layer) if name.partition(".")[0] in ("ffn", "gate", "up", "down")
            ]
            if other:
                raise PlanError(f"layers.{layer}.{other[0]} and neurons chosen per prompt exclude each other")

    def _validate_rule(self, name: str, tensor: torch.Tensor) -> None:
        if name.startswith("prompt."):
            if tensor.dtype not in (torch.float32, torch.int32):
                raise PlanError(f"{name} has dtype {tensor.dtype}, expected float32 or int32")
            if tensor.shape[-1:] != (self.model.neurons,):
                raise PlanError(f"{name} has shape {list(tensor.shape)}, expected [..., {self.model.neurons}]")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise PlanError(f"{name} holds a value that is not finite")
            return
        levels = _LEVELS.fullmatch(name)
        if levels:
            self._validate_levels(name, tensor, levels)
            return
        threshold, predictor = _THRESHOLD.fullmatch(name), _PREDICTOR.fullmatch(name)
        match = threshold or predictor
        if match is None:
            raise PlanError(f"tensor {name!r} is not a known rule")
        if int(match[1]) >= self.model.layers:
            raise PlanError(f"tensor {name!r} is for layer {match[1]}, the model has {self.model.layers}")
        if tensor.dtype != torch.float32:
            raise PlanError(f"{name} has dtype {tensor.dtype}, expected float32")
        if threshold:
            features = self.model.features(threshold[2])
            if tuple(tensor.shape) not in ((1,), (features,)):
                raise PlanError(f"{name} has shape {list(tensor.shape)}, expected [1] or [{features}]")
            if bool((~(tensor >= 0)).any()):
                raise PlanError(f"{name} holds a negative or NaN threshold, expected values >= 0")
            return
        h, n = self.model.hidden, self.model.neurons
        shape, part = tuple(tensor.shape), match[2]
        sound = {"a": len(shape) == 2 and shape[1] == h, "b": len(shape) == 2 and shape[0] == n, "bias": shape == (n,)}
        if not sound[part]:
            want = {"a": f"[rank, {h}]", "b": f"[{n}, rank]", "bias": f"[{n}]"}[part]
            raise PlanError(f"{name} has shape {list(shape)}, expected {want}")
        if bool(torch.isnan(tensor).any()):
            raise PlanError(f"{name} holds NaN")

    def _validate_levels(self, name: str, tensor: torch.Tensor, match: re.Match[str]) -> None:
        site, _, part = name.rpartition(".")
        if match[1] is not None and int(match[1]) >= self.model.layers:
            raise PlanError(f"tensor {name!r} is for layer {match[1]}, the model has {self.model.layers}")
        other = f"{site}.{'center' if part == 'level_threshold' else 'level_threshold'}"
        for wrong, there in ((f"{site}.threshold", False), (other, True)):
            if (wrong in self.rules) != there:
                raise PlanError(f"{name} {'needs' if there else 'excludes'} {wrong}")
        features = self.model.features(match[2] or "head")
        if tensor.dtype != torch.float32:
            raise PlanError(f"{name} has dtype {tensor.dtype}, expected float32")
        if part == "center":
            if tuple(tensor.shape) != (features,) or not bool(torch.isfinite(tensor).all()):
                raise PlanError(f"{name} has shape {list(tensor.shape)} or is not finite, expected [{features}]")
            return
        if tensor.dim() != 2 or tensor.shape[0] not in (2, 3, 4) or tensor.shape[1] != features:
            raise PlanError(f"{name} has shape {list(tensor.shape)}, expected [2 to 4, {features}]")
        if bool((~(tensor >= 0)).any()) or bool((tensor[1:] < tensor[:-1]).any()):
            raise PlanError(f"{name} holds a negative, NaN or falling threshold, expected rising values >= 0")


class atomic_path:
    """``with atomic_path(target) as temporary``: write ``temporary``; it becomes ``target`` only if the block succeeds.

    The temporary file is locked (``flock``) as long as its process lives.  Those beside it that nobody has locked were left
    by killed processes, and are removed.

    Raises PlanError naming the path when the directory is missing or not writable.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self._target = Path(target)

    def __enter__(self) -> str:
        if self._target.is_dir():
            raise PlanError(f"cannot write {_short_path(self._target)}: it is a directory, expected a file name")
        directory = self._target.parent
        try:
            _remove_orphans(directory)
            self._handle, self._temporary = _locked_file(directory, f".{self._target.name}{_MARK}")
        except OSError as error:
            raise PlanError(f"cannot write {_short_path(self._target)}: {error.strerror}") from None
        except ValueError as error:  # a name with a zero byte
            raise PlanError(f"cannot write {_short_path(self._target)}: {error}") from None
        return self._temporary

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                # mkstemp makes the file private; a plan is as public as any file its user writes.
                mask = os.umask(0)
                os.umask(mask)
                os.chmod(self._temporary, 0o666 & ~mask)
                os.replace(self._temporary, self._target)
            else:
                os.unlink(self._temporary)
        finally:
            os.close(self._handle)


def _locked_file(directory: Path, prefix: str) -> tuple[int, str]:
    while True:
        handle, name = tempfile.mkstemp(prefix=prefix, dir=directory)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody takes it for an orphan either
            fcntl.flock(handle, fcntl.LOCK_EX)
        # Between its making and its locking, another process may have taken it for an orphan.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(name), os.fstat(handle)):
                return handle, name
        os.close(handle)


def _remove_orphans(directory: Path) -> None:
    for path in directory.glob(f".*{_MARK}*"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # locked by its living process, gone already, or not ours to open
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


def _short_path(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 160 else f"{text[:60]}...{text[-60:]}"


def _typed(meta: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = meta.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PlanError(f"metadata {name!r} is {_short(value)}, which has the wrong type")
    return value


def _integers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)


def _short(value: object) -> str:
    try:
        text = str(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; nested too deeply
        return f"a {type(value).__name__} too long to show"
    return text[:16] + "..." if len(text) > 24 else text


def short(value: object) -> str:
    """A setting as people read it: six digits of a float."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def one_line(message: object) -> str:
    """``message`` as one printable line of at most 300 characters, its middle cut out where it is longer."""
    text = str(message)
    if len(text) > 4 * _LONGEST_LINE:
        text = f"{text[: 2 * _LONGEST_LINE]} ... {text[-2 * _LONGEST_LINE :]}"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    # A message begins with what it is about and ends with what was expected.
    return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE - 105]} ... {text[-100:]}"

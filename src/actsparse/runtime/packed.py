"""Packed directories: a model whose matrices are nested low-bit codes, with the plan that says how deep to read them.

::

    config.json ...              as the model had them; config.json gains ``quantization_config`` (``quant_method`` actsparse)
    plan.safetensors             the plan, made for the packed weights
    actsparse-00000.safetensors  ... one file per decoder layer, one for everything else
    model.safetensors.index.json which tensor is in which of them, as for any checkpoint of several files

A packed matrix stands as five tensors under its module's name: ``weight`` uint8 [I, G + 8 G S] (a column's mantissas, then its
planes), ``scale`` bfloat16 [I], ``gain`` float32 [L], ``center`` float32 [I] and ``start`` float32 [O]: the product is
start + W (x - center), and a bias is part of ``start``.  Everything else (embeddings, norms) stands under its own name.  The
format of codes is :mod:`actsparse.kernels.planes`'.

Shape letters: I inputs, O outputs, G groups of 64 outputs, S bits stored, L = S/2 levels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from actsparse import kernels
from actsparse.kernels.planes import GROUP, Packed, groups_of
from actsparse.models import directory, opening, sites
from actsparse.models.directory import PLAN, SHARDS
from actsparse.models.sites import ModelError
from actsparse.plan import Plan

# Codes are called a weight, as everywhere: a reader that does not know them fails on their shape, where it would fill a weight
# that it misses with random numbers.
PARTS = ("weight", "scale", "gain", "center", "start")
# What version 1 called them.
_CODES = ".codes"
_NONE: Mapping[str, str] = {}


class PackedLinear(nn.Module):
    """A linear layer over a packed weight, every plane of it: plain quantisation.

    Args:
        packed: the weight.
        center: float32 [I], taken off the input: codes are rounded for deviations from it.
        start: float32 [O], what the output starts from: W center of the dense weight, and the bias.
    """

    center: torch.Tensor
    start: torch.Tensor

    def __init__(self, packed: kernels.Nested, center: torch.Tensor, start: torch.Tensor) -> None:
        super().__init__()
        self.packed = packed
        self.register_buffer("center", center, persistent=False)
        self.register_buffer("start", start, persistent=False)
        self.in_features, self.out_features = packed.inputs, packed.out

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        self.packed = kernels.packed_on(self.packed, self.start.device)
        return self

    def matrix(self) -> Any:
        """What the native decode step is told of it."""
        return kernels.packed_of(self.packed, None, self.center, self.start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.graded_linear(x, self.packed, None, self.center, self.start)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packed.stored} bits stored"


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """What tells a file's codes from those of any other model or layer: a SHA-256 over its matrices' scales and gains."""
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if name.endswith((".scale", ".gain"))):
        digest.update(name.encode() + tensors[name].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def tensors_of(packed: kernels.Nested) -> dict[str, torch.Tensor]:
    """A packed matrix as the tensors that a directory stores."""
    packed = kernels.cuda.packed_of(packed) if isinstance(packed, kernels.cuda.Tiles) else packed
    codes = torch.cat([packed.mantissa, *packed.planes], 1).contiguous()
    return {"weight": codes, "scale": packed.scale.contiguous(), "gain": packed.gain.contiguous()}


def packed_from(codes: torch.Tensor, scale: torch.Tensor, gain: torch.Tensor, out: int) -> kernels.Nested:
    """The matrix of :func:`tensors_of`, in the order of bytes that the kernels of their device read.

    ValueError when shapes, types or values are not of the format.
    """
    groups, levels = groups_of(out), gain.numel()
    width = groups + levels * groups * GROUP // 4
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != width:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}, expected uint8 [I, {width}] for {out} outputs")
    planes = codes[:, groups:].unflatten(1, (levels, groups * GROUP // 4)).unbind(1)
    packed = Packed(out, codes[:, :groups], tuple(planes), scale, gain)
    packed.check()
    return kernels.cuda.tiles_of(packed) if codes.is_cuda else kernels.planes.relaid(packed)


def open_packed(name: str, device: torch.device | None = None) -> tuple[Any, Plan]:
    """The model of a packed directory on ``device`` (the CPU), reading every plane, and its plan.

    Raises:
        ModelError: a file is missing or damaged, or tensors do not fit the configuration.
        PlanError: its plan is missing, damaged, or for other weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    home = Path(name)
    config = AutoConfig.from_pretrained(name)
    about = config.quantization_config
    directory.check(home, about)
    plan = Plan.load(home / PLAN)
    opening.without_plan(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, str(about.get("dtype")), torch.bfloat16))
    sites.layers_of(model)  # fused layers are packed by their parts
    count = about.get("shards")
    if not isinstance(count, int) or not 0 < count < 100_000:
        raise ModelError(f"{name}/config.json names {str(count)[:24]} shards, expected a number")
    try:
        place = torch.device("cpu") if device is None else device
        files = [home / SHARDS.format(number) for number in range(count)]
        rest = _fill(model, _tensors(files, about.get("digests") or {}, place))
        _fill_rest(model, rest)
    except ValueError as error:
        raise error if isinstance(error, ModelError) else ModelError(f"{name}: {error}") from None
    opening.materialise_buffers(model)
    model.to(place)
    sites.set_fingerprint(model, plan.model.fingerprint)
    if (home / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval(), plan


class _Awaited(nn.Module):
    """Stands where a packed matrix will come, while transformers reads the rest."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features


def await_packed(model: Any, files: Iterable[Path]) -> list[str]:
    """Take out of a model on the meta device every linear layer that the files hold packed; returns their names."""
    sites.layers_of(model)  # fused layers are packed by their parts
    names = []
    for file in files:
        with _opened(file) as tensors:
            names += [key.removesuffix(".gain") for key in tensors.keys() if key.endswith(".gain")]  # noqa: SIM118
    for name in names:
        model.set_submodule(name, _Awaited(_linear(model, name)))
        model.all_tied_weights_keys.pop(f"{name}.weight", None)
    return names


def fill_awaited(model: Any, files: Iterable[Path], plan: Plan) -> None:
    """Put the packed matrices where :func:`await_packed` took layers out; ModelError for one that does not fit."""
    try:
        _fill(model, _tensors(files))
    except ValueError as error:
        raise error if isinstance(error, ModelError) else ModelError(str(error)) from None
    missing = next((name for name, module in model.named_modules() if isinstance(module, _Awaited)), None)
    if missing is not None:
        raise ModelError(f"{missing} is incomplete, expected {', '.join(PARTS)}")
    sites.set_fingerprint(model, plan.model.fingerprint)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"packed model {path.parent} lacks {path.name}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is truncated or damaged: {error}") from None


def _tensors(
    files: Iterable[Path], digests: Mapping[str, str] = _NONE, device: torch.device | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each file, on ``device``; those that version 1 called codes are weights.

    ModelError for a file that has another digest than ``digests`` (:func:`digest_of` by file name) gives for it.
    """
    for path in files:
        with _opened(path) as file:
            try:
                found = {
                    f"{key.removesuffix(_CODES)}.weight" if key.endswith(_CODES) else key: file.get_tensor(key)
                    for key in file.keys()  # noqa: SIM118
                }
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is truncated or damaged: {error}") from None
        made = digest_of(found) if path.name in digests else None
        yield {key: tensor.to(device) for key, tensor in found.items()}
        # Afterwards: whoever takes the tensors in knows better what is wrong with one.
        if made != digests.get(path.name):
            raise ModelError(
                f"{path} holds codes of another model or layer: expected those that were packed with its plan"
            )


def _linear(model: Any, name: str) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"tensor {name}.gain belongs to no module of the model") from None
    if not isinstance(module, nn.Linear | _Awaited):
        raise ModelError(f"tensor {name}.gain belongs to a {type(module).__name__}, expected a linear layer")
    return module


def _fill(model: Any, files: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put packed matrices into a model, file by file; returns all other tensors, ValueError for one that does not fit."""
    rest: dict[str, torch.Tensor] = {}
    for tensors in files:
        for name in [key.removesuffix(".gain") for key in tensors if key.endswith(".gain")]:
            linear = _linear(model, name)
            parts = [tensors.pop(f"{name}.{part}", None) for part in PARTS]
            codes, scale, gain, center, start = parts
            if codes is None or scale is None or gain is None or center is None or start is None:
                raise ValueError(f"{name} is incomplete, expected {', '.join(PARTS)}")
            try:
                packed = packed_from(codes, scale, gain, linear.out_features)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if packed.inputs != linear.in_features:
                raise ValueError(f"{name} has {packed.inputs} columns, expected {linear.in_features}")
            for part, vector, size in (("center", center, packed.inputs), ("start", start, packed.out)):
                if vector.dtype != torch.float32 or tuple(vector.shape) != (size,) or not bool(vector.isfinite().all()):
                    given = f"{vector.dtype} {list(vector.shape)}"
                    raise ValueError(f"{name}.{part} is {given} or not finite, expected finite float32 [{size}]")
            model.set_submodule(name, PackedLinear(packed, center, start))
        rest |= tensors
    return rest


def _fill_rest(model: Any, rest: dict[str, torch.Tensor]) -> None:
    """Put what is not packed into a model made on the meta device."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, tensor in rest.items():
        if name in shapes and tensor.shape != shapes[name]:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shapes[name])}")
    found = model.load_state_dict(rest, strict=False, assign=True)
    if found.unexpected_keys:
        raise ValueError(f"holds {found.unexpected_keys[0]}, which the model does not know")
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(f"lacks {empty[0]}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)

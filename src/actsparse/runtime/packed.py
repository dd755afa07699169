"""Packed directories: a model whose matrices are nested low-bit codes, with the plan that says how deep to read them.

::

    config.json ...              as the model had them; config.json gains ``quantization_config`` (``quant_method`` actsparse)
    plan.safetensors             the plan, made for the packed weights
    actsparse-00000.safetensors  ... one file per decoder layer, one for everything else

A packed matrix stands as five tensors under its module's name: ``codes`` uint8 [I, G + 8 G S] (a column's mantissas, then its
planes), ``scale`` bfloat16 [I], ``gain`` float32 [L], ``center`` float32 [I] and ``start`` float32 [O]: the product is
start + W (x - center), and a bias is part of ``start``.  Everything else (embeddings, norms) stands under its own name.  The
format of codes is :mod:`actsparse.kernels.planes`'.

Shape letters: I inputs, O outputs, G groups of 64 outputs, S bits stored, L = S/2 levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from actsparse import kernels
from actsparse.kernels.planes import GROUP, Packed, groups_of
from actsparse.models import opening, sites
from actsparse.models.sites import ModelError
from actsparse.plan import Plan

FORMAT_VERSION = 1
PLAN = "plan.safetensors"
SHARDS = "actsparse-{:05d}.safetensors"


class PackedLinear(nn.Module):
    """A linear layer over a packed weight, every plane of it: plain quantisation.

    Args:
        packed: the weight.
        center: float32 [I], taken off the input: codes are rounded for deviations from it.
        start: float32 [O], what the output starts from: W center of the dense weight, and the bias.
    """

    center: torch.Tensor
    start: torch.Tensor

    def __init__(self, packed: Packed, center: torch.Tensor, start: torch.Tensor) -> None:
        super().__init__()
        self.packed = packed
        self.register_buffer("center", center, persistent=False)
        self.register_buffer("start", start, persistent=False)
        self.in_features, self.out_features = packed.inputs, packed.out

    def matrix(self) -> kernels.Matrix:
        """What the native decode step is told of it."""
        return kernels.packed_of(self.packed, None, self.center, self.start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.graded_linear(x, self.packed, None, self.center, self.start)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packed.stored} bits stored"


def tensors_of(packed: Packed) -> dict[str, torch.Tensor]:
    """A packed matrix as the tensors that a directory stores."""
    codes = torch.cat([packed.mantissa, *packed.planes], 1).contiguous()
    return {"codes": codes, "scale": packed.scale.contiguous(), "gain": packed.gain.contiguous()}


def packed_from(codes: torch.Tensor, scale: torch.Tensor, gain: torch.Tensor, out: int) -> Packed:
    """The matrix of :func:`tensors_of`; ValueError when shapes, types or values are not of the format."""
    groups, levels = groups_of(out), gain.numel()
    width = groups + levels * groups * GROUP // 4
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != width:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}, expected uint8 [I, {width}] for {out} outputs")
    planes = codes[:, groups:].unflatten(1, (levels, groups * GROUP // 4)).unbind(1)
    packed = Packed(out, codes[:, :groups], tuple(planes), scale, gain)
    packed.check()
    return kernels.planes.relaid(packed)


def open_packed(name: str) -> tuple[Any, Plan]:
    """The model of a packed directory, reading every plane, and its plan.

    Raises:
        ModelError: a file is missing or damaged, or tensors do not fit the configuration.
        PlanError: its plan is missing, damaged, or for other weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(name)
    config = AutoConfig.from_pretrained(name)
    about = config.quantization_config
    if about.get("format_version") != FORMAT_VERSION:
        raise ModelError(f"{name} has packed format {about.get('format_version')!r}, expected {FORMAT_VERSION}")
    plan = Plan.load(directory / PLAN)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, str(about.get("dtype")), torch.bfloat16))
    tensors = _read(directory, about.get("shards"))
    try:
        _fill(model, tensors)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from None
    opening.materialise_buffers(model)
    sites.set_fingerprint(model, plan.model.fingerprint)
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval(), plan


def _read(directory: Path, count: Any) -> dict[str, torch.Tensor]:
    if not isinstance(count, int) or not 0 < count < 100_000:
        raise ModelError(f"{directory}/config.json names {str(count)[:24]} shards, expected a number")
    tensors: dict[str, torch.Tensor] = {}
    for number in range(count):
        path = directory / SHARDS.format(number)
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise ModelError(f"packed model {directory} lacks {path.name}") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path} is truncated or damaged: {error}") from None
    return tensors


def _fill(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Put the tensors into a model made on the meta device; ValueError for one that is missing, foreign or does not fit."""
    rest = dict(tensors)
    names = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    for name in names:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"tensor {name}.codes belongs to no module of the model") from None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"tensor {name}.codes belongs to a {type(linear).__name__}, expected a linear layer")
        parts = [rest.pop(f"{name}.{part}", None) for part in ("codes", "scale", "gain", "center", "start")]
        codes, scale, gain, center, start = parts
        if codes is None or scale is None or gain is None or center is None or start is None:
            raise ValueError(f"{name} is incomplete, expected codes, scale, gain, center and start")
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
    found = model.load_state_dict(rest, strict=False, assign=True)
    if found.unexpected_keys:
        raise ValueError(f"holds {found.unexpected_keys[0]}, which the model does not know")
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(f"lacks {empty[0]}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)

"""Predictors in PowerInfer's file format: a directory with one ``model_{layer}.pt`` per layer.

Each file is a state dict: ``fc1.weight`` [R, H], ``fc2.weight`` [N, R] and, for SVDP's predictors, ``fc2.bias`` [N].
PowerInfer's own trained predictors put a ReLU between the two layers and have no bias; the file does not say so.

Shape letters: H hidden, N neurons, R rank.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

import torch

from actsparse.plan import SKIP_ZEROS, ModelIdentity, Plan, PlanError, atomic_path

_FILE = re.compile(r"model_(\d+)\.pt")
_KEYS = ("fc1.weight", "fc2.weight", "fc2.bias")


def export_predictors(
    plan: Plan, directory: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16, relu: bool = False
) -> list[Path]:
    """Write the plan's predictors as PowerInfer does; returns the files.

    Args:
        plan: a plan with a predictor for every layer.
        directory: made if it is missing.
        dtype: of the tensors; float16 is what PowerInfer's converter and SVDP's executors read.
        relu: for readers that apply a ReLU between the layers, as PowerInfer's executor does: A is written twice, with both
            signs, and B likewise, so that B relu(A x) - B relu(-A x) = B A x.  Costs twice the rank.

    Raises:
        PlanError: a layer without a predictor, a value out of the type's range, or a place that cannot be written.
    """
    states = [_state(plan, layer, dtype, relu) for layer in range(plan.model.layers)]
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"cannot make the directory {folder}: {error.strerror}") from None
    files = []
    for layer, state in enumerate(states):
        files.append(folder / f"model_{layer}.pt")
        with atomic_path(files[-1]) as temporary:
            torch.save(state, temporary)
    return files


def import_predictors(directory: str | os.PathLike[str], model: ModelIdentity, *, linear: bool = False) -> Plan:
    """A plan whose predictors come from a directory of ``model_{layer}.pt`` files.

    Files are read by PyTorch's weights-only loader: one with code in it is refused, not run.

    Args:
        directory: where the files are; one for every layer of the model, and none for a layer it does not have.
        model: the model they were made for.
        linear: take files without ``fc2.bias`` for linear predictors with a bias of 0.  Otherwise they are refused,
            since that is how PowerInfer's own predictors look, which need a ReLU that a plan's predictors do not have.

    Raises:
        PlanError: with one line that names the file and what is wrong with it.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise PlanError(f"{folder} is not a directory, expected one with model_0.pt, model_1.pt ...")
    found = {int(match[1]) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    missing, extra = sorted(set(range(model.layers)) - found), sorted(found - set(range(model.layers)))
    if missing or extra:
        which, what = (missing, "misses") if missing else (extra, "has")
        raise PlanError(f"{folder} {what} model_{which[0]}.pt, expected model_0.pt to model_{model.layers - 1}.pt")
    rules: dict[str, torch.Tensor] = {}
    for layer in range(model.layers):
        state = _load(folder / f"model_{layer}.pt", model, linear)
        prefix = f"layers.{layer}.ffn."
        for part, key in (("a", "fc1.weight"), ("b", "fc2.weight"), ("bias", "fc2.bias")):
            rules[f"{prefix}predictor_{part}"] = state[key].float().contiguous()
        rules[f"{prefix}threshold"] = torch.tensor([SKIP_ZEROS])
        if model.activation == "drelu":
            rules[f"layers.{layer}.down.threshold"] = torch.tensor([SKIP_ZEROS])
    plan = Plan(
        method="svdp",
        sparsity=0.0,
        model=model,
        rules=rules,
        settings={"imported": str(folder)},
        version=importlib.metadata.version("actsparse"),
    )
    plan.validate()
    return plan


def _state(plan: Plan, layer: int, dtype: torch.dtype, relu: bool) -> dict[str, torch.Tensor]:
    rules = plan.layer_rules(layer)
    try:
        a, b, bias = (rules[f"ffn.predictor_{part}"] for part in ("a", "b", "bias"))
    except KeyError:
        raise PlanError(
            f"plan of method {plan.method} has no predictor for layer {layer}, expected one made by svdp"
        ) from None
    if relu:
        a, b = torch.cat([a, -a]), torch.cat([b, -b], dim=1)
    state = {key: tensor.to(dtype).contiguous() for key, tensor in zip(_KEYS, (a, b, bias), strict=True)}
    for key, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise PlanError(f"layer {layer} {key} holds a value out of the range of {dtype}, expected a wider type")
    return state


def _load(path: Path, model: ModelIdentity, linear: bool) -> dict[str, torch.Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises a dozen unrelated kinds for files that are not what they should be
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PlanError(f"{path} is refused: not a plain state dict of tensors ({line[:120]})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise PlanError(f"{path} holds a {type(state).__name__}, expected a state dict of tensors")
    unknown = sorted(str(key) for key in state if key not in _KEYS)
    if unknown or "fc1.weight" not in state or "fc2.weight" not in state:
        raise PlanError(f"{path} has the tensors {', '.join(sorted(map(str, state)))}, expected {', '.join(_KEYS)}")
    if "fc2.bias" not in state:
        if not linear:
            raise PlanError(
                f"{path} has no fc2.bias: PowerInfer's own predictors need a ReLU between their layers, which a plan's "
                "predictors do not have (if these are linear, say so)"
            )
        state["fc2.bias"] = torch.zeros(model.neurons)
    rank = state["fc1.weight"].shape[0] if state["fc1.weight"].dim() == 2 else 0
    shapes = {"fc1.weight": (rank, model.hidden), "fc2.weight": (model.neurons, rank), "fc2.bias": (model.neurons,)}
    for key, shape in shapes.items():
        tensor = state[key]
        if tuple(tensor.shape) != shape or not rank:
            want = {"fc1.weight": f"[rank, {model.hidden}]", "fc2.weight": f"[{model.neurons}, {rank}]"}
            raise PlanError(f"{path} {key} has shape {list(tensor.shape)}, expected {want.get(key, list(shape))}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise PlanError(
                f"{path} {key} is {tensor.dtype} or holds values that are not finite, expected finite floats"
            )
    return state

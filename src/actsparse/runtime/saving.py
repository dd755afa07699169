"""Saving a sparsified model: a checkpoint that ``from_pretrained`` opens as the same sparse model.

A dense checkpoint stays one: the plan lies beside it, and a reader that does not know this package reads the dense model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from actsparse.models import directory, fused, sites
from actsparse.models.directory import INDEX, PLAN, QUANT_METHOD, SHARDS
from actsparse.models.sites import ModelError
from actsparse.plan import Plan, atomic_path
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.packed import PackedLinear, tensors_of

_SHIM = Path(__file__).parent / "shim"
AUTO_MAP = {
    "AutoConfig": "configuration_actsparse.ActsparseConfiguration",
    "AutoModelForCausalLM": "modeling_actsparse.ActsparseForCausalLM",
}
# Weights whose columns are skipped are copied into rows to be written: of one file at a time.
_MOST_BYTES = "2GB"


def save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
    """``model.save_pretrained`` of a sparsified model: its checkpoint, the plan and what opens both.

    A dense model's weights are written as transformers writes them, a packed one's as :func:`actsparse.calibration.pack.pack`
    does.  Where the model carries a PEFT adapter, that alone is written, as transformers does.

    Args:
        model: sparsified.
        save_directory: as transformers takes it.
        options: transformers' own; a packed model takes none.

    Raises:
        ModelError: a packed model that was restored has no plan to be saved with.
        PlanError: the plan is for evaluation only.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        PreTrainedModel.save_pretrained(model, save_directory, *args, **options)
        return
    state = getattr(model, "actsparse_state", None)
    if state is None:
        raise ModelError("the model is packed and was restored: expected it sparsified, with the plan to be saved")
    plan: Plan = state.plan
    plan.check_decodable()
    home = Path(save_directory)
    about: dict[str, Any] = {"method": plan.method, "sparsity": plan.sparsity, "scope": plan.scope}
    if holds_packed(model):
        if args or options:
            raise ModelError(f"save_pretrained of a packed model got {', '.join(options) or args}, expected no options")
        home.mkdir(parents=True, exist_ok=True)
        about |= _save_packed(model, home)
    else:
        options.setdefault("max_shard_size", _MOST_BYTES)
        tensors = dict(options.pop("state_dict", None) or model.state_dict())
        tensors |= _replaced_weights(model, state)
        fused.join_state(model, tensors)
        PreTrainedModel.save_pretrained(model, save_directory, *args, state_dict=tensors, **options)
        _index(home)
    complete(home, plan, about)


def complete(home: Path, plan: Plan, about: dict[str, Any]) -> None:
    """Make of the checkpoint in ``home`` a sparse model's directory: the plan, what opens it, and config.json at last.

    Args:
        home: a Hugging Face checkpoint.
        plan: made for it.
        about: what ``quantization_config`` says beyond the format and the plan's name.
    """
    plan.save(home / PLAN)
    for file in sorted(_SHIM.glob("*.py")):
        shutil.copyfile(file, home / file.name)
    path = home / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD, "format_version": directory.FORMAT_VERSION, "plan": PLAN, **about,
    }  # fmt: skip
    config["auto_map"] = AUTO_MAP
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_index(home: Path, files: dict[str, list[str]], size: int) -> None:
    """``model.safetensors.index.json``: which file has which tensors, ``size`` bytes in all."""
    names = {name: file for file, tensors in sorted(files.items()) for name in sorted(tensors)}
    with atomic_path(home / INDEX) as temporary:
        document = {"metadata": {"total_size": size}, "weight_map": names}
        Path(temporary).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def holds_packed(model: Any) -> bool:
    """Whether the model's matrices were opened packed: there are no dense ones to go back to."""
    state = getattr(model, "actsparse_state", None)
    originals = [old for _, _, old in state.replaced] + [state.head] if state is not None else model.modules()
    return any(isinstance(module, PackedLinear) for module in originals)


def _replaced_weights(model: Any, state: Any) -> dict[str, torch.Tensor]:
    """Dense weights whose modules were replaced by rounded ones, under their names in the state dict."""
    names = {module: name for name, module in model.named_modules()}
    dense = [(layer.product(path_name), old) for layer, path_name, old in _rounded(state)]
    if state.head is not None:
        dense.append((model.get_output_embeddings(), state.head))
    return {f"{names[new]}.{part}": tensor for new, old in dense for part, tensor in old.state_dict().items()}


def _rounded(state: Any) -> Iterator[tuple[sites.LayerSites, str, Any]]:
    for layer, path, old in state.replaced:
        name = next((name for name, place in layer.family.projections if place == path), None)
        if name is not None and isinstance(layer.product(name), GradedLinear):
            yield layer, name, old


def _save_packed(model: Any, home: Path) -> dict[str, Any]:
    """Write every tensor, a file per layer; returns what ``quantization_config`` says of them."""
    layers = sites.layers_of(model)
    names = {module: name for name, module in model.named_modules()}
    inside = [f"{names[layer.module]}." for layer in layers]
    products = {name: module for module, name in names.items() if isinstance(module, PackedLinear | GradedLinear)}
    rest = model.state_dict()
    files: dict[str, list[str]] = {}
    size = 0
    for number in range(len(layers) + 1):
        prefix = inside[number - 1] if number else ""

        def here(name: str, prefix: str = prefix) -> bool:
            return name.startswith(prefix) if prefix else not name.startswith(tuple(inside))

        tensors = {name: tensor for name, tensor in rest.items() if here(name)}
        for name, module in products.items():
            if here(name):
                parts = {**tensors_of(module.packed), "center": module.center, "start": module.start}
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        file = SHARDS.format(number)
        with atomic_path(home / file) as temporary:
            save_file({name: one.cpu().contiguous() for name, one in tensors.items()}, temporary, {"format": "pt"})
        files[file] = list(tensors)
        size += sum(one.numel() * one.element_size() for one in tensors.values())
    write_index(home, files, size)
    model.config.save_pretrained(home)
    model.generation_config.save_pretrained(home)
    stored = next(iter(products.values())).packed.stored
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return {"bits_stored": stored, "shards": len(layers) + 1, "dtype": dtype}


def _index(home: Path) -> None:
    """An index for a checkpoint of one file too: some readers take every ``.safetensors`` file that no index names."""
    from safetensors import safe_open

    file = home / "model.safetensors"
    if any(home.glob("model-*-of-*.safetensors")):
        file.unlink(missing_ok=True)  # of an earlier save: transformers would open it first
        return
    with safe_open(file, framework="pt") as tensors:
        write_index(home, {file.name: list(tensors.keys())}, file.stat().st_size)

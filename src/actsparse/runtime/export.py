"""Directories for serving engines: a checkpoint's own files with a plan beside them, and a config.json that names it.

vLLM (with the plug-in ``actsparse-vllm``) mixes prompts and decoding in one batch, so a plan for it has scope ``all``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from actsparse.models import directory, opening
from actsparse.models.directory import INDEX, PLAN
from actsparse.models.sites import ModelError
from actsparse.plan import Plan, PlanError

_COPIED = (".json", ".jinja", ".model", ".safetensors", ".txt")


def export(model: str, plan: Plan | None, target: str) -> Plan:
    """Write the directory ``target`` for vLLM and return the plan in it; weights are linked where the file system can.

    Args:
        model: a directory or hub id; of packed weights, or dense ones.
        plan: made for it; None for a directory that has its own.
        target: must not exist.

    Raises:
        ModelError: no safetensors weights, or ``target`` exists or cannot be written.
        PlanError: no plan, two of them, or one that vLLM cannot obey.
    """
    source, home = Path(opening.local_directory(model)), Path(target)
    about = directory.description(str(source))
    packed = about is not None and directory.holds_packed(about)
    if packed and plan is not None:
        raise PlanError(f"{model} is packed and has its own plan: expected no other")
    if about is not None:
        directory.check(source, about)
    if plan is None:
        if about is None:
            raise PlanError(f"{model} has no plan of its own: expected one")
        plan = Plan.load(source / PLAN)
    plan.check_decodable()
    if plan.prompt:
        raise PlanError(f"plan's method is {plan.method}: it chooses neurons per prompt, vLLM batches many prompts")
    if plan.method == "graded" and not packed:
        raise PlanError("plan's method is graded: it needs packed weights, made by `actsparse pack`")
    plan = plan.with_scope("all")
    files = [file for file in sorted(source.iterdir()) if file.suffix in _COPIED and file.name != PLAN]
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        raise ModelError(f"model {model} has no .safetensors files")
    if home.exists():
        raise ModelError(f"cannot write {target}: it exists already")
    if not home.parent.is_dir():
        raise ModelError(f"cannot write {target}: {home.parent} is no directory")
    with tempfile.TemporaryDirectory(prefix=f".{home.name}.", dir=home.parent) as folder:
        made = Path(folder) / "made"
        made.mkdir()
        for file in files:
            _link(file, made / file.name)
        plan.save(made / PLAN)
        # Without an index vLLM takes every .safetensors file for the model's, the plan too.
        if not (made / INDEX).exists():
            _write(made / INDEX, _index(weights))
        _write(made / "config.json", _config(source, plan))
        os.replace(made, home)
    return plan


def _config(source: Path, plan: Plan) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    version = {"quant_method": directory.QUANT_METHOD, "format_version": directory.FORMAT_VERSION}
    about = config.get("quantization_config") or version
    about |= {"plan": PLAN, "method": plan.method, "sparsity": plan.sparsity, "scope": plan.scope}
    config["quantization_config"] = about
    if config.get("hidden_act") == "relu" and config.get("architectures") == ["LlamaForCausalLM"]:
        # vLLM's Llama knows SiLU only; the plug-in brings this one.
        config["architectures"] = ["ReluLlamaForCausalLM"]
    return config


def _index(weights: list[Path]) -> dict[str, Any]:
    names: dict[str, str] = {}
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), file.name)
    return {"metadata": {"total_size": sum(file.stat().st_size for file in weights)}, "weight_map": names}


def _write(path: Path, document: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)  # a link's target is the source's own file
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file.resolve(), to)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, to)

"""Opening Hugging Face models: from a directory or the hub, with errors a user can act on."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from actsparse.models import directory
from actsparse.models.sites import FAMILIES, ModelError, family_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(name: str) -> torch.device:
    """The device ``name`` (such as ``cpu``, ``cuda`` or ``cuda:1``); ModelError for one that this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, not built in, or absent
        raise ModelError(f"device is {name!r}, expected one of this machine: {_first_line(error)}") from None
    if device.type == "meta":
        raise ModelError("device is 'meta', expected one that holds values")
    return device


def check_unquantised(name: str) -> None:
    """ModelError for a directory whose config.json says that another tool has quantised its weights."""
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        about = config.get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # not ours to judge: opening it tells what is wrong
    if about and directory.of_config(config) is None:
        tool = about.get("quant_method") if isinstance(about, dict) else None
        raise ModelError(f"model {name} is quantised already ({tool or 'by an unnamed tool'}), expected dense weights")


def open_model(name: str, dtype: str = "auto", device: str = "cpu") -> Any:
    """The causal language model ``name`` (a directory or a hub id), dense, in evaluation mode.

    Of a directory that holds a dense checkpoint and a plan, this is the checkpoint's model, without the plan.

    Args:
        name: what ``AutoModelForCausalLM.from_pretrained`` takes.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: where its weights go, see :func:`device_of`.

    Raises:
        ModelError: no such device; missing, unreadable, of a family that is not supported, or with tensors that are missing or
            of other shapes than its config.json says (heads that are tied excepted).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown: expected auto, {', '.join(DTYPES)}")
    place = device_of(device)
    _check_directory(name)
    try:
        config = AutoConfig.from_pretrained(name)
        about = directory.of_config(config.to_dict())
        if about is not None and directory.holds_packed(about):
            raise ModelError(f"model {name} is packed, expected a dense one")
        if about is not None:
            without_plan(config)
        check_family(config)
        with quiet():
            # Mismatches are let through here to be named below, all of them and on one line.
            model, found = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=DTYPES.get(dtype, "auto"),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        check_complete(name, found["missing_keys"], [entry[0] for entry in found["mismatched_keys"]])
        extra = sorted(found["unexpected_keys"])
        if extra and about is not None:
            raise ModelError(f"model {name} holds {extra[0]}, expected only tensors of its config.json")
    except ModelError:
        raise
    except Exception as error:  # transformers, the hub client and safetensors raise many unrelated kinds
        raise ModelError(f"model {name} cannot be loaded: {_first_line(error)}") from None
    return model.eval().to(place)


def without_plan(config: Any) -> Any:
    """``config``, in place, as the dense model has it, without what points to a plan and to the code that knows plans."""
    for name in ("auto_map", "quantization_config"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def local_directory(name: str) -> str:
    """The directory of model ``name``: itself, or a hub id's snapshot in the hub client's cache; ModelError for neither."""
    _check_directory(name)
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub client raises many unrelated kinds
        raise ModelError(f"model {name} cannot be fetched: {_first_line(error)}") from None


def open_gguf(file: str) -> tuple[Any, Any]:
    """The model and tokenizer of a GGUF file, dequantised to bfloat16 by transformers; ModelError when that fails."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(file)
    if not path.is_file():
        raise ModelError(f"{file} does not exist or is not a file, expected a GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{file} needs the package gguf: pip install 'actsparse[gguf]'")
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its bar over tensors obeys no setting
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers and gguf raise many unrelated kinds
        raise ModelError(f"{file} cannot be loaded: {_first_line(error)}") from None
    family_of(model)
    return model.eval(), tokenizer


def open_tokenizer(name: str) -> Any:
    """The tokenizer of ``name``; ModelError when there is none."""
    from transformers import AutoTokenizer

    _check_directory(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as above
        raise ModelError(f"tokenizer of {name} cannot be loaded: {_first_line(error)}") from None


def materialise_buffers(model: Any) -> None:
    """Make the modules of a model from the meta device again whose buffers are computed (the rotary embedding's)."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            if isinstance(module, torch.nn.Embedding):  # Gemma's, which scales what it looks up
                module.embed_scale = torch.tensor(module.scalar_embed_scale)
            else:
                model.set_submodule(name, type(module)(config=model.config))


def check_family(config: Any) -> None:
    """ModelError, before weights are read, for a model of ``config`` whose family will be refused."""
    if config.model_type not in FAMILIES:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            family_of(AutoModelForCausalLM.from_config(config))


def check_complete(name: str, missing: Iterable[str], mismatched: Iterable[str]) -> None:
    """ModelError when weights of the model ``name`` are not in its files, or not in the shapes of its config.json."""
    for wrong, what in (
        (sorted(missing), "lacks"),
        (sorted(mismatched), "stores in another shape than config.json says"),
    ):
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ModelError(
                f"model {name} {what} {', '.join(wrong[:3])}{more}: expected every tensor of the configuration"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bar over tensors and its table of what it did not find off the terminal."""
    from transformers.utils import logging

    was_on, before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if was_on:
            logging.enable_progress_bar()


def _check_directory(name: str) -> None:
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelError(f"model {name} does not exist: expected a directory or a hub id (organisation/name)")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"model {name} has no config.json: expected a Hugging Face model directory")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

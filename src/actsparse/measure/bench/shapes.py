"""Random-weight models of a named shape: speed does not depend on what the weights mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actsparse.models.opening import DTYPES, device_of
from actsparse.models.sites import ModelError

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
CONTEXT = 4096
STANDARD_DEVIATION = 0.02
# Beside the weights: the bandwidth test's buffer, a matrix being re-laid, activations, Python and torch themselves.
OVERHEAD_BYTES = 2 << 30
# Odd, so that rows of a power-of-two length never fall on the same place of the pool.
_POOL = (1 << 24) + 12345


def config_of(shape: str) -> LlamaConfig:
    """The configuration of a named shape; ModelError, listing them, for an unknown one."""
    if shape not in SHAPES:
        raise ModelError(f"shape {shape!r} is unknown: expected one of {', '.join(SHAPES)}")
    return LlamaConfig(**SHAPES[shape], max_position_embeddings=CONTEXT, tie_word_embeddings=False)


def fits_with_codes(config: Any, dtype: str, bits_stored: int) -> bool:
    """Whether :func:`random_model` of this configuration, and all its weights packed beside it, fit the memory of the CPU."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    available = available_bytes()
    codes = sum(p.numel() for p in model.parameters()) * bits_stored // 8
    return available is None or _needed(model) + codes <= available


def _needed(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters()) + OVERHEAD_BYTES


def random_model(config: Any, dtype: str, *, name: str = "model", seed: int = 0, device: str = "cpu") -> Any:
    """A model of ``config`` with normal(0, 0.02) weights and unit norms, in evaluation mode.

    The values are runs of one pool of random numbers, each matrix's rows from other places: a billion fresh ones would
    take ten seconds.

    Raises:
        ModelError: it does not fit the memory that is available (both sizes are named), or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown: expected one of {', '.join(DTYPES)}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    needed = _needed(model)
    place = device_of(device)
    available = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else available_bytes()
    if available is not None and needed > available:
        raise ModelError(
            f"{name} in {dtype} needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB is available"
        )
    model = model.to_empty(device=place)
    # Its frequencies are computed when it is made, which on the meta device gave nothing.
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(place)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(_POOL, dtype=DTYPES[dtype]).normal_(0, STANDARD_DEVIATION, generator=generator).to(place)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                _fill(parameter.view(-1), pool, generator)
    return model.eval()


def _fill(flat: torch.Tensor, pool: torch.Tensor, generator: torch.Generator) -> None:
    run = pool.numel() // 4
    for at in range(0, flat.numel(), run):
        size = min(run, flat.numel() - at)
        start = int(torch.randint(pool.numel() - size, (1,), generator=generator))
        flat[at : at + size] = pool[start : start + size]


def available_bytes() -> int | None:
    """Memory that a new allocation can get, the container's limit included; None where the system does not tell."""
    found = []
    info = Path("/proc/meminfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text(encoding="ascii").splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file() and limit.read_text(encoding="ascii").strip() != "max":
        found.append(int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
    return min(found, default=None)

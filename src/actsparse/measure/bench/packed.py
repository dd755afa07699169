"""Random-weight models that are made packed, matrix by matrix: a shape whose 16-bit weights do not fit needs only its codes.

Shape letters: I inputs, O outputs, G groups of a column, L levels, T tokens.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from actsparse.kernels import planes
from actsparse.kernels.planes import Packed
from actsparse.measure.bench.shapes import OVERHEAD_BYTES, STANDARD_DEVIATION, available_bytes
from actsparse.methods.graded import DENSE_BITS, Reading, alone, reading_of, unit_thresholds
from actsparse.methods.rounding import residuals
from actsparse.models import opening, sites
from actsparse.models.sites import ModelError
from actsparse.plan import ModelIdentity, Plan
from actsparse.runtime.packed import PackedLinear

# Random bytes that all planes are runs of; odd, so that no two matrices begin at the same place of it for long.
_POOL = (96 << 20) + 12345
# Codes are even over their range and mantissas over the upper half of theirs: weights of this deviation in units of the scale.
_DEVIATION = 0.44
_SAMPLED_COLUMNS = 16


def random_packed(config: Any, stored: int, *, name: str, seed: int = 0) -> Any:
    """A model of ``config`` whose matrices are random codes of ``stored`` bits, in evaluation mode.

    Raises:
        ModelError: it does not fit the memory that is available (both sizes are named).
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    packed_weights = sum(linear.weight.numel() for linear in linears.values())
    others = sum(p.numel() for p in model.parameters()) - packed_weights
    # An eighth of a bit for mantissas and as much for what fills lines up.
    needed = packed_weights * (stored + 0.25) / 8 + 2 * others + OVERHEAD_BYTES
    available = available_bytes()
    if available is not None and needed > available:
        raise ModelError(
            f"{name} in {stored} bits needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB is available"
        )
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(256, (_POOL,), dtype=torch.uint8, generator=generator)
    for path, linear in linears.items():
        packed = _random_codes(linear.out_features, linear.in_features, stored, pool, generator)
        center, start = torch.zeros(linear.in_features), torch.zeros(linear.out_features)
        model.set_submodule(path, PackedLinear(packed, center, start))
    rest = {
        path: torch.ones(p.shape, dtype=p.dtype)
        if p.dim() == 1
        else torch.empty(p.shape, dtype=p.dtype).normal_(0, STANDARD_DEVIATION, generator=generator)
        for path, p in model.named_parameters()
    }
    model.load_state_dict(rest, strict=False, assign=True)
    opening.materialise_buffers(model)
    sites.set_fingerprint(model, f"random codes of {stored} bits, seed {seed}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def plans_on_random_tokens(model: Any, bits: Sequence[float], *, tokens: int) -> list[Plan]:
    """One plan per number of bits read, from the inputs of every product on random tokens.

    Every product reads that many bits: random weights have no loss that could tell products apart.
    """
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(
        model.config.vocab_size, (1, min(tokens, model.config.max_position_embeddings)), generator=generator
    )
    products = {
        f"layers.{layer.index}.{name}": layer.product(name)
        for layer in sites.layers_of(model)
        for name, _ in layer.family.projections
    }
    products["head"] = model.get_output_embeddings()
    readings: dict[str, Reading] = {}

    def reads(site: str, product: Any) -> Any:
        packed, center = product.packed, product.center

        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2).float()
            readings[site] = reading_of(x, _unit(packed), packed, center)

        return product.register_forward_pre_hook(hook)

    handles = [reads(site, product) for site, product in products.items()]
    try:
        with torch.no_grad():
            model(input_ids=drawn, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [_plan(model, readings, wanted) for wanted in bits]


def _plan(model: Any, readings: dict[str, Reading], bits: float) -> Plan:
    rules: dict[str, torch.Tensor] = {}
    total = read = 0.0
    for site, reading in readings.items():
        theta = alone(reading, bits)
        rules[f"{site}.level_threshold"] = (reading.unit.double() * theta).float()
        rules[f"{site}.center"] = reading.center
        if site != "head":
            total += reading.weights
            read += reading.bits(theta) * reading.weights
    stored = 2 * len(next(iter(readings.values())).unit)
    return Plan(
        method="graded",
        sparsity=1 - bits / DENSE_BITS,
        model=ModelIdentity(**sites.describe(model)),
        rules=rules,
        settings={"bits_stored": stored, "bits_read": read / total},
        scope="decode",
        version=importlib.metadata.version("actsparse"),
    )


def _unit(packed: Packed) -> torch.Tensor:
    """Thresholds at theta 1, [L, I]: random columns are alike, so that a few of them stand for all."""
    part = planes.columns_of(packed, 0, _SAMPLED_COLUMNS)
    left = residuals(planes.unpack(part), part).mean(1, keepdim=True)
    return unit_thresholds(left.expand(-1, packed.inputs), packed.level_bytes)


def _random_codes(outputs: int, inputs: int, stored: int, pool: torch.Tensor, generator: torch.Generator) -> Packed:
    groups = planes.groups_of(outputs)
    width = groups * planes.GROUP // 4

    def run() -> torch.Tensor:
        begin = int(torch.randint(len(pool) - width * min(inputs, len(pool) // 2 // width), (1,), generator=generator))
        rows = min(inputs, len(pool) // 2 // width)
        piece = pool[begin : begin + rows * width].view(rows, width)
        return piece if rows == inputs else piece.repeat(-(-inputs // rows), 1)[:inputs]

    mantissa = torch.randint(128, 256, (inputs, groups), generator=generator).to(torch.uint8)
    scale = torch.full((inputs,), STANDARD_DEVIATION / _DEVIATION, dtype=torch.bfloat16)
    return planes.relaid(
        Packed(outputs, mantissa, tuple(run() for _ in range(stored // 2)), scale, torch.ones(stored // 2))
    )

"""What a decoded token reads of a model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actsparse.models import sites
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.layers import Meter, SparseFFN
from actsparse.runtime.packed import PackedLinear
from actsparse.runtime.swap import state_of


@dataclass(frozen=True)
class WeightsRead:
    """What a decoded token reads.

    Attributes:
        bytes: of weights, the output head's included.
        fraction: of the dense model's bytes.
        ffn_fraction: of the bytes of its feed-forward blocks.
        bits_read: bits per weight of the decoder layers' matrices, scales and predictors included.
        bits_stored: the same of what is stored.
    """

    bytes: float
    fraction: float
    ffn_fraction: float
    bits_read: float
    bits_stored: float


def weights_read(model: Any, meter: Meter | None = None) -> WeightsRead:
    """Weight bytes per decoded token of ``model``: every projection at its metered fraction, and the output head.

    The embedding counts for nothing (one row is read); a predictor counts in full.  A plan that is for evaluation only
    counts as its ideal: gate and up are read for the neurons that down keeps.
    """
    state = state_of(model)
    products = {
        f"layers.{layer.index}.{name}": layer.product(name)
        for layer in sites.layers_of(model)
        for name, _ in layer.family.projections
    }
    counts = {site: _weights(module) for site, module in products.items()}
    stored = {site: _stored_bytes(module) for site, module in products.items()}
    for layer in sites.layers_of(model):
        if not layer.family.has_ffn:
            site = f"layers.{layer.index}.experts"
            counts[site], stored[site] = _experts(layer.ffn, model.config)
    head = model.get_output_embeddings()
    kept = {site: 1 - value for site, value in meter.sparsity().items()} if meter else {}
    if state and state.plan.evaluation_only:
        # The ideal that such a plan stands for: what it keeps is known before gate and up are read.
        for site in [site for site in kept if site.endswith(".down")]:
            kept |= {f"{site.removesuffix('down')}{name}": kept[site] for name in sites.FFN_PROJECTIONS}
    extra = 0
    for module in state.modules if state else []:
        if isinstance(module, SparseFFN):
            rules = module.rules()
            predictor = (rules.predictor_a, rules.predictor_b)
            extra += sum(matrix.numel() * matrix.element_size() for matrix in predictor if matrix is not None)
    ffn = [site for site in counts if site.rpartition(".")[2] in (*sites.FFN_PROJECTIONS, "experts")]
    read = {site: size * kept.get(site, 1.0) for site, size in stored.items()}
    used = sum(read.values()) + extra
    ffn_used = sum(read[site] for site in ffn) + extra
    weights = sum(counts.values())
    whole = used + _stored_bytes(head) * kept.get("head", 1.0)
    width = model.dtype.itemsize
    return WeightsRead(
        bytes=whole,
        fraction=whole / (width * (weights + _weights(head))),
        ffn_fraction=ffn_used / (width * sum(counts[site] for site in ffn)),
        bits_read=8 * used / weights,
        bits_stored=8 * (sum(stored.values()) + extra) / weights,
    )


def _experts(block: Any, config: Any) -> tuple[int, int]:
    """Weights and bytes that a token reads of a block of experts: those it is sent to, of tensors stacked [experts, ...]."""
    weights = size = 0
    for parameter in block.parameters():
        used = config.num_experts_per_tok / len(parameter) if parameter.dim() == 3 else 1.0
        weights += round(parameter.numel() * used)
        size += round(parameter.numel() * parameter.element_size() * used)
    return weights, size


def _weights(product: Any) -> int:
    if isinstance(product, GradedLinear | PackedLinear):
        return product.in_features * product.out_features
    return int(product.weight.numel())


def _stored_bytes(product: Any) -> int:
    if isinstance(product, GradedLinear | PackedLinear):
        return product.packed.nbytes
    return int(product.weight.numel() * product.weight.element_size())

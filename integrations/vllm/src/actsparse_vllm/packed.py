"""Linear layers over nested low-bit weights of a packed directory, read to the depth that a graded plan says.

Shape letters: I inputs and O outputs of this process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from actsparse import kernels
from actsparse.kernels.planes import GROUP, Packed, groups_of
from actsparse.plan import Plan, PlanError
from actsparse.runtime.packed import packed_from
from actsparse_vllm import operators

PARTS = ("codes", "scale", "gain", "center", "start")
# Codes are called a weight since version 2 of the format.
NAMES = {"weight": "codes"} | {part: part for part in PARTS}
_SHARD = {"q": 0, "k": 1, "v": 2, None: 0}


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):
    """The packed matrices of one layer.

    Args:
        plan: the plan made with them.
        place: ``layers.{i}`` or ``head``.
        names: the projections, in their merged order.
    """

    def __init__(self, plan: Plan, place: str, names: tuple[str, ...]) -> None:
        self._sites = [place if place == name else f"{place}.{name}" for name in names]
        self._thresholds = [plan.rules.get(f"{site}.level_threshold") for site in self._sites]
        self._loaded: list[dict[str, Tensor]] = [{} for _ in names]

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self._sizes, self._inputs = output_partition_sizes, input_size_per_partition
        self._dtype = params_dtype
        for name, part in NAMES.items():
            # Nothing but a name for the loader: matrices of several projections do not merge.
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = self._loader(part)
            layer.register_parameter(name, parameter)
        operators.attach(layer, sum(output_partition_sizes))

    def _loader(self, part: str) -> Any:
        def load(parameter: nn.Parameter, loaded: Tensor, shard: int | str | None = None) -> None:
            number = _SHARD[shard] if shard is None or isinstance(shard, str) else shard
            self._loaded[number][part] = loaded.clone()

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        device = layer.codes.device
        if device.type not in ("cpu", "cuda"):
            raise PlanError(f"packed weights on {device} have no kernels: expected a CPU or CUDA")
        if device.type == "cuda" and self._dtype not in kernels.cuda.DTYPES:
            raise PlanError(f"dtype is {self._dtype}, packed weights on {device} need bfloat16 or float16")
        products = []
        for number, site in enumerate(self._sites):
            packed, *rules = self._matrix(layer, number, site)
            moved = [None if rule is None else rule.to(device) for rule in rules]
            products.append((kernels.packed_on(packed, device), *moved))
            self._loaded[number] = {}
        for name in NAMES:
            delattr(layer, name)
        kernels.use_huge_pages(*(storage for packed, *_ in products for storage in packed.storages))
        operators.set_product(layer, Graded(products))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # The packed start has the bias in it.
        return operators.call(layer, x, None)

    def tie_weights(self, layer: nn.Module, embed_tokens: VocabParallelEmbedding) -> nn.Module:
        # A packed head is a matrix of its own, whatever the configuration says.
        return layer

    def _matrix(self, layer: nn.Module, number: int, site: str) -> tuple[Packed, Tensor | None, Tensor, Tensor]:
        """This process's part of a matrix with its thresholds, center and start."""
        loaded, threshold = self._loaded[number], self._thresholds[number]
        missing = [part for part in PARTS if part not in loaded]
        if missing:
            raise PlanError(f"the packed model has no {site} {missing[0]}")
        codes, scale, gain, center, start = (loaded[part] for part in PARTS)
        try:
            packed = packed_from(codes, scale, gain, len(start))
        except ValueError as error:
            raise PlanError(f"{site}: {error}") from None
        if threshold is not None and len(threshold) != len(packed.planes):
            raise PlanError(f"{site} stores {packed.stored} bits, the plan's thresholds are for {2 * len(threshold)}")
        rank, size = layer.tp_rank, layer.tp_size
        if size > 1 and isinstance(layer, RowParallelLinear):
            columns = slice(rank * self._inputs, (rank + 1) * self._inputs)
            packed = _columns(packed, columns)
            center = center[columns].contiguous()
            threshold = None if threshold is None else threshold[:, columns].contiguous()
            # The processes' results are added up: one of them starts from it.
            start = start if rank == 0 else torch.zeros_like(start)
        elif self._sizes[number] != len(start):
            begin, end = self._outputs(layer, number, len(start))
            packed = _rows(packed, begin, end, self._sizes[number], site)
            start = torch.cat([start[begin:end], start.new_zeros(self._sizes[number] - (end - begin))])
        return packed, threshold, center, start

    def _outputs(self, layer: nn.Module, number: int, whole: int) -> tuple[int, int]:
        """Which of a matrix's outputs this process has."""
        own, rank = self._sizes[number], layer.tp_rank
        if isinstance(layer, VocabParallelEmbedding):
            return min(rank * own, whole), min((rank + 1) * own, whole)
        # More processes than key heads share them.
        begin = rank * own if own * layer.tp_size <= whole else rank // (own * layer.tp_size // whole) * own
        return begin, begin + own


class Graded:
    """Packed products side by side, each column read as deep as its input says."""

    def __init__(self, products: list[tuple[Packed, Tensor | None, Tensor, Tensor]]) -> None:
        self._products = products

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        results = [kernels.graded_linear(x, *product) for product in self._products]
        return results[0] if len(results) == 1 else torch.cat(results, -1)


def _columns(packed: Packed, columns: slice) -> Packed:
    """Some inputs of a packed matrix."""
    planes = tuple(plane[columns] for plane in packed.planes)
    return kernels.planes.relaid(
        Packed(packed.out, packed.mantissa[columns], planes, packed.scale[columns].contiguous(), packed.gain)
    )


def _rows(packed: Packed, begin: int, end: int, out: int, site: str) -> Packed:
    """Outputs ``begin`` to ``end`` of a packed matrix, filled up with zeros to ``out``; they lie in whole groups."""
    if begin % GROUP or (end % GROUP and end != packed.out):
        raise PlanError(f"{site} is cut at {begin} and {end} among processes, expected multiples of {GROUP}")
    first, last, wanted = begin // GROUP, groups_of(end), groups_of(out)
    width = GROUP // 4
    mantissa = packed.mantissa.new_zeros(packed.inputs, wanted)
    mantissa[:, : last - first] = packed.mantissa[:, first:last]
    planes = []
    for plane in packed.planes:
        part = plane.new_zeros(packed.inputs, wanted * width)
        part[:, : (last - first) * width] = plane[:, first * width : last * width]
        planes.append(part)
    return kernels.planes.relaid(Packed(out, mantissa, tuple(planes), packed.scale, packed.gain))

"""Linear layers of 16- or 32-bit weights under the rules of a plan.

Shape letters: T tokens, I inputs and O outputs of this process, N its neurons, R rank of a predictor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from actsparse import kernels
from actsparse.plan import SKIP_ZEROS
from actsparse_vllm import operators

if TYPE_CHECKING:
    from actsparse_vllm.config import ActsparseConfig


# Skipping fewer of a batch's neurons than this is worth nothing.
USELESS = 0.1


@register_weight_loader_v2_supported_method
class SparseLinearMethod(LinearMethodBase):
    """One layer's part of the plan.

    Args:
        config: the model's configuration, which has the plan.
        index: the decoder layer.
        names: the projections that the layer multiplies, in their merged order.
    """

    def __init__(self, config: ActsparseConfig, index: int, names: tuple[str, ...]) -> None:
        self._config, self._index, self._names = config, index, names
        self._dense = UnquantizedLinearMethod()

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
        self._dense.create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
            **extra_weight_attrs,
        )  # fmt: skip
        self._sizes, self._whole_inputs = output_partition_sizes, input_size
        self._whole_outputs = output_size
        operators.attach(layer, sum(output_partition_sizes))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._config.check_claimed()
        product = self._gate_up(layer) if self._names == ("gate", "up") else None
        if product is None:
            product = self._columns(layer)
        if product is None:
            self._dense.process_weights_after_loading(layer)
            product = Dense(self._dense, layer)
        elif layer.weight.is_cpu:
            kernels.use_huge_pages(*product.weights)
        operators.set_product(layer, product)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return operators.call(layer, x, bias)

    def _gate_up(self, layer: nn.Module) -> GateUp | None:
        """The product whose rows are chosen, if a rule chooses any."""
        rules = self._config.plan.layer_rules(self._index)
        if not any(name.startswith("ffn.") for name in rules):
            return None
        gate, up = layer.weight.data.split(self._sizes)
        inputs = {
            f"{name}_in_threshold": self._threshold(layer, rules.get(f"{name}.threshold"), up.shape[1])
            for name in self._names
        }
        if any(threshold is not None for threshold in inputs.values()):
            gate, up = (by_columns(weight) for weight in (gate, up))
            release(layer)
        neurons, device = len(up), up.device
        begin = layer.tp_rank * neurons
        part = {}
        for name in ("ffn.threshold", "ffn.predictor_bias", "ffn.predictor_b"):
            if name in rules:
                rule = rules[name].expand(neurons * layer.tp_size) if rules[name].shape == (1,) else rules[name]
                part[name] = rule[begin : begin + neurons].to(device).contiguous()
        for name, tensor in (("a", rules.get("ffn.predictor_a")), ("b", part.get("ffn.predictor_b"))):
            if tensor is not None:
                # Parameters, so that what vLLM does with a model's memory it does with theirs.
                parameter = nn.Parameter(tensor.to(device, up.dtype).contiguous(), requires_grad=False)
                layer.register_parameter(f"actsparse_predictor_{name}", parameter)
                part[f"ffn.predictor_{name}"] = parameter.data
        made = kernels.Rules(
            activation=self._config.plan.model.activation,
            gate_threshold=part.get("ffn.threshold"),
            predictor_a=part.get("ffn.predictor_a"),
            predictor_b=part.get("ffn.predictor_b"),
            predictor_bias=part.get("ffn.predictor_bias"),
            **inputs,
        )
        if kernels.merged.obstacle(gate, up, made) or made.predictor_a is not None:
            return GateUp(gate, up, made)
        # Exact zeros are skipped whatever a plan was made for: how many there are is not known.
        exact = bool((part["ffn.threshold"] <= SKIP_ZEROS).all())
        return GateUp(gate, up, made, layer.weight.data, 1.0 if exact else self._config.plan.sparsity)

    def _columns(self, layer: nn.Module) -> Columns | None:
        """The product whose columns are skipped, if a rule skips any; neighbours of one rule are multiplied together."""
        rules = self._config.plan.layer_rules(self._index)
        runs: list[tuple[int, Tensor | None]] = []
        for name, size in zip(self._names, self._sizes, strict=True):
            threshold = rules.get(f"{name}.threshold")
            if name == "down":
                threshold = _of_down(rules, gated=self._config.gated)
            if runs and _same(runs[-1][1], threshold):
                runs[-1] = (runs[-1][0] + size, threshold)
            else:
                runs.append((size, threshold))
        if all(threshold is None for _, threshold in runs):
            return None
        weights = layer.weight.data.split([size for size, _ in runs])
        parts = []
        for weight, (_, threshold) in zip(weights, runs, strict=True):
            own = weight.clone() if threshold is None else by_columns(weight)
            parts.append((own, self._threshold(layer, threshold, weight.shape[1])))
        release(layer)
        return Columns(parts)

    def _threshold(self, layer: nn.Module, threshold: Tensor | None, inputs: int) -> Tensor | None:
        """This process's part of an input threshold, float32 [I]."""
        if threshold is None:
            return None
        whole = threshold.to(layer.weight.device).expand(self._whole_inputs)
        begin = layer.tp_rank * inputs if isinstance(layer, RowParallelLinear) else 0
        return whole[begin : begin + inputs].contiguous()


class Dense:
    """vLLM's own product."""

    def __init__(self, method: UnquantizedLinearMethod, layer: nn.Module) -> None:
        self._method = method
        # The layer owns this product: no cycle between them.
        self._holder = nn.Module()
        self._holder.__dict__.update({k: v for k, v in layer.__dict__.items() if k != "actsparse_product"})

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._method.apply(self._holder, x, bias)


class Columns:
    """Products side by side, each of which skips the columns whose inputs stay under its threshold.

    Args:
        parts: weights [O, I], stored by columns where there is a threshold, each with its threshold [I] or None.
    """

    def __init__(self, parts: list[tuple[Tensor, Tensor | None]]) -> None:
        self._parts = parts

    @property
    def weights(self) -> list[Tensor]:
        """What it reads."""
        return [weight for weight, _ in self._parts]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if len(self._parts) == 1:
            weight, threshold = self._parts[0]
            return kernels.linear(x, weight, bias, threshold)
        biases = [None] * len(self._parts) if bias is None else bias.split([len(weight) for weight, _ in self._parts])
        return torch.cat(
            [
                kernels.linear(x, weight, b, threshold)
                for (weight, threshold), b in zip(self._parts, biases, strict=True)
            ],
            -1,
        )


class GateUp:
    """gate and up of a block, up only where the rules keep a neuron; see :func:`actsparse.kernels.merged.gate_up`.

    Args:
        gate, up: weights [N, H].
        rules: what decides.
        whole: both, [2 N, H]; None: neurons are chosen however many rows there are.
        sparsity: share of the neurons that the gate drops for one token.
    """

    def __init__(
        self, gate: Tensor, up: Tensor, rules: kernels.Rules, whole: Tensor | None = None, sparsity: float = 0.0
    ) -> None:
        self._gate, self._up, self._rules, self._whole = gate, up, rules, whole
        # Of so many tokens together nearly every neuron is kept: finding out which are not takes longer than reading them.
        self._most = next((n for n in range(2, kernels.MAX_BATCH + 1) if sparsity**n < USELESS), kernels.MAX_BATCH + 1)

    @property
    def weights(self) -> list[Tensor]:
        """What it reads."""
        return [self._gate, self._up]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rules = self._rules
        whole, rows = self._whole, x.numel() // x.shape[-1]
        if whole is not None and self._most <= rows and kernels.path_for(x, whole).startswith("cpu-"):
            return kernels.merged.on_cpu_whole(x, whole, bias, rules)
        if bias is not None:
            gate_bias, up_bias = bias.split(len(self._up))
            rules = replace(rules, gate_bias=gate_bias, up_bias=up_bias)
        return kernels.merged.gate_up(x, self._gate, self._up, rules)


def by_columns(weight: Tensor) -> Tensor:
    """W [O, I] re-laid so that each column is contiguous."""
    return weight.t().contiguous().t()


def release(layer: nn.Module) -> None:
    """Let go of the weight that was loaded, whose parts lie elsewhere now."""
    layer.weight = nn.Parameter(layer.weight.data.new_empty(0), requires_grad=False)


def _of_down(rules: dict[str, Tensor], *, gated: bool) -> Tensor | None:
    """The input threshold of down: the plan's, and at least exact zeros where neurons are dropped before it.

    A plain block's gate threshold looks at activation(up x), which is down's input.
    """
    found = [rules["down.threshold"]] if "down.threshold" in rules else []
    if any(name.startswith("ffn.") for name in rules):
        found.append(torch.tensor([SKIP_ZEROS]))
    if not gated and "ffn.threshold" in rules:
        found.append(rules["ffn.threshold"])
    if not found:
        return None
    threshold = found[0]
    for other in found[1:]:
        threshold = torch.maximum(threshold, other)
    return threshold


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None) == (b is None) and (a is None or b is None or (a.shape == b.shape and torch.equal(a, b)))

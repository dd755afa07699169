"""The executor for devices without kernels of ours: plain PyTorch that gathers the rows it needs and multiplies those.

It is what the executor of SVDP does on Ascend (arXiv:2603.14110): ``index_select`` and ``matmul``, nothing else, so it runs
wherever PyTorch does (``npu`` through torch_npu, ``mps``, ``xpu``).  Weights that are not needed are never touched.  But every
selection is a copy, and the host waits twice a block to learn how many rows there are: not fit for graph capture.

Shape letters: H hidden, N neurons, R rank, B rows of x, C candidates, K kept, T tokens; "..." any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import ACTIVATIONS, keep
from .rules import Rules


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: Tensor | None = None) -> Tensor:
    """y = W x~ + bias from the columns that some row of x keeps; see :func:`actsparse.kernels.linear`."""
    rows = x.reshape(-1, x.shape[-1])
    chosen = None
    if threshold is not None:
        chosen, kept, rows = _narrow(None, keep(rows, threshold), rows)
        rows = torch.where(kept, rows, 0.0)
    y = rows @ _only(weight.T, 0, chosen)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def gated_ffn(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules) -> Tensor:
    """One feed-forward block; see :func:`actsparse.kernels.gated_ffn`.

    Computed in x's own type.  Several rows share one gathering of the union of what they keep, each under its own mask.
    Input thresholds change the result as they should but save no reading here.
    """
    rows = x.reshape(-1, x.shape[-1])
    chosen = None if rules.neurons is None else rules.neurons.long()
    allowed: Tensor | None = None
    if rules.predictor_a is not None and rules.predictor_b is not None:
        score = _product(_product(rows, rules.predictor_a, None), rules.predictor_b, rules.predictor_bias)
        allowed = _only(~(score <= 0), 1, chosen)  # NaN counts as active
        chosen, allowed = _narrow(chosen, allowed)

    gate_in = rows if rules.gate_in_threshold is None else torch.where(keep(rows, rules.gate_in_threshold), rows, 0.0)
    up_in = rows if rules.up_in_threshold is None else torch.where(keep(rows, rules.up_in_threshold), rows, 0.0)
    first, first_in, first_bias = (up, up_in, rules.up_bias) if gate is None else (gate, gate_in, rules.gate_bias)
    g = ACTIVATIONS[rules.activation](_product(first_in, _only(first, 0, chosen), _only_bias(first_bias, chosen)))
    if rules.gate_threshold is not None:
        passes = keep(g, _only(rules.gate_threshold, 0, chosen))
        allowed = passes if allowed is None else allowed & passes
        chosen, allowed, g = _narrow(chosen, allowed, g)

    value = g
    if gate is not None:
        value = g * ACTIVATIONS[rules.up_activation](
            _product(up_in, _only(up, 0, chosen), _only_bias(rules.up_bias, chosen))
        )
    if rules.value_threshold is not None:
        passes = keep(value, _only(rules.value_threshold, 0, chosen))
        allowed = passes if allowed is None else allowed & passes
        chosen, allowed, value = _narrow(chosen, allowed, value)
    if rules.mean is not None:
        value = value - _only(rules.mean, 0, chosen).to(value.dtype)
    if allowed is not None:
        value = torch.where(allowed, value, 0.0)
    # Column-wise storage of down is row-wise storage of its transpose: what is gathered lies together.
    y = value @ _only(down.T, 0, chosen)
    if rules.down_bias is not None:
        y = y + rules.down_bias.to(y.dtype)
    return y.reshape(*x.shape[:-1], down.shape[0])


def channel_statistics(
    x: Tensor,
    counts: Tensor | None,
    min_exponent: int,
    sub_bits: int,
    sum_abs: Tensor | None,
    sum_square: Tensor | None,
) -> int:
    """As :func:`actsparse.kernels.reference.channel_statistics`, with bins read from the bits of float32; all on x's device."""
    value = x.float().abs()
    finite = value < torch.inf  # NaN is not
    value = torch.where(finite, value, 0.0)
    if sum_abs is not None:
        sum_abs += value.sum(0, dtype=torch.float64)
    if sum_square is not None:
        sum_square += value.double().square_().sum(0)
    if counts is not None:
        bins = counts.shape[1]
        # Positive floats order as their bits do: dropping low mantissa bits gives equal bins per octave.
        place = (value.view(torch.int32) >> (23 - sub_bits)) - (((min_exponent + 127) << sub_bits) - 2)
        place = torch.where(value == 0, 0, place.clamp_(1, bins - 1))
        first = torch.arange(0, counts.numel(), bins, device=x.device)
        counts.view(-1).scatter_add_(0, (place + first).view(-1), finite.view(-1).to(counts.dtype))
    return int((~finite).sum())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.T
    return y if bias is None else y + bias.to(y.dtype)


def _only(tensor: Tensor, dim: int, chosen: Tensor | None) -> Tensor:
    return tensor if chosen is None else tensor.index_select(dim, chosen)


def _only_bias(bias: Tensor | None, chosen: Tensor | None) -> Tensor | None:
    return None if bias is None else _only(bias, 0, chosen)


def _narrow(chosen: Tensor | None, allowed: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Down to the neurons that at least one row allows: their indices [C], the mask [B, C], and the same of ``values``."""
    places = allowed.any(0).nonzero()[:, 0]
    chosen = places if chosen is None else chosen.index_select(0, places)
    return chosen, *(tensor.index_select(1, places) for tensor in (allowed, *values))

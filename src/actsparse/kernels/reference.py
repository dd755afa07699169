"""The oracle: every kernel's arithmetic in plain PyTorch, on any device, differentiable.

Shape letters: I in, O out, H hidden, N neurons, R rank, C channels, T tokens; "..." any leading dimensions.

Each product comes twice. The plain names compute in float32 (float64 when given float64) whatever the storage type, as
the kernels do, and round once at the end. The ``_masked`` names compute in the model's own type through ``F.linear``:
that is what a prefill of thousands of tokens should cost. Both are *dense* products of masked values, so a weight that a
kernel would never read does take part here, multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import Rules

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
}


def keep(values: Tensor, threshold: Tensor) -> Tensor:
    """True where a value is computed: everything but |v| < t, so that NaN is kept and never hidden."""
    return ~(values.abs() < threshold)


def _masked(values: Tensor, threshold: Tensor | None) -> Tensor:
    return values if threshold is None else torch.where(keep(values, threshold), values, 0.0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None, compute: torch.dtype) -> Tensor:
    bias = None if bias is None else bias.to(compute)
    return F.linear(_masked(x.to(compute), threshold), weight.to(compute), bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: Tensor | None = None) -> Tensor:
    """y = W x~ + bias with x~ = x where not |x| < threshold; x [..., I], weight [O, I], threshold float32 [I]."""
    return _product(x, weight, bias, threshold, _wide(x)).to(x.dtype)


def linear_masked(x: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: Tensor | None = None) -> Tensor:
    """As :func:`linear`, computed in x's own type."""
    return _product(x, weight, bias, threshold, x.dtype)


def _decide(
    x: Tensor, gate: Tensor | None, up: Tensor, rules: Rules, compute: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """g u of every neuron, and who is left after the predictor, after the gate, after the value (None: everyone)."""
    left: list[Tensor | None] = [None]
    if rules.predictor_a is not None and rules.predictor_b is not None:
        score = _product(x, rules.predictor_a, None, None, compute)
        score = _product(score, rules.predictor_b, rules.predictor_bias, None, compute)
        left[0] = ~(score <= 0)  # NaN counts as active
    u = _product(x, up, rules.up_bias, rules.up_in_threshold, compute)
    if gate is None:
        value = g = ACTIVATIONS[rules.activation](u)
    else:
        g = ACTIVATIONS[rules.activation](_product(x, gate, rules.gate_bias, rules.gate_in_threshold, compute))
        value = g * ACTIVATIONS[rules.up_activation](u)
    for decided, threshold in ((g, rules.gate_threshold), (value, rules.value_threshold)):
        before = left[-1]
        if threshold is None:
            left.append(before)
        else:
            left.append(keep(decided, threshold) if before is None else before & keep(decided, threshold))
    return value, left


def _ffn(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules, compute: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """The block's output, and the masks of :func:`_decide` over the neurons of the set."""
    if rules.neurons is not None:
        # A fixed set is a smaller dense block.
        chosen = rules.neurons
        gate, up = None if gate is None else gate.index_select(0, chosen), up.index_select(0, chosen)
        down, rules = down.index_select(1, chosen), rules.of_neurons()
    value, left = _decide(x, gate, up, rules, compute)
    if rules.mean is not None:
        value = value - rules.mean.to(compute)
    if left[-1] is not None:
        value = torch.where(left[-1], value, 0.0)
    return _product(value, down, rules.down_bias, None, compute).to(x.dtype), left


def gated_ffn(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules) -> Tensor:
    """One feed-forward block; arguments and meaning as in :func:`actsparse.kernels.gated_ffn`."""
    return _ffn(x, gate, up, down, rules, _wide(x))[0]


def gated_ffn_masked(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules) -> Tensor:
    """As :func:`gated_ffn`, computed in x's own type."""
    return _ffn(x, gate, up, down, rules, x.dtype)[0]


def gated_ffn_metered(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`gated_ffn_masked` and :func:`ffn_keep` in one go, at the price of the first; not for a set of neurons."""
    y, left = _ffn(x, gate, up, down, rules, x.dtype)
    return y, _masks(x, gate, left, rules)


def _masks(x: Tensor, gate: Tensor | None, left: list[Tensor | None], rules: Rules) -> dict[str, Tensor]:
    gate_inputs, up_inputs = rules.gate_in_threshold, rules.up_in_threshold
    masks = {
        "gate": left[0] if gate_inputs is None else keep(x, gate_inputs),
        "up": left[1] if up_inputs is None else keep(x, up_inputs),
        "ffn": left[1],
        "down": left[2],
    }
    if gate is None:
        # A plain block decides by up itself, which is therefore read for every candidate.
        masks["up"] = left[0] if up_inputs is None else masks["up"]
        del masks["gate"]
    return {name: mask for name, mask in masks.items() if mask is not None}


def ffn_keep(x: Tensor, gate: Tensor | None, up: Tensor, rules: Rules) -> dict[str, Tensor]:
    """What a block reads of its matrices, as masks that are True where read.

    "gate" and "up" are [..., H] over inputs where an input threshold decides and [..., N] over neurons elsewhere; "ffn"
    [..., N] are the neurons that pass set, predictor and gate threshold; "down" [..., N] those that also pass the value
    threshold. A matrix that no rule touches is left out.
    """
    _, left = _decide(x, gate, up, rules, x.dtype)
    if rules.neurons is not None:
        member = torch.zeros(up.shape[0], dtype=torch.bool, device=x.device).index_fill_(0, rules.neurons.long(), True)
        left = [member.expand(*x.shape[:-1], -1) if mask is None else mask & member for mask in left]
    return _masks(x, gate, left, rules)


def core_statistics(x: Tensor, count: int, share: float, *, positive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The strongest channels of each token of x [T, C], finite, by |value| or, if ``positive``, by max(value, 0).

    They are the ``count`` largest, or for count 0 the ``share`` of those that are not 0 (rounded, half to even, at least
    one).  Returns float32 levels [T], the strength of the weakest of them; counts [C], how many tokens have the channel
    among them (not weaker than the level, and not 0); sums [C], its strengths in units of the tokens' levels.
    """
    strength = x.float().clamp(min=0) if positive else x.float().abs()
    levels = core_levels(strength, count, share)
    core = core_of(strength, levels)
    sums = (strength / levels.clamp(min=torch.finfo(torch.float32).tiny)).sum(0)
    return levels[:, 0], core.sum(0).float(), sums


def core_parts(x: Tensor, stops: Sequence[int], count: int, share: float, *, positive: bool) -> Tensor:
    """Counts and sums of :func:`core_statistics` of finite tokens up to each of P ``stops`` since the one before, in one go.

    Away from the CPU, where each of its dozen operations costs as much for a token as for a thousand.  Strengths are compared
    in the values' own type, in which a level is one of them.  Returns float32 [P, 2, C + 1]; the last column counts tokens.
    """
    strength = x.detach().clamp(min=0) if positive else x.detach().abs()
    level = core_levels(strength, count, share)
    core = core_of(strength, level)
    # A token with fewer active channels than its core has no level; 0 times that is 0 in the other parts.
    units = (strength.float() / level.float().clamp(min=torch.finfo(torch.float32).tiny)).nan_to_num()
    inside = _inside(tuple(stops), x.device)
    sums = torch.stack([inside @ core.float(), inside @ units], 1).nan_to_num()
    return torch.cat([sums, inside.sum(1)[:, None, None].expand(-1, 2, 1)], 2)


@lru_cache(maxsize=16)
def _inside(stops: tuple[int, ...], device: torch.device) -> Tensor:
    """Which tokens are in which part, float32 [P, T].  Kept, because sending it to a GPU waits for what that is doing."""
    token, ends = torch.arange(stops[-1]), torch.tensor(stops)[:, None]
    begins = torch.cat([ends.new_zeros(1, 1), ends[:-1]])
    return ((token >= begins) & (token < ends)).float().to(device)


def core_of(strength: Tensor, level: Tensor) -> Tensor:
    """Which channels are core, bool [T, C]: active and not weaker than the level [T, 1]; ties belong."""
    return (strength >= level) & (strength > 0)


def core_levels(strength: Tensor, count: int, share: float) -> Tensor:
    """The levels of :func:`core_statistics`, [T, 1], from strengths [T, C] of any float type and in that."""
    if count:
        return strength.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    wanted = ((strength > 0).sum(1, keepdim=True) * torch.tensor(share)).round().long().clamp(min=1)
    return strength.sort(dim=1, descending=True).values.gather(1, wanted - 1)


def channel_statistics(
    x: Tensor,
    counts: Tensor | None,
    min_exponent: int,
    sub_bits: int,
    sum_abs: Tensor | None,
    sum_square: Tensor | None,
) -> int:
    """Adds x [T, C] to histograms and sums in place; returns how many values were not finite (those are left out).

    counts int32 or uint32-in-int32 [C, bins]: bin 0 exact zeros, bin 1 magnitudes under 2^min_exponent, then 2^sub_bits
    linear bins per octave, the last one open above. sum_abs and sum_square are float64 [C].
    """
    value = x.to(torch.float32).abs()
    finite = value.isfinite()
    clean = torch.where(finite, value, 0.0).double()
    if sum_abs is not None:
        sum_abs += clean.sum(0)
    if sum_square is not None:
        sum_square += clean.square().sum(0)
    if counts is not None:
        bins = counts.shape[1]
        fraction, exponent = torch.frexp(clean)  # fraction in [0.5, 1)
        inside = ((2 * fraction - 1) * 2**sub_bits).floor().long()
        bin_of = (exponent.long() - 1 - min_exponent) * 2**sub_bits + inside + 2
        bin_of = bin_of.clamp(1, bins - 1)
        bin_of = torch.where(clean == 0, 0, bin_of)
        counts.scatter_add_(1, bin_of.T.contiguous(), finite.T.to(counts.dtype))
    return int((~finite).sum())

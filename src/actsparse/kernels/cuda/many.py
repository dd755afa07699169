"""Products of more than 8 rows, as in a prompt: the matrix library's, of what thresholds leave.

The same arithmetic as the ``_masked`` oracle's, whose masks take a dozen passes through memory: a prompt's first token came a
sixth later than the dense model's.

Letters: T rows, C channels.
"""

from __future__ import annotations

from ctypes import Structure, c_int32, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rules import Rules
from . import compiler
from .launches import ACTIVATIONS
from .products import Run
from .structures import Launch, pointer, vector

THREADS = 256
_ROWS = 4  # of a thread, eight channels each


class Cut(Structure):
    """What is left of rows."""

    _fields_ = [
        *((name, c_void_p) for name in ("value", "second", "least", "product", "y")),
        *((name, c_int32) for name in ("rows", "size", "activation", "second_activation")),
    ]


def fits(rules: Rules, *operands: Tensor | None) -> bool:
    """Whether :func:`gated_ffn` knows these rules and sizes, and autograd is not to follow."""
    if any(rule is not None for rule in (rules.predictor_a, rules.neurons, rules.mean)):
        return False
    given = [tensor for tensor in operands if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    x, *weights = given
    sizes = all(size % 8 == 0 for weight in weights for size in weight.shape)
    types = all(weight.dtype == x.dtype for weight in weights if weight.dim() == 2)
    return x.dtype in compiler.DTYPES and types and sizes and not compiler.device_obstacle(x.device.index or 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None, run: Run = compiler.run) -> Tensor:
    """As :func:`actsparse.kernels.reference.linear_masked`."""
    return F.linear(x if threshold is None else cut(x, least=threshold, run=run), weight, _of(x, bias))


def gated_ffn(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules, run: Run = compiler.run
) -> Tensor:
    """As :func:`actsparse.kernels.reference.gated_ffn_masked`, of rules that :func:`fits` takes."""
    u = linear(x, up, rules.up_bias, rules.up_in_threshold, run)
    least, product = rules.gate_threshold, rules.value_threshold
    if gate is None:
        value = cut(u, least=least, product=product, activation=rules.activation, run=run)
    else:
        g = linear(x, gate, rules.gate_bias, rules.gate_in_threshold, run)
        value = cut(g, u, least, product, rules.activation, rules.up_activation, run=run)
    return linear(value, down, rules.down_bias, None, run)


def cut(
    value: Tensor,
    second: Tensor | None = None,
    least: Tensor | None = None,
    product: Tensor | None = None,
    activation: str = "identity",
    second_activation: str = "identity",
    *,
    run: Run = compiler.run,
) -> Tensor:
    """v = activation(value) times w = second_activation(second), [..., C]; 0 where |v| < least or |v w| < product, [C]."""
    value, second = _aligned(value), None if second is None else _aligned(second)
    least, product = vector(least, value.device), vector(product, value.device)
    y = torch.empty_like(value)
    if value.numel():
        size = value.shape[-1]
        rows = value.numel() // size
        parameters = Cut(
            *map(pointer, (value, second, least, product, y)), rows, size, ACTIVATIONS[activation],
            ACTIVATIONS[second_activation],
        )  # fmt: skip
        grid = (-(-(-(-rows // _ROWS) * size // 8) // THREADS), 1)
        run(
            [Launch("cut", grid, THREADS, 0, parameters, (value, second, least, product, y))],
            value.device,
            value.dtype,
            1,
        )
    return y


def _aligned(values: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on."""
    values = values.contiguous()
    return values.clone() if values.data_ptr() % 16 else values


def _of(x: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)

"""Rounding with error feedback: what rounding a column does to the output, the columns not yet rounded make good.

Frantar et al., "GPTQ", arXiv:2210.17323 (the order of columns by their Hessian's diagonal: its ``act-order``), on nested
codes that are read to several levels.  The error that a column passes on is the mean over what is read of it: its shares of
input energy per level say how much each level's error counts.

Shape letters: O outputs, I inputs, L levels, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from actsparse import kernels
from actsparse.kernels import planes
from actsparse.kernels.planes import GROUP, Packed
from actsparse.methods.rounding import gains_of, round_columns

# Added to the Hessian's diagonal, as a fraction of its mean: fewer tokens than inputs make it singular.
DAMPING = 0.01
# Columns between two updates of all that follow.
_BLOCK = 128


def energy_shares(deviation: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Share of each input's energy that is read at each level, float32 [L + 1, I]; level 0 (skipped) first.

    deviation [T, I] is what the products multiply, threshold [L, I] as rules have it.  Inputs without energy count as
    read whole.
    """
    square = deviation.float().square()
    size = deviation.abs()
    reached = torch.stack([square.sum(0), *(torch.where(size >= t, square, 0.0).sum(0) for t in threshold)])
    beyond = torch.cat([reached[1:], torch.zeros_like(reached[:1])])
    total = reached[0]
    shares = (reached - beyond) / total.clamp(min=1e-30)
    shares[-1] = torch.where(total > 0, shares[-1], 1.0)
    return shares


def round_with_feedback(
    weight: torch.Tensor, stored: int, hessian: torch.Tensor, shares: torch.Tensor, damping: float = DAMPING
) -> tuple[Packed, torch.Tensor]:
    """W [O, I] as nested codes of ``stored`` bits, the error of each column made good by those after it.

    Returns the codes, and what each column stood at when its turn came, float32 [O, I]: its own error is against that.

    Args:
        weight: any float type.
        stored: 4, 6 or 8.
        hessian: [I, I], the mean of x x^T over the calibration tokens (x: what the product multiplies, deviations included).
        shares: [L + 1, I] of :func:`energy_shares`.
        damping: see :data:`DAMPING`.

    Raises:
        ValueError: a weight is not finite, or ``stored`` is something else.
    """
    outputs, inputs = weight.shape
    level_weight = shares[1:] + 1e-3 * shares[1:].mean()  # no column's search goes without a criterion
    mantissa = torch.empty(planes.groups_of(outputs), inputs, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(inputs, dtype=torch.bfloat16, device=weight.device)
    fits = torch.zeros(2, stored // 2, dtype=torch.float64, device=weight.device)
    for at in range(0, inputs, 4 * _BLOCK):
        block = slice(at, at + 4 * _BLOCK)
        _, mantissa[:, block], scale[block], fit = round_columns(weight[:, block], stored, level_weight[:, block])
        fits += fit
    gain = gains_of(fits)

    order = hessian.diagonal().argsort(descending=True)
    upper = _inverse_factor(hessian[order][:, order], damping)
    rest = weight.float()[:, order].T.contiguous()  # [I, O]: a column lies together
    half_range = (mantissa.float() * (scale.float() / 255)).T[order]
    ordered_shares = shares[:, order]
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=weight.device)
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        block_of = (rest, begin, end, stored, half_range, upper, ordered_shares[1:], gain, codes)
        native = rest.is_cuda and not kernels.cuda.device_obstacle(rest.device.index)
        errors = kernels.cuda.round_block(*block_of) if native else _round_block(*block_of)
        if end < inputs:
            rest[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(inputs, device=order.device)
    return planes.pack(codes[back].T, mantissa, scale, gain, stored), rest[back].T


def _round_block(
    rest: torch.Tensor, begin: int, end: int, stored: int, half_range: torch.Tensor, upper: torch.Tensor,
    shares: torch.Tensor, gain: torch.Tensor, codes: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """As :func:`actsparse.kernels.cuda.round_block`, on any device."""
    outputs = rest.shape[1]
    errors = torch.empty(end - begin, outputs, device=rest.device)
    with _one_thread():
        for i in range(begin, end):
            column = rest[i]
            steps = half_range[i].repeat_interleave(GROUP)[:outputs]
            codes[i], read = _read_value(column, steps, stored, gain, shares[:, i])
            torch.div(column - read, upper[i, i], out=errors[i - begin])
            if i + 1 < end:
                rest[i + 1 : end].addr_(upper[i, i + 1 : end], errors[i - begin], alpha=-1)
    return errors


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Column by column the work is too small to share: waking a second thread costs more, on a busy machine fifty times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_value(
    column: torch.Tensor, steps: torch.Tensor, stored: int, gain: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A column's code, and the mean of the values it is read as, by share."""
    half = 2 ** (stored - 1)
    code = (column * (half / steps.clamp(min=1e-30)) + half).floor_().clamp_(0, 2 * half - 1)
    read = torch.zeros_like(column)
    for index, share in enumerate(shares):
        level = 2 * index + 2
        value = (code * 2.0 ** (level - stored)).floor_().add_(0.5 - 2 ** (level - 1))
        read += value * (share * gain[index] * 2.0 ** (1 - level))
    return code.to(torch.uint8), read * steps


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular, with U^T U the inverse of the damped Hessian, float32."""
    damped = hessian.float().clone()
    mean = float(damped.diagonal().mean())
    strength = damping
    for _ in range(6):
        damped.diagonal().add_(strength * mean + 1e-12)
        lower, wrong = torch.linalg.cholesky_ex(damped)
        if not int(wrong):
            inverse = torch.cholesky_inverse(lower)
            upper, wrong = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(wrong):
                return upper
        strength = 10 * strength
    raise ValueError("the Hessian of a product's inputs stays singular under damping, expected finite activations")

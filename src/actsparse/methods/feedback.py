"""Rounding with error feedback: what rounding a column does to the output, the columns not yet rounded make good.

Frantar et al., "GPTQ", arXiv:2210.17323 (the order of columns by their Hessian's diagonal: its ``act-order``), on nested
codes that are read to several levels.  The error that a column passes on is the mean over what is read of it: its shares of
input energy per level say how much each level's error counts.

Shape letters: O outputs, I inputs, L levels, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from actsparse import kernels
from actsparse.kernels import planes
from actsparse.kernels.planes import GROUP, Packed
from actsparse.methods.rounding import CLIPS, each_block, gains_of, round_columns

# Added to the Hessian's diagonal, as a fraction of its mean: fewer tokens than inputs make it singular.
DAMPING = 0.01
# Inputs that share a scale where rows are rounded.
ROW_GROUP = 64
# Columns between two updates of all that follow, and between two of those up to there.
_BLOCK, _COLUMNS = 128, 16


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

    def search(block: slice) -> torch.Tensor:
        _, mantissa[:, block], scale[block], fit = round_columns(weight[:, block], stored, level_weight[:, block])
        return fit

    for fit in each_block(search, outputs, inputs, weight.device):
        fits += fit
    gain = gains_of(fits)

    order = hessian.diagonal().argsort(descending=True)
    half_range = (mantissa.float() * (scale.float() / 255)).T[order].contiguous()
    ordered = shares[1:, order].contiguous()
    # Whole groups of outputs: what is added is zero, and stays it.
    codes = torch.empty(inputs, planes.groups_of(outputs) * GROUP, dtype=torch.uint8, device=weight.device)

    def rounded_block(rest: torch.Tensor, begin: int, end: int, upper: torch.Tensor) -> torch.Tensor:
        native = rest.is_cuda and not kernels.cuda.device_obstacle(rest.device.index)
        rounded = kernels.cuda.round_block if native else _round_block
        return rounded(rest, begin, end, stored, half_range, upper, ordered, gain, codes)

    padded = F.pad(weight.float(), (0, 0, 0, -outputs % GROUP))
    stood = _feed_back(padded, hessian, order, damping, rounded_block)[:, :outputs]
    back = order.argsort()
    return planes.pack(codes[back, :outputs].T, mantissa, scale, gain, stored), stood[back].T


def round_rows_with_feedback(
    weight: torch.Tensor, bits: int, hessian: torch.Tensor, group: int = ROW_GROUP, damping: float = DAMPING
) -> tuple[torch.Tensor, float]:
    """W [O, I] as GPTQ rounds it, float32 [O, I], and the bits it takes per weight: what others are compared with.

    Each ``group`` inputs of a row share a scale (16 bits) and a zero point (``bits`` bits), searched before any column is
    rounded; codes count from 0 to 2^bits - 1 (asymmetric).

    Raises ValueError when the Hessian stays singular.
    """
    outputs, inputs = weight.shape
    grouped = F.pad(weight.float(), (0, -inputs % group)).unflatten(1, (-1, group))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    most = 2**bits - 1
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for clip in CLIPS:
        step = ((high - low) * (clip / most)).clamp(min=1e-8).half().float().clamp(min=6e-8)
        origin = (-low * clip / step).round()
        code = (grouped / step[..., None] + origin[..., None]).round().clamp(0, most)
        error = (grouped - (code - origin[..., None]) * step[..., None]).square().sum(2)
        scale, zero = torch.where(error < best, step, scale), torch.where(error < best, origin, zero)
        best = torch.minimum(error, best)
    order = hessian.diagonal().argsort(descending=True)
    place = (order // group).tolist()
    rounded = torch.empty(inputs, outputs, device=weight.device)

    def read(i: int, column: torch.Tensor) -> torch.Tensor:
        step, origin = scale[:, place[i]], zero[:, place[i]]
        rounded[i] = ((column / step + origin).round_().clamp_(0, most) - origin) * step
        return rounded[i]

    _feed_back(weight, hessian, order, damping, partial(_column_by_column, read=read))
    return rounded[order.argsort()].T.contiguous(), bits + (16 + bits) / group


def _feed_back(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    order: torch.Tensor,
    damping: float,
    block: Callable[[torch.Tensor, int, int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Go through the columns in ``order``, some at a time: ``block`` rounds them and makes their errors good among themselves.

    It is given all columns [I, O], the first and the one after the last of its own and the factor [I, I], and returns the
    errors of its own.  Returns what each column stood at when its turn came, [I, O] in order.
    """
    inputs = len(order)
    upper = _inverse_factor(hessian[order][:, order], damping)
    rest = weight.float()[:, order].T.contiguous()  # [I, O]: a column lies together
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        errors = block(rest, begin, end, upper)
        if end < inputs:
            rest[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    return rest


def _column_by_column(
    rest: torch.Tensor, begin: int, end: int, upper: torch.Tensor, *, read: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """A block of :func:`_feed_back`; ``read`` is given a place and a column [O], and tells what is read of it."""
    errors = torch.empty(end - begin, rest.shape[1], device=rest.device)
    with _one_thread():
        for first in range(begin, end, _COLUMNS):
            last = min(first + _COLUMNS, end)
            for i in range(first, last):
                torch.div(rest[i] - read(i, rest[i]), upper[i, i], out=errors[i - begin])
                if i + 1 < last:
                    rest[i + 1 : last].addr_(upper[i, i + 1 : last], errors[i - begin], alpha=-1)
            if last < end:
                rest[last:end].addmm_(upper[first:last, last:end].T, errors[first - begin : last - begin], alpha=-1)
    return errors


def _round_block(
    rest: torch.Tensor, begin: int, end: int, stored: int, half_range: torch.Tensor, upper: torch.Tensor,
    shares: torch.Tensor, gain: torch.Tensor, codes: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """As :func:`actsparse.kernels.cuda.round_block`, on any device, for whole groups of outputs."""
    half = 2 ** (stored - 1)
    span = half_range[begin:end].unsqueeze(2)
    steps = half / span.clamp(min=1e-30)
    values = _values_read(stored, gain, shares[:, begin:end])

    def read(i: int, column: torch.Tensor) -> torch.Tensor:
        at = i - begin
        code = (column.view(-1, GROUP) * steps[at]).add_(half).floor_().clamp_(0, 2 * half - 1).long()
        codes[i] = code.view(-1)
        return (values[at].take(code) * span[at]).view(-1)

    return _column_by_column(rest, begin, end, upper, read=read)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Column by column the work is too small to share: waking a second thread costs more, on a busy machine fifty times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _values_read(stored: int, gain: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """What each code is read as on average, by the columns' shares [L, I], in units of the half range: [I, 2^S]."""
    code = torch.arange(2**stored, dtype=torch.float32, device=gain.device)
    read = torch.zeros(shares.shape[1], 2**stored, device=gain.device)
    for index, share in enumerate(shares):
        level = 2 * index + 2
        value = (code * 2.0 ** (level - stored)).floor_().add_(0.5 - 2 ** (level - 1))
        read += share.unsqueeze(1) * (value * (gain[index] * 2.0 ** (1 - level)))
    return read


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

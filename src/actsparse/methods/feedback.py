"""Rounding with error feedback: what rounding a column does to the output, the columns not yet rounded make good.

Frantar et al., "GPTQ", arXiv:2210.17323 (the order of columns by their Hessian's diagonal: its ``act-order``), in the form of
Chee et al., "QuIP", arXiv:2307.13304, which needs no inverse, on nested codes that are read to several levels.  The error that
a column passes on is the mean over what is read of it: its shares of input energy per level say how much each level's error
counts.  Then one sweep of coordinate descent: each column's codes once more, now that all others have theirs (Behdin et al.,
"QuantEase", arXiv:2309.01885, on plain codes).

Shape letters: O outputs, I inputs, L levels, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from actsparse.kernels import planes, rounding
from actsparse.kernels.planes import GROUP, Packed
from actsparse.methods.rounding import CLIPS, each_block, each_slice, gains_of, round_columns

# What :func:`round_with_feedback` does, as plans and cards say it.
DESCRIPTION = "error feedback and then coordinate descent"
# Added to the Hessian's diagonal, as a fraction of its mean: fewer tokens than inputs make it singular.
DAMPING = 0.01
# Inputs that share a scale where rows are rounded.
ROW_GROUP = 64
# Columns between two updates of all that follow, and between two of those up to there.
_BLOCK, _COLUMNS = rounding.MOST_COLUMNS, 16
# Columns of a block of coordinate descent, which is given its part of Hessian times errors.
_DESCENT_BLOCK = 64
# Outputs that a thread rounds at a time, and that a GPU does.
_OUTPUTS = {"cpu": 128, "cuda": 16384}


@dataclass(frozen=True)
class Curvature:
    """How much a product's outputs mind errors of its weights, and of pairs of them.

    Attributes:
        order: int64 [I], the inputs by their energy, greatest first.
        hessian: float32 [I, I] in that order, damped.
        feedback: float32 [I, I] in that order, above the diagonal: what of a column's error (row) those after it (columns) are
            moved by.
    """

    order: torch.Tensor
    hessian: torch.Tensor
    feedback: torch.Tensor


def curvature_of(hessian: torch.Tensor, damping: float = DAMPING) -> Curvature:
    """From the mean of x x^T over the calibration tokens [I, I] (x: what products multiply, deviations included).

    Raises ValueError when it stays singular under damping (see :data:`DAMPING`).
    """
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian.float()[order][:, order].contiguous()
    mean = float(damped.diagonal().mean())
    strength = damping
    for _ in range(6):
        damped.diagonal().add_(strength * mean + 1e-12)
        # H = R R^T with R upper triangular: the last input first.
        lower, wrong = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(wrong):
            upper = lower.flip(0, 1)
            return Curvature(order, damped, (upper / upper.diagonal()).triu_(1).contiguous())
        strength = 10 * strength
    raise ValueError("the Hessian of a product's inputs stays singular under damping, expected finite activations")


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
    weight: torch.Tensor, stored: int, curvature: Curvature, shares: torch.Tensor, prompts: float = 0.0
) -> tuple[Packed, torch.Tensor]:
    """W [O, I] as nested codes of ``stored`` bits: each column's error made good by those after it, then one sweep of descent.

    Returns the codes, and the weights at which a column would leave nothing to gain beside the others, float32 [O, I]: its own
    error is against that.

    Args:
        weight: any float type.
        stored: 4, 6 or 8.
        curvature: of the product's inputs.
        shares: [L + 1, I] of :func:`energy_shares`.
        prompts: how much, of 1, the error of all planes counts, which prompts read; the rest is for what ``shares`` say.

    Raises:
        ValueError: a weight is not finite, or ``stored`` is something else.
    """
    outputs, inputs = weight.shape
    device, order = weight.device, curvature.order
    blend = (1 - prompts) * shares
    blend[-1] += prompts
    level_weight = blend[1:] + 1e-3 * blend[1:].mean()  # no column's search goes without a criterion
    mantissa = torch.empty(planes.groups_of(outputs), inputs, dtype=torch.uint8, device=device)
    scale = torch.empty(inputs, dtype=torch.bfloat16, device=device)
    fits = torch.zeros(2, stored // 2, dtype=torch.float64, device=device)

    def search(block: slice) -> torch.Tensor:
        _, mantissa[:, block], scale[block], fit = round_columns(weight[:, block], stored, level_weight[:, block])
        return fit

    for fit in each_block(search, outputs, inputs, device):
        fits += fit
    gain = gains_of(fits)

    half_range = (mantissa.float() * (scale.float() / 255)).T[order]
    ordered, reads = blend[:, order].contiguous(), shares[:, order].contiguous()
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=device)
    stood = torch.empty(outputs, inputs, device=device)
    backend = rounding.backend_of(device)

    def one(part: slice) -> None:
        padded = F.pad(weight[part].float(), (0, 0, 0, -(part.stop - part.start) % GROUP))
        wanted = padded[:, order].T.contiguous()
        spans = half_range[:, part.start // GROUP : -(-part.stop // GROUP)].contiguous()
        chosen = torch.empty(wanted.shape, dtype=torch.uint8, device=device)
        columns = rounding.Columns(stored, spans, ordered, gain)

        def block(rest: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            return backend.round_block(columns, begin, end, curvature.feedback, wanted, rest, chosen)

        better = _feed_back(wanted, curvature, block)
        columns = rounding.Columns(stored, spans, reads, gain)
        as_read, whole = backend.code_errors(columns, wanted, chosen)
        for begin in range(0, inputs, _DESCENT_BLOCK):
            end = min(begin + _DESCENT_BLOCK, inputs)
            backend.descend_block(
                columns, begin, end, curvature.hessian, prompts, wanted, chosen, as_read, whole, better
            )
        codes[order, part] = chosen[:, : part.stop - part.start]
        stood[part, order] = better[:, : part.stop - part.start].T

    size = _OUTPUTS.get(device.type, _OUTPUTS["cpu"])
    each_slice(one, [slice(at, min(at + size, outputs)) for at in range(0, outputs, size)], device)
    return planes.pack(codes.T, mantissa, scale, gain, stored), stood


def round_rows_with_feedback(
    weight: torch.Tensor, bits: int, curvature: Curvature, group: int = ROW_GROUP
) -> tuple[torch.Tensor, float]:
    """W [O, I] as GPTQ rounds it, float32 [O, I], and the bits it takes per weight: what others are compared with.

    Each ``group`` inputs of a row share a scale (16 bits) and a zero point (``bits`` bits), searched before any column is
    rounded; codes count from 0 to 2^bits - 1 (asymmetric).
    """
    inputs = weight.shape[1]
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
    order = curvature.order
    place = (order // group).tolist()
    wanted = weight.float()[:, order].T.contiguous()
    rounded = torch.empty_like(wanted)

    def read(i: int, column: torch.Tensor) -> torch.Tensor:
        step, origin = scale[:, place[i]], zero[:, place[i]]
        rounded[i] = ((column / step + origin).round_().clamp_(0, most) - origin) * step
        return wanted[i] - rounded[i]

    _feed_back(wanted, curvature, partial(_column_by_column, feedback=curvature.feedback, error=read))
    return rounded[order.argsort()].T.contiguous(), bits + (16 + bits) / group


def _feed_back(
    weight: torch.Tensor, curvature: Curvature, block: Callable[[torch.Tensor, int, int], torch.Tensor]
) -> torch.Tensor:
    """Go through the columns [I, O], some at a time: ``block`` rounds them and makes their errors good among themselves.

    It is given all columns, the first and the one after the last of its own, and returns what is left of its own.  Returns what
    each column stood at when its turn came, [I, O].
    """
    rest = weight.clone()
    for begin in range(0, len(rest), _BLOCK):
        end = min(begin + _BLOCK, len(rest))
        errors = block(rest, begin, end)
        if end < len(rest):
            rest[end:].addmm_(curvature.feedback[begin:end, end:].T, errors)
    return rest


def _column_by_column(
    rest: torch.Tensor, begin: int, end: int, *, feedback: torch.Tensor,
    error: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """A block of :func:`_feed_back`; ``error`` is given a place and what its column [O] stands at, and rounds it."""
    errors = torch.empty(end - begin, rest.shape[1], device=rest.device)
    with _one_thread():
        for first in range(begin, end, _COLUMNS):
            last = min(first + _COLUMNS, end)
            for i in range(first, last):
                errors[i - begin] = error(i, rest[i])
                if i + 1 < last:
                    rest[i + 1 : last].addr_(feedback[i, i + 1 : last], errors[i - begin])
            if last < end:
                rest[last:end].addmm_(feedback[first:last, last:end].T, errors[first - begin : last - begin])
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

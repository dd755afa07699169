"""Rounding weights to nested codes (:mod:`actsparse.kernels.planes`): scales searched, gains fitted, column by column.

A code is read to several levels, so its scale has to serve all of them: each group takes the half range, a fraction of its
largest magnitude, at which the squared errors of the levels add up to least.  What is left is fitted: one gain a level for the
whole matrix, by least squares (one a column is not better and costs reading).

Shape letters: O outputs, I inputs, G groups of 64 outputs, S bits stored, L = S/2 levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.nn.functional as F

from actsparse import kernels
from actsparse.kernels import planes
from actsparse.kernels.planes import GROUP, Packed

# Half ranges that are tried, as fractions of a group's largest magnitude.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
# Gains that least squares gives groups of 64 normal values: the search takes them for granted, the fit replaces them.
PRIOR_GAINS = {2: 0.92, 4: 0.99, 6: 1.0, 8: 1.0}
# What an error at each level counts unless calibration says otherwise. Inputs that are read further are larger by as much as
# the error there is smaller (that is the rule), so that all levels' shares of the error of the output are alike.
LEVEL_WEIGHTS = {2: 1.0, 4: 16.0, 6: 256.0, 8: 4096.0}
# Values of a block of columns: on a CPU it and what is made of it stay in a core's cache from one step to the next, on a GPU a
# step is a launch, and should be worth it.
_BLOCK, _GPU_BLOCK = 1 << 17, 1 << 25
_Result = TypeVar("_Result")


def round_nearest(weight: torch.Tensor, stored: int, level_weight: torch.Tensor | None = None) -> Packed:
    """W [O, I] as nested codes of ``stored`` bits, each rounded to the nearest.

    Args:
        weight: any float type.
        stored: 4, 6 or 8.
        level_weight: float32 [L, I], how much each column's error at each level counts in the search; None: as
            :data:`LEVEL_WEIGHTS`.

    Raises:
        ValueError: a weight is not finite (its place is named), or ``stored`` is something else.
    """
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, inputs, dtype=torch.uint8, device=weight.device)
    mantissa = torch.empty(planes.groups_of(outputs), inputs, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(inputs, dtype=torch.bfloat16, device=weight.device)
    fits = torch.zeros(2, stored // 2, dtype=torch.float64, device=weight.device)

    def one(block: slice) -> torch.Tensor:
        weights = None if level_weight is None else level_weight[:, block]
        codes[:, block], mantissa[:, block], scale[block], fit = round_columns(weight[:, block], stored, weights)
        return fit

    for fit in each_block(one, outputs, inputs, weight.device):
        fits += fit
    return planes.pack(codes, mantissa, scale, gains_of(fits), stored)


def each_block(work: Callable[[slice], _Result], outputs: int, inputs: int, device: torch.device) -> Sequence[_Result]:
    """``work`` of every block of columns, in their order; see :func:`each_slice`."""
    size = max(8, (_BLOCK if device.type == "cpu" else _GPU_BLOCK) // outputs)
    return each_slice(work, [slice(at, min(at + size, inputs)) for at in range(0, inputs, size)], device)


def each_slice(work: Callable[[slice], _Result], slices: Sequence[slice], device: torch.device) -> Sequence[_Result]:
    """``work`` of every slice, in their order; on a CPU a thread each, as many as torch has.

    Threads that share a slice would wait for each other at every step of it, a step being some microseconds: on a busy
    machine that took fifteen times as long.  And nothing that is computed hangs on how many threads there are.
    """
    threads = min(torch.get_num_threads(), len(slices)) if device.type == "cpu" else 1
    inference, before = torch.is_inference_mode_enabled(), torch.get_num_threads()

    def alone(part: slice) -> _Result:
        with torch.inference_mode(inference), torch.no_grad():  # a thread has modes of its own
            return work(part)

    try:
        if threads == 1:
            if device.type == "cpu":
                torch.set_num_threads(1)
            return [alone(part) for part in slices]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, slices))
    finally:
        torch.set_num_threads(before)


def gains_of(fits: torch.Tensor) -> torch.Tensor:
    """Gains float32 [L] from sums [2, L] of what :func:`round_columns` gives; 1 for a matrix of zeros."""
    dot, square = fits
    return torch.where(square > 0, dot / square.clamp(min=1e-300), 1.0).float()


def round_columns(
    weight: torch.Tensor, stored: int, level_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [O, I], mantissa uint8 [G, I], scale bfloat16 [I] of some columns; see :func:`round_nearest`.

    Last come the sums that the gains are fitted from, float64 [2, L]: values times weights, and values squared.
    """
    levels = range(2, stored + 1, 2)
    if stored not in planes.STORED:
        raise ValueError(f"{stored} bits stored, expected 4, 6 or 8")
    if not bool(torch.isfinite(weight).all()):
        place = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise ValueError(f"the weight at {place} is {float(weight[tuple(place)])}, expected finite values")
    outputs = weight.shape[0]
    # [I, G, 64]: a column's groups lie together.
    grouped = F.pad(weight.T.float(), (0, -outputs % GROUP)).unflatten(1, (-1, GROUP))
    peak = grouped.abs().amax(2)
    best, half_range = torch.full_like(peak, torch.inf), peak
    for clip in CLIPS:
        tried = peak * clip
        unit = grouped * (1 / tried.clamp(min=1e-30)).unsqueeze(2)
        code = _encode(unit, stored)
        error = torch.zeros_like(peak)
        for index, level in enumerate(levels):
            slope, offset = _line(level)
            off = torch.add(unit, _cut(code, level, stored), alpha=-PRIOR_GAINS[level] * slope).sub_(
                PRIOR_GAINS[level] * offset
            )
            part = torch.linalg.vector_norm(off, dim=2).square_()
            error += part * (LEVEL_WEIGHTS[level] if level_weight is None else level_weight[index].unsqueeze(1))
        error *= tried.square()
        half_range = torch.where(error < best, tried, half_range)
        best = torch.minimum(error, best)
    scale = _up_to_bfloat16(half_range.amax(1))
    mantissa = (half_range * (255 / scale.float().clamp(min=1e-30)).unsqueeze(1)).round_().clamp_(1, 255)
    exact = mantissa * (scale.float() / 255).unsqueeze(1)
    code = _encode(grouped * (1 / exact.clamp(min=1e-30)).unsqueeze(2), stored)
    fits = torch.empty(2, stored // 2, dtype=torch.float64, device=weight.device)
    for index, level in enumerate(levels):
        slope, offset = _line(level)
        value = _cut(code, level, stored).mul(slope).add_(offset).mul_(exact.unsqueeze(2))
        # What fills the last group up is no weight: it counts for nothing beside weights that are 0 there, but has a square.
        dot = (value * grouped).sum(2)
        value = value.flatten(1)[:, :outputs]
        fits[0, index] = dot.double().sum()
        fits[1, index] = torch.linalg.vector_norm(value, dim=1).double().square().sum()
    codes = code.to(torch.uint8).flatten(1)[:, :outputs].T
    return codes, mantissa.to(torch.uint8).T, scale, fits


def _up_to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """The least bfloat16 numbers not below positive ``values``: mantissas of 255 then reach them."""
    down = values.to(torch.bfloat16)
    up = (down.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(down.float() < values, up, down)


def residuals(weight: torch.Tensor, packed: Packed, sensitivity: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error of every column at every level, level 0 (skipped) first: float32 [L + 1, I].

    With ``sensitivity`` [O] each output's error counts that much.
    """
    outputs, inputs = weight.shape
    left = torch.empty(len(packed.levels) + 1, inputs, device=weight.device)
    counts = torch.ones(outputs, device=weight.device) if sensitivity is None else sensitivity.float()

    def one(block: slice) -> None:
        columns = weight[:, block].T.float().contiguous()
        left[0, block] = columns.square() @ counts
        for index, level in enumerate(packed.levels, 1):
            read = kernels.unpack_columns(packed, block.start, block.stop, torch.float32, level)
            left[index, block] = (columns - read).square_() @ counts

    each_block(one, outputs, inputs, weight.device)
    return left


def _encode(unit: torch.Tensor, stored: int) -> torch.Tensor:
    """Codes of weights in units of their half range."""
    half = 2 ** (stored - 1)
    return (unit * half).add_(half).floor_().clamp_(0, 2 * half - 1)


def _cut(code: torch.Tensor, level: int, stored: int) -> torch.Tensor:
    """The first ``level`` bits of codes."""
    return code if level == stored else (code * 2.0 ** (level - stored)).floor_()


def _line(level: int) -> tuple[float, float]:
    """Slope and offset that make values, in units of the half range, of the first ``level`` bits of a code."""
    return 2.0 ** (1 - level), (0.5 - 2 ** (level - 1)) * 2.0 ** (1 - level)

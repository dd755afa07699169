"""Graded reading: more bits of a weight where its activation is larger (this project's own method).

Every column of every matrix is stored once as a nested code (:mod:`actsparse.kernels.planes`) and read, token by token, only
as deep as its input deserves.  Stopping at level b leaves the error (x_i - c_i) (W - W_b)[:, i], whose price in loss is, to
second order, (x_i - c_i)^2 r_{i,b} with r_{i,b} = sum over outputs of E[g_o^2] (W - W_b)[o, i]^2, g the gradient of the loss
by the product's outputs.  The least price at a given number of bytes is reverse water-filling: raise column i from one level
to the next while (x_i - c_i)^2 (r before - r after) / (bytes it costs) stays above one number, the same for every site of
the model.  So each level has a threshold per channel, known up to that number, and calibration only has to find it.

Inputs are taken as deviations from c, their mean where they are skipped; W c is a constant vector a product starts from.

Reverse water-filling: Cover and Thomas, Elements of Information Theory, 10.3.3.  Related: Any-Precision LLM
(arXiv:2402.10517, nested planes, one level a request), DecDEC (arXiv:2412.20185), GRINQH (arXiv:2606.23419, bits by |x|).
TEAL, WINA and CHESS on q, o and down are the case of one level.

Shape letters: T tokens, I inputs, O outputs, L levels without 0, K bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from actsparse.kernels.planes import STORED, Packed
from actsparse.methods.base import HEAD, Calibrated, Layer, Method, MethodError, Solution, Targets
from actsparse.methods.rounding import residuals, round_nearest
from actsparse.methods.statistics import Statistic

# Bits of the weights that others read; the sparsity of a plan is the share of them that it does not.
DENSE_BITS = 16
DEFAULT_BITS = 3.0
# Below this most columns are skipped, and no model is left.
LEAST_BITS = 1.0
_CENTER_ROUNDS = 3
_READING_TOKENS = 4096
_CENTER_TOKENS = 2048
# An error in the output head costs more than the gradient says: measured, a head that obeys the same theta as the layers
# takes 0.8 points of perplexity at 3 bits read, for a twentieth of the bytes.
HEAD_WEIGHT = 4.0
# Ratios of input to threshold are counted by their logarithm, 32 bins a power of two.
_LOWEST, _HIGHEST, _PER_OCTAVE = -64, 64, 32


@dataclass
class Reading(Statistic):
    """What one product reads at any theta.

    Attributes:
        center: float32 [I], what inputs deviate from.
        unit: float32 [L, I], thresholds at theta 1.
        counts: int64 [L, K], how many inputs lie in each bin of log2 of their ratio to the unit threshold; the first bin
            holds everything below, the last everything above.
        size: int64 [3 + L]: tokens, outputs, inputs, bytes a column's levels cost.
    """

    center: torch.Tensor
    unit: torch.Tensor
    counts: torch.Tensor
    size: torch.Tensor
    taps = ()

    def update(self, values: Mapping[str, torch.Tensor], batch: Any) -> None:
        raise NotImplementedError("readings are made from a layer's whole activity at once")

    def state(self) -> dict[str, torch.Tensor]:
        return {"center": self.center, "unit": self.unit, "counts": self.counts, "size": self.size}

    @property
    def weights(self) -> int:
        """O I."""
        return int(self.size[1] * self.size[2])

    def bits(self, theta: float) -> float:
        """Bits read per weight at ``theta``, scales included."""
        tokens, outputs, inputs = (int(value) for value in self.size[:3])
        shares = self._above(theta) / (tokens * inputs)
        return float((shares * self.size[3:].double()).sum()) * 8 / outputs

    def skipped(self, theta: float) -> float:
        """Fraction of the columns that are not read at all at ``theta``."""
        return 1 - float(self._above(theta)[0]) / int(self.size[0] * self.size[2])

    def _above(self, theta: float) -> torch.Tensor:
        """Per level, how many inputs reach it, float64 [L]; bins that ``theta`` cuts count in part."""
        place = (torch.log2(torch.tensor(theta, dtype=torch.float64)) - _LOWEST) * _PER_OCTAVE + 1
        index = int(place.clamp(0, self.counts.shape[1] - 1))
        part = float((place - index).clamp(0, 1))
        above = self.counts[:, index:].sum(1).double()
        return above - part * self.counts[:, index].double()


def unit_of(weight: torch.Tensor, packed: Packed, sensitivity: torch.Tensor) -> torch.Tensor:
    """Thresholds at theta 1, float32 [L, I], of a product.

    Args:
        weight: [O, I], what the codes of ``packed`` stand for.
        packed: the codes.
        sensitivity: float32 [O], the mean squared gradient of the loss by each output.
    """
    return unit_thresholds(residuals(weight, packed, sensitivity), packed.level_bytes)


def reading_of(x: torch.Tensor, unit: torch.Tensor, packed: Packed, center: torch.Tensor) -> Reading:
    """The reading of one product on calibration inputs x [T, I], of thresholds ``unit`` on deviations from ``center`` [I]."""
    x = _sample(x)
    bins = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2
    counts = torch.zeros(len(unit), bins, dtype=torch.int64, device=x.device)
    # A value of 0 lies below everything, a threshold of infinity (or both) is reached by nothing.
    size = (x - center).abs_().log2_().mul_(_PER_OCTAVE)
    for level, threshold in enumerate(unit):
        place = size - (torch.log2(threshold) + _LOWEST).mul_(_PER_OCTAVE).sub_(1)
        counts[level] = torch.bincount(place.clamp_(0, bins - 1).int().flatten(), minlength=bins)
    size = torch.tensor([len(x), packed.out, packed.inputs, *packed.level_bytes], dtype=torch.int64)
    # safetensors takes no tensor twice, and products that share an input share its center.
    return Reading(center.cpu().clone(), unit.cpu(), counts.cpu(), size)


def center_of(
    x: torch.Tensor,
    products: Sequence[tuple[torch.Tensor, Packed]],
    bits: float = DEFAULT_BITS,
    theta: float | None = None,
) -> torch.Tensor:
    """What products that share the inputs x [T, I] should take off them: the mean of each channel where it is skipped.

    The plain mean lies beside the bulk of a channel with a few large values.  Who is skipped depends on the center: found in
    a few rounds, each product reading ``bits`` on its own unless ``theta`` is known.

    Args:
        x: the inputs.
        products: thresholds of :func:`unit_of`, and codes, of each.
        bits: about what will be read.
        theta: about what it will be.
    """
    x = _sample(x, _CENTER_TOKENS)
    center = torch.zeros_like(x[0])
    for _ in range(_CENTER_ROUNDS):
        # A little mass at zero: a channel that is hardly ever skipped has no mean worth trusting.
        total, count = torch.zeros_like(center), torch.full_like(center, 0.01 * len(x) * len(products))
        for unit, packed in products:
            reached = alone(reading_of(x, unit, packed, center), bits) if theta is None else theta
            skipped = (x - center).abs() < unit[0] * reached
            total += torch.where(skipped, x, 0.0).sum(0)
            count += skipped.sum(0)
        center = total / count
    return center


def _sample(x: torch.Tensor, tokens: int = _READING_TOKENS) -> torch.Tensor:
    """Every k-th token: shares of channels times thousands of tokens are known well enough."""
    return x[:: max(1, len(x) // tokens)]


def alone(reading: Reading, bits: float) -> float:
    """The theta at which one product reads ``bits`` bits, or all it has where that is less."""
    return choose_theta({(0, ""): reading}, min(bits, reading.bits(2.0 ** (_LOWEST + 1))))


def unit_thresholds(left: torch.Tensor, level_bytes: Sequence[int]) -> torch.Tensor:
    """Thresholds on ``|x_i - c_i|`` at theta 1, float32 [L, I], not falling along L.

    Args:
        left: [L + 1, I], the weighted squared error each level leaves, level 0 first.
        level_bytes: what each level costs beyond the one before.

    A level that is not worth stopping at (it lies above the lower convex hull of cost and error) gets the threshold of the
    next that is; one that brings nothing is never reached (infinity).
    """
    steps = len(level_bytes)
    cost = torch.tensor([0, *level_bytes], dtype=torch.float64, device=left.device).cumsum(0)
    error = left.double()
    unit = torch.full((steps, left.shape[1]), torch.inf, dtype=torch.float64, device=left.device)
    at = torch.zeros(1, left.shape[1], dtype=torch.long, device=left.device)  # the hull's last corner
    level = torch.arange(steps + 1, device=left.device)[:, None]
    for _ in range(steps):
        slope = (error.gather(0, at) - error) / (cost[:, None] - cost[at])
        slope = torch.where(level > at, slope, -1.0)
        best, to = slope.max(0, keepdim=True)
        inside = (level[1:] > at) & (level[1:] <= to) & (best > 0)
        unit = torch.where(inside, best.clamp(min=1e-300).rsqrt(), unit)
        at = torch.where(best > 0, to, steps)
    return unit.float()


def choose_theta(readings: Mapping[tuple[int, str], Reading], bits: float) -> float:
    """The theta at which the matrices of the decoder layers read ``bits`` bits per weight on average.

    The output head obeys the same number, and is not counted.  Raises MethodError when even the ends of the range read more, or
    less, than asked.
    """
    counted = [reading for (layer, _), reading in readings.items() if layer != HEAD]
    total = sum(reading.weights for reading in counted)

    def average(exponent: float) -> float:
        return sum(reading.bits(2.0**exponent) * reading.weights for reading in counted) / total

    low, high = float(_LOWEST + 1), float(_HIGHEST - 1)
    most, least = average(low), average(high)
    if not least < bits <= most + 1e-9:
        raise MethodError(
            f"bits read is {bits:g}, expected more than {least:.2f} and at most the {most:.2f} that are stored"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) > bits else (low, middle)
    return 2.0**high


def check_bits(bits: float, stored: int) -> None:
    """MethodError unless ``bits`` can be read of ``stored``: :data:`LEAST_BITS` or more, at most all, scales included."""
    if not LEAST_BITS <= bits <= stored + 1:
        raise MethodError(
            f"bits read is {bits:g}, expected {LEAST_BITS:g} or more and at most the {stored} stored (and scales)"
        )


class Graded(Method):
    """Columns of nested low-bit weights, each read as deep as its input deserves.

    Args:
        bits_stored: bits of a code, 4, 6 or 8: what is stored of each weight, and the most that is read.
    """

    name = "graded"
    source = "docs/graded.md"
    phases = ()
    sites = ()
    activity = True
    # A prompt of many tokens reads every weight anyway: by default it reads every plane, and the rules are for decoding.
    scopes = ("decode", "all", "last_half")
    sparsity = 1 - DEFAULT_BITS / DENSE_BITS
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "bits_stored": {"type": int, "choices": STORED, "help": "bits stored of each weight: 4, 6 or 8 (default: 6)"},
    }

    highest = 1 - LEAST_BITS / DENSE_BITS

    def __init__(self, bits_stored: int = 6) -> None:
        if bits_stored not in STORED:
            raise MethodError(f"bits stored is {bits_stored}, expected 4, 6 or 8")
        self.bits_stored = bits_stored

    def check_target(self, sparsity: float) -> None:
        check_bits(DENSE_BITS * (1 - sparsity), self.bits_stored)

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        return {}

    def observe(
        self, layer: Layer, inputs: Mapping[str, torch.Tensor], sensitivity: Mapping[str, torch.Tensor]
    ) -> dict[str, Statistic]:
        """The readings of a layer's products, by projection, from its activity (:mod:`actsparse.calibration.activity`)."""
        found: dict[str, Statistic] = {}
        counts = HEAD_WEIGHT if layer.index == HEAD else 1.0
        for names, x in by_input(inputs):
            products = []
            for name in names:
                packed = round_nearest(layer.weight(name), self.bits_stored)
                products.append((unit_of(layer.weight(name), packed, counts * sensitivity[name]), packed))
            center = center_of(x, products)
            for name, (unit, packed) in zip(names, products, strict=True):
                found[name] = reading_of(x, unit, packed, center)
        return found

    def observed(self, state: Mapping[str, torch.Tensor]) -> Statistic:
        return Reading(**state)

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        readings = {(c.layer.index, name): s for c in layers for name, s in c.statistics.items()}
        # A search for a budget begins at sparsity 0, and no sparsity reads more than every plane.
        return solution_of(readings, min(DENSE_BITS * (1 - targets.default), most_bits(readings)))


def most_bits(readings: Mapping[tuple[int, str], Statistic]) -> float:
    """Bits per weight of the decoder layers' matrices with every plane read."""
    counted = [one for (layer, _), one in readings.items() if layer != HEAD and isinstance(one, Reading)]
    return sum(one.bits(2.0 ** (_LOWEST + 1)) * one.weights for one in counted) / sum(one.weights for one in counted)


def by_input(inputs: Mapping[str, torch.Tensor]) -> list[tuple[list[str], torch.Tensor]]:
    """Products grouped by the input they share."""
    groups: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, x in inputs.items():
        groups.setdefault(id(x), ([], x))[0].append(name)
    return list(groups.values())


def solution_of(readings: Mapping[tuple[int, str], Statistic], bits: float) -> Solution:
    """The rules that read ``bits`` bits per weight, from the readings of all products by (layer, projection)."""
    known: dict[tuple[int, str], Reading] = {}
    for key, reading in readings.items():
        assert isinstance(reading, Reading)
        known[key] = reading
    theta = choose_theta(known, bits)
    solution = Solution(target=1 - bits / DENSE_BITS)
    total = read = 0.0
    for (layer, name), reading in known.items():
        site = "head" if layer == HEAD else f"layers.{layer}.{name}"
        solution.rules[f"{site}.level_threshold"] = (reading.unit.double() * theta).float()
        solution.rules[f"{site}.center"] = reading.center.float()
        # Padding and scales of a tiny matrix may read more than 16 bits a weight.
        solution.achieved[site] = max(0.0, 1 - reading.bits(theta) / DENSE_BITS)
        if layer != HEAD:
            total += reading.weights
            read += reading.bits(theta) * reading.weights
    solution.facts = {"theta": theta, "bits_read": read / total}
    return solution

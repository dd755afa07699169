"""Streaming statistics of activations: what calibration accumulates, in memory that does not grow with the tokens.

Quantiles come from histograms whose bins are linear within each power of two.  The *rank error* of a quantile read from
one is bounded by the share of all values that lie in the bins it falls into; ``quantile`` returns that bound beside the
value.  Inside a bin values count as evenly spread, which in practice is some hundred times closer than the bound.

Shape letters: B windows in a batch, T tokens in a window, C channels.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from actsparse import kernels
from actsparse.plan import SKIP_ZEROS


class CalibrationError(ValueError):
    """Calibration met activations or settings that it cannot use."""


@dataclass(frozen=True)
class Batch:
    """Where a batch of windows came from: index of its first window in the text, and each window's domain label."""

    first: int
    domains: tuple[str, ...]


class Statistic(ABC):
    """Something accumulated over tokens from one or more taps of one layer.

    What is large lies where the activations are; what is read from it comes on the CPU.
    """

    taps: tuple[str, ...]

    @abstractmethod
    def update(self, values: Mapping[str, torch.Tensor], batch: Batch) -> None:
        """Take in the values [B, T, C] of the taps for one batch."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on later (tensors are not copied)."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from ``state``."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


@dataclass(frozen=True)
class Bins:
    """Histogram bins: bin 0 exact zeros, bin 1 below 2^min_exponent, then 2^sub_bits a power of two, the last is open."""

    min_exponent: int
    octaves: int
    sub_bits: int

    @property
    def count(self) -> int:
        """Number of bins."""
        return 2 + (self.octaves << self.sub_bits) + 1

    def edges(self) -> torch.Tensor:
        """Lower edges of bins 1 ... count - 1, float64 [count - 1]; the first is 0."""
        steps = 1 << self.sub_bits
        octave = torch.arange(self.octaves, dtype=torch.float64).repeat_interleave(steps)
        step = torch.arange(steps, dtype=torch.float64).repeat(self.octaves)
        inner = torch.exp2(octave + self.min_exponent) * (1 + step / steps)
        top = torch.tensor([2.0 ** (self.min_exponent + self.octaves)], dtype=torch.float64)
        return torch.cat([torch.zeros(1, dtype=torch.float64), inner, top])


# Per channel: 22 powers of two from 2^-16, 32 bins each: 2.8 KB a channel.  Pooled over channels: all that float32 products
# of activations reach in practice, 128 bins a power of two.
CHANNEL_BINS = Bins(min_exponent=-16, octaves=22, sub_bits=5)
POOLED_BINS = Bins(min_exponent=-40, octaves=56, sub_bits=7)
_POOL_WAYS = 8


class Histogram(Statistic):
    """Counts of |value| of one tap, per channel or pooled over the layer's channels.

    Args:
        tap: the tap.
        channels: C.
        pooled: one distribution over all channels (finer bins) instead of one each.
    """

    def __init__(self, tap: str, channels: int, *, pooled: bool) -> None:
        self.taps = (tap,)
        self.bins = POOLED_BINS if pooled else CHANNEL_BINS
        self._pooled = pooled
        # A pooled histogram is kept in several interleaved parts so that every thread has its own.
        ways = _POOL_WAYS if channels % _POOL_WAYS == 0 else 1
        self._counts = torch.zeros(ways if pooled else channels, self.bins.count, dtype=torch.int32)

    def update(self, values: Mapping[str, torch.Tensor], batch: Batch) -> None:
        x = values[self.taps[0]]
        x = x.reshape(-1, self._counts.shape[0] if self._pooled else x.shape[-1])
        self._counts = self._counts.to(x.device)
        _check(kernels.channel_statistics(x, self._counts, self.bins.min_exponent, self.bins.sub_bits, None, None))

    def state(self) -> dict[str, torch.Tensor]:
        return {"counts": self._counts}

    def quantile(self, fraction: float, scale: torch.Tensor | None = None) -> Quantile:
        """The ``fraction``-quantile of |value| * scale over all tokens and channels.

        Args:
            fraction: 0 <= fraction < 1.
            scale: [C] positive factors, per-channel histograms only; None for 1.
        """
        counts = self._counts.cpu().to(torch.int64) & 0xFFFFFFFF
        if self._pooled:
            counts = counts.sum(0, keepdim=True)
        cumulative = counts.cumsum(1).double()
        total = float(cumulative[:, -1].sum())
        if total == 0:
            raise CalibrationError("no activations were seen, expected at least one token")
        edges = self.bins.edges()
        factor = torch.ones(len(counts), dtype=torch.float64) if scale is None else scale.double()
        if fraction <= 0:
            return Quantile(0.0, 0.0, 0.0)
        zeros = float(counts[:, 0].sum())
        if fraction * total <= zeros:
            return Quantile(SKIP_ZEROS, zeros / total, 0.0)

        def rank(level: float) -> tuple[float, float]:
            """Values below ``level`` after scaling, and how many share a bin with it."""
            value = level / factor
            index = torch.searchsorted(edges, value, right=True) - 1
            low = edges[index]
            last = index == len(edges) - 1
            width = torch.where(last, torch.inf, edges[(index + 1).clamp(max=len(edges) - 1)] - low)
            part = torch.where(value.isinf(), 1.0, (value - low) / width)
            below = cumulative.gather(1, index[:, None])[:, 0]
            inside = counts.gather(1, index[:, None] + 1)[:, 0].double()
            return float((below + part * inside).sum()), float(inside.sum())

        low, high = 0.0, float(edges[-1] * factor[factor.isfinite()].max().clamp(min=1e-30)) * 2
        for _ in range(200):
            middle = (low + high) / 2
            if middle in (low, high):
                break
            low, high = (middle, high) if rank(middle)[0] < fraction * total else (low, middle)
        below, shared = rank(high)
        return Quantile(high, below / total, shared / total)


@dataclass(frozen=True)
class Quantile:
    """A quantile read from a histogram: its value, the share of values below it, and a bound on that share's error."""

    value: float
    achieved: float
    rank_error: float


class Moments(Statistic):
    """Per channel, the mean of |value| and the root mean square of one tap, summed in float64."""

    def __init__(self, tap: str, channels: int) -> None:
        self.taps = (tap,)
        self._sum_abs = torch.zeros(channels, dtype=torch.float64)
        self._sum_square = torch.zeros(channels, dtype=torch.float64)
        self._tokens = torch.zeros(1, dtype=torch.int64)

    def update(self, values: Mapping[str, torch.Tensor], batch: Batch) -> None:
        x = values[self.taps[0]]
        x = x.reshape(-1, x.shape[-1])
        self._sum_abs, self._sum_square = self._sum_abs.to(x.device), self._sum_square.to(x.device)
        _check(kernels.channel_statistics(x, None, 0, 0, self._sum_abs, self._sum_square))
        self._tokens += len(x)

    def state(self) -> dict[str, torch.Tensor]:
        return {"sum_abs": self._sum_abs, "sum_square": self._sum_square, "tokens": self._tokens}

    @property
    def mean_abs(self) -> torch.Tensor:
        """Mean of |value|, float64 [C]."""
        return self._sum_abs.cpu() / self._tokens.clamp(min=1)

    @property
    def root_mean_square(self) -> torch.Tensor:
        """Root of the mean of value squared, float64 [C]."""
        return (self._sum_square.cpu() / self._tokens.clamp(min=1)).sqrt()


def _check(non_finite: int) -> None:
    if non_finite:
        raise CalibrationError(f"{non_finite} activations are NaN or infinite, expected finite values")


# Counts are 32-bit: a channel sees one value a token.
MAX_TOKENS = min(sys.maxsize, 2**32 - 1)


def core_count(channels: int, alpha: float, *, sparse: bool) -> int:
    """How many channels are a token's core; 0 where that depends on the token."""
    return 0 if sparse else max(1, round(alpha * channels))


def core_statistics(
    values: torch.Tensor, alpha: float, *, positive: bool, sparse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The core channels of each token: the top fraction ``alpha`` of its active ones.

    Args:
        values: finite [T, C], any float type.
        alpha: fraction, rounded to a number of channels, at least one.
        positive: rank by max(value, 0) instead of ``|value|``.
        sparse: whether channels can be inactive (0), as after a ReLU; otherwise all C count as active.

    Returns:
        float32 levels [T], the strength of each token's last core channel; counts [C], how many tokens have the channel
        in their core; sums [C], its strengths in units of the tokens' levels.
    """
    count = core_count(values.shape[1], alpha, sparse=sparse)
    native = values.device.type == "cpu" and values.dtype in kernels.cpu.DTYPES and not kernels.cpu.missing
    compute = kernels.core_statistics if native else kernels.reference.core_statistics
    levels, counts, sums = compute(values.detach(), count, alpha, positive=positive)
    return levels, counts, sums.nan_to_num()


class TokenSample(Statistic):
    """A uniform sample of the tokens of one tap, at most ``capacity``, in the model's own type.

    Every token draws a number from a generator seeded by its position in the text; the smallest stay.  Up to ``capacity``
    tokens the sample is the whole text, so that nothing is estimated.
    """

    def __init__(self, tap: str, channels: int, capacity: int) -> None:
        self.taps = (tap,)
        self._rows = torch.zeros(0, channels)
        self._capacity = capacity
        self._state = {
            "draw": torch.full((capacity,), torch.inf, dtype=torch.float64),
            "position": torch.zeros(capacity).long(),
            "seen": torch.zeros(1).long(),
        }

    def update(self, values: Mapping[str, torch.Tensor], batch: Batch) -> None:
        x = values[self.taps[0]]
        x = x.reshape(-1, x.shape[-1]).to("cpu")
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError("activations are NaN or infinite, expected finite values")
        self._make_room(x.dtype)
        seen, draw, position = int(self._state["seen"]), self._state["draw"], self._state["position"]
        fresh = torch.rand(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(seen))
        place = torch.arange(seen, seen + len(x))
        if seen < self._capacity:
            # A sample that is not yet full takes every token, whatever it drew.
            room = min(len(x), self._capacity - seen)
            self._rows[seen : seen + room] = x[:room]
            draw[seen : seen + room] = fresh[:room]
            position[seen : seen + room] = place[:room]
            x, fresh, place = x[room:], fresh[room:], place[room:]
            self._state["seen"] += room
        self._state["seen"] += len(x)
        chosen = torch.cat([draw, fresh]).topk(self._capacity, largest=False).indices
        new = chosen[chosen >= self._capacity] - self._capacity
        stays = torch.zeros(self._capacity, dtype=torch.bool)
        stays[chosen[chosen < self._capacity]] = True
        free = (~stays).nonzero()[:, 0][: len(new)]
        self._rows[free], draw[free], position[free] = x[new], fresh[new], place[new]

    def _make_room(self, dtype: torch.dtype) -> None:
        if not len(self._rows):
            self._rows = torch.zeros(self._capacity, self._rows.shape[1], dtype=dtype)

    def state(self) -> dict[str, torch.Tensor]:
        return {"rows": self._rows, **self._state}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        if len(state["rows"]):
            self._make_room(state["rows"].dtype)
            super().load_state(state)

    def tokens(self) -> torch.Tensor:
        """The sampled values in the order of the text, [T, channels]."""
        kept = min(int(self._state["seen"]), self._capacity)
        return self._rows[self._state["position"][:kept].argsort()]

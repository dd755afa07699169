"""SVDP: predictors of ReLU sparsity without training.

Serbin et al., "SVD Contextual Sparsity Predictors for Fast LLM Inference", arXiv:2603.14110, and its published
construction.  The first half of the tokens whitens W_gate's SVD (:mod:`.whitening`), which gives a rank-R predictor B A x of
the gate's input; the second half sets one bias per neuron.  At run time the predictor names the neurons that may be active,
their gate rows are computed exactly, and up and down are read only where that gate is above zero: a false positive costs
reading, a false negative becomes 0.

Shape letters: T tokens, H hidden, N neurons, R rank, G grid points.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from actsparse.methods.base import Calibrated, Layer, Method, MethodError, Solution, Targets
from actsparse.methods.relu import Zeros, check_activation, skip_zeros
from actsparse.methods.statistics import CalibrationError, Statistic, TokenSample
from actsparse.methods.whitening import Covariance, LowRank, low_rank

BIASES = ("none", "constant", "full", "smooth")
PENALTIES = ("gate", "gate-up", "full")
GRID = 256
# The published construction's constants: a neuron starts inactive on at most this share of the tokens, and the search ends
# once more than this share of the neurons is inactive on every token.
START_LIMIT = 0.95
ALWAYS_OFF_LIMIT = 0.01
# Between a threshold and the score it was read off, in standard deviations of the neuron's scores.
ROUNDING = 1e-5
# The first layers are more sensitive: their s is lower.
GENTLE_LAYERS, GENTLER_BY = 2, 0.1
# Of N, the published ranks' range; "auto" goes no lower, and spends its bytes against the middle.
LEAST_RANK, USUAL_RANK = 0.02, 0.025
# Tokens that stand in for all of the second half. A rank among m of them is off by at most 0.5 / sqrt(m): 0.6 %.  Where a
# token is small (H below 2048) more are kept, in the same memory: thresholds from more tokens lose less on the next text.
SAMPLE_TOKENS, SAMPLE_VALUES = 8192, 8192 * 2048
# The search for a rank weighs about so many pairs of a token and a neuron, from every k-th neuron: all of them cost minutes
# a layer. Tokens are not thinned out, because how well thresholds hold on other tokens depends on their number.
_SEARCH_PAIRS = 8192 * 512
_CHUNK = 512


@dataclass(frozen=True)
class Evidence:
    """What the bias search weighs, over the sampled tokens.

    Attributes:
        inputs: x, float32 [T, H].
        offset: bias of the gate projection, float32 [N]; zeros where it has none.
        exact: what the gate's activation sees, float32 [N, T]; the neuron is active where it is above 0.
        energy: squared importance, float32 [N, T].
        power: the activation is relu to this power.
    """

    inputs: torch.Tensor
    offset: torch.Tensor
    exact: torch.Tensor
    energy: torch.Tensor
    power: int = 1

    def part(self, tokens: slice) -> Evidence:
        """The same of some of the tokens."""
        return replace(self, inputs=self.inputs[tokens], exact=self.exact[:, tokens], energy=self.energy[:, tokens])

    def scores(self, factors: LowRank) -> torch.Tensor:
        """Predicted gate inputs, float32 [N, T]."""
        latents = self.inputs.double() @ factors.a.T
        return factors.b.float() @ latents.float().T + self.offset[:, None]

    def expected_energy(self, scores: torch.Tensor) -> torch.Tensor:
        """The energy that is to be expected of a token with this score, float32 [N, T].

        The exact value is the score plus an error, taken as normal with the neuron's own variance; then E[g^2 | score] is
        known in closed form, and one factor per neuron makes the total right (the part of up and down).
        """
        expected = torch.empty_like(scores)
        for at in range(0, len(scores), _CHUNK):
            rows = slice(at, at + _CHUNK)
            spread = (self.exact[rows] - scores[rows]).square().mean(1, keepdim=True).sqrt().clamp(min=1e-20)
            moment = rectified_moment(scores[rows] / spread, 2 * self.power)
            scale = self.energy[rows].sum(1, keepdim=True) / moment.sum(1, keepdim=True).clamp(min=1e-20)
            expected[rows] = moment * scale
        return expected


class Svdp(Method):
    """A rank-R predictor of the gate's sign; see the module docstring.

    Args:
        rank: R, or ``auto``: per layer the rank that loses least energy when all of them read as many bytes as a rank of
            2.5 % of N at this s (a higher rank has to pay by predicting more neurons inactive).  Each half of the sampled
            tokens judges thresholds made from the other: on their own tokens, low ranks look free (docs/svdp.md).
        s: the share of the natural sparsity that is predicted inactive; None takes the target sparsity's value.
        whitening: weigh the SVD by the inputs' covariance.
        bias: ``full`` (one threshold per neuron), ``constant`` (one per layer), ``none`` (zero), or ``smooth``: as full, but
            the search weighs each token's expected energy given its score instead of the energy it happened to have.  Ours,
            not the paper's: the full search overfits its few thousand tokens (docs/svdp.md).
        penalty: what a skipped active neuron costs, squared: g (``gate``), g u (``gate-up``) or g u times the norm of its
            column of W_down (``full``).
    """

    name = "svdp"
    source = "arXiv:2603.14110"
    phases = ((0.0, 0.5), (0.5, 1.0))
    sparsity = 0.4
    options = {  # noqa: RUF012
        "rank": {"help": "rank of the predictor, or auto (default): chosen per layer by loss at equal bytes"},
        "s": {
            "type": float,
            "help": "share of the natural sparsity to predict (default: the value of --sparsity, 0.4)",
        },
        "whitening": {"action": argparse.BooleanOptionalAction, "help": "weigh the SVD by the inputs (default: yes)"},
        "bias": {
            "choices": BIASES,
            "help": "thresholds: one per neuron (full, default; smooth), per layer (constant), or zero",
        },
        "penalty": {
            "choices": PENALTIES,
            "help": "cost of a missed neuron: g, g u, or g u |W_down column| (full, default)",
        },
    }

    def __init__(
        self,
        rank: int | str = "auto",
        s: float | None = None,
        whitening: bool = True,
        bias: str = "full",
        penalty: str = "full",
    ) -> None:
        if s is not None and not 0 <= s < 1:
            raise MethodError(f"s is {s}, expected 0 <= s < 1")
        for name, value, known in (("bias", bias, BIASES), ("penalty", penalty, PENALTIES)):
            if value not in known:
                raise MethodError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        self.rank = parse_rank(rank)
        if self.rank == "auto" and bias == "none":
            raise MethodError("rank auto needs calibrated thresholds: pass a rank with bias none")
        self.s = s
        self.whitening = whitening
        self.bias = bias
        self.penalty = penalty

    def statistics(self, layer: Layer, phase: int, earlier: Mapping[str, Statistic]) -> dict[str, Statistic]:
        check_activation(self.name, layer)
        rank, limit = self.rank, min(layer.model.hidden, layer.model.neurons)
        if isinstance(rank, int) and rank > limit:
            raise MethodError(f"rank is {rank}, expected at most {limit} for this model")
        if phase == 0:
            return {
                "ffn_in/covariance": Covariance("ffn_in", layer.model.hidden),
                "gate/zeros/first": Zeros("gate"),
            }
        return {
            "ffn_in/sample": TokenSample("ffn_in", layer.model.hidden, sample_tokens(layer.model.hidden)),
            "gate/zeros/second": Zeros("gate"),
        }

    def solve(self, layers: Sequence[Calibrated], targets: Targets) -> Solution:
        solution = Solution(target=targets.default if self.s is None else self.s)
        ranks = []
        for calibrated in layers:
            index = calibrated.layer.index
            s = targets(index, "ffn") if self.s is None else self.s
            ranks.append(self._solve_layer(calibrated, s, solution))
        solution.facts["ranks"] = ranks
        return solution

    def _solve_layer(self, calibrated: Calibrated, s: float, solution: Solution) -> int:
        layer, statistics = calibrated.layer, calibrated.statistics
        inactive = layer_budget(layer.index, s) * natural_sparsity(statistics)
        factors = self._factors(layer, statistics)
        sample: TokenSample = statistics["ffn_in/sample"]  # type: ignore[assignment]
        if self.rank == "auto":
            rank, inactive, unseen = self._choose_rank(layer, factors, sample.tokens(), inactive)
            factors = factors.cut(rank)
            solution.facts.setdefault("energy_lost_unseen", []).append(float(f"{unseen:.3g}"))
        tokens = evidence(layer, sample.tokens(), self.penalty)
        scores = tokens.scores(factors)
        threshold = self._threshold(scores, tokens, inactive)
        found = outcome(scores, tokens, threshold)
        prefix = f"layers.{layer.index}.ffn.predictor_"
        solution.rules[f"{prefix}a"] = factors.a.float().cpu()
        solution.rules[f"{prefix}b"] = factors.b.float().contiguous().cpu()
        solution.rules[f"{prefix}bias"] = (tokens.offset - threshold).cpu()
        # Where both ReLUs count, what is known is a lower bound: zeros of up are found at run time.
        skip_zeros(solution, layer, found.skipped, found.skipped)
        if layer.gated:
            solution.achieved[f"layers.{layer.index}.gate"] = found.inactive
        for name, value in (
            ("energy_lost", found.energy_lost),
            ("ridge", factors.ridge),
            ("residual", factors.residual),
        ):
            solution.facts.setdefault(name, []).append(float(f"{value:.3g}"))
        return len(factors.a)

    def _factors(self, layer: Layer, statistics: Mapping[str, Statistic]) -> LowRank:
        weight = gate_weight(layer)
        rank = candidate_ranks(layer)[-1] if isinstance(self.rank, str) else self.rank
        covariance: Covariance = statistics["ffn_in/covariance"]  # type: ignore[assignment]
        return low_rank(weight, rank, covariance.mean if self.whitening else None)

    def _choose_rank(
        self, layer: Layer, factors: LowRank, tokens: torch.Tensor, inactive: float
    ) -> tuple[int, float, float]:
        """The rank of least loss among those that read the same bytes, the inactive rate that pays for it, and that loss."""
        if len(tokens) < 2:
            raise CalibrationError(f"rank auto judges on tokens of its own, expected at least 2, got {len(tokens)}")
        neurons, hidden = layer.model.neurons, layer.model.hidden
        every = -(-neurons * len(tokens) // _SEARCH_PAIRS)
        factors = replace(factors, b=factors.b[::every])
        whole, middle = evidence(layer, tokens, self.penalty, every), len(tokens) // 2
        halves = whole.part(slice(middle)), whole.part(slice(middle, None))
        best = (float("inf"), 0, 0.0)
        for rank, rate in affordable_ranks(candidate_ranks(layer), hidden, neurons, inactive):
            scores = [half.scores(factors.cut(rank)) for half in halves]
            thresholds = [self._threshold(seen, half, rate) for seen, half in zip(scores, halves, strict=True)]
            lost = [outcome(scores[unseen], halves[unseen], thresholds[1 - unseen]).energy_lost for unseen in range(2)]
            best = min(best, (sum(lost) / 2, rank, rate))
        return best[1], best[2], best[0]

    def _threshold(self, scores: torch.Tensor, tokens: Evidence, inactive: float) -> torch.Tensor:
        """Per neuron, the score up to which it is predicted inactive, float32 [N]."""
        if self.bias == "none":
            return scores.new_zeros(len(scores))
        if self.bias == "constant":
            place = min(scores.numel(), 1 + round(inactive * (scores.numel() - 1)))
            return scores.flatten().kthvalue(place).values.expand(len(scores)).clone()
        energy = tokens.energy if self.bias == "full" else tokens.expected_energy(scores)
        # The next token may lie so close above that float32 sums in another order fall below.
        return neuron_thresholds(scores, energy, inactive) - ROUNDING * scores.std(1, correction=0)


def parse_rank(rank: int | str) -> int | str:
    """``auto`` or an integer of at least 1; MethodError for anything else."""
    if rank == "auto":
        return "auto"
    try:
        number = int(rank)
    except ValueError:
        number = 0
    if number < 1:
        raise MethodError(f"rank is {rank!r}, expected a whole number of at least 1, or auto")
    return number


def sample_tokens(hidden: int) -> int:
    """How many tokens of H values a layer's sample holds."""
    return max(SAMPLE_TOKENS, SAMPLE_VALUES // hidden)


def candidate_ranks(layer: Layer) -> list[int]:
    """Ranks that ``auto`` compares: 2 to 11 % of N in steps of sqrt(2), multiples of 8, at most an eighth of H (or 128)."""
    most = min(layer.model.hidden, layer.model.neurons, max(128, layer.model.hidden // 8))
    steps = (LEAST_RANK * 2 ** (step / 2) * layer.model.neurons for step in range(6))
    return sorted({min(most, max(8, 8 * math.ceil(rank / 8))) for rank in steps})


def affordable_ranks(ranks: Sequence[int], hidden: int, neurons: int, inactive: float) -> list[tuple[int, float]]:
    """Each rank with the inactive rate at which it reads what ``USUAL_RANK`` of N reads at ``inactive``.

    A rank costs H + N values, a neuron predicted active its gate row of H.  Ranks that would leave no neuron active are left
    out; if that is all of them, the smallest stays, at ``inactive``.
    """
    row_of_rank = (hidden + neurons) / (hidden * neurons)
    rates = [(rank, max(0.0, inactive + (rank - USUAL_RANK * neurons) * row_of_rank)) for rank in ranks]
    return [(rank, rate) for rank, rate in rates if rate < 1] or [(min(ranks), inactive)]


def layer_budget(index: int, s: float) -> float:
    """The layer's own s: the first two layers are spared."""
    return max(0.0, s - GENTLER_BY) if index < GENTLE_LAYERS else s


def natural_sparsity(statistics: Mapping[str, Statistic]) -> float:
    """Share of exact zeros of the gate over all tokens of both phases."""
    counts = [statistics[f"gate/zeros/{half}"] for half in ("first", "second")]
    return sum(c.zeros for c in counts) / max(1, sum(c.count for c in counts))  # type: ignore[attr-defined]


def gate_weight(layer: Layer) -> torch.Tensor:
    """The projection whose sign is predicted, [N, H]."""
    return layer.weight("gate" if layer.gated else "up")


def evidence(layer: Layer, tokens: torch.Tensor, penalty: str, every: int = 1) -> Evidence:
    """Run the layer's own weights over sampled inputs [T, H]; with ``every``, of one in so many neurons."""
    some = slice(None, None, every)
    gate, up = gate_weight(layer)[some], layer.weight("up")[some]
    x = tokens.to(gate.device, torch.float32)

    def bias_of(projection: str) -> torch.Tensor | None:
        bias = layer.bias(projection)
        return None if bias is None else bias.detach().float()[some]

    neurons = len(gate)
    offset = bias_of("gate" if layer.gated else "up")
    if offset is None:
        offset = x.new_zeros(neurons)
    up_bias = bias_of("up") if layer.gated else None
    norms = layer.weight("down")[:, some].detach().float().norm(dim=0)
    power = 2 if layer.model.activation == "relu2" else 1
    exact = x.new_empty(neurons, len(x))
    energy = x.new_empty(neurons, len(x))
    for at in range(0, neurons, _CHUNK):
        rows = slice(at, at + _CHUNK)
        exact[rows] = gate[rows].detach().float() @ x.T + offset[rows, None]
        g = exact[rows].relu() ** power
        if layer.gated and penalty != "gate":
            u = up[rows].detach().float() @ x.T
            if up_bias is not None:
                u += up_bias[rows, None]
            g *= u.relu() if layer.model.activation == "drelu" else u
        energy[rows] = (g * norms[rows, None] if penalty == "full" else g).square()
    return Evidence(x, offset, exact, energy, power)


def rectified_moment(t: torch.Tensor, order: int) -> torch.Tensor:
    """E[max(0, t + e)^order] for a standard normal e; order 2 or 4."""
    density = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(t)
    if order == 2:
        return ((t.square() + 1) * below + t * density).clamp(min=0)
    return ((t**4 + 6 * t.square() + 3) * below + (t**3 + 5 * t) * density).clamp(min=0)


def neuron_thresholds(scores: torch.Tensor, energy: torch.Tensor, inactive: float) -> torch.Tensor:
    """The paper's greedy search (section 3.3): spend the layer's inactive rate where it costs least energy.

    A neuron predicted inactive on its q lowest-scored tokens loses the energy of those tokens, taken at ``GRID`` values of q.
    Every neuron starts at the last point that loses nothing; then, one grid step at a time, the neuron whose next step costs
    least advances, until the mean inactive rate of the layer is reached.

    Args:
        scores: predicted gate inputs, float32 [N, T].
        energy: squared importance [N, T].
        inactive: rate to reach, 0 to 1.

    Returns:
        Thresholds, float32 [N]: scores up to and including them are predicted inactive.
    """
    neurons, tokens = scores.shape
    grid = min(GRID, tokens)
    # As published: losses are read at evenly spread ranks, thresholds at multiples of T // G. Both agree to 1 / T where
    # T is a multiple of G; elsewhere the thresholds lie a little lower, on the safe side.
    ranks = torch.linspace(0, tokens - 1, grid).long().to(scores.device)
    stride = tokens // grid
    loss = scores.new_empty(neurons, grid)
    levels = scores.new_empty(neurons, grid)
    for at in range(0, neurons, _CHUNK):
        rows = slice(at, at + _CHUNK)
        ordered, order = scores[rows].sort(dim=1)
        loss[rows] = energy[rows].gather(1, order).cumsum(1)[:, ranks]
        levels[rows] = ordered[:, ::stride][:, :grid]
    start = ((loss == 0).sum(1) - 1).clamp(0, max(int(START_LIMIT * grid) - 1, 0))
    steps = int((inactive - float(start.double().mean()) / grid) * neurons * grid)
    place = advance(loss, start, steps, most_off=ALWAYS_OFF_LIMIT * neurons)
    return levels.gather(1, place[:, None])[:, 0]


def advance(loss: torch.Tensor, start: torch.Tensor, steps: int, most_off: float) -> torch.Tensor:
    """Take ``steps`` greedy steps at once: each advances, by one grid point, the neuron whose next point costs least.

    A step is taken before another exactly when the dearest step on the way to it, itself included, is cheaper; so the greedy
    order is a sort by that running maximum, and neurons need not be visited one step at a time.

    Args:
        loss: cumulative losses [N, G], not falling along G.
        start: where each neuron stands, int64 [N].
        steps: how many steps; none when negative.
        most_off: the search ends once more neurons than this have reached the last point.

    Returns:
        Where each neuron ends, int64 [N].
    """
    if steps <= 0:
        return start
    cost = loss.diff(dim=1)
    ahead = torch.arange(cost.shape[1], device=cost.device) >= start[:, None]
    dearest = cost.masked_fill(~ahead, -torch.inf).cummax(1).values
    # Stable, so that steps of one neuron with one maximum stay in their order.
    order = dearest[ahead].sort(stable=True).indices[:steps]
    neuron, point = ahead.nonzero()[order].T
    off = (point == cost.shape[1] - 1).cumsum(0)
    taken = neuron[: int((off <= most_off).sum()) + 1]
    return start + torch.bincount(taken, minlength=len(start))


@dataclass(frozen=True)
class Outcome:
    """What thresholds do on the sample: share predicted inactive, share skipped in the end, and share of energy lost."""

    inactive: float
    skipped: float
    energy_lost: float


def outcome(scores: torch.Tensor, tokens: Evidence, threshold: torch.Tensor) -> Outcome:
    """Judge thresholds [N] on tokens, those they were made from or others."""
    inactive = kept = lost = total = 0.0
    for at in range(0, len(scores), _CHUNK):
        rows = slice(at, at + _CHUNK)
        off = scores[rows] <= threshold[rows, None]
        inactive += float(off.sum())
        kept += float(((tokens.exact[rows] > 0) & ~off).sum())
        lost += float((tokens.energy[rows] * off).double().sum())
        total += float(tokens.energy[rows].double().sum())
    count = scores.numel()
    return Outcome(inactive / count, 1 - kept / count, lost / max(total, 1e-300))

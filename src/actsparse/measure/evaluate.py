"""Quality: a sparsified model beside the dense one on the same tokens (perplexity, divergence, agreement), and what it reads.

Only tokens predicted from positions that the scope sparsifies are scored, for the dense model too:

- ``all``: every token of a window but its first;
- ``last_half``: tokens of the second half, the window run in one forward;
- ``decode``: tokens after the prompt (the first half), which is run densely; the rest continues from its cache under the
  rules, as decoding would, only many tokens at a time.

Shape letters: W windows, B windows in a batch, L tokens in a window, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.nn import functional as F

from actsparse.measure.reading import WeightsRead, weights_read
from actsparse.models import caches, text
from actsparse.models.sites import ModelError
from actsparse.plan import Plan, PlanError
from actsparse.runtime.layers import Meter
from actsparse.runtime.swap import attach_meter, restore, sparsify, state_of

BATCH_TOKENS = 2048
# Logits of the reference that are held while the candidate is made ready, in bytes (one batch at least).
HELD_BYTES = 1 << 30
# Positions whose distributions are compared at once: a vocabulary may have 256k entries.
COMPARED_POSITIONS = 64
_LARGEST_LOSS = 700  # nats: beyond it the perplexity is no float64
# Below this a short text may really skip nothing.
LEAST_SKIPPED = 0.01


class Progress(Protocol):
    """Told after every batch how many tokens are done, of how many."""

    def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, with the standard error that windows as independent samples give."""

    ppl: float
    stderr: float


@dataclass(frozen=True)
class Mean:
    """A mean over scored tokens, with the standard error that windows as independent samples give."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Paired:
    """A candidate beside a reference, per window: float64 [W], means over the window's scored tokens.

    Attributes:
        reference: negative log-likelihood (nats) of the reference.
        candidate: that of the candidate.
        divergence: KL(reference || candidate) of the predicted distributions, nats.
        agreement: fraction of tokens for which both predict the same token first.
    """

    reference: torch.Tensor
    candidate: torch.Tensor
    divergence: torch.Tensor
    agreement: torch.Tensor


# Makes a model ready and yields it: a model that takes turns with itself, dense and sparse, or simply another one.
Ready = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Comparison:
    """A sparsified model beside the dense one.

    ``delta_stderr`` is the standard error of ``sparse.ppl - dense.ppl``, paired by window; ``sparsity`` the fraction
    skipped per site; ``tokens`` how many were scored.  ``divergence`` (KL(dense || sparse), nats) and ``agreement`` (of the
    most likely token) are None where they were not asked for.
    """

    dense: Perplexity
    sparse: Perplexity
    delta_stderr: float
    weights_read: WeightsRead
    sparsity: dict[str, float]
    tokens: int
    scope: str
    divergence: Mean | None = None
    agreement: Mean | None = None


def compare_perplexity(
    model: Any,
    plan: Plan,
    windows: text.Windows,
    *,
    progress: Progress | None = None,
    dense: torch.Tensor | None = None,
    divergence: bool = True,
    reference: Any | None = None,
) -> Comparison:
    """``model`` dense and under ``plan``, on the same tokens.  The model is left dense.

    A packed model's dense is every plane of its weights, unless ``reference`` is another model to compare with.

    Args:
        model: the Hugging Face model, dense or sparsified.
        plan: its rules; ``plan.scope`` decides which tokens are sparsified and scored.
        windows: evaluation text.
        progress: called after every batch.
        dense: what :func:`window_losses` gave for the dense model on the same windows and scope; saves its pass
            where no divergence is asked for.
        reference: what stands in for the dense model, with the same tokenizer; by default the model itself.
        divergence: also give the KL divergence to the dense model and the agreement of the most likely token.

    Raises:
        PlanError: nothing was skipped under a plan that should skip; see :func:`check_skipped`.
    """
    restore(model)
    meter = Meter()
    read: WeightsRead | None = None

    @contextlib.contextmanager
    def sparsified() -> Iterator[Any]:
        nonlocal read
        sparsify(model, plan)
        try:
            attach_meter(model, meter)
            yield model
            read = weights_read(model, meter)
        finally:
            restore(model)

    paired: Paired | None = None
    if divergence:
        paired = paired_losses(
            lambda: contextlib.nullcontext(model if reference is None else reference),
            sparsified,
            windows,
            plan.scope,
            progress=progress,
        )
        sparse = paired.candidate
        dense = paired.reference if dense is None else dense
    else:
        passes = 1 if dense is not None else 2
        total = windows.count * passes
        if dense is None:
            other_model = model if reference is None else reference
            shifted = progress and _shifted(progress, 0, total)
            dense = window_losses(other_model, windows, plan.scope, progress=shifted)
        with sparsified():
            shifted = progress and _shifted(progress, (passes - 1) * windows.count, total)
            sparse = window_losses(model, windows, plan.scope, progress=shifted)
    check_skipped(plan, meter)
    assert read is not None
    one, other = perplexity(dense), perplexity(sparse)
    # First-order error of exp(mean) for both sides, paired: each window moves both.
    moved = other.ppl * sparse - one.ppl * dense
    site_sparsity = {
        site: value for site, value in meter.sparsity().items() if site in plan.achieved or not plan.achieved
    }
    return Comparison(
        one,
        other,
        _stderr(moved),
        read,
        site_sparsity,
        scored_tokens(windows, plan.scope),
        plan.scope,
        _mean(paired.divergence) if paired else None,
        _mean(paired.agreement) if paired else None,
    )


def check_skipped(plan: Plan, meter: Meter) -> None:
    """Refuse a measurement in which rules that should skip did not: it would be the dense model's, under the plan's name.

    A plan should skip when a site of it skipped :data:`LEAST_SKIPPED` of the calibration text, or, where it does not say,
    when its target is as high.  Dense plans and sparsity 0 pass.

    Raises:
        PlanError: no rule was applied to any token, or all were and none skipped anything.
    """
    if not plan.rules and not plan.prompt:
        return
    if not meter.seen:
        raise PlanError(
            f"plan of method {plan.method}: its rules were applied to no token, so that the model ran dense"
        )
    if plan.method == "graded":
        return  # its `achieved` counts bits against 16: reading every plane is no dense model
    expected = max(plan.achieved.values(), default=plan.sparsity)
    if expected >= LEAST_SKIPPED and not any(value > 0 for value in meter.sparsity().values()):
        raise PlanError(
            f"plan of method {plan.method} skipped nothing under scope {plan.scope}, expected up to {expected:.1%} of a site: "
            "the model ran dense"
        )


def scorer(model: Any, windows: text.Windows, reference: Any | None = None) -> Callable[[Plan], tuple[float, float]]:
    """What a search for a budget measures plans with: fraction of the weights read, relative increase of perplexity.

    ``reference`` is what stands in for the dense model, by default the model itself.
    """
    dense: dict[str, torch.Tensor] = {}

    def score(plan: Plan) -> tuple[float, float]:
        if plan.scope not in dense:
            dense[plan.scope] = window_losses(model if reference is None else reference, windows, plan.scope)
        result = compare_perplexity(model, plan, windows, dense=dense[plan.scope], divergence=False)
        return result.weights_read.fraction, result.sparse.ppl / result.dense.ppl - 1

    return score


def paired_losses(
    reference: Ready,
    candidate: Ready,
    windows: text.Windows,
    scope: str = "all",
    *,
    progress: Progress | None = None,
) -> Paired:
    """Losses of two models on the same windows, and how far the candidate's predictions are from the reference's.

    Each is called once per block of windows and its context left before the other's is entered, so that one model can be
    both.  A block is as many windows as leave the reference's logits within :data:`HELD_BYTES`, one batch at least.  Both
    must have one vocabulary.

    Raises:
        PlanError: the vocabularies differ.
    """
    length = windows.tokens.shape[1]
    size = max(1, BATCH_TOKENS // length)
    batches = list(windows.tokens.split(size))
    rows: list[torch.Tensor] = []
    done = 0

    def tick(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress:
            progress(done, 2 * windows.count)

    # Not inference mode: weights that are re-laid in it could never again take part in a backward pass.
    with torch.no_grad():
        at = 0
        while at < len(batches):
            held: list[torch.Tensor] = []
            with reference() as model:
                while at + len(held) < len(batches) and (not held or _fits(held)):
                    tokens = batches[at + len(held)]
                    held.append(_scored_logits(model, tokens.to(model.device), scope).cpu())
                    tick(tokens.numel())
            block = batches[at : at + len(held)]
            with candidate() as model:
                for index, tokens in enumerate(block):
                    tokens = tokens.to(model.device)
                    found = _scored_logits(model, tokens, scope)
                    if found.shape != held[index].shape:
                        raise PlanError(
                            f"the candidate's vocabulary has {found.shape[-1]} entries, the reference's "
                            f"{held[index].shape[-1]}: expected one vocabulary"
                        )
                    targets = tokens[:, scored_from(scope, length) + 1 :]
                    for one, other, target in zip(held[index], found, targets, strict=True):
                        rows.append(_compare(one.to(other.device), other, target))
                    tick(tokens.numel())
            at += len(block)
    return Paired(*torch.stack(rows).unbind(1))


def _fits(held: list[torch.Tensor]) -> bool:
    return (len(held) + 1) * held[0].numel() * held[0].element_size() <= HELD_BYTES


def _compare(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses, divergence and agreement of one window, float64 [4], from logits [L, V] (the last row predicts no target)."""
    parts: list[torch.Tensor] = []
    for at in range(0, len(targets), COMPARED_POSITIONS):
        chosen = slice(at, min(at + COMPARED_POSITIONS, len(targets)))
        p, q = (F.log_softmax(side[chosen].float(), dim=-1) for side in (reference, candidate))
        share = p.exp()
        # What the reference excludes adds nothing, not 0 x infinity.
        terms = torch.where(share == 0, 0.0, share * (p - q))
        losses = [F.nll_loss(side, targets[chosen], reduction="none").double() for side in (p, q)]
        agree = (p.argmax(-1) == q.argmax(-1)).double()
        parts.append(torch.stack([*losses, terms.sum(-1, dtype=torch.float64), agree]))
    # Row by row, because the mean of several rows at once may be summed in another order than that of window_losses.
    return torch.stack([row.mean() for row in torch.cat(parts, dim=1)]).cpu()


def window_losses(
    model: Any, windows: text.Windows, scope: str = "all", *, progress: Progress | None = None
) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of the scored tokens of each window, float64 [W]."""
    count, length = windows.tokens.shape
    size = max(1, BATCH_TOKENS // length)
    losses = []
    with torch.inference_mode():
        for at in range(0, count, size):
            tokens = windows.tokens[at : at + size].to(model.device)
            losses.append(_batch_losses(model, tokens, scope))
            if progress:
                progress(min(at + size, count) * length, windows.count)
    found = torch.cat(losses)
    worst = float(found.max())
    if not worst < _LARGEST_LOSS:
        raise ModelError(
            f"the loss of a window is {worst:g}, expected a finite number under {_LARGEST_LOSS}: "
            "the model's weights hold NaN, infinity or absurd values"
        )
    return found


def scored_from(scope: str, length: int) -> int:
    """First position whose prediction is scored."""
    return 0 if scope == "all" else length // 2


def scored_tokens(windows: text.Windows, scope: str) -> int:
    """How many tokens :func:`window_losses` scores."""
    count, length = windows.tokens.shape
    return int(count) * (int(length) - 1 - scored_from(scope, int(length)))


def perplexity(losses: torch.Tensor) -> Perplexity:
    """Perplexity of per-window losses [W]."""
    ppl = math.exp(float(losses.mean()))
    return Perplexity(ppl, ppl * _stderr(losses))


def _scored_logits(model: Any, tokens: torch.Tensor, scope: str) -> torch.Tensor:
    """Logits [B, S, V] from the first scored position on; the last one's prediction has no target."""
    length = tokens.shape[1]
    start = scored_from(scope, length)
    if scope == "decode":
        past = caches.cache_of(model(input_ids=tokens[:, :start], use_cache=True, logits_to_keep=1))
        with _as_decoding(model):
            argument = caches.cache_argument(model.forward, past)
            logits = model(input_ids=tokens[:, start:], use_cache=True, **argument).logits
    else:
        logits = model(input_ids=tokens, use_cache=False).logits[:, start:]
    return cast(torch.Tensor, logits)


def _batch_losses(model: Any, tokens: torch.Tensor, scope: str) -> torch.Tensor:
    start, logits = scored_from(scope, tokens.shape[1]), _scored_logits(model, tokens, scope)
    rows = []
    for row, target in zip(logits, tokens[:, start + 1 :], strict=True):
        rows.append(F.cross_entropy(row[:-1].float(), target, reduction="none").double().mean())
    return torch.stack(rows).cpu()


@contextlib.contextmanager
def _as_decoding(model: Any) -> Iterator[None]:
    """Let several tokens in one forward count as so many decode steps."""
    state = state_of(model)
    modules = state.modules if state else []
    scopes = [module.scope for module in modules]
    for module in modules:
        module.scope = "all"
    try:
        yield
    finally:
        for module, scope in zip(modules, scopes, strict=True):
            module.scope = scope


def _shifted(progress: Progress, before: int, overall: int) -> Progress:
    def shifted(done: int, total: int) -> None:
        progress(before + done, overall)

    return shifted


def _mean(values: torch.Tensor) -> Mean:
    return Mean(float(values.mean()), _stderr(values))


def _stderr(values: torch.Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

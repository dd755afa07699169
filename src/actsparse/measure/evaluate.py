"""Quality: perplexity of a sparsified model, paired with the dense one on the same tokens, and the weights it reads.

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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from actsparse.models import caches, sites, text
from actsparse.models.sites import ModelError
from actsparse.plan import Plan, PlanError
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.layers import Meter, SparseFFN
from actsparse.runtime.packed import PackedLinear
from actsparse.runtime.swap import attach_meter, restore, sparsify, state_of

BATCH_TOKENS = 2048
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
class WeightsRead:
    """What a decoded token reads.

    Attributes:
        bytes: of weights, the output head's included.
        fraction: of the dense model's bytes.
        ffn_fraction: of the bytes of its feed-forward blocks.
        bits_read: bits per weight of the decoder layers' matrices, scales and predictors included.
        bits_stored: the same of what is stored.
    """

    bytes: float
    fraction: float
    ffn_fraction: float
    bits_read: float
    bits_stored: float


@dataclass(frozen=True)
class Comparison:
    """A sparsified model beside the dense one.

    ``delta_stderr`` is the standard error of ``sparse.ppl - dense.ppl``, paired by window; ``sparsity`` the fraction
    skipped per site; ``tokens`` how many were scored.
    """

    dense: Perplexity
    sparse: Perplexity
    delta_stderr: float
    weights_read: WeightsRead
    sparsity: dict[str, float]
    tokens: int
    scope: str


def compare_perplexity(
    model: Any,
    plan: Plan,
    windows: text.Windows,
    *,
    progress: Progress | None = None,
    dense: torch.Tensor | None = None,
) -> Comparison:
    """Perplexity of ``model`` dense and under ``plan``, on the same tokens.  The model is left dense.

    Args:
        model: the Hugging Face model, dense or sparsified.
        plan: its rules; ``plan.scope`` decides which tokens are sparsified and scored.
        windows: evaluation text.
        progress: called after every batch.
        dense: what :func:`window_losses` gave for the dense model on the same windows and scope, to save a pass.

    Raises:
        PlanError: nothing was skipped under a plan that should skip; see :func:`check_skipped`.
    """
    restore(model)
    passes = 1 if dense is not None else 2
    total = windows.count * passes
    before = 0
    if dense is None:
        dense = window_losses(model, windows, plan.scope, progress=progress and _shifted(progress, 0, total))
        before = windows.count
    meter = Meter()
    sparsify(model, plan)
    try:
        attach_meter(model, meter)
        shifted = progress and _shifted(progress, before, total)
        sparse = window_losses(model, windows, plan.scope, progress=shifted)
        read = weights_read(model, meter)
        check_skipped(plan, meter)
    finally:
        restore(model)
    one, other = perplexity(dense), perplexity(sparse)
    # First-order error of exp(mean) for both sides, paired: each window moves both.
    paired = other.ppl * sparse - one.ppl * dense
    site_sparsity = {
        site: value for site, value in meter.sparsity().items() if site in plan.achieved or not plan.achieved
    }
    return Comparison(one, other, _stderr(paired), read, site_sparsity, scored_tokens(windows, plan.scope), plan.scope)


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
    expected = max(plan.achieved.values(), default=plan.sparsity)
    if expected >= LEAST_SKIPPED and not any(value > 0 for value in meter.sparsity().values()):
        raise PlanError(
            f"plan of method {plan.method} skipped nothing under scope {plan.scope}, expected up to {expected:.1%} of a site: "
            "the model ran dense"
        )


def scorer(model: Any, windows: text.Windows) -> Callable[[Plan], tuple[float, float]]:
    """What a search for a budget measures plans with: fraction of the weights read, relative increase of perplexity."""
    dense: dict[str, torch.Tensor] = {}

    def score(plan: Plan) -> tuple[float, float]:
        if plan.scope not in dense:
            dense[plan.scope] = window_losses(model, windows, plan.scope)
        result = compare_perplexity(model, plan, windows, dense=dense[plan.scope])
        return result.weights_read.fraction, result.sparse.ppl / result.dense.ppl - 1

    return score


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


def weights_read(model: Any, meter: Meter | None = None) -> WeightsRead:
    """Weight bytes per decoded token of ``model``: every projection at its metered fraction, and the output head.

    The embedding counts for nothing (one row is read); a predictor counts in full.  A plan that is for evaluation only
    counts as its ideal: gate and up are read for the neurons that down keeps.
    """
    state = state_of(model)
    products = {
        f"layers.{layer.index}.{name}": layer.product(name)
        for layer in sites.layers_of(model)
        for name, _ in layer.family.projections
    }
    counts = {site: _weights(module) for site, module in products.items()}
    stored = {site: _stored_bytes(module) for site, module in products.items()}
    head = model.get_output_embeddings()
    kept = {site: 1 - value for site, value in meter.sparsity().items()} if meter else {}
    if state and state.plan.evaluation_only:
        # The ideal that such a plan stands for: what it keeps is known before gate and up are read.
        for site in [site for site in kept if site.endswith(".down")]:
            kept |= {f"{site.removesuffix('down')}{name}": kept[site] for name in sites.FFN_PROJECTIONS}
    extra = 0
    for module in state.modules if state else []:
        if isinstance(module, SparseFFN):
            rules = module.rules()
            predictor = (rules.predictor_a, rules.predictor_b)
            extra += sum(matrix.numel() * matrix.element_size() for matrix in predictor if matrix is not None)
    ffn = [site for site in counts if site.rpartition(".")[2] in sites.FFN_PROJECTIONS]
    read = {site: size * kept.get(site, 1.0) for site, size in stored.items()}
    used = sum(read.values()) + extra
    ffn_used = sum(read[site] for site in ffn) + extra
    weights = sum(counts.values())
    whole = used + _stored_bytes(head) * kept.get("head", 1.0)
    width = model.dtype.itemsize
    return WeightsRead(
        bytes=whole,
        fraction=whole / (width * (weights + _weights(head))),
        ffn_fraction=ffn_used / (width * sum(counts[site] for site in ffn)),
        bits_read=8 * used / weights,
        bits_stored=8 * (sum(stored.values()) + extra) / weights,
    )


def _weights(product: Any) -> int:
    if isinstance(product, GradedLinear | PackedLinear):
        return product.in_features * product.out_features
    return int(product.weight.numel())


def _stored_bytes(product: Any) -> int:
    if isinstance(product, GradedLinear | PackedLinear):
        return product.packed.nbytes
    return int(product.weight.numel() * product.weight.element_size())


def _batch_losses(model: Any, tokens: torch.Tensor, scope: str) -> torch.Tensor:
    length = tokens.shape[1]
    start = scored_from(scope, length)
    if scope == "decode":
        past = caches.cache_of(model(input_ids=tokens[:, :start], use_cache=True, logits_to_keep=1))
        with _as_decoding(model):
            argument = caches.cache_argument(model.forward, past)
            logits = model(input_ids=tokens[:, start:], use_cache=True, **argument).logits
    else:
        logits = model(input_ids=tokens, use_cache=False).logits[:, start:]
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


def _stderr(values: torch.Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

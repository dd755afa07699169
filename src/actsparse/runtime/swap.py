"""Sparsify and restore: put a plan's rules into the user's own model, and take them out again without a trace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actsparse import kernels
from actsparse.kernels.parallel import Share, local, share_of
from actsparse.methods import prompt_rule
from actsparse.methods.rounding import round_nearest
from actsparse.models import directory, fused, opening, sites
from actsparse.models.sites import ModelError
from actsparse.plan import SKIP_ZEROS, ModelIdentity, Plan, PlanError
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.host import HostWeights
from actsparse.runtime.layers import (
    FFN_RULES,
    Meter,
    Passed,
    SparseFFN,
    SparseLinear,
    SparseModule,
    SparsePlainFFN,
    is_columns,
    lay_columns,
    lay_rows,
)
from actsparse.runtime.lowmemory import MappedWeights, mapped_weights, open_mapped
from actsparse.runtime.packed import PackedLinear, open_packed
from actsparse.runtime.packed_ffn import PackedFFN
from actsparse.runtime.prompt_ffn import PromptFFN
from actsparse.runtime.prompts import Prompts
from actsparse.runtime.saving import holds_packed, save_pretrained

_ATTRIBUTE = "actsparse_state"
_ROUNDED = "actsparse_rounded"


@dataclass
class State:
    """What :func:`sparsify` did to a model, kept on it for :func:`restore` and for reports."""

    plan: Plan
    replaced: list[tuple[sites.LayerSites, str, nn.Module]]
    relaid: list[nn.Linear]
    modules: list[SparseModule]
    handles: list[Any] = field(default_factory=list)
    prompts: Prompts | None = None
    # Weights in the host's memory, and layers whose weight was put there or on the card, with the one that they had.
    host: HostWeights | None = None
    moved: list[tuple[nn.Linear, nn.Parameter]] = field(default_factory=list)
    head: nn.Module | None = None


def sparsify(model: Any, plan: Plan | str | os.PathLike[str], *, scope: str | None = None) -> Any:
    """Make ``model`` obey ``plan``, in place; returns the model.

    Every weight stays one copy: those whose columns are skipped are re-laid once (the peak is one extra matrix).  A
    model that is already sparsified is restored first.

    Args:
        model: the Hugging Face model the plan was made for.
        plan: a plan or the path of one.
        scope: ``all``, ``decode`` or ``last_half``; by default the plan's own.

    Raises:
        PlanError: unreadable plan, or a plan for another model (both values are named).
        ModelError: unsupported family.
    """
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    if scope is not None:
        plan = plan.with_scope(scope)
    if mapped_weights(model) is not None and not plan.prompt:
        raise PlanError(f"plan's method is {plan.method}: a low-memory model needs one that chooses neurons per prompt")
    plan.check_model(ModelIdentity(**sites.describe(model)))
    rule = prompt_rule(plan) if plan.prompt else None
    if rule is not None and not sites.family_of(model).gated:
        raise ModelError(f"family {model.config.model_type} has no gated FFN: {plan.method} is for gated ones")
    share = _share(model, plan)
    # Only now: a plan that is refused leaves the model as it was.
    restore(model)
    state = State(plan, [], [], [])
    setattr(model, _ATTRIBUTE, state)
    activation = sites.activation_of(model)
    for layer in sites.layers_of(model):
        if any(isinstance(layer.product(name), PackedLinear) for name, _ in layer.family.projections):
            _sparsify_packed_layer(state, layer, plan, activation)
        else:
            _sparsify_layer(state, layer, plan, activation, share)
        _grade_layer(state, layer, plan)
    if "head.level_threshold" in plan.rules:
        state.head = model.get_output_embeddings()
        graded = _graded(state.head, "head", plan)
        model.set_output_embeddings(graded)
        state.modules.append(graded)
    if rule is not None:
        mapped = mapped_weights(model)
        state.prompts = Prompts(model.get_decoder(), rule, gather=mapped is not None)
        state.handles += state.prompts.handles
        if mapped is not None and mapped.card is not None:
            state.host = HostWeights(mapped.card)
        try:
            for layer in sites.layers_of(model):
                if state.host is not None and mapped is not None:
                    _part(state, layer, mapped, state.host, chosen=layer.index in rule.layers)
                if layer.index in rule.layers:
                    _choose_by_prompt(state, layer, state.prompts, activation, mapped)
        except BaseException:  # the card may be full, too
            restore(model)
            raise
    model.save_pretrained = partial(save_pretrained, model)
    # Last, when every weight lies as it will be read.
    kernels.use_huge_pages(*map(local, resident(model)))
    return model


def restore(model: Any) -> Any:
    """Undo :func:`sparsify`, bit for bit, in place; returns the model.  A dense model is left as it is."""
    state = state_of(model)
    if state is not None:
        # Blocks before what they hold: those were replaced first.
        for layer, path, module in reversed(state.replaced):
            layer.replace(path, module)
        for linear in state.relaid:
            lay_rows(linear)
        for linear, weight in state.moved:
            linear.weight = weight
        if state.head is not None:
            model.set_output_embeddings(state.head)
        for handle in state.handles:
            handle.remove()
        delattr(model, _ATTRIBUTE)
        if not holds_packed(model):
            model.__dict__.pop("save_pretrained", None)  # not there yet where sparsifying failed
    fused.fuse(model)
    return model


def load(
    name: str,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    low_memory: bool = False,
    **options: Any,
) -> Any:
    """Open a model (directory or hub id) and, if a plan is given, sparsify it; returns (model, tokenizer).

    ``low_memory`` (a directory, weights as stored) keeps feed-forward weights in their files, or, off the CPU and then with a
    plan only, in the host's memory: :mod:`.lowmemory`.
    """
    if low_memory and plan is None and device != "cpu":
        raise ModelError(f"low memory on {device} needs a plan that chooses neurons per prompt, got none")
    model = open_mapped(name, device=device) if low_memory else open_model(name, dtype, device)
    tokenizer = opening.open_tokenizer(name)
    if plan is not None:
        sparsify(model, plan, **options)
    return model, tokenizer


def open_model(name: str, dtype: str = "auto", device: str = "cpu") -> Any:
    """The model ``name``: dense, or under its own plan where it is one of this package's directories.

    As :func:`actsparse.models.opening.open_model`, which opens dense models; PlanError for a directory's bad plan.
    """
    about = directory.description(name)
    if about is None:
        return opening.open_model(name, dtype, device)
    home = opening.local_directory(name)
    directory.check(Path(home), about)
    if not directory.holds_packed(about):
        plan = Plan.load(Path(home) / directory.PLAN)
        return sparsify(opening.open_model(home, dtype, device), plan)
    if dtype != "auto":
        raise ModelError(f"dtype is {dtype}, {name} is packed: expected auto")
    model, plan = open_packed(home, opening.device_of(device))
    return sparsify(model, plan)


def state_of(model: Any) -> State | None:
    """What was done to ``model``, or None for a dense one."""
    return getattr(model, _ATTRIBUTE, None)


def resident(model: Any) -> list[nn.Parameter]:
    """The parameters of ``model`` without those that are kept in the host's memory for a GPU."""
    state = state_of(model)
    host = None if state is None else state.host
    return [parameter for parameter in model.parameters() if host is None or not host.holds(parameter)]


def prompts_of(model: Any) -> Prompts | None:
    """The sessions of a model whose neurons are chosen per prompt, None for any other."""
    state = state_of(model)
    return state.prompts if state else None


@contextmanager
def without_rules(model: Any) -> Iterator[None]:
    """Let the modules of ``model`` compute densely inside the block, and decoders made there too (packed weights: every plane).

    Not for neurons that are chosen per prompt.
    """
    state = state_of(model)
    modules = state.modules if state else []
    scopes = [module.scope for module in modules]
    for module in modules:
        module.scope = "none"
    try:
        yield
    finally:
        for module, scope in zip(modules, scopes, strict=True):
            module.scope = scope


def attach_meter(model: Any, meter: Meter | None) -> None:
    """Let every sparse module of ``model`` count into ``meter`` (None stops counting)."""
    state = state_of(model)
    for module in state.modules if state else []:
        module.meter = meter


def path_of(model: Any) -> str:
    """Which path a decode step of ``model`` takes, and why: for ``info`` and ``bench``."""
    state = state_of(model)
    if state is None:
        return "dense: not sparsified"
    weight = local(next(iter(state.modules)).parameters().__next__())
    return kernels.explain(weight.new_empty(1, 1), weight)


def _share(model: Any, plan: Plan) -> Share | None:
    """This process's part of a model that is divided among several; ModelError where the plan or family cannot be."""
    # Packed weights, which have none of this name, are never divided.
    try:
        share = share_of(getattr(sites.layers_of(model)[0].product("q"), "weight", None))
    except ValueError as error:
        raise ModelError(str(error)) from None
    if share is None:
        return None
    graded = any(name.endswith("level_threshold") for name in plan.rules)
    if plan.prompt or graded or not sites.family_of(model).gated:
        what = f"plan's method is {plan.method}" if plan.prompt or graded else f"family is {model.config.model_type}"
        raise ModelError(
            f"{what}, the model is divided among {share.size} processes: expected thresholds of a gated block"
        )
    for layer in sites.layers_of(model):
        for name, _ in layer.family.projections:
            if share_of(layer.weight(name)) != share:
                raise ModelError(f"layers.{layer.index}.{name} is not divided as the others are")
    return share


def _part_of(rules: dict[str, Any], share: Share) -> dict[str, Any]:
    """What this process needs of a layer's rules: inputs of o, and neurons, are divided; all else is everybody's."""
    divided = ("o.threshold", "down.threshold", "ffn.threshold", "ffn.predictor_b", "ffn.predictor_bias")
    return {name: share.part(rule) if name in divided else rule for name, rule in rules.items()}


def _sparsify_layer(state: State, layer: sites.LayerSites, plan: Plan, activation: str, share: Share | None) -> None:
    rules = plan.layer_rules(layer.index)
    if share is not None:
        rules = _part_of(rules, share)
    paths = dict(layer.family.projections)
    for projection in sites.ATTENTION_PROJECTIONS:
        threshold = rules.get(f"{projection}.threshold")
        if threshold is None:
            continue
        linear = layer.linear(projection)
        _lay_columns(state, linear)
        added = share if projection == "o" else None
        sparse = SparseLinear(linear, f"layers.{layer.index}.{projection}", threshold, plan.scope, added)
        _replace(state, layer, paths[projection], linear, sparse)
    if any(name in rules for name in FFN_RULES.values()):
        _sparsify_ffn(state, layer, plan, rules, activation, share)
    # Parts of a fused layer that were re-laid have storage of their own: no second copy stays behind.
    fused.settle(layer.module)


def _sparsify_ffn(
    state: State,
    layer: sites.LayerSites,
    plan: Plan,
    rules: Mapping[str, torch.Tensor],
    activation: str,
    share: Share | None,
) -> None:
    paths = dict(layer.family.projections)
    linears = _ffn_linears(layer)
    for name in ("gate", "up"):
        if f"{name}.threshold" in rules:
            _lay_columns(state, linears[name][1])
    _lay_columns(state, linears["down"][1])
    family, site = layer.family, f"layers.{layer.index}"
    if family.gated:
        ffn = SparseFFN(layer.ffn, linears, site, activation, rules, plan.scope, family.up_activation, share)
        _replace(state, layer, family.ffn, layer.ffn, ffn)
        return
    middle, last = layer.module.get_submodule(family.activation_module), linears["down"][1]
    block = nn.Sequential(layer.ffn, middle, last)
    plain = SparsePlainFFN(block, linears, site, activation, rules, plan.scope)
    state.handles.append(layer.module.register_forward_pre_hook(partial(_note_tokens, plain), with_kwargs=True))
    _replace(state, layer, family.ffn, layer.ffn, plain)
    for path, old, new in ((family.activation_module, middle, nn.Identity()), (paths["down"], last, Passed(last))):
        layer.replace(path, new)
        state.replaced.append((layer, path, old))


def _sparsify_packed_layer(state: State, layer: sites.LayerSites, plan: Plan, activation: str) -> None:
    """Thresholds on packed weights: a column is read at every plane, or not at all."""
    rules, paths = plan.layer_rules(layer.index), dict(layer.family.projections)
    gate = rules.get("ffn.threshold")
    if "ffn.predictor_a" in rules or (gate is not None and not layer.family.gated):
        what = "a predictor" if gate is None else "a gate's threshold on a block without a gate"
        raise PlanError(
            f"plan of method {plan.method} has {what} for layer {layer.index}: its weights are packed, which cannot"
        )
    thresholds = {name: rules[f"{name}.threshold"] for name in paths if f"{name}.threshold" in rules}
    if gate is not None:
        thresholds.setdefault("down", torch.tensor([SKIP_ZEROS]))  # what the gate drops is zero there
    for name, threshold in thresholds.items():
        linear, site = layer.product(name), f"layers.{layer.index}.{name}"
        if bool(linear.center.any()):
            raise PlanError(
                f"{site} was packed for deviations from a center, the plan of method {plan.method} skips by magnitude: "
                "expected weights of pack --bits-read all"
            )
        levels = threshold.expand(len(linear.packed.planes), linear.in_features)
        graded = GradedLinear(linear.packed, site, levels, linear.center, linear.start, plan.scope)
        _replace(state, layer, paths[name], linear, graded)
    if gate is not None:
        family = layer.family
        parts = {name: (paths[name].rpartition(".")[2], layer.product(name)) for name in sites.FFN_PROJECTIONS}
        ffn = PackedFFN(parts, f"layers.{layer.index}", activation, gate, plan.scope, family.up_activation)
        _replace(state, layer, family.ffn, layer.ffn, ffn)


def _grade_layer(state: State, layer: sites.LayerSites, plan: Plan) -> None:
    """Products on weights that are rounded to nested codes here and now; the dense ones are kept for :func:`restore`."""
    for name, path in layer.family.projections:
        site = f"layers.{layer.index}.{name}"
        if f"{site}.level_threshold" in plan.rules:
            linear = layer.product(name)
            _replace(state, layer, path, linear, _graded(linear, site, plan))


def _graded(linear: Any, site: str, plan: Plan) -> GradedLinear:
    threshold = plan.rules[f"{site}.level_threshold"]
    if isinstance(linear, PackedLinear):
        packed, center, start = linear.packed, linear.center, linear.start
        if 2 * len(threshold) != packed.stored:
            raise PlanError(f"{site} stores {packed.stored} bits, the plan's thresholds are for {2 * len(threshold)}")
    elif type(linear) is nn.Linear:
        packed, center = _rounded(linear, 2 * len(threshold)), plan.rules[f"{site}.center"].to(linear.weight.device)
        start = center @ linear.weight.detach().float().T
        start = start if linear.bias is None else start + linear.bias.detach().float()
    else:
        raise ModelError(f"{site} is a {type(linear).__name__}, expected nn.Linear")
    return GradedLinear(packed, site, threshold, center, start, plan.scope)


def _note_tokens(plain: SparsePlainFFN, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    plain.note_tokens(sites.hidden_of(args, kwargs).shape[-2])


def _rounded(linear: nn.Linear, stored: int) -> kernels.Nested:
    """The layer's weight as codes, made once: plans of several budgets share them."""
    key = (stored, linear.weight.data_ptr(), linear.weight._version)
    known = linear.__dict__.get(_ROUNDED)
    if known is None or known[0] != key:
        rounded = round_nearest(linear.weight.detach(), stored)
        known = key, kernels.packed_on(rounded, linear.weight.device)
        linear.__dict__[_ROUNDED] = known
    packed: kernels.Nested = known[1]
    return packed


def _part(state: State, layer: sites.LayerSites, mapped: MappedWeights, host: HostWeights, *, chosen: bool) -> None:
    """Take a layer's mapped feed-forward weights into the host's memory where neurons are ``chosen``, else onto the card."""
    for name, (_, linear) in _ffn_linears(layer).items():
        old: Any = linear.weight
        data = old.detach()
        new = host.take_in(data, columns=name == "down") if chosen else data.to(host.card)
        state.moved.append((linear, old))
        linear.weight = nn.Parameter(new, requires_grad=False)
        mapped.releaser([old])()


def _choose_by_prompt(
    state: State, layer: sites.LayerSites, prompts: Prompts, activation: str, mapped: MappedWeights | None
) -> None:
    linears = _ffn_linears(layer)
    if mapped is None:
        # Weights that are mapped from a file stay as they lie there: decoding runs on copies of the chosen ones.
        _lay_columns(state, linears["down"][1])
    ffn = PromptFFN(layer.ffn, linears, layer.index, activation, prompts, layer.family.up_activation)
    ffn.host = state.host
    if mapped is not None and ffn.host is None:
        ffn.release = mapped.releaser([linear.weight for _, linear in linears.values()])
    _replace(state, layer, layer.family.ffn, layer.ffn, ffn)


def _ffn_linears(layer: sites.LayerSites) -> dict[str, tuple[str, nn.Linear]]:
    """Path, relative to the feed-forward block, and layer of its projections."""
    prefix = f"{layer.family.ffn}."
    paths = dict(layer.family.projections)
    return {
        name: (paths[name].removeprefix(prefix), layer.linear(name)) for name in sites.FFN_PROJECTIONS if name in paths
    }


def _lay_columns(state: State, linear: nn.Linear) -> None:
    if not is_columns(local(linear.weight)):
        lay_columns(linear)
        state.relaid.append(linear)


def _replace(state: State, layer: sites.LayerSites, path: str, old: nn.Module, new: SparseModule) -> None:
    new.train(old.training)
    layer.replace(path, new)
    state.replaced.append((layer, path, old))
    state.modules.append(new)

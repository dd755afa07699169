"""What the native decode step is told of a Hugging Face model, and why some models cannot be told.

Everything is read from the model's own modules and configuration; which module is which, its family says
(:class:`actsparse.models.families.Step`).

Shape letters: L cache length, D head dimension, R channels of a head that are rotated, Q query and K key/value heads.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from actsparse import kernels
from actsparse.kernels.parallel import share_of
from actsparse.models import sites
from actsparse.models.families import Step
from actsparse.models.sites import LayerSites, ModelError
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.layers import Passed, SparseFFN, SparseLinear, SparsePlainFFN
from actsparse.runtime.packed import PackedLinear
from actsparse.runtime.packed_ffn import PackedFFN

PACKED = (GradedLinear, PackedLinear)
_WINDOWS = {"full_attention": False, "attention": False, "sliding_attention": True}


def step_of(model: Any) -> Step:
    """How the model's family tells its layers; ModelError for one that has no native decode step."""
    step = sites.family_of(model).step
    if step is None:
        raise ModelError(f"family {model.config.model_type} has no native decode step")
    return step


def obstacle_of(model: Any, cuda: bool) -> str | None:
    """What of the model's layers the native decode step (that of CUDA, if ``cuda``) cannot express, in words."""
    try:
        step = step_of(model)
        sites.activation_of(model)
        windows_of(model)
    except ModelError as error:
        return str(error)
    if share_of(getattr(sites.layers_of(model)[0].product("q"), "weight", None)) is not None:
        return "its weights are divided among processes"
    config, decoder = model.config, model.get_decoder()
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention is bidirectional"
    if getattr(config, "attn_logit_softcapping", None) and not step.attention_cap:
        return "its configuration caps attention scores, which its family does not"
    if _rope_types(config) & {"dynamic"}:
        return "rope type dynamic changes with the length of the text"
    if getattr(decoder, "project_in", None) is not None:
        return "its embedding has another width than its layers"
    scales = {layer.attention.scaling for layer in sites.layers_of(model)}
    if len(scales) > 1:
        return "its layers scale attention differently"
    if not getattr(sites.layers_of(model)[0].module, "do_layer_norm_before", True):
        return "its norms stand after the sums"
    return _foreign_module(model, step) or _misread_heads(model) or (_cuda_obstacle(model, step) if cuda else None)


def longest_of(model: Any) -> tuple[int, str] | None:
    """The most positions that a decode step's tables can hold, and why; None for any number."""
    config = model.config
    if "longrope" in _rope_types(config):
        original = config.rope_parameters.get("original_max_position_embeddings")
        return original or config.original_max_position_embeddings, "rope type longrope changes there"
    positions = step_of(model).positions
    if positions:
        embedding = getattr(model.get_decoder(), positions)
        return embedding.num_embeddings - embedding.offset, "its learned positions end there"
    return None


def decoder_for(backend: Any, model: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
    """The backend's decoder for ``model``, which :func:`obstacle_of` had nothing against; caches are [layers, K, L, D]."""
    step, layers, config = step_of(model), sites.layers_of(model), model.config
    decoder, embedding = model.get_decoder(), model.get_input_embeddings()
    heads, kv_heads, head_dim = sites.heads_of(config)
    length = keys.shape[2]
    ropes: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}
    windows = windows_of(model)
    natives, told = [], []
    for layer in layers:
        told.append(_ropes_of(decoder, layer, config, length, ropes) | {"window": windows[layer.index]})
        more = told[-1] if backend is kernels else {}
        natives.append(_layer(backend, layer, model, step, keys[layer.index], values[layer.index], more))
    attention: Any = layers[0].attention
    options: dict[str, Any]
    if backend is kernels:
        # Older releases of transformers let sdpa, which knows no caps, compute Gemma 2: the step gives what the modules give.
        capped = step.attention_cap and getattr(config, "_attn_implementation", None) != "sdpa"
        cap = getattr(config, "attn_logit_softcapping", None) if capped else None
        options = {
            "embedding_scale": _embedding_scale(embedding, config),
            "residual_scale": float(getattr(config, "residual_multiplier", 1.0)),
            "logit_scale": 1 / float(getattr(config, "logits_scaling", 1.0)),
            "attention_cap": float(cap or 0.0),
            "logit_cap": float(getattr(config, "final_logit_softcapping", None) or 0.0),
            "query_scale": _query_scale(config, length),
        }
        if step.positions:
            positions = getattr(decoder, step.positions)
            options["positions"] = backend.matrix_of(positions.weight.detach()[positions.offset :])
    else:
        options = told[0]
    return backend.decoder_of(
        natives,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        embedding=backend.matrix_of(embedding.weight.detach()),
        lm_head=_matrix(backend, model.get_output_embeddings()),
        final_norm=_norm(backend, getattr(decoder, step.final_norm), step),
        attention_scale=attention.scaling,
        **options,
    )


def windows_of(model: Any) -> list[int]:
    """Sliding window of every layer in positions, 0 for none; ModelError where the configuration does not say it clearly."""
    config = model.config
    count = len(model.get_decoder().layers)
    window = getattr(config, "sliding_window", None) or 0
    kinds = list(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count)
    unknown = sorted(set(kinds) - set(_WINDOWS))
    if unknown or len(kinds) != count:
        raise ModelError(f"its layers have attention of kind {unknown or len(kinds)}, expected {', '.join(_WINDOWS)}")
    found = [window if _WINDOWS[kind] else 0 for kind in kinds]
    # transformers' own reading of the same configuration.
    cached = [layer.sliding_window if layer.is_sliding else 0 for layer in DynamicCache(config=config).layers]
    if cached and cached != found:
        raise ModelError("its layers have a sliding window that its configuration does not show as expected")
    return found


def rope_tables(rotary: Any, length: int, *kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [length, R / 2], from the model's own rotary module (any fixed scaling included).

    ``kind``: that of the layer's attention, for a module with frequencies for each.
    """
    device = next(rotary.buffers()).device
    positions = torch.arange(length, device=device)[None]
    tables = rotary(torch.empty(1, dtype=torch.float32, device=device), positions, *kind)
    cosine, sine = (table[0, :, : table.shape[-1] // 2].contiguous() for table in tables)
    return cosine, sine


def _ropes_of(
    decoder: Any, layer: LayerSites, config: Any, length: int, known: dict[str | None, Any]
) -> dict[str, torch.Tensor | None]:
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None or not getattr(layer.attention, "use_rope", True):
        return {"cosine": None, "sine": None}
    kind = config.layer_types[layer.index] if _has_kinds(rotary) else None
    if kind not in known:
        known[kind] = rope_tables(rotary, length, *([] if kind is None else [kind]))
    return dict(zip(("cosine", "sine"), known[kind], strict=True))


def _has_kinds(rotary: Any) -> bool:
    """Whether a rotary module has frequencies for each kind of attention."""
    return "layer_type" in inspect.signature(type(rotary).forward).parameters


def _rope_types(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    each = parameters.values() if any(isinstance(one, dict) for one in parameters.values()) else [parameters]
    return {one.get("rope_type", "default") for one in each if isinstance(one, dict)}


def _embedding_scale(embedding: Any, config: Any) -> float:
    scale = getattr(embedding, "embed_scale", None)
    if scale is not None:
        return float(torch.as_tensor(scale).to(embedding.weight.dtype))  # rounded as the module rounds it
    return float(getattr(config, "embedding_multiplier", 1.0))


def _query_scale(config: Any, length: int) -> torch.Tensor | None:
    """Ministral 3 scales queries by their position, float32 [L]."""
    parameters = getattr(config, "rope_parameters", None) or {}
    beta = parameters.get("llama_4_scaling_beta")
    if not beta:
        return None
    floor = torch.floor(torch.arange(length) / parameters["original_max_position_embeddings"])
    return 1 + beta * torch.log1p(floor)


def _misread_heads(model: Any) -> str | None:
    """How the projections' shapes contradict the heads that the configuration shows, in words."""
    heads, kv_heads, head_dim = sites.heads_of(model.config)
    for layer in sites.layers_of(model):
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            rows = layer.product(name).out_features
            if rows != count * head_dim:
                return f"layer {layer.index} {name} has {rows} rows, expected {count} heads of {head_dim}"
    return None


def _layer(
    backend: Any,
    layer: LayerSites,
    model: Any,
    step: Step,
    keys: torch.Tensor,
    values: torch.Tensor,
    more: dict[str, Any],
) -> Any:
    attention: dict[str, Any] = {name: layer.product(name) for name in sites.ATTENTION_PROJECTIONS}
    thresholds: dict[str, Any] = {
        f"{name}_threshold": module.threshold if isinstance(module, SparseLinear) and module.scope != "none" else None
        for name, module in attention.items()
    }
    norms = {
        name: _norm(backend, _optional(layer.module, getattr(step, name)), step)
        for name in ("input_norm", "post_norm", "attention_out_norm", "ffn_out_norm", "q_norm", "k_norm")
    }
    if backend is kernels:
        parallel = bool(getattr(layer.module, "use_parallel_residual", False))
        more = more | {"heads_norm": _heads_norm(layer, model, step), "parallel": parallel}
    else:
        norms = {name: norm for name, norm in norms.items() if norm is not None}
    return backend.layer_of(
        ffn=_ffn(backend, layer, model),
        k_cache=keys,
        v_cache=values,
        **norms,
        **{name: _matrix(backend, linear, thresholds[f"{name}_threshold"]) for name, linear in attention.items()},
        **thresholds,
        **more,
    )


def _ffn(backend: Any, layer: LayerSites, model: Any) -> Any:
    names = [name for name in sites.FFN_PROJECTIONS if layer.family.gated or name != "gate"]
    ffn = layer.ffn
    if isinstance(ffn, SparseFFN):
        rules = ffn.rules()
        block: list[Any] = [layer.weight(name).detach() for name in names]
    else:
        plain = kernels.Rules(sites.activation_of(model), layer.family.up_activation)
        rules = ffn.rules() if isinstance(ffn, PackedFFN) else plain
        block = [_matrix(backend, layer.product(name)) for name in names]
    return backend.ffn_of(*([] if layer.family.gated else [None]), *block, rules)


def _matrix(backend: Any, linear: Any, threshold: torch.Tensor | None = None) -> Any:
    if isinstance(linear, PACKED):
        return linear.matrix()
    # Detached, because re-laying a weight gives the parameter new storage: an alias keeps the one pointed at alive.
    if backend is not kernels:
        return backend.matrix_of(linear.weight.detach(), linear.bias)
    return kernels.matrix_of(linear.weight.detach(), linear.bias, prefer=kernels.cpu.skipped_by(threshold))


def _norm(backend: Any, module: Any, step: Step) -> Any:
    if module is None:
        return None
    if isinstance(module, nn.LayerNorm):
        return backend.norm_of(module.weight, eps=module.eps, kind="layer", bias=module.bias)
    each = getattr(module, "norms", None)  # StableLM: a LayerNorm for each head
    if each is not None:
        weight = torch.stack([norm.weight.detach() for norm in each])
        return backend.norm_of(weight, eps=each[0].eps, kind="layer")
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    weight = module.weight.detach()
    return backend.norm_of(weight.float() + step.norm_shift if step.norm_shift else weight, eps=eps)


def _heads_norm(layer: LayerSites, model: Any, step: Step) -> str:
    module = _optional(layer.module, step.q_norm)
    if module is None:
        return "alike"
    if hasattr(module, "norms"):
        return "each"
    head_dim = sites.heads_of(model.config)[2]
    return "alike" if module.weight.numel() == head_dim else "all"


def _optional(root: nn.Module, path: str) -> Any:
    """The module at ``path``; None where there is none, or no path."""
    found: Any = root if path else None
    for part in path.split(".") if path else []:
        found = getattr(found, part, None)
    return found


def _foreign_module(model: Any, step: Step) -> str | None:
    """What a layer has that is not known, or has in place of a plain or sparse one (a quantised one, an adapter), in words."""
    for layer in sites.layers_of(model):
        family = layer.family
        known = {*(path for _, path in family.projections), *step.norms}
        for name, _ in layer.module.named_parameters():
            owner = name.rpartition(".")[0]
            if owner not in known and owner.partition(".norms.")[0] not in known:
                return f"layer {layer.index} has a parameter {name}, which the native decode step does not know"
        sparse_ffn = isinstance(layer.ffn, SparseFFN)
        for name, _ in family.projections:
            module = layer.product(name)
            if isinstance(module, SparsePlainFFN | Passed) and sparse_ffn and name in sites.FFN_PROJECTIONS:
                continue
            if type(module) is not nn.Linear and not isinstance(module, (SparseLinear, *PACKED)):
                return f"layer {layer.index} {name} is a {type(module).__name__}, expected nn.Linear"
            if isinstance(module, SparseLinear) and name in sites.FFN_PROJECTIONS and not sparse_ffn:
                return f"layer {layer.index} {name} is sparsified outside its feed-forward block"
    head = model.get_output_embeddings()
    return (
        None
        if type(head) is nn.Linear or isinstance(head, PACKED)
        else f"the output head is a {type(head).__name__}, expected nn.Linear"
    )


def _cuda_obstacle(model: Any, step: Step) -> str | None:
    """What the CUDA step cannot express or read, in words."""
    layers, decoder = sites.layers_of(model), model.get_decoder()
    missing = cuda_lacks(step)
    if missing:
        return f"the CUDA decode step has no {missing}"
    if len(set(windows_of(model))) > 1:
        return "the CUDA decode step has no layers that mix sliding and full attention"
    rotary, (_, _, head_dim) = decoder.rotary_emb, sites.heads_of(model.config)
    if _has_kinds(rotary) or 2 * rotary.inv_freq.numel() != head_dim:
        return "the CUDA decode step has no rotary embedding of part of the head, or of several kinds"
    if not all(getattr(layer.attention, "use_rope", True) for layer in layers):
        return "the CUDA decode step has no layers without rotary embedding"
    scales = [_embedding_scale(model.get_input_embeddings(), model.config)]
    scales += [getattr(model.config, name, 1.0) for name in ("residual_multiplier", "logits_scaling")]
    if any(not math.isclose(scale, 1.0) for scale in scales) or _query_scale(model.config, 1) is not None:
        return "the CUDA decode step has no multipliers"
    if getattr(model.config, "final_logit_softcapping", None):
        return "the CUDA decode step has no caps"
    products = [layer.product(name) for layer in layers for name, _ in layer.family.projections]
    products += [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = (product.weight for product in products if not isinstance(product, PACKED))
    obstacle = kernels.cuda.decoder.decoder_obstacle(head_dim, *weights)
    if obstacle:
        return str(obstacle)
    for product in products:
        if isinstance(product, PACKED) and (obstacle := kernels.cuda.graded.obstacle_of(product.packed)):
            return str(obstacle)
    plain = ""
    for layer in layers:
        packed = [isinstance(layer.product(name), PACKED) for name, _ in layer.family.projections]
        if any(packed):
            if plain:
                return f"layer {layer.index} is packed and {plain} is not, which the CUDA decode step does not take"
            if isinstance(layer.ffn, PackedFFN):
                return (
                    f"layer {layer.index} has a gate's threshold on packed weights, which the CUDA decode step has not"
                )
            if not all(packed):
                return f"layer {layer.index} has packed and plain matrices, the CUDA decode step takes one kind"
            continue
        plain = f"layer {layer.index} before it"
        gate, up, down = (layer.weight(name) for name in sites.FFN_PROJECTIONS)
        rules = layer.ffn.rules() if isinstance(layer.ffn, SparseFFN) else kernels.Rules(sites.activation_of(model))
        # A row of q's inputs, because feed-forward weights may be in the host's memory.
        obstacle = kernels.cuda.ffn_obstacle(layer.weight("q")[:1], gate, up, down, rules)
        if obstacle:
            return f"layer {layer.index}: {obstacle}"
    if plain and isinstance(model.get_output_embeddings(), PACKED):
        return f"the head is packed and {plain} is not, which the CUDA decode step does not take"
    return None


def cuda_lacks(step: Step) -> str:
    """What a family's step has that the CUDA decode step lacks, in words; empty for nothing."""
    has = {
        "norms with shifted weights": step.norm_shift != 0,
        "norms of what blocks give": bool(step.attention_out_norm or step.ffn_out_norm),
        "blocks without a norm before them": not (step.input_norm and step.post_norm),
        "caps": step.attention_cap,
        "learned positions": bool(step.positions),
        "LayerNorm": step.layer_norms,
        "multipliers": step.multipliers,
        "layers with windows or rotary embeddings of their own": step.layers_differ,
    }
    return next((what for what, there in has.items() if there), "")

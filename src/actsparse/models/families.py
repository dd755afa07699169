"""The families of models that the package knows: one entry each, and nothing else knows their modules' names.

``docs/families.md`` adds one step by step.  A model of another family is taken for what it looks like (:func:`by_structure`)
where its layers are shaped like Llama's, and decodes through its own modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

ATTENTION_PROJECTIONS = ("q", "k", "v", "o")
FFN_PROJECTIONS = ("gate", "up", "down")


class ModelError(ValueError):
    """A model that this package cannot work on."""


@dataclass(frozen=True)
class Step:
    """What the native decode step must be told of a family's layers, beyond their projections.

    Paths are relative to the layer (``final_norm`` and ``positions``: to the decoder); a module that is None or not there is no
    norm.  Multipliers (of the embedding, of what blocks give, of logits), sliding windows, rotary embeddings of part of
    the head or of some layers, and the cap of the logits are read from the model itself.

    Attributes:
        input_norm: before the attention.
        post_norm: before the feed-forward block.
        attention_out_norm, ffn_out_norm: of what either gives, before it is added.
        q_norm, k_norm: of q and k: of each head, of each with its own weights, or of all heads at once.
        norm_shift: what RMSNorm adds to its weights.
        attention_cap: whether ``attn_logit_softcapping`` of the configuration is applied.
        positions: learned positions, an embedding with an ``offset``.
        layer_norms: whether norms are LayerNorm.
        multipliers: whether embeddings, what blocks give, queries or logits are multiplied.
        layers_differ: whether windows or rotary embeddings differ between layers, or leave out part of the head.
    """

    input_norm: str = "input_layernorm"
    post_norm: str = "post_attention_layernorm"
    attention_out_norm: str = ""
    ffn_out_norm: str = ""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    final_norm: str = "norm"
    norm_shift: float = 0.0
    attention_cap: bool = False
    positions: str = ""
    layer_norms: bool = False
    multipliers: bool = False
    layers_differ: bool = False

    @property
    def norms(self) -> tuple[str, ...]:
        """The paths of the layer's norms."""
        paths = (self.input_norm, self.post_norm, self.attention_out_norm, self.ffn_out_norm, self.q_norm, self.k_norm)
        return tuple(path for path in paths if path)


@dataclass(frozen=True)
class Family:
    """How one model family lays out a decoder layer (attribute paths relative to the layer).

    A plain family (``gated`` False) may keep its two projections and its activation in the layer itself; ``ffn`` is then
    its first projection, where the block begins.

    Attributes:
        example: a public checkpoint.
        notes: what a user should know.
        attention, ffn: the blocks.
        projections: the linear layer behind each of ``q k v o gate up down``.  A part of a fused layer is the fused layer's
            path and the part's name.
        fused: layers whose rows are several projections, in order.
        activation_module: the module that applies the activation.
        gated: whether the block has a gate.
        up_activation: what the block applies to W_up x.
        step: how the native decode step reads the layers; None: it does not, and tokens go through the modules.
    """

    example: str = ""
    notes: str = ""
    attention: str = "self_attn"
    ffn: str = "mlp"
    projections: tuple[tuple[str, str], ...] = (
        ("q", "self_attn.q_proj"),
        ("k", "self_attn.k_proj"),
        ("v", "self_attn.v_proj"),
        ("o", "self_attn.o_proj"),
        ("gate", "mlp.gate_proj"),
        ("up", "mlp.up_proj"),
        ("down", "mlp.down_proj"),
    )
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    activation_module: str = "mlp.act_fn"
    gated: bool = True
    up_activation: str = "identity"
    step: Step | None = Step()

    @property
    def has_ffn(self) -> bool:
        """Whether the feed-forward block's projections are linear layers: those of experts are not."""
        return any(name == "up" for name, _ in self.projections)

    def stored(self, projection: str) -> str:
        """The path of the layer that stores ``projection`` in a checkpoint: a fused one, or its own."""
        path = dict(self.projections)[projection]
        parent = path.rpartition(".")[0]
        return parent if parent in self.fused else path


_LLAMA = Family()
_GEMMA_NORMS = Step(
    post_norm="pre_feedforward_layernorm",
    attention_out_norm="post_attention_layernorm",
    ffn_out_norm="post_feedforward_layernorm",
    norm_shift=1.0,
)
# Experts are one stacked tensor a layer, which no linear layer reads: the attention alone is sparsified.
_EXPERTS = Family(
    projections=_LLAMA.projections[:4],
    gated=False,
    step=None,
    notes="attention only (teal, wina): experts are stacked tensors, not linear layers",
)

FAMILIES: dict[str, Family] = {
    "llama": Family(example="meta-llama/Llama-3.2-1B", notes="ReLU variants (ProSparse) too"),
    "mistral": Family(example="mistralai/Mistral-7B-v0.3"),
    "ministral": Family(example="mistralai/Ministral-8B-Instruct-2410", step=Step(layers_differ=True)),
    "ministral3": Family(
        example="mistralai/Ministral-3-3B-Instruct-2512", notes="the text model", step=Step(multipliers=True)
    ),
    "qwen2": Family(example="Qwen/Qwen2.5-1.5B"),
    "qwen3": Family(example="Qwen/Qwen3-1.7B"),
    "gemma": Family(example="google/gemma-2b", step=Step(norm_shift=1.0)),
    "gemma2": Family(example="google/gemma-2-2b", step=replace(_GEMMA_NORMS, attention_cap=True)),
    "gemma3_text": Family(example="google/gemma-3-1b-it", step=_GEMMA_NORMS),
    "phi3": Family(
        example="microsoft/Phi-4-mini-instruct",
        notes="Phi-3 and Phi-4; qkv and gate_up split in place; longrope natively up to its original context",
        projections=(
            ("q", "self_attn.qkv_proj.q"),
            ("k", "self_attn.qkv_proj.k"),
            ("v", "self_attn.qkv_proj.v"),
            ("o", "self_attn.o_proj"),
            ("gate", "mlp.gate_up_proj.gate"),
            ("up", "mlp.gate_up_proj.up"),
            ("down", "mlp.down_proj"),
        ),
        fused={"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
        activation_module="mlp.activation_fn",
    ),
    "smollm3": Family(example="HuggingFaceTB/SmolLM3-3B", step=Step(layers_differ=True)),
    "olmo2": Family(
        example="allenai/OLMo-2-0425-1B",
        step=Step(
            input_norm="",
            post_norm="",
            attention_out_norm="post_attention_layernorm",
            ffn_out_norm="post_feedforward_layernorm",
        ),
    ),
    "granite": Family(example="ibm-granite/granite-3.3-2b-instruct", step=Step(multipliers=True)),
    "stablelm": Family(
        example="stabilityai/stablelm-2-1_6b",
        step=Step(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm", layer_norms=True, layers_differ=True),
    ),
    # TurboSparse-Mistral and Bamboo: Mistral with ReLU on gate and up. Their configurations say so by this name alone.
    "bamboo": Family(example="PowerInfer/Bamboo-base-v0_1", notes="dReLU; needs its own code", up_activation="relu"),
    "opt": Family(
        example="facebook/opt-1.3b",
        notes="norms after the blocks (opt-350m): through the modules",
        ffn="fc1",
        projections=(
            ("q", "self_attn.q_proj"),
            ("k", "self_attn.k_proj"),
            ("v", "self_attn.v_proj"),
            ("o", "self_attn.out_proj"),
            ("up", "fc1"),
            ("down", "fc2"),
        ),
        activation_module="activation_fn",
        gated=False,
        step=Step(
            input_norm="self_attn_layer_norm",
            post_norm="final_layer_norm",
            final_norm="final_layer_norm",
            positions="embed_positions",
            layer_norms=True,
        ),
    ),
    "mixtral": replace(_EXPERTS, example="mistralai/Mixtral-8x7B-v0.1"),
    "qwen3_moe": replace(_EXPERTS, example="Qwen/Qwen3-30B-A3B"),
}

_FOUND = "actsparse_family"


def by_structure(model: Any) -> Family:
    """The family of a model that :data:`FAMILIES` does not name, if its layers are shaped like Llama's.

    Every layer must have Llama's seven linear layers, by name and of one shape, and its block must compute
    down(act(gate x) * up x), which is tried on random inputs.  How norms and positions enter is not looked at: nothing of it is
    replaced, and tokens go through the modules.

    Raises:
        ModelError: it is not; the line names the first module that is not understood.
    """
    known = getattr(model, _FOUND, None)
    if known is not None:
        return known
    name = model.config.model_type
    family = replace(_LLAMA, step=None)
    head = f"model family {name!r} is not supported"
    tail = f"expected a family shaped like Llama, or one of {', '.join(sorted(FAMILIES))}"
    try:
        layers = list(model.get_decoder().layers)
    except (AttributeError, NotImplementedError, TypeError):
        raise ModelError(f"{head}: its decoder has no list of layers; {tail}") from None
    shapes: dict[str, torch.Size] = {}
    for index, layer in enumerate(layers):
        for projection, path in family.projections:
            module = _submodule(layer, path)
            if not isinstance(module, nn.Linear):
                parent = _submodule(layer, path.rpartition(".")[0])
                where = "is missing" if parent is None else f"is {_kind(module)} in a {type(parent).__name__}"
                raise ModelError(f"{head}: layer {index} {path} {where}, not nn.Linear; {tail}")
            if shapes.setdefault(projection, module.weight.shape) != module.weight.shape:
                given, first = list(module.weight.shape), list(shapes[projection])
                raise ModelError(f"{head}: layer {index} {path} is {given}, layer 0's {first}; {tail}")
        if _submodule(layer, family.activation_module) is None:
            raise ModelError(f"{head}: layer {index} {family.activation_module} is missing; {tail}")
        if not _computes_gated(layer.get_submodule(family.ffn)):
            kind = type(layer.get_submodule(family.ffn)).__name__
            raise ModelError(f"{head}: layer {index} mlp, a {kind}, is not down(act(gate x) * up x); {tail}")
    if not layers:
        raise ModelError(f"{head}: it has no layers; {tail}")
    setattr(model, _FOUND, family)
    return family


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def _kind(module: nn.Module | None) -> str:
    return "missing" if module is None else f"a {type(module).__name__}"


def _computes_gated(block: Any) -> bool:
    """Whether a block with the right names also does what they say; on the meta device, where nothing is computed, yes."""
    weight = block.up_proj.weight
    if weight.is_meta:
        return True
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            got = block(x)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        want = block.down_proj(block.act_fn(block.gate_proj(x)) * block.up_proj(x))
    if not isinstance(got, torch.Tensor) or got.shape != want.shape:
        return False
    # A few roundings of the type apart at most.
    allowed = 16 * torch.finfo(weight.dtype).eps
    return float((got - want).float().norm()) <= allowed * float(want.float().norm())

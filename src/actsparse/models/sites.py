"""The sites of a model: its decoder layers by the package's names, whatever its family (:mod:`.families`) calls them.

A *projection* is one of ``q k v o gate up down``.  A *tap* is a place where calibration reads activations:

=================  ======================================  ==========
tap                value                                   shape
=================  ======================================  ==========
``attention_in``   input of q, k and v                     [T, H]
``o_in``           input of o                              [T, O]
``ffn_in``         input of gate and up                    [T, H]
``gate``           g = act(W_gate x)                       [T, N]
``up``             u = W_up x                              [T, N]
``value``          g * u, the input of down                [T, N]
=================  ======================================  ==========

In a dReLU block (ReLU on gate and on up) u is the value after its ReLU.  A plain block (OPT) has no gate projection:
g = act(W_up x), and u is 1 for every neuron.

Shape letters: T tokens, H hidden, N neurons, O attention output features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actsparse.models import fused
from actsparse.models.families import ATTENTION_PROJECTIONS, FAMILIES, FFN_PROJECTIONS, Family, ModelError, by_structure

__all__ = ["ATTENTION_PROJECTIONS", "FAMILIES", "FFN_PROJECTIONS", "Family", "ModelError"]

_FINGERPRINT = "actsparse_fingerprint"
TAPS = ("attention_in", "o_in", "ffn_in", "gate", "up", "value")

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class LayerSites:
    """One decoder layer of a model: its modules by the package's names.

    ``rows`` gives the rows of the projections that a fused layer holds; it stands as its parts whenever one is asked for.
    """

    index: int
    module: nn.Module
    family: Family
    rows: Mapping[str, int]

    def linear(self, projection: str) -> nn.Linear:
        """The nn.Linear behind ``projection``."""
        module = self.product(projection)
        if hasattr(module, "base_layer"):  # PEFT's
            raise ModelError(
                f"layer {self.index} {projection} carries an adapter, expected nn.Linear: merge it, or take a plan that "
                "leaves attention alone"
            )
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"layer {self.index} {projection} is a {type(module).__name__}, expected nn.Linear "
                "(a quantised or already sparsified model?)"
            )
        return module

    def product(self, projection: str) -> Any:
        """The module behind ``projection``, of a dense or a sparsified model, or a stand-in with its sizes and weight."""
        self.split()
        return self.module.get_submodule(dict(self.family.projections)[projection])

    def split(self) -> None:
        """Let fused layers stand as their parts (:mod:`.fused`)."""
        if self.family.fused:
            fused.split(self.module, self.family, self.rows)

    def weight(self, projection: str) -> torch.Tensor:
        """The weight of ``projection``, of a dense or a sparsified model."""
        weight = self.product(projection).weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def ffn(self) -> nn.Module:
        """The feed-forward module."""
        return self.module.get_submodule(self.family.ffn)

    @property
    def attention(self) -> nn.Module:
        """The attention module."""
        return self.module.get_submodule(self.family.attention)

    def replace(self, path: str, module: nn.Module) -> None:
        """Put ``module`` at attribute ``path`` of the layer."""
        self.split()
        self.module.set_submodule(path, module)

    def tap(self, name: str, observe: Callable[[torch.Tensor], None]) -> Any:
        """Call ``observe`` with the values of tap ``name`` at every forward; returns the hook's handle."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observe(hidden_of(args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            observe(output)

        def after_relu(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            observe(torch.relu(output))

        def ones(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            observe(torch.ones_like(output))

        if name in ("ffn_in", "gate", "up", "value") and not self.family.has_ffn:
            raise ModelError(f"layer {self.index} has no feed-forward projections: {self.family.notes}")
        if self.family.up_activation != "identity" and name in ("gate", "up"):
            # dReLU: one activation module serves both projections, so its calls cannot be told apart.
            return self.linear(name).register_forward_hook(after_relu)
        if name == "gate":
            return self.module.get_submodule(self.family.activation_module).register_forward_hook(after)
        if name == "up":
            return self.linear("up").register_forward_hook(after if self.family.gated else ones)
        module = {
            "attention_in": lambda: self.linear("q"),
            "o_in": lambda: self.linear("o"),
            "ffn_in": lambda: self.ffn,
            "value": lambda: self.linear("down"),
        }[name]()
        return module.register_forward_pre_hook(before, with_kwargs=True)


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The activations [..., T, H] that a module was called with, whatever the argument's name.

    Raises:
        ModelError: neither the first argument nor exactly one named one is a floating-point tensor of 2 or 3 dimensions.
    """
    given = list(args[:1]) or list(kwargs.values())
    found = [x for x in given if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() in (2, 3)]
    if len(found) != 1:
        raise ModelError(f"a module was called with {len(found)} tensors of activations, expected one")
    return found[0]


def family_of(model: Any) -> Family:
    """The family of ``model``, by its configuration's name or by its structure; ModelError for one that is neither known nor
    shaped like a known one."""
    name = getattr(getattr(model, "config", None), "model_type", None)
    return FAMILIES[name] if name in FAMILIES else by_structure(model)


def layers_of(model: Any) -> list[LayerSites]:
    """The decoder layers of ``model``, first to last; fused layers stand as their parts from now on (:mod:`.fused`)."""
    family = family_of(model)
    rows = rows_of(model.config) if family.fused else {}
    layers = [LayerSites(index, layer, family, rows) for index, layer in enumerate(model.get_decoder().layers)]
    for layer in layers:
        layer.split()
    return layers


def heads_of(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads, head dimension."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def rows_of(config: Any) -> dict[str, int]:
    """The rows of the projections that families keep in fused layers."""
    heads, kv_heads, head_dim = heads_of(config)
    neurons = config.intermediate_size
    return {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "gate": neurons, "up": neurons}


def activation_of(model: Any) -> str:
    """The FFN's activation as the kernels name it; ModelError for one they do not know."""
    config = model.config
    names = (getattr(config, key, None) for key in ("hidden_activation", "hidden_act", "activation_function"))
    name = next((name for name in names if name), None)
    if name not in _ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not supported: expected one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def describe(model: Any) -> dict[str, Any]:
    """The fields of a plan's ModelIdentity: family, shapes, activation and a fingerprint of the weights.

    The activation of a block with ReLU on gate and up is ``drelu``.
    """
    family = family_of(model)
    config = model.config
    activation = activation_of(model)
    if family.up_activation != "identity":
        if (activation, family.up_activation) != ("relu", "relu"):
            raise ModelError(f"activation is {activation!r}, expected 'relu' for the family {config.model_type!r}")
        activation = "drelu"
    heads, kv_heads, head_dim = heads_of(config)
    return {
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "neurons": config.ffn_dim if hasattr(config, "ffn_dim") else config.intermediate_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "activation": activation,
        "fingerprint": fingerprint(model),
    }


def set_fingerprint(model: Any, value: str) -> None:
    """Let ``model`` go by the fingerprint of the weights that its own were made from."""
    setattr(model, _FINGERPRINT, value)


def fingerprint(model: Any) -> str:
    """SHA-256 over the first 64 values of a few rows of every projection, rounded to bfloat16.

    Rounding makes it independent of whether the checkpoint was loaded in float32 or bfloat16.
    """
    known = getattr(model, _FINGERPRINT, None)
    if known is not None:
        return str(known)
    digest = hashlib.sha256()
    for layer in layers_of(model):
        for projection, _ in layer.family.projections:
            weight = layer.weight(projection)
            # Of a weight that is divided among processes, everybody gathers the whole.
            weight = getattr(weight, "full_tensor", lambda weight=weight: weight)()
            rows = torch.linspace(0, weight.shape[0] - 1, 4, device="cpu").long()
            sample = weight.detach()[rows.to(weight.device), :64].to("cpu", torch.bfloat16).contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

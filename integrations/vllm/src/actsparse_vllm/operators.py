"""The operator that every linear layer of a served model calls: what it does lies outside the compiled graph.

vLLM keeps compiled graphs on disk under a key that knows neither the plan nor ``--hf-overrides``.  The graph of a model must
therefore be the same under every plan, and under none of its rules.  So each linear layer calls one opaque operator with a
*handle*, an integer in a tensor that is an input of the graph, and the handle finds the layer's :class:`Product`.
"""

from __future__ import annotations

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn


class Product(Protocol):
    """What a layer multiplies: x [T, I] and a bias [O] or None to y [T, O]."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor: ...


_products: WeakValueDictionary[int, Product] = WeakValueDictionary()
_numbers = itertools.count()


def attach(layer: nn.Module, out: int) -> None:
    """Give ``layer`` a handle, and remember how many outputs its product has."""
    layer.register_buffer("actsparse_handle", torch.tensor(next(_numbers), device="cpu"), persistent=False)
    layer.actsparse_out = out


def set_product(layer: nn.Module, product: Product) -> None:
    """Let the layer's handle find ``product``, which lives as long as the layer."""
    layer.actsparse_product = product
    _products[int(layer.actsparse_handle)] = product


def call(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's product with x, through the operator."""
    return torch.ops.actsparse_vllm.product(x, layer.actsparse_handle, bias, layer.actsparse_out)


def _product(x: Tensor, handle: Tensor, bias: Tensor | None, out: int) -> Tensor:
    return _products[handle.item()](x, bias)  # type: ignore[index]


def _product_fake(x: Tensor, handle: Tensor, bias: Tensor | None, out: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


# As in actsparse.kernels: the custom_op decorator's wrappers cost 20 us a call.
_library = torch.library.Library("actsparse_vllm", "DEF")
_library.define("product(Tensor x, Tensor handle, Tensor? bias, SymInt out) -> Tensor")
for _key in ("CPU", "CUDA"):
    _library.impl("product", _product, _key)
torch.library.register_fake("actsparse_vllm::product", _product_fake, lib=_library)

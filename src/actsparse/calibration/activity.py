"""What goes into every product of a model, and how much the loss minds an error in what comes out, layer by layer.

One forward pass keeps every layer's input; then the layers are run again from the last to the first, each with gradients of
the next-token loss, and handed out one by one.  So one layer's activations are in memory at a time, and a caller may let go of
its weights, or replace them by rounded ones, before the next is read.

Shape letters: W windows, L tokens in a window, T = W L tokens, H hidden, I inputs and O outputs of a product, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from actsparse.methods.base import HEAD
from actsparse.methods.statistics import CalibrationError
from actsparse.models import sites

BATCH_TOKENS = 1024


class Progress(Protocol):
    """Told after every batch how many tokens times layers are done, of how many."""

    def __call__(self, done: int, total: int) -> None: ...


def within(progress: Progress, before: int, own: int, overall: int) -> Progress:
    """Progress of a part that is ``own`` of ``overall`` and comes after ``before`` of it."""

    def tell(done: int, total: int) -> None:
        progress(before * total // own + done, overall * total // own)

    return tell


@dataclass
class Activity:
    """The products of one layer (of the output head, for index :data:`HEAD`), by projection.

    Attributes:
        layer: index of the layer.
        inputs: float32 [T, I]; projections that share an input share the tensor.
        sensitivity: float32 [O], the mean over tokens of the squared gradient of the summed loss by each output.
        gradients: of the loss by what goes into the layer, a tensor a batch: where a later call can go on from.
    """

    layer: int
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    sensitivity: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: list[torch.Tensor] = field(default_factory=list)


def activities(
    model: Any,
    tokens: torch.Tensor,
    *,
    start: tuple[int, list[torch.Tensor]] | None = None,
    done_with: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> Iterator[Activity]:
    """The activity of the output head, then that of every layer, last to first.

    Args:
        model: a dense Hugging Face causal language model.
        tokens: int64 [W, L].
        start: go on with the layer before this one, whose ``gradients`` these are.
        done_with: called with a layer's index whenever its weights are not needed for a while.
        progress: called after every batch.

    Raises:
        CalibrationError: activations or gradients are not finite.
    """
    layers = sites.layers_of(model)
    count, length = tokens.shape
    batches = [
        tokens[at : at + max(1, BATCH_TOKENS // length)] for at in range(0, count, max(1, BATCH_TOKENS // length))
    ]
    total, done = (2 * len(layers) + 1) * tokens.numel(), 0

    def tick(batch: torch.Tensor, times: int = 1) -> None:
        nonlocal done
        done += times * batch.numel()
        if progress:
            progress(done, total)

    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in required:
        parameter.requires_grad_(False)
    try:
        recordings = []
        for batch in batches:
            recordings.append(_record(model, layers, batch.to(model.device), done_with))
            tick(batch, len(layers))
        if start is None:
            listener = _Listener(HEAD, {"head": model.get_output_embeddings()})
            gradients = []
            for batch, recording in zip(batches, recordings, strict=True):
                with listener:
                    gradients.append(_loss_gradient(model, recording, batch.to(model.device)))
                tick(batch)
            yield listener.activity(gradients)
            after = len(layers)
        else:
            after, gradients = start[0] if start[0] != HEAD else len(layers), list(start[1])
            done += (1 + len(layers) - after) * tokens.numel()
        for index in reversed(range(after)):
            listener = _Listener(
                index, {name: layers[index].linear(name) for name, _ in layers[index].family.projections}
            )
            for number, (batch, recording) in enumerate(zip(batches, recordings, strict=True)):
                with listener:
                    gradients[number] = recording.backward(layers[index].module, index, gradients[number])
                tick(batch)
            yield listener.activity(gradients)
            if done_with:
                done_with(index)
    finally:
        for parameter, wanted in required:
            parameter.requires_grad_(wanted)


@dataclass
class _Recording:
    """One batch: what each layer was called with, and what the last one gave."""

    calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]]
    last: torch.Tensor

    def backward(self, layer: nn.Module, index: int, gradient: torch.Tensor) -> torch.Tensor:
        hidden, args, kwargs = self.calls[index]
        self.calls[index] = (hidden.new_empty(0), (), {})  # not needed again
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            output = layer(leaf, *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            output.backward(gradient)
        assert leaf.grad is not None
        return leaf.grad


def _record(
    model: Any, layers: list[sites.LayerSites], batch: torch.Tensor, done_with: Callable[[int], None] | None
) -> _Recording:
    calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[torch.Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args or not isinstance(args[0], torch.Tensor):
            raise CalibrationError("a decoder layer is not called with its hidden states first: transformers changed")
        if calls and done_with:
            done_with(len(calls) - 1)
        calls.append((args[0], args[1:], dict(kwargs)))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.module.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].module.register_forward_hook(after))
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return _Recording(calls, outputs[0])


class _Given(nn.Module):
    """Stands in for all layers: whatever goes in, the recorded last hidden state comes out."""

    def __init__(self, hidden: torch.Tensor, like: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        # Decoders ask a layer for its kind of attention.
        self.attention_type = getattr(like, "attention_type", None)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.hidden


def _loss_gradient(model: Any, recording: _Recording, batch: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed next-token loss by the last layer's output."""
    decoder = model.get_decoder()
    layers, leaf = decoder.layers, recording.last.detach().requires_grad_()
    decoder.layers = nn.ModuleList([_Given(leaf, layers[0])])
    try:
        with torch.enable_grad():
            logits = model(input_ids=batch, use_cache=False).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum").backward()
    finally:
        decoder.layers = layers
    assert leaf.grad is not None
    if not bool(torch.isfinite(leaf.grad).all()):
        raise CalibrationError("the gradient of the loss is NaN or infinite, expected finite values")
    return leaf.grad


class _Listener:
    """Collects inputs and squared output gradients of products while it is entered."""

    def __init__(self, layer: int, products: dict[str, nn.Module]) -> None:
        self._layer = layer
        self._products = products
        self._inputs: dict[str, list[torch.Tensor]] = {name: [] for name in products}
        self._squares: dict[str, torch.Tensor] = {}
        self._tokens = 0
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in self._products.items()]

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = args[0].detach()
            self._inputs[name].append(x.reshape(-1, x.shape[-1]))

            def squared(gradient: torch.Tensor) -> None:
                rows = gradient.detach().reshape(-1, gradient.shape[-1]).float().square().sum(0)
                self._squares[name] = rows if name not in self._squares else self._squares[name] + rows

            output.register_hook(squared)

        return after

    def activity(self, gradients: list[torch.Tensor]) -> Activity:
        found = Activity(self._layer, gradients=list(gradients))
        shared: dict[tuple[int, ...], torch.Tensor] = {}
        for name, parts in self._inputs.items():
            key = tuple(part.data_ptr() for part in parts)
            if key not in shared:
                shared[key] = torch.cat(parts).float()
                if not bool(torch.isfinite(shared[key]).all()):
                    raise CalibrationError(f"layer {self._layer} {name}: activations are NaN or infinite")
            found.inputs[name] = shared[key]
            found.sensitivity[name] = self._squares[name] / max(1, len(shared[key]))
        self._inputs.clear()
        return found

"""The native decode step: one token through a whole Hugging Face model in one call into the kernels (CPU or CUDA).

A Hugging Face layer costs about a millisecond of Python and small operations per token; for a model of a billion
parameters that is a sixth of a token.  Here the model's own tensors are only pointed at: no weight is copied, and what
:func:`actsparse.runtime.swap` put into the model (thresholds, predictors) is obeyed exactly as its modules would.

Shape letters: T tokens, V vocabulary, K key/value heads, L cache length, D head dimension.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from actsparse import kernels
from actsparse.models import sites
from actsparse.models.sites import LayerSites, ModelError
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.layers import SparseFFN, SparseLinear
from actsparse.runtime.packed import PackedLinear
from actsparse.runtime.packed_ffn import PackedFFN
from actsparse.runtime.prompts import read
from actsparse.runtime.sessions import Session
from actsparse.runtime.swap import prompts_of, state_of

# Their frequencies change with the length of the text, so that no table made beforehand can hold them.
_PACKED = (GradedLinear, PackedLinear)
_CHANGING_ROPES = ("dynamic", "longrope")


class Decoder:
    """Decodes one sequence, token by token, on the CPU or on one GPU, wherever the model is.

    It is made for the model as it is: sparsify or restore the model first, and make a new decoder afterwards.

    Args:
        model: a Hugging Face causal language model, dense or sparsified; it runs the prefill itself.
        cache_length: how many tokens the key/value cache can hold, prompt included.

    Raises:
        ModelError: the model cannot be decoded natively (see :meth:`supports`), or ``cache_length`` is below 1.
        PlanError: the model was sparsified with a plan that is for evaluation only.
    """

    def __init__(self, model: Any, cache_length: int) -> None:
        state = state_of(model)
        if state is not None:
            state.plan.check_decodable()
        obstacle = self.supports(model)
        if obstacle is not None:
            raise ModelError(f"no native decode step for this model: {obstacle}")
        if cache_length < 1:
            raise ModelError(f"cache_length is {cache_length}, expected at least 1")
        self.model = model
        self.cache_length = cache_length
        self.position = 0
        self._state = state
        # Neurons chosen per prompt: the sequence's session, the blocks that obey it, and what they point at.
        self._prompts = prompts_of(model)
        self._session: Session | None = None
        self._stepped: list[int] = []
        self._chosen = {block.layer: block for block in self._prompts.modules} if self._prompts else {}
        self._chosen_ffns: list[kernels.FFN] = []
        layers = sites.layers_of(model)
        heads, kv_heads, head_dim = _heads(model.config)
        embedding, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings()
        size = (len(layers), kv_heads, cache_length, head_dim)
        self._keys = embedding.new_empty(size)
        self._values = embedding.new_empty(size)
        decoder = model.get_decoder()
        attention: Any = layers[0].attention
        cosine, sine = rope_tables(decoder.rotary_emb, cache_length)
        self._vocabulary = head.out_features
        packed = (module.packed for module in model.modules() if isinstance(module, _PACKED))
        kernels.use_huge_pages(*model.parameters(), *(storage for each in packed for storage in each.storages))
        # Its own counters: two that decode at once in one process must not count each other's reads.
        self._stats = kernels.cpu.Stats()
        self._stats_reference = ctypes.byref(self._stats)
        self._kernels: Any = _kernels_for(embedding)
        self.native: Any = self._kernels.decoder_of(
            [_layer(self._kernels, layer, model, self._keys[i], self._values[i]) for i, layer in enumerate(layers)],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            embedding=self._kernels.matrix_of(embedding),
            lm_head=_matrix(self._kernels, head),
            final_norm=_norm(self._kernels, decoder.norm),
            cosine=cosine,
            sine=sine,
            attention_scale=attention.scaling,
            window=_window(model.config) or 0,
        )

    @property
    def counts(self) -> bool:
        """Whether :meth:`stats` counts what is read: on the CPU."""
        return self._kernels is kernels

    @property
    def path(self) -> str:
        """Which kernels run, and why, in words."""
        head = self.model.get_output_embeddings()
        if isinstance(head, _PACKED):
            return f"cpu-{kernels.isa()}: packed weights on the CPU, {torch.get_num_threads()} threads"
        with torch.no_grad():
            return kernels.explain(head.weight[:1], head.weight)

    @staticmethod
    def supports(model: Any) -> str | None:
        """Why ``model`` cannot be decoded natively, in words; None when it can."""
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1:
            return f"the model is on {', '.join(sorted(map(str, devices)))}: expected one device"
        device = devices.pop()
        if device.type not in ("cpu", "cuda"):
            return f"the model is on {device}, the native decode step runs on the CPU and on CUDA"
        cuda = device.type == "cuda"
        missing = kernels.cuda.device_obstacle(device.index or 0) if cuda else kernels.cpu.missing
        if missing:
            return missing
        try:
            family = sites.family_of(model)
            sites.activation_of(model)
        except ModelError as error:
            return str(error)
        if not family.native_decode:
            return f"family {model.config.model_type} has no native decode step"
        dtypes = {parameter.dtype for parameter in model.parameters()}
        known = kernels.cuda.DTYPES if cuda else kernels.cpu.DTYPES
        if len(dtypes) > 1 or not dtypes <= set(known):
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            expected = " or ".join(f"all {str(dtype).removeprefix('torch.')}" for dtype in known)
            return f"weights are {names}, expected {expected}"
        window = _window(model.config)
        if window is None:
            return "its layers mix sliding and full attention"
        if not window and any(layer.is_sliding for layer in DynamicCache(config=model.config).layers):
            return "its layers have a sliding window that its configuration does not show as expected"
        rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope in _CHANGING_ROPES:
            return f"rope type {rope} changes with the length of the text"
        if 2 * model.get_decoder().rotary_emb.inv_freq.numel() != _heads(model.config)[2]:
            return "its rotary embedding does not cover the whole head"
        return _foreign_module(model) or _misread_heads(model) or (_cuda_obstacle(model) if cuda else None)

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run ``tokens`` (int64 [T]) after what the cache holds; returns the last one's logits, float32 [V].

        The Hugging Face model itself runs them, so that its modules apply the plan's scope.

        Raises:
            ModelError: no tokens, more than the cache has room for, or the model was changed since.
        """
        tokens = tokens.to(self._keys.device)
        begin, end = self.position, self.position + tokens.numel()
        self.check(end)
        if tokens.dim() != 1 or begin == end:
            raise ModelError(f"tokens have shape {list(tokens.shape)}, expected [T] with T >= 1")
        # Without a config every layer keeps all positions: a sliding window is then the mask's business alone.
        cache = DynamicCache()
        if begin:
            for index, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
                cache.update(keys[None, :, :begin], values[None, :, :begin], index)
        changed = begin
        if self._prompts is not None and self._session is not None and begin:
            stepped = torch.tensor([self._stepped[: max(0, begin - self._session.seen)]], dtype=torch.int64)
            self._prompts.attach(cache, self._session, stepped)
            # What was decoded on a set is run again, dense, before text that follows it.
            changed = self._session.resumable(begin)
        with torch.no_grad():
            output = read(self.model, tokens[None], cache, self._prompts)
            for index, layer in enumerate(cache.layers):
                self._keys[index, :, changed:end] = layer.keys[0, :, changed:]
                self._values[index, :, changed:end] = layer.values[0, :, changed:]
        self.position = end
        if self._prompts is not None:
            self._session = self._prompts.session(cache)
            self._stepped = []
            self._choose()
        return output.logits[0, -1].float()

    def step(self, token: int) -> torch.Tensor:
        """Append one token; returns the logits that follow it, float32 [V].

        Raises:
            ModelError: the cache is full, the token is not in the vocabulary, the model was changed since, or its neurons
                are chosen per prompt and there is no prompt before the token.
        """
        self.check(self.position + 1)
        if self._prompts is not None and (self._session is None or self.position < self._session.seen):
            known = 0 if self._session is None else self._session.seen
            raise ModelError(
                f"a decode step at position {self.position}, neurons were chosen for a prompt of {known} tokens: prefill first"
            )
        if not 0 <= token < self.native.embedding.out:
            raise ModelError(f"token is {token}, expected 0 to {self.native.embedding.out - 1}")
        if self._kernels is kernels:
            logits = torch.empty(self._vocabulary, dtype=torch.float32, device="cpu")
            kernels.decode_step(self.native, token, self.position, logits, self._stats_reference)
        else:
            logits = self._kernels.decode_step(self.native, token, self.position)
        if self._session is not None:
            self._stepped[self.position - self._session.seen :] = [token]
        self.position += 1
        return logits

    def stats(self) -> dict[str, int]:
        """Work done by :meth:`step` since this decoder was made (prefill not counted); see :meth:`kernels.cpu.Stats.counts`."""
        return self._stats.counts()

    def rewind(self, position: int) -> None:
        """Forget everything from ``position`` on (0 <= position <= the present one)."""
        if not 0 <= position <= self.position:
            raise ModelError(f"position is {position}, expected 0 to {self.position}")
        self.position = position

    def resumable(self, position: int) -> int:
        """The last position, not after ``position``, from which a prefill gives to the last bit what a fresh one would.

        All of them unless neurons are chosen per prompt.
        """
        return position if self._prompts is None else self._prompts.resumable(self._session, position)

    def reset(self) -> None:
        """Forget every token."""
        self.rewind(0)

    def _choose(self) -> None:
        """Let the blocks that obey the session decode on its neurons."""
        if self._session is None:
            raise ModelError("the prompt's key/value cache carries no chosen neurons")
        self._chosen_ffns = []
        for index, block in self._chosen.items():
            operands = block.operands(self._session)
            ffn = self._kernels.ffn_of(*operands.matrices, kernels.Rules(**operands.options))
            self._chosen_ffns.append(ffn)
            self.native.layer[index].ffn = ffn

    def check(self, end: int) -> None:
        """ModelError unless the cache has room up to position ``end`` and the model is what the decoder was made for."""
        if end > self.cache_length:
            raise ModelError(f"{end} tokens do not fit the cache of {self.cache_length}")
        if state_of(self.model) is not self._state:
            raise ModelError("the model was sparsified or restored after this decoder was made: make a new one")


def rope_tables(rotary: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [length, D / 2], from the model's own rotary module (any fixed scaling included)."""
    device = rotary.inv_freq.device
    positions = torch.arange(length, device=device)[None]
    tables = rotary(torch.empty(1, dtype=torch.float32, device=device), positions)
    cosine, sine = (table[0, :, : table.shape[-1] // 2].contiguous() for table in tables)
    return cosine, sine


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads, head dimension."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _misread_heads(model: Any) -> str | None:
    """How the projections' shapes contradict the heads that the configuration shows, in words."""
    heads, kv_heads, head_dim = _heads(model.config)
    for layer in sites.layers_of(model):
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            rows = layer.product(name).out_features
            if rows != count * head_dim:
                return f"layer {layer.index} {name} has {rows} rows, expected {count} heads of {head_dim}"
    return None


def _layer(backend: Any, layer: LayerSites, model: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
    paths, family = dict(layer.family.projections), layer.family
    attention: dict[str, Any] = {name: layer.module.get_submodule(paths[name]) for name in sites.ATTENTION_PROJECTIONS}
    thresholds: dict[str, Any] = {
        f"{name}_threshold": module.threshold if isinstance(module, SparseLinear) else None
        for name, module in attention.items()
    }
    ffn = layer.ffn
    if isinstance(ffn, SparseFFN):
        rules = ffn.rules()
        block: list[Any] = [layer.weight(name).detach() for name in sites.FFN_PROJECTIONS]
    else:
        plain = kernels.Rules(sites.activation_of(model), family.up_activation)
        rules = ffn.rules() if isinstance(ffn, PackedFFN) else plain
        block = [_matrix(backend, layer.product(name)) for name in sites.FFN_PROJECTIONS]
    gate, up, down = block
    return backend.layer_of(
        input_norm=_norm(backend, layer.module.get_submodule(family.input_norm)),
        post_norm=_norm(backend, layer.module.get_submodule(family.post_norm)),
        ffn=backend.ffn_of(gate, up, down, rules),
        k_cache=keys,
        v_cache=values,
        q_norm=_optional_norm(backend, layer.module, family.q_norm),
        k_norm=_optional_norm(backend, layer.module, family.k_norm),
        **{name: _matrix(backend, linear, thresholds[f"{name}_threshold"]) for name, linear in attention.items()},
        **thresholds,
    )


def _matrix(backend: Any, linear: Any, threshold: torch.Tensor | None = None) -> Any:
    if isinstance(linear, _PACKED):
        return linear.matrix()
    # Detached, because re-laying a weight gives the parameter new storage: an alias keeps the one pointed at alive.
    if backend is not kernels:
        return backend.matrix_of(linear.weight.detach(), linear.bias)
    return kernels.matrix_of(linear.weight.detach(), linear.bias, prefer=kernels.cpu.skipped_by(threshold))


def _norm(backend: Any, module: Any) -> Any:
    return backend.norm_of(module.weight, eps=module.variance_epsilon)


def _optional_norm(backend: Any, layer: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    module = getattr(layer.get_submodule(parent), name, None)
    return None if module is None else _norm(backend, module)


def _kernels_for(weight: torch.Tensor) -> Any:
    """The functions that make and run a decode step where ``weight`` lies."""
    return kernels.cuda.decoder if weight.is_cuda else kernels


def _cuda_obstacle(model: Any) -> str | None:
    """What the CUDA step cannot read, in words."""
    products = [layer.product(name) for layer in sites.layers_of(model) for name, _ in layer.family.projections]
    products += [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(isinstance(product, _PACKED) for product in products):
        return "packed weights have no CUDA kernel"
    weights = (product.weight for product in products)
    obstacle = kernels.cuda.decoder.decoder_obstacle(_heads(model.config)[2], *weights)
    if obstacle:
        return obstacle
    for layer in sites.layers_of(model):
        gate, up, down = (layer.weight(name) for name in sites.FFN_PROJECTIONS)
        rules = layer.ffn.rules() if isinstance(layer.ffn, SparseFFN) else kernels.Rules(sites.activation_of(model))
        obstacle = kernels.cuda.ffn_obstacle(up[:1], gate, up, down, rules)
        if obstacle:
            return f"layer {layer.index}: {obstacle}"
    return None


def _window(config: Any) -> int | None:
    """Sliding window in positions, 0 for none, None when layers differ."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds and window:
        if len(kinds) > 1:
            return None
        return window if kinds == {"sliding_attention"} else 0
    return window


def _foreign_module(model: Any) -> str | None:
    """What a layer has that is not known, or has in place of a plain or sparse one (a quantised one, an adapter), in words."""
    for layer in sites.layers_of(model):
        family = layer.family
        known = {
            *(path for _, path in family.projections),
            family.input_norm,
            family.post_norm,
            family.q_norm,
            family.k_norm,
        }
        for name, _ in layer.module.named_parameters():
            if name.rpartition(".")[0] not in known:
                return f"layer {layer.index} has a parameter {name}, which the native decode step does not know"
        sparse_ffn = isinstance(layer.ffn, SparseFFN)
        for name, path in layer.family.projections:
            module = layer.module.get_submodule(path)
            if type(module) is not nn.Linear and not isinstance(module, (SparseLinear, *_PACKED)):
                return f"layer {layer.index} {name} is a {type(module).__name__}, expected nn.Linear"
            if isinstance(module, SparseLinear) and name in sites.FFN_PROJECTIONS and not sparse_ffn:
                return f"layer {layer.index} {name} is sparsified outside its feed-forward block"
    head = model.get_output_embeddings()
    return (
        None
        if type(head) is nn.Linear or isinstance(head, _PACKED)
        else f"the output head is a {type(head).__name__}, expected nn.Linear"
    )

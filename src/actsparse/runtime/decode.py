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
from transformers import DynamicCache

from actsparse import kernels
from actsparse.models import sites
from actsparse.models.sites import ModelError
from actsparse.runtime import stepping
from actsparse.runtime.prompts import read
from actsparse.runtime.sessions import Session
from actsparse.runtime.swap import prompts_of, resident, state_of


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
        if cache_length < 1:
            raise ModelError(f"cache_length is {cache_length}, expected at least 1")
        obstacle = self.supports(model, cache_length)
        if obstacle is not None:
            raise ModelError(f"no native decode step for this model: {obstacle}")
        self.model = model
        self.cache_length = cache_length
        self.position = 0
        self._state = state
        # Neurons chosen per prompt: the sequence's session, the blocks that obey it, and what they point at.
        self._prompts = prompts_of(model)
        self._session: Session | None = None
        self._stepped: list[int] = []
        self._chosen = {block.layer: block for block in self._prompts.modules} if self._prompts else {}
        self._chosen_ffns: dict[int, kernels.FFN] = {}
        _, kv_heads, head_dim = sites.heads_of(model.config)
        embedding, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings()
        size = (len(sites.layers_of(model)), kv_heads, cache_length, head_dim)
        self._keys = embedding.new_empty(size)
        self._values = embedding.new_empty(size)
        self._vocabulary = head.out_features
        packed = (module.packed for module in model.modules() if isinstance(module, stepping.PACKED))
        kernels.use_huge_pages(*resident(model), *(storage for each in packed for storage in each.storages))
        # Its own counters: two that decode at once in one process must not count each other's reads.
        self._stats = kernels.cpu.Stats()
        self._stats_reference = ctypes.byref(self._stats)
        self._kernels: Any = _kernels_for(embedding)
        self.native: Any = stepping.decoder_for(self._kernels, model, self._keys, self._values)

    @property
    def counts(self) -> bool:
        """Whether :meth:`stats` counts what is read: on the CPU."""
        return self._kernels is kernels

    @property
    def path(self) -> str:
        """Which kernels run, and why, in words."""
        head = self.model.get_output_embeddings()
        if isinstance(head, stepping.PACKED):
            if head.packed.scale.is_cuda:
                index = head.packed.scale.device.index
                return f"cuda-{kernels.cuda.architecture(index)}: packed weights on {torch.cuda.get_device_name(index)}"
            return f"cpu-{kernels.isa()}: packed weights on the CPU, {torch.get_num_threads()} threads"
        with torch.no_grad():
            return kernels.explain(head.weight[:1], head.weight)

    @staticmethod
    def supports(model: Any, cache_length: int = 0) -> str | None:
        """Why ``model`` cannot be decoded natively with a cache of so many tokens, in words; None when it can."""
        devices = {parameter.device for parameter in resident(model)}
        if len(devices) > 1:
            return f"the model is on {', '.join(sorted(map(str, devices)))}: expected one device"
        device = devices.pop()
        if device.type not in ("cpu", "cuda"):
            return f"the model is on {device}, the native decode step runs on the CPU and on CUDA"
        cuda = device.type == "cuda"
        missing = kernels.cuda.device_obstacle(device.index or 0) if cuda else kernels.cpu.missing
        if missing:
            return missing
        dtypes = {parameter.dtype for parameter in model.parameters()}
        known = kernels.cuda.DTYPES if cuda else kernels.cpu.DTYPES
        if len(dtypes) > 1 or not dtypes <= set(known):
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            expected = " or ".join(f"all {str(dtype).removeprefix('torch.')}" for dtype in known)
            return f"weights are {names}, expected {expected}"
        obstacle = stepping.obstacle_of(model, cuda)
        longest = None if obstacle else stepping.longest_of(model)
        if longest and cache_length > longest[0]:
            return f"a cache of {cache_length} tokens is longer than {longest[0]}: {longest[1]}"
        return obstacle

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
            before, self._session = self._session, None
            self._stepped = []
            self._session = self._choose(self._prompts.session(cache), {} if before is None else before.gathered)
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

    def _choose(self, session: Session | None, before: dict[tuple[int, int], Any]) -> Session:
        """Let the blocks that obey a session decode on its neurons, in place of copies made ``before``."""
        if session is None:
            raise ModelError("the prompt's key/value cache carries no chosen neurons")
        for index, block in self._chosen.items():
            copies = before.pop((index, 0), None)
            if copies is not None:
                # As many neurons as ever: they may lie where the last ones lay, without second copies or a new graph.
                block.gather(session, into=copies)
                continue
            operands = block.operands(session)
            ffn = self._kernels.ffn_of(*operands.matrices, kernels.Rules(**operands.options))
            self._chosen_ffns[index] = ffn
            self.native.layer[index].ffn = ffn
        return session

    def check(self, end: int) -> None:
        """ModelError unless the cache has room up to position ``end`` and the model is what the decoder was made for."""
        if end > self.cache_length:
            raise ModelError(f"{end} tokens do not fit the cache of {self.cache_length}")
        if state_of(self.model) is not self._state:
            raise ModelError("the model was sparsified or restored after this decoder was made: make a new one")


def _kernels_for(weight: torch.Tensor) -> Any:
    """The functions that make and run a decode step where ``weight`` lies."""
    return kernels.cuda.decoder if weight.is_cuda else kernels

"""Several sequences decoded together: each step reads the weights once for all of them.

Sequences come and go between steps, and none has an influence on another: a sequence's logits are, to the last bit, those of
:class:`actsparse.runtime.decode.Decoder` alone.

Shape letters: B sequences in a step, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from actsparse import kernels
from actsparse.models.sites import ModelError
from actsparse.runtime.decode import Decoder
from actsparse.runtime.swap import prompts_of

MOST_SEQUENCES = kernels.MAX_BATCH


class Batch:
    """Decodes up to 8 sequences of a model on the CPU, each with its own key/value cache and length.

    It is made for the model as it is: sparsify or restore the model first.  One thread at a time may use it.

    Args:
        model: a Hugging Face causal language model, dense or sparsified; it runs the prefills itself.
        cache_length: how many tokens the cache of each sequence can hold, prompt included.
        size: how many sequences at once; they are numbered from 0.

    Raises:
        ModelError: the model cannot be decoded so (see :meth:`obstacle`), or a number is out of range.
        PlanError: the model was sparsified with a plan that is for evaluation only.
    """

    def __init__(self, model: Any, cache_length: int, size: int = MOST_SEQUENCES) -> None:
        obstacle = self.obstacle(model)
        if obstacle is not None:
            raise ModelError(f"sequences of this model cannot be decoded together: {obstacle}")
        if not 1 <= size <= MOST_SEQUENCES:
            raise ModelError(f"{size} sequences at once, expected 1 to {MOST_SEQUENCES}")
        # Each points at the same weights and has caches of its own.
        self._decoders = [Decoder(model, cache_length) for _ in range(size)]
        self.cache_length = cache_length
        layers = int(self._decoders[0].native.layers)
        self._stats = (kernels.cpu.Stats * (layers + 1))()

    @staticmethod
    def obstacle(model: Any) -> str | None:
        """Why sequences of ``model`` cannot be decoded together, in words; None when they can."""
        reason = Decoder.supports(model)
        if reason is not None:
            return reason
        if prompts_of(model) is not None:
            return "its neurons are chosen for each prompt"
        if not next(model.parameters()).is_cpu:
            return "the model is not on the CPU"
        return None

    @property
    def size(self) -> int:
        """How many sequences at once."""
        return len(self._decoders)

    @property
    def path(self) -> str:
        """Which kernels run, and why, in words."""
        return self._decoders[0].path

    def position(self, sequence: int) -> int:
        """How many tokens the cache of a sequence holds."""
        return self._decoders[sequence].position

    def rewind(self, sequence: int, position: int) -> None:
        """Forget everything of a sequence from ``position`` on."""
        self._decoders[sequence].rewind(position)

    def prefill(self, sequence: int, tokens: torch.Tensor) -> torch.Tensor:
        """Run ``tokens`` (int64 [T]) after what the cache of a sequence holds; returns the last one's logits, float32 [V]."""
        return self._decoders[sequence].prefill(tokens)

    def step(self, tokens: Mapping[int, int]) -> torch.Tensor:
        """Append one token to each sequence named; returns the logits that follow, float32 [B, V] in the order of ``tokens``.

        Raises:
            ModelError: a cache is full, a token is not in the vocabulary, or the model was changed since.
        """
        decoders = [self._decoders[sequence] for sequence in tokens]
        for decoder in decoders:
            decoder.check(decoder.position + 1)
        native = [decoder.native for decoder in decoders]
        for token in tokens.values():
            if not 0 <= token < native[0].embedding.out:
                raise ModelError(f"token is {token}, expected 0 to {native[0].embedding.out - 1}")
        head = native[0].lm_head if native[0].lm_head.data else native[0].embedding
        logits = torch.empty(len(native), head.out, dtype=torch.float32, device="cpu")
        positions = [decoder.position for decoder in decoders]
        kernels.decode_together(native, list(tokens.values()), positions, logits, self._stats)
        for decoder in decoders:
            decoder.position += 1
        return logits

    def bytes_read(self) -> list[int]:
        """Weight bytes that :meth:`step` read so far, of each layer and last of the output head.

        What a step reads for several sequences counts once.
        """
        return [each.bytes for each in self._stats]

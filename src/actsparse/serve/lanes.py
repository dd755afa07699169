"""What decodes the sequences of one served model: together in one native step where that exists, else one after another.

Shape letters: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from actsparse.models import caches, sites
from actsparse.models.sites import ModelError
from actsparse.runtime.batch import MOST_SEQUENCES, Batch
from actsparse.runtime.decode import Decoder
from actsparse.runtime.prompts import read
from actsparse.runtime.swap import prompts_of, state_of, without_rules

# Prompts are run in pieces of so many tokens, between which the other sequences go on. A fixed length, so that an answer does
# not depend on what else is being decoded.
PREFILL_TOKENS = 512


class Sequences(Protocol):
    """What a lane asks of its decoder: see :class:`actsparse.runtime.batch.Batch`."""

    @property
    def path(self) -> str:
        """Which kernels or modules run."""

    def rewind(self, sequence: int, position: int) -> None:
        """Forget from ``position`` on."""

    def prefill(self, sequence: int, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [V] after ``tokens`` [T]."""

    def step(self, tokens: Mapping[int, int]) -> torch.Tensor:
        """Logits [B, V] after one more token of each."""

    def bytes_read(self) -> list[int] | None:
        """Weight bytes read by steps so far, by layer and for the head, or as one sum; None where nobody counts."""


class Lane:
    """One served model: a name, its sequences, and how its prompts are run.

    Args:
        name: under which it is asked for.
        model: a Hugging Face model, dense or sparsified.
        context: tokens of a sequence, prompt included.
        slots: sequences at once.
        rules: False sets the model's rules aside (dense beside sparse, on one copy of the weights).
    """

    def __init__(self, name: str, model: Any, context: int, slots: int = MOST_SEQUENCES, *, rules: bool = True) -> None:
        self.name, self.context, self.slots, self.rules = name, context, slots, rules
        self._model = model
        self.obstacle = Batch.obstacle(model)
        state = state_of(model)
        if state is not None:
            state.plan.check_decodable()
        with self._as_asked():
            self.sequences: Sequences = (
                Batch(model, context, slots) if self.obstacle is None else Apart(model, context, slots)
            )
        # A prompt of which the plan takes the second half, or which chooses neurons, must be seen whole.
        scope = state.plan.scope if state is not None and rules else "all"
        self._piece = PREFILL_TOKENS if scope != "last_half" and prompts_of(model) is None else context
        layers = [_weights(layer) for layer in sites.layers_of(model)]
        self.weights = [*layers, _size(model.get_output_embeddings())]
        self.dense_bits = 8 * model.dtype.itemsize

    @property
    def together(self) -> bool:
        """Whether several sequences share a step."""
        return self.obstacle is None

    def piece(self, left: int) -> int:
        """How many of the ``left`` tokens of a prompt to run next: a lone last one would count as a decode step."""
        return left if left <= self._piece + 1 else self._piece

    def prefill(self, slot: int, tokens: list[int]) -> torch.Tensor:
        """Run a piece of a prompt; logits [V] after it."""
        with self._as_asked():
            return self.sequences.prefill(slot, torch.tensor(tokens))

    def step(self, tokens: Mapping[int, int]) -> torch.Tensor:
        """One more token of each sequence named; logits [B, V]."""
        if self.together:
            return self.sequences.step(tokens)
        with self._as_asked():
            return self.sequences.step(tokens)

    def bits(self, read: list[int]) -> tuple[float | None, list[float]]:
        """Bits of each weight among ``read`` bytes: over all, and by layer and head (none where only a sum is known)."""
        whole = 8 * sum(read) / sum(self.weights)
        if len(read) != len(self.weights):
            return whole, []
        return whole, [round(8 * count / weights, 3) for count, weights in zip(read, self.weights, strict=True)]

    def _as_asked(self) -> AbstractContextManager[None]:
        return nullcontext() if self.rules else without_rules(self._model)


class Apart:
    """Sequences decoded one after another: for models that no native step takes, or only one sequence at a time."""

    def __init__(self, model: Any, context: int, slots: int) -> None:
        reason = Decoder.supports(model)
        self._all: list[_Native | _Modules] = [
            _Native(model, context) if reason is None else _Modules(model, context) for _ in range(slots)
        ]
        first = self._all[0]
        self.path = first.decoder.path if isinstance(first, _Native) else f"transformers' modules: {reason}"

    def rewind(self, sequence: int, position: int) -> None:
        """Forget everything (``position`` 0)."""
        if position:
            raise ModelError(f"position is {position}, expected 0")
        self._all[sequence].reset()

    def prefill(self, sequence: int, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [V] after ``tokens`` [T]."""
        return self._all[sequence].prefill(tokens)

    def step(self, tokens: Mapping[int, int]) -> torch.Tensor:
        """Logits [B, V] after one more token of each."""
        return torch.stack([self._all[sequence].step(token) for sequence, token in tokens.items()])

    def bytes_read(self) -> list[int] | None:
        """Weight bytes read by steps so far, as one sum; None where nobody counts."""
        counts = [each.bytes_read() for each in self._all]
        known = [count for count in counts if count is not None]
        return [sum(known)] if known else None


class _Native:
    def __init__(self, model: Any, context: int) -> None:
        self.decoder = Decoder(model, context)

    def reset(self) -> None:
        self.decoder.rewind(self.decoder.resumable(0))

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder.prefill(tokens)

    def step(self, token: int) -> torch.Tensor:
        # On a GPU the logits stay valid only until the next step.
        return self.decoder.step(token).clone()

    def bytes_read(self) -> int | None:
        return self.decoder.stats()["bytes"] if self.decoder.counts else None


class _Modules:
    def __init__(self, model: Any, context: int) -> None:
        self._model, self._context = model, context
        self.reset()

    def reset(self) -> None:
        self._cache, self._position = DynamicCache(config=self._model.config), 0

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        self._take(len(tokens))
        with torch.no_grad():
            prompts = prompts_of(self._model)
            return self._last(read(self._model, tokens[None].to(self._model.device), self._cache, prompts))

    def step(self, token: int) -> torch.Tensor:
        self._take(1)
        with torch.no_grad():
            ids = torch.tensor([[token]], device=self._model.device)
            argument = caches.cache_argument(self._model.forward, self._cache)
            return self._last(self._model(input_ids=ids, use_cache=True, **argument))

    def bytes_read(self) -> int | None:
        return None

    def _take(self, count: int) -> None:
        if self._position + count > self._context:
            raise ModelError(f"{self._position + count} tokens do not fit the cache of {self._context}")
        self._position += count

    @staticmethod
    def _last(output: Any) -> torch.Tensor:
        logits: torch.Tensor = output.logits[0, -1]
        return logits.float().cpu()


def _weights(layer: sites.LayerSites) -> int:
    return sum(_size(layer.product(name)) for name, _ in layer.family.projections)


def _size(product: Any) -> int:
    if hasattr(product, "in_features"):
        return int(product.in_features * product.out_features)
    return int(product.weight.numel())

"""What one generation knows of its text, where neurons are chosen once per prompt.

Sums of scores are kept at fixed places of the text (:meth:`actsparse.methods.prompt.PromptRule.marks`).  So the scores of
any beginning that ends at such a place are there without running it again, and they are added up in the same order however
the text came in.

Shape letters: B batch, T tokens, D decoded tokens, N neurons, S rows of a score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from actsparse.methods.prompt import Choice, PromptRule

# Stands for a token that the model was given as an embedding.
UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Tally:
    """One sequence's sums at one layer: of the tokens up to each mark since the one before, and of those after the last.

    ``blocks`` is float32 [M, S, N], ``rest`` [S, N], None where there are no tokens after the last mark.
    """

    blocks: torch.Tensor | None = None
    rest: torch.Tensor | None = None

    def add(self, rule: PromptRule, known: int, values: torch.Tensor) -> Tally:
        """With ``values`` [T, N] of the tokens that follow the first ``known``."""
        end = known + len(values)
        marks = [mark for mark in rule.marks(end) if mark > known]
        stops = [*marks, *([] if marks and marks[-1] == end else [end])]
        parts = rule.score_parts(values, [stop - known for stop in stops])
        if self.rest is not None:
            parts = torch.cat([(self.rest + parts[0])[None], parts[1:]])
        blocks = parts[: len(marks)]
        return Tally(
            blocks if self.blocks is None else torch.cat([self.blocks, blocks]),
            parts[-1] if len(stops) > len(marks) else None,
        )

    def cut(self, count: int) -> Tally:
        """Of the first ``count`` blocks alone."""
        assert self.blocks is not None
        return Tally(self.blocks[:count])

    def sums(self, first: int | None) -> torch.Tensor:
        """Over all tokens [1, S, N]; with ``first``, over the first so many blocks and over what follows [2, S, N]."""
        assert self.blocks is not None
        parts = [self.blocks] if first is None else [self.blocks[:first], self.blocks[first:]]
        sums = torch.stack([part.sum(0) for part in parts])
        if self.rest is not None:
            sums[-1] += self.rest
        return sums


@dataclass(frozen=True, eq=False)
class Session:
    """One generation's text and scores; never changed, only replaced, so that copies of a cache may share it.

    Attributes:
        owner: the token of the model that made it.
        rule: what chooses from the scores.
        tallies: per sequence, by layer.
        ids: the text, int64 [B, T]; :data:`UNKNOWN` where the model was fed embeddings.
        real: bool [B, T], False for padding; None when nothing is.
        gathered: copies of chosen weights, by layer and sequence, made when they are first decoded with.
    """

    owner: object
    rule: PromptRule
    tallies: tuple[Mapping[int, Tally], ...]
    ids: torch.Tensor
    real: torch.Tensor | None = None
    gathered: dict[tuple[int, int], Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self

    @property
    def seen(self) -> int:
        """Position after the last token of the text."""
        return self.ids.shape[1]

    @property
    def batch(self) -> int:
        """How many sequences."""
        return len(self.tallies)

    def tokens(self, sequence: int) -> int:
        """How many tokens of one sequence are no padding."""
        return self.seen if self.real is None else int(self.real[sequence].sum())

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """What was chosen, per sequence."""
        chosen = []
        for sequence, layers in enumerate(self.tallies):
            tokens, first = self.tokens(sequence), None
            if self.rule.halves:
                first = len(self.rule.marks(self.rule.half(tokens)))
            chosen.append(self.rule.choose({layer: tally.sums(first) for layer, tally in layers.items()}))
        return tuple(chosen)

    def neurons(self, layer: int, sequence: int = 0) -> torch.Tensor | None:
        """The set of one sequence at one layer, int32 ascending; None where the layer stays dense."""
        return self.choices[sequence].neurons.get(layer)

    def resumable(self, position: int) -> int:
        """The last position, not after ``position``, at which the text's scores are known."""
        return self.seen if position >= self.seen else position - position % self.rule.block

    def cut(self, position: int) -> Session | None:
        """The session as it was at a resumable position; None for the beginning."""
        if position == self.seen:
            return self
        if position == 0:
            return None
        count = len(self.rule.marks(position))
        tallies = tuple({layer: one.cut(count) for layer, one in each.items()} for each in self.tallies)
        return Session(self.owner, self.rule, tallies, self.ids[:, :position])

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        tallies = [tally for layers in self.tallies for tally in layers.values()]
        pieces = [piece for tally in tallies for piece in (tally.blocks, tally.rest) if piece is not None]
        return sum(piece.numel() * piece.element_size() for piece in pieces)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a cache carries: its session, the tokens decoded since [B, D], and whether the next ones are text anyway."""

    session: Session
    decoded: torch.Tensor
    text_next: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return self

    @property
    def position(self) -> int:
        """Position after the last token that the cache holds."""
        return self.session.seen + self.decoded.shape[1]

    def then(self, position: int, ids: torch.Tensor) -> Kept:
        """After tokens [B, T] were decoded at ``position`` (later ones, decoded before, are forgotten)."""
        before = self.decoded[:, : position - self.session.seen]
        return replace(self, decoded=torch.cat([before, ids], 1))

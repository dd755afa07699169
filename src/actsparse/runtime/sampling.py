"""How the next token is chosen from logits [V]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from actsparse.runtime.finite import check_logits


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    ``temperature`` 0 takes the most likely one.  ``top_k`` 0 and ``top_p`` 1 restrict nothing.  ``seed`` None draws from
    torch's global state.  Raises ValueError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected 0 < top_p <= 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 or more")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2^63 - 1")

    def processors(self) -> LogitsProcessorList:
        """The warpers, in the order in which transformers applies them."""
        warpers = LogitsProcessorList()
        if self.temperature not in (0, 1):
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.temperature and self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.temperature and self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


class seeded:
    """Sample from ``seed`` inside the block and leave torch's global state as it was; None changes nothing."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        if self._seed is not None:
            self._before = torch.get_rng_state()
            torch.manual_seed(self._seed)

    def __exit__(self, *exception: object) -> None:
        if self._seed is not None:
            torch.set_rng_state(self._before)


def choose(
    logits: torch.Tensor,
    tokens: list[int],
    warpers: LogitsProcessorList,
    *,
    greedy: bool,
    generator: torch.Generator | None = None,
) -> int:
    """The next token after ``tokens``, drawn from ``generator`` (None: torch's); ModelError where the logits are not finite."""
    check_logits(logits)
    if greedy:
        return int(logits.argmax())
    scores = warpers(torch.tensor([tokens]), logits[None].cpu())
    return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=generator))

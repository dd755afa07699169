"""What packing reads and stores unless told otherwise (docs/graded.md says what each costs)."""

from __future__ import annotations

from pathlib import Path

# The text, and what plans and cards call it: where it lies on this machine is of no use on another.
DEFAULT_TEXT = Path(__file__).parent / "default.jsonl"
DEFAULT_SOURCE = f"{DEFAULT_TEXT.name}, which comes with actsparse"
# Bits read per weight, scales included.
QUALITIES = {"near-lossless": 4.0, "balanced": 3.0, "fast": 2.5}
# From so many bits read, what 6 bits cannot tell of a weight is a good part of all that is lost.
DEEP = 4.0
# A budget that so little may be lost under wants as much read.
_TIGHT = 0.01
# Work that calibration may take, in multiplications; and the tokens that this buys at least and at most.
_WORK, _LEAST_TOKENS, _MOST_TOKENS = 1.5e13, 2048, 16384


def stored_for(bits_read: float | None) -> int:
    """Bits to store of a weight of which ``bits_read`` are read on average; None: all of them."""
    return 8 if bits_read is not None and bits_read >= DEEP else 6


def quality_for(max_ppl_increase: float) -> str:
    """The quality whose codes a search for so small an increase of perplexity goes through."""
    return "near-lossless" if max_ppl_increase <= _TIGHT else "balanced"


def default_tokens(parameters: int, device: str = "cpu") -> int:
    """Calibration tokens for a model of so many parameters: small models need, and can afford, more; GPUs afford the most."""
    if device == "cuda":
        return _MOST_TOKENS
    affordable = _WORK / (3 * parameters)  # two forward passes, and one backward that needs no gradients of weights
    return int(min(_MOST_TOKENS, max(_LEAST_TOKENS, affordable)))

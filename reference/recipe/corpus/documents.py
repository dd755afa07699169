"""A document of the reference text, and what every step does with one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

DOMAINS = ("man", "doc", "python", "rustdoc")
# Characters kept of a held-out document.
MAX_HELD_CHARS = 8_000

Rows = list[dict[str, object]]


@dataclass
class Document:
    """One document: where it came from and its text; ``more`` is never held out."""

    domain: str
    source: str
    path: str
    text: str
    more: bool = False


class BuildError(Exception):
    """A problem to show the user as one line."""


def digest(*parts: str) -> int:
    """A stable 64-bit number of some strings."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


def unit(*parts: str) -> float:
    """A stable number in [0, 1) of some strings."""
    return digest(*parts) / 2**64


def cut(text: str, limit: int) -> str:
    """At most ``limit`` characters, ending with a line."""
    if len(text) <= limit:
        return text
    return text[: max(text.rfind("\n", 0, limit) + 1, limit // 2)]


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

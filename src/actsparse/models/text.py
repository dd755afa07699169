"""Text in, token windows out: files or hub datasets, tokenised once, cut into windows of equal length.

Shape letters: W windows, L window length.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PACKINGS = ("packed", "documents")


class TextError(ValueError):
    """Text that cannot be read, is empty, or is not text."""


@dataclass(frozen=True)
class Document:
    """One document with its domain label (empty when the source has none)."""

    text: str
    domain: str = ""


@dataclass(frozen=True)
class Windows:
    """Token windows.

    Attributes:
        tokens: [W, L] int64.
        source: the file or dataset they came from.
        domains: per window, the domain of the document at its start.
    """

    tokens: torch.Tensor
    source: str
    domains: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.tokens.numel()

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens and their shape."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a plan records of its text."""
        return {
            "source": self.source,
            "sha256": self.digest,
            "tokens": self.count,
            "window": int(self.tokens.shape[1]),
        }


# What a plan records that needed no text.
NO_TEXT = Windows(torch.zeros(0, 1, dtype=torch.int64), "none", ())


def read_documents(source: str) -> Iterator[Document]:
    """Documents of ``source``.

    A path: ``.jsonl`` (objects with ``text`` and perhaps ``domain``), anything else is read as one UTF-8 document.
    Otherwise a hub dataset, ``name[:config[:split[:column]]]``, streamed through the ``datasets`` library.

    Raises:
        TextError: missing, empty, binary or malformed.
    """
    path = Path(source)
    if path.is_dir():
        raise TextError(f"text {source} is a directory, expected a file or a hub dataset")
    if path.is_file():
        yield from _read_file(path)
    elif path.suffix in (".txt", ".jsonl", ".json", ".md") or source.startswith((".", "/", "~")):
        raise TextError(f"text file {source} does not exist")
    else:
        yield from _read_hub(source)


def check_text(text: str, what: str) -> str:
    """``text`` itself; TextError naming ``what`` when it holds half a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise TextError(f"{what} is not Unicode text: lone surrogate {code} at character {error.start}") from None
    return text


def load_windows(
    source: str | Sequence[str],
    tokenizer: Any,
    *,
    tokens: int | None,
    window: int,
    packing: str = "packed",
) -> Windows:
    """Tokenise ``source`` until ``tokens`` tokens are there and cut them into windows.

    Args:
        source: as for :func:`read_documents`, or the documents themselves.
        tokenizer: a Hugging Face tokenizer.
        tokens: how many to use; None takes the whole text.  Rounded down to whole windows (at least one).
        window: length L of a window, in tokens.
        packing: ``packed`` joins documents with the end-of-text token and cuts anywhere; ``documents`` takes the first
            L tokens of each document that has as many.

    Raises:
        TextError: no tokens asked for, or not one whole window in the text.

    Warns:
        UserWarning: the text holds fewer tokens than were asked for (the number used is named).
    """
    if tokens is not None and tokens < 1:
        raise TextError(f"tokens is {tokens}, expected at least 1")
    if window < 2:
        raise TextError(f"window is {window} tokens, expected at least 2")
    if isinstance(source, str):
        documents, name = read_documents(source), source
    else:
        documents, name = iter([Document(text) for text in source]), "texts given in Python"
    window = min(window, tokens) if tokens is not None else window
    want = None if tokens is None else max(1, tokens // window)
    rows: list[list[int]] = []
    domains: list[str] = []
    pending: list[int] = []
    pending_domains: list[tuple[int, str]] = []
    end = tokenizer.eos_token_id
    for document in documents:
        check_text(document.text, f"text {name}")
        # verbose=False: a document longer than the model's context is cut into windows below, so no need to warn.
        ids = tokenizer(document.text, verbose=False)["input_ids"]
        if packing == "documents":
            if len(ids) >= window:
                rows.append(ids[:window])
                domains.append(document.domain)
        else:
            pending_domains.append((len(pending), document.domain))
            pending.extend(ids if end is None else [*ids, end])
            while len(pending) >= window and (want is None or len(rows) < want):
                rows.append(pending[:window])
                domains.append(_domain_at_start(pending_domains))
                del pending[:window]
                pending_domains = _shift(pending_domains, window)
        if want is not None and len(rows) >= want:
            break
    if not rows:
        raise TextError(f"text {name} holds {len(pending)} tokens, expected at least one window of {window}")
    if want is not None and len(rows) < want:
        warnings.warn(
            f"{name} holds fewer tokens than asked for: using {len(rows) * window} of {tokens}",
            UserWarning,
            stacklevel=2,
        )
    return Windows(torch.tensor(rows[:want], dtype=torch.int64), name, tuple(domains[:want]))


def _domain_at_start(starts: list[tuple[int, str]]) -> str:
    return [domain for start, domain in starts if start <= 0][-1]


def _shift(starts: list[tuple[int, str]], by: int) -> list[tuple[int, str]]:
    moved = [(start - by, domain) for start, domain in starts]
    last = max((i for i, (start, _) in enumerate(moved) if start <= 0), default=0)
    return moved[last:]


def _read_file(path: Path) -> Iterator[Document]:
    if path.stat().st_size == 0:
        raise TextError(f"text file {path} is empty")
    seen = False
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        document = _document(path, number, line)
                        seen = seen or bool(document.text.strip())
                        yield document
            else:
                text = file.read()
                if "\0" in text:
                    raise TextError(f"text file {path} is not text: it holds a zero byte")
                seen = bool(text.strip())
                yield Document(text)
    except UnicodeDecodeError as error:
        raise TextError(f"text file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise TextError(f"text file {path} cannot be read: {error.strerror}") from None
    if not seen:
        raise TextError(f"text file {path} holds no text")


def _document(path: Path, number: int, line: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{path} line {number} is not JSON: {error.msg}") from None
    except RecursionError:
        raise TextError(f"{path} line {number} is nested too deeply, expected an object with a 'text' field") from None
    except ValueError as error:  # a number of thousands of digits
        raise TextError(f"{path} line {number} cannot be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise TextError(f"{path} line {number} has no 'text' field, expected an object with one")
    domain = record.get("domain", "")
    if not isinstance(domain, str):
        raise TextError(f"{path} line {number} has a 'domain' that is {type(domain).__name__}, expected text")
    place = f"{path} line {number}"
    return Document(check_text(record["text"], f"{place} 'text'"), check_text(domain, f"{place} 'domain'"))


def _read_hub(source: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise TextError(
            f"text {source!r} is neither a file nor readable as a hub dataset: pip install 'actsparse[hub]'"
        ) from None
    name, config, split, column = [*source.split(":"), "", "", "", ""][:4]
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for record in stream:
            if column and column not in record:
                raise TextError(f"dataset {name} has no column {column!r}: it has {', '.join(record)}")
            yield Document(str(record[column or "text"]), str(record.get("domain", "")))
    except (OSError, ValueError, KeyError, ConnectionError, RuntimeError) as error:
        if isinstance(error, TextError):
            raise
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TextError(f"text {source!r} is neither a file nor a dataset that could be loaded: {line}") from None

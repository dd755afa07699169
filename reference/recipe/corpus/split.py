"""Removal of duplicates, the split into training and held-out documents, and the choice of the committed ones."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator

from .documents import DOMAINS, MAX_HELD_CHARS, Document, Rows, cut, digest, unit
from .licences import licence_of, may_commit, may_hold

# Sources of which no document is trained on: the "unseen" part of the held-out text.
UNSEEN = {
    "tk8.6-doc", "nsd", "libarchive-dev", "libevent-dev", "x11-utils", "tcpdump",
    "python-flask-doc", "sphinx-doc", "python-attr-doc", "libuv1-doc", "python-tornado-doc", "glance-doc",
    "python-xarray-doc", "python3-httpx", "python3-starlette", "python3-fsspec", "python3-joblib", "python3-trio",
    "python3-glance", "python3-xarray", "python3-flask", "python3-attr", "python3-rich", "python3-tornado",
    "rust-doc/rust-by-example", "rust-doc/nomicon", "librust-rayon-dev", "librust-petgraph-dev",
    "librust-indexmap-dev", "librust-url-dev", "librust-axum-dev", "librust-uuid-dev", "librust-smallvec-dev",
}  # fmt: skip
# Share of the remaining held-out-able documents that leave the training text, by domain.
HELD_SHARE = {"man": 0.09, "doc": 0.07, "python": 0.06, "rustdoc": 0.10}

WORD = re.compile(r"[a-z_]+|[^\sa-z_0-9]")
SHINGLE = 10
SAMPLE = 8  # one shingle in this many is kept
SHARED = 2  # kept shingles that a document may share with the held-out ones by chance


def shingles(text: str) -> tuple[int, set[int]]:
    """The number of the normalised text, and a sample of its hashed word shingles (digits and spacing ignored)."""
    words = WORD.findall(text.lower())
    ids = [hash_word(w) for w in words]
    mask = (1 << 61) - 1
    sample = set()
    power = pow(1_000_003, SHINGLE, mask)
    rolling = 0
    for index, value in enumerate(ids):
        rolling = (rolling * 1_000_003 + value) % mask
        if index >= SHINGLE:
            rolling = (rolling - ids[index - SHINGLE] * power) % mask
        if index >= SHINGLE - 1 and (rolling * 0x9E3779B97F4A7C15 >> 20) % SAMPLE == 0:
            sample.add(rolling)
    return digest(" ".join(words)), sample


_WORDS: dict[str, int] = {}


def hash_word(word: str) -> int:
    """A stable number of a word, remembered."""
    value = _WORDS.get(word)
    if value is None:
        value = _WORDS[word] = digest(word) >> 3
    return value


def _shingles_of(document: Document) -> tuple[int, set[int]]:
    return shingles(document.text)


def split(
    documents: list[Document], infos: dict[str, dict[str, str]], seed: str, jobs: int
) -> tuple[list[Document], list[dict[str, object]]]:
    """Training documents, and held-out records with their overlap with the training text.

    Exact duplicates go first. The held-out documents are a random choice by name plus all of ``UNSEEN``. A training
    document that repeats at least 80 % of its shingles from earlier training documents is dropped. ``overlap`` of a
    held-out document is the share of its shingles that occur in the training text or in a held-out document before it.

    The documents that are only trained on (``more``) come last. None is taken that repeats more than ``SHARED`` of the kept
    shingles which the held-out documents had to themselves, so that more training text does not wear the held-out text
    down; what it still has in common with them counts in ``overlap``.
    """
    documents = sorted(documents, key=lambda d: (d.more, digest(seed, d.source, d.path)))
    with multiprocessing.Pool(jobs) as pool:
        prints = pool.map(_shingles_of, documents, chunksize=64)
    exact: set[int] = set()
    train: list[Document] = []
    held: list[tuple[Document, set[int], bool]] = []
    seen: set[int] = set()
    own: set[int] | None = None
    for document, (number, sample) in zip(documents, prints, strict=True):
        if number in exact or not sample:
            continue
        exact.add(number)
        if document.more:
            if own is None:
                own = set[int]().union(*(s for _, s, _ in held)) - seen
            alone = document.source not in UNSEEN and len(sample & own) <= SHARED
            if alone and len(sample & seen) < 0.8 * len(sample):
                train.append(document)
                seen |= sample
            continue
        unseen = document.source in UNSEEN
        held_out = may_hold(document.source) and unit(seed, "split", document.path) < HELD_SHARE[document.domain]
        if unseen or held_out:
            held.append((document, sample, unseen))
        elif len(sample & seen) < 0.8 * len(sample):
            train.append(document)
            seen |= sample
    records: list[dict[str, object]] = []
    earlier: set[int] = set()
    for document, sample, unseen in held:
        overlap = sum(1 for s in sample if s in seen or s in earlier) / len(sample)
        earlier |= sample
        records.append({
            "domain": document.domain, "source": document.source, "licence": licence_of(document.source, infos),
            "path": document.path, "split": "unseen-source" if unseen else "seen-source",
            "overlap": round(overlap, 3), "text": cut(document.text, MAX_HELD_CHARS),
        })  # fmt: skip
    return train, records


def take(rows: Iterator[dict[str, object]], budget: int) -> list[dict[str, object]]:
    """Rows until their text fills the budget (in bytes)."""
    chosen, used = [], 0
    while used < budget:
        row = next(rows, None)
        if row is None:
            break
        chosen.append(row)
        used += len(str(row["text"]).encode())
    return chosen


def choose(held: Rows, strict: float, committed_bytes: int) -> tuple[Rows, Rows, Rows]:
    """The evaluation text, the calibration text and the task pool out of the held-out documents.

    They take documents that may be committed and repeat little of the training text. Documents of unseen sources go to
    the evaluation text and the task pool first.
    """
    evaluation, calibration, pool_rows = [], [], []
    for domain in DOMAINS:
        rows = [r for r in held if r["domain"] == domain and float(str(r["overlap"])) <= strict and may_commit(r)]
        new = iter([r for r in rows if r["split"] == "unseen-source"])
        old = iter([r for r in rows if r["split"] == "seen-source"])
        evaluation += take(new, committed_bytes // 2) + take(old, committed_bytes // 2)
        calibration += take(old, committed_bytes)
        pool_rows += [*new, *old]
    return evaluation, calibration, pool_rows

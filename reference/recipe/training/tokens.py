"""The training text as tokens: reading it, the tokenizer, encoding, batches."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
DOMAINS = ("man", "doc", "python", "rustdoc")


class RecipeError(Exception):
    """A problem to show the user as one line."""


def documents(folder: Path) -> Iterator[dict[str, Any]]:
    """The training documents of a text folder."""
    for name in ("train.jsonl.xz", "train.jsonl"):
        path = folder / name
        if path.exists():
            opener = lzma.open if name.endswith("xz") else open
            with opener(path, "rt", encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)
            return
    raise RecipeError(f"{folder} holds neither train.jsonl.xz nor tokens; build_text.py --cache writes it")


def prepare(folder: Path, out: Path, vocab: int) -> None:
    """Train the tokenizer on an equal share of each domain (not of the text that is only trained on) and encode the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    out.mkdir(parents=True, exist_ok=True)
    rows = list(documents(folder))
    # Twice the rendered Rust documentation: there is less of it than of the others.
    rows += [row for row in rows if row["domain"] == "rustdoc"]
    random.Random(0).shuffle(rows)
    used = dict.fromkeys(DOMAINS, 0)
    sample = []
    for row in rows:
        if not row.get("more") and used.get(row["domain"], 0) < 10_000_000:
            used[row["domain"]] = used.get(row["domain"], 0) + len(row["text"])
            sample.append(row["text"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    tokens: list[np.ndarray] = []
    size = 0
    for first in range(0, len(rows), 512):
        texts = [row["text"] for row in rows[first : first + 512]]
        size += sum(len(text.encode()) for text in texts)
        for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            tokens.append(np.array([0, *encoded.ids], dtype=np.uint16))
    flat = np.concatenate(tokens)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 4, "lc": 1, "lp": 1, "pb": 1}]
    with lzma.open(out / "tokens.u16.xz", "wb", format=lzma.FORMAT_XZ, filters=filters) as file:
        file.write(flat.astype("<u2").tobytes())
    info = {"documents": len(rows), "bytes": size, "tokens": int(flat.size), "bytes_per_token": size / flat.size}
    (out / "tokens.json").write_text(json.dumps(info, indent=1) + "\n")
    print(json.dumps(info), flush=True)


class Batches:
    """Batches of consecutive tokens: every epoch a new offset and a new order."""

    def __init__(self, tokens: np.ndarray, rows: int, length: int, seed: int, device: torch.device) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.int16 if tokens.max() < 2**15 else np.int32)).to(device)
        self.rows, self.length, self.device = rows, length, device
        self.random = np.random.default_rng(seed)
        self.order = np.zeros(0, dtype=np.int64)
        self.span = torch.arange(length + 1, device=device)
        self.epochs = 0

    def next(self) -> Tensor:
        """Rows of ``length + 1`` tokens."""
        while len(self.order) < self.rows:
            offset = int(self.random.integers(self.length))
            count = (len(self.tokens) - offset - 1) // self.length
            if count < 1:
                raise RecipeError("the training text is shorter than one sequence")
            fresh = self.random.permutation(count) * self.length + offset
            self.order = np.concatenate([self.order, fresh])
            self.epochs += 1
        starts, self.order = self.order[: self.rows], self.order[self.rows :]
        where = torch.from_numpy(starts).to(self.device, non_blocking=True)[:, None] + self.span
        return self.tokens[where].long()

"""Sequences decoded together: each gets, to the last bit, what it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import actsparse
from actsparse.models.sites import ModelError
from actsparse.runtime.batch import Batch
from actsparse.runtime.decode import Decoder
from actsparse.runtime.swap import sparsify, without_rules

from .test_decode import CONFIGS, VOCABULARY, random_model, random_plan, tokens_of


def alone(model: Any, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of one sequence's steps, float32 [T - prompt, V]."""
    decoder = Decoder(model, len(tokens))
    decoder.prefill(tokens[:prompt])
    return torch.stack([decoder.step(int(token)) for token in tokens[prompt:]])


def check(model: Any) -> Batch:
    """Three sequences of different lengths that come and go: one joins later, one slot is used again."""
    texts = [tokens_of(count, seed) for seed, count in enumerate((24, 17, 20, 12))]
    prompts, joins = (9, 3, 14, 5), (0, 0, 4, 11)
    expected = [alone(model, text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
    batch = Batch(model, 30, 3)
    where: dict[int, int] = {}
    done, together = set(), set()
    for step in range(60):
        for number, text in enumerate(texts):
            free = next((slot for slot in range(3) if slot not in where.values()), None)
            if number in where or number in done or step < joins[number] or free is None:
                continue
            where[number] = free
            batch.rewind(free, 0)
            batch.prefill(free, text[: prompts[number]])
        if not where:
            break
        fed = {slot: int(texts[number][batch.position(slot)]) for number, slot in where.items()}
        rows = batch.step(fed)
        together.add(len(fed))
        for (number, slot), row in zip(list(where.items()), rows, strict=True):
            at = batch.position(slot) - prompts[number]
            assert torch.equal(row, expected[number][at - 1]), (number, at)
            if batch.position(slot) == len(texts[number]):
                del where[number]
                done.add(number)
    assert done == {0, 1, 2, 3}
    assert {2, 3} <= together
    return batch


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_have_the_bits_they_have_alone(name: str, sparse: bool) -> None:
    family, options = CONFIGS[name]
    model = random_model(family, **options)
    if sparse:
        sparsify(model, random_plan(model))
    check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_half_precision_and_wide_blocks(dtype: torch.dtype, threads: int) -> None:
    """Blocks wide enough to be cut into several segments, whose sums must not move with what other rows keep."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = random_model("llama", hidden_size=128, intermediate_size=3000).to(dtype)
        check(model)
        sparsify(model, random_plan(model))
        check(model)
    finally:
        torch.set_num_threads(before)


def test_a_predictor() -> None:
    model = random_model("llama", hidden_act="relu", intermediate_size=1500)
    sparsify(model, random_plan(model, predictor=True))
    check(model)


def test_packed_weights_and_what_they_read(tiny: Callable[..., Any], tokenizer: Any, text_file: Any) -> None:
    model = tiny(vocab_size=4096)
    plan = actsparse.calibrate(
        model, tokenizer, str(text_file), method="graded", sparsity=1 - 3 / 16, tokens=512, window=64
    )
    sparsify(model, plan)
    check(model)
    with without_rules(model):
        whole = Batch(model, 8, 1)
        first = whole.prefill(0, tokens_of(4))
    batch = Batch(model, 8, 1)
    assert not torch.equal(batch.prefill(0, tokens_of(4)), first)
    for each in (whole, batch):
        each.step({0: 5})
    weights = 48 * 48 * 2 + 48 * 16 * 2 + 48 * 132 * 3
    bits = [[8 * count / weights for count in each.bytes_read()[:2]] for each in (whole, batch)]
    # Six bits in rows padded to whole groups of 64, and mantissas and scales.
    assert all(6 < every < 12 and read < 0.9 * every for every, read in zip(*bits, strict=True))


def test_rules_set_aside_leave_the_dense_model() -> None:
    model = random_model("llama")
    tokens = tokens_of(12)
    expected = alone(model, tokens, 1)
    sparsify(model, random_plan(model))
    with without_rules(model):
        decoder = Decoder(model, 12)
        decoder.prefill(tokens[:1])
    sparse = alone(model, tokens, 1)
    found = torch.stack([decoder.step(int(token)) for token in tokens[1:]])
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, sparse, atol=1e-2)


def test_a_step_reads_weights_once_for_all() -> None:
    model = random_model("llama")
    one, three = Batch(model, 8, 1), Batch(model, 8, 3)
    one.prefill(0, tokens_of(4))
    for slot in range(3):
        three.prefill(slot, tokens_of(4, slot))
    one.step({0: 5})
    three.step({0: 5, 1: 6, 2: 7})
    assert three.bytes_read() == one.bytes_read()


def test_wrong_use_is_refused() -> None:
    model = random_model("llama")
    with pytest.raises(ModelError, match="9 sequences at once, expected 1 to 8"):
        Batch(model, 8, 9)
    assert "float64" in str(Batch.obstacle(random_model("llama").double()))
    batch = Batch(model, 4, 2)
    batch.prefill(0, tokens_of(4))
    batch.prefill(1, tokens_of(2))
    with pytest.raises(ModelError, match="5 tokens do not fit"):
        batch.step({0: 1, 1: 1})
    with pytest.raises(ModelError, match=f"token is {VOCABULARY}"):
        batch.step({1: VOCABULARY})
    assert batch.position(1) == 2
    sparsify(model, random_plan(model))
    with pytest.raises(ModelError, match="sparsified or restored after"):
        batch.step({1: 1})

"""State that belongs to one generation: models, threads, sequences of a batch, later text, a decoder taken back."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import DynamicCache

from actsparse import restore, sparsify
from actsparse.models.caches import cache_of
from actsparse.models.sites import ModelError
from actsparse.runtime.decode import Decoder
from actsparse.runtime.swap import state_of

from .cases import generated, make, over, session_of, stability


def test_generations_do_not_leak_into_each_other(model):
    first, second = torch.randint(0, 64, (1, 20)), torch.randint(0, 64, (1, 33))
    sparsify(model, stability(model, 0.8))
    alone = [generated(model, first)]
    restore(model)
    sparsify(model, stability(model, 0.8))
    alone.append(generated(model, second))
    assert [generated(model, first), generated(model, second), generated(model, first)] == [*alone, alone[0]]
    # Interleaved, token by token, each on its cache.
    caches = [DynamicCache(), DynamicCache()]
    rows = [first, second]
    new = [over(model, row, cache).logits[:, -1:].argmax(-1) for row, cache in zip(rows, caches, strict=True)]
    for _ in range(8):
        rows = [torch.cat([row, token], 1) for row, token in zip(rows, new, strict=True)]
        new = [over(model, t, c).logits[:, -1:].argmax(-1) for t, c in zip(new, caches, strict=True)]
    assert [row.tolist() for row in rows] == alone
    # A static cache is the same object in every generation.
    assert generated(model, second, cache_implementation="static") == alone[1]
    assert generated(model, first, cache_implementation="static") == alone[0]


def test_two_models_and_threads_do_not_leak(model):
    other = make(1)
    tokens = torch.randint(0, 64, (1, 20))
    for one in (model, other):
        sparsify(one, stability(one, 0.8))
    alone = [generated(model, tokens), generated(other, tokens)]
    cache = cache_of(model(tokens, use_cache=True))
    assert session_of(other, cache) is None
    results = [[], []]
    prompts = [tokens, torch.randint(0, 64, (1, 27))]
    alone.append(generated(model, prompts[1]))

    def work(index):
        results[index] = [generated(model, prompts[index]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[alone[0]] * 4, [alone[2]] * 4]
    assert generated(other, tokens) == alone[1]


def test_a_failed_forward_leaves_nothing(model):
    tokens = torch.randint(0, 64, (1, 20))
    sparsify(model, stability(model))
    cache = DynamicCache()
    with pytest.raises(IndexError):
        over(model, torch.full((1, 5), 99), cache)
    assert session_of(model, cache) is None
    assert not state_of(model).prompts._runs
    assert generated(model, tokens) == generated(model, tokens)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_every_sequence_of_a_batch_has_its_own_set(model, implementation):
    short, long = torch.randint(1, 64, (1, 13)), torch.randint(1, 64, (1, 20))
    sparsify(model, stability(model, 0.7))
    alone = [generated(model, short)[0][13:], generated(model, long)[0][20:]]
    batch = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :7] = 0
    options = {"cache_implementation": "static"} if implementation == "static" else {}
    both = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    assert both[:, 20:].tolist() == alone
    cache = DynamicCache()
    over(model, batch, cache, attention_mask=mask)
    sets = [session_of(model, cache).neurons(1, sequence).tolist() for sequence in (0, 1)]
    for sequence, tokens in enumerate((short, long)):
        mine = session_of(model, cache_of(model(tokens, use_cache=True)))
        assert sets[sequence] == mine.neurons(1).tolist()
    beams = model.generate(long, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0)
    assert beams.shape == (1, 24)
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ModelError, match="the batch has 1 sequences, neurons were chosen for 2"):
        over(model, long[:, :1], cache)


def test_later_text_refreshes_the_set(model):
    tokens = torch.randint(0, 64, (1, 60))
    sparsify(model, stability(model, 0.7))
    cache = DynamicCache()
    over(model, tokens[:, :20], cache)
    first = session_of(model, cache)
    over(model, tokens[:, 20:21], cache)  # an answer of one token: decoding changes nothing
    assert session_of(model, cache) is first
    forked = copy.deepcopy(cache)
    over(model, tokens[:, 21:40], cache)
    second = session_of(model, cache)
    assert second.neurons(1).tolist() != first.neurons(1).tolist()
    assert session_of(model, forked) is first
    # Text scored in two parts without an answer in between is one text.
    parts, whole = DynamicCache(), DynamicCache()
    over(model, tokens[:, :20], parts)
    over(model, tokens[:, 20:40], parts)
    over(model, tokens[:, :40], whole)
    for layer in (1, 2):
        assert session_of(model, parts).neurons(layer).tolist() == session_of(model, whole).neurons(layer).tolist()


def test_a_decoder_that_was_taken_back(model):
    tokens = torch.randint(0, 64, (1, 40))
    sparsify(model, stability(model, 0.7))
    decoder = Decoder(model, 64)
    decoder.prefill(tokens[0, :30])
    asked = decoder._session
    first = [int(decoder.step(7).argmax()) for _ in range(3)]
    # The same prompt once more: its last token runs again, dense, and nothing changes.
    decoder.rewind(29)
    decoder.prefill(tokens[0, 29:30])
    for layer in (1, 2):
        assert decoder._session.neurons(layer).tolist() == asked.neurons(layer).tolist()
    assert [int(decoder.step(7).argmax()) for _ in range(3)] == first
    # Other text in its place: what was forgotten no longer counts, what is left does.
    decoder.rewind(20)
    decoder.prefill(tokens[0, 31:40])
    fresh = DynamicCache()
    over(model, torch.cat([tokens[:, :20], tokens[:, 31:40]], 1), fresh)
    for layer in (1, 2):
        assert decoder._session.neurons(layer).tolist() == session_of(model, fresh).neurons(layer).tolist()
    # Nothing at all in its place: there is no set for what is left.
    decoder.rewind(20)
    with pytest.raises(ModelError, match="a decode step at position 20, neurons were chosen for a prompt of 29 tokens"):
        decoder.step(7)
    with pytest.raises(ModelError, match="a decode step at position 0, neurons were chosen for a prompt of 0 tokens"):
        Decoder(model, 8).step(7)

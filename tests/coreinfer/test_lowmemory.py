"""The low-memory mode decodes what the ordinary one does."""

from __future__ import annotations

import pytest
import torch

from actsparse import sparsify
from actsparse.models.caches import cache_of
from actsparse.models.sites import ModelError
from actsparse.runtime.decode import Decoder
from actsparse.runtime.lowmemory import open_mapped

from .cases import N, generated, make, over, session_of, stability


@pytest.mark.parametrize("tied", [False, True])
def test_low_memory_decodes_the_same(tmp_path, tied):
    model = make()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 64, (1, 30))
    plan = stability(model, 0.6)
    mapped = open_mapped(str(tmp_path))
    sparsify(mapped, plan)
    sparsify(model, plan)
    torch.testing.assert_close(mapped(tokens).logits, model(tokens).logits)
    assert generated(mapped, tokens) == generated(model, tokens)
    cache = cache_of(mapped(tokens, use_cache=True))
    over(mapped, tokens[:, :1], cache)
    session = session_of(mapped, cache)
    copies = session.gathered[1, 0]
    assert copies.up.shape == (round(0.4 * N), 32)
    decoders = [Decoder(one, 40) for one in (mapped, model)]
    for decoder in decoders:
        decoder.prefill(tokens[0])
    steps = [torch.stack([decoder.step(token) for token in (1, 2, 3)]) for decoder in decoders]
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)


def test_low_memory_needs_a_checkpoint(tmp_path):
    with pytest.raises(ModelError, match="no directory with a config.json"):
        open_mapped(str(tmp_path))
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="is not a sound safetensors file"):
        open_mapped(str(tmp_path))

"""The low-memory mode decodes what the ordinary one does."""

from __future__ import annotations

import pytest
import torch

from actsparse import calibrate, restore, sparsify
from actsparse.kernels.cuda import compiler
from actsparse.models.caches import cache_of
from actsparse.models.sites import ModelError
from actsparse.runtime import swap
from actsparse.runtime.decode import Decoder
from actsparse.runtime.host import HostWeights
from actsparse.runtime.lowmemory import mapped_weights, open_mapped
from actsparse.runtime.swap import load, open_model, state_of

from .cases import N, generated, make, over, session_of, stability


def as_on_a_card(directory):
    """A mapped model whose feed-forward weights are handled as for a GPU, with the CPU in its place."""
    mapped = open_mapped(str(directory))
    mapped_weights(mapped).card = torch.device("cpu")
    return mapped


@pytest.mark.parametrize("opened", [open_mapped, as_on_a_card])
@pytest.mark.parametrize("tied", [False, True])
def test_low_memory_decodes_the_same(tmp_path, tied, opened):
    model = make()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 64, (1, 30))
    plan = stability(model, 0.6)
    mapped = opened(str(tmp_path))
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
    with pytest.raises(ModelError, match="low memory on cuda needs a plan"):
        load(str(tmp_path), device="cuda", low_memory=True)
    with pytest.raises(ModelError, match="device is 'meta'"):
        open_mapped(str(tmp_path), device="meta")


def test_weights_pass_through_two_places_in_any_order():
    host = HostWeights(torch.device("cpu"))
    given = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6), torch.randn(2, 4), torch.randn(8, 3)]
    held = [host.take_in(weight, columns=weight.shape[0] == 4) for weight in given]
    places = set()
    # A forward, one that ended early, and two that take turns.
    for at in (0, 1, 2, 3, 4, 0, 1, 0, 3, 1, 2, 2, 4, 3):
        with host.on_card(held[at]) as there:
            assert torch.equal(there, given[at])
            assert there.stride() == held[at].stride()
            places.add(there.data_ptr())
    assert len(places) == 2
    assert places.isdisjoint(weight.data_ptr() for weight in held)
    with pytest.raises(ZeroDivisionError), host.on_card(held[0]):
        raise ZeroDivisionError
    with host.on_card(held[1]) as there:  # nobody holds the lock any more
        assert torch.equal(there, given[1])
    assert all(host.holds(weight) for weight in held)
    assert not any(host.holds(weight) for weight in given)
    index = torch.tensor([1, 3])
    room = torch.empty(2, 4)
    assert host.gather(held[0], index, room) is room
    assert torch.equal(room, given[0][index])
    assert torch.equal(host.gather(held[2].t(), index), given[2].t()[index])


def test_a_second_prompt_takes_the_place_of_the_first_ones_neurons(tmp_path):
    make().save_pretrained(tmp_path)
    mapped = sparsify(as_on_a_card(tmp_path), stability(make(), 0.6))
    first, second = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(mapped, 80)
    decoder.prefill(first)
    decoder.step(1)
    copies, blocks = dict(decoder._session.gathered), dict(decoder._chosen_ffns)
    chosen = decoder._session.neurons(1)
    for text in (second, torch.cat([second, torch.tensor([1]), first])):
        decoder.rewind(decoder.resumable(0))
        decoder.prefill(text)
        assert not torch.equal(decoder._session.neurons(1), chosen)
        fresh = Decoder(mapped, 80)
        fresh.prefill(text)
        assert torch.equal(decoder.step(3), fresh.step(3))
        assert all(decoder._chosen_ffns[index] is block for index, block in blocks.items())
        for key, copy in decoder._session.gathered.items():
            assert copy.down.data_ptr() == copies[key].down.data_ptr()
            assert torch.equal(
                copy.up, mapped.model.layers[key[0]].mlp.up_proj.weight[decoder._session.neurons(key[0])]
            )


def test_restored_weights_are_the_mapped_ones(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path)
    mapped = as_on_a_card(tmp_path)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in mapped.named_parameters()}
    plan = stability(make(), 0.6)
    assert plan.prompt["layers"] == [1, 2]
    sparsify(mapped, plan)
    held = [name for name, weight in mapped.named_parameters() if state_of(mapped).host.holds(weight)]
    assert held == [f"model.layers.{i}.mlp.{name}_proj.weight" for i in (1, 2) for name in ("gate", "up", "down")]

    def check():
        for name, weight in mapped.named_parameters():
            address, values = before[name]
            assert weight.data_ptr() == address
            assert torch.equal(weight, values)

    restore(mapped)
    check()

    def full(host, weight, **options):
        raise ModelError("cannot be pinned")

    monkeypatch.setattr(swap.HostWeights, "take_in", full)
    with pytest.raises(ModelError, match="cannot be pinned"):
        sparsify(mapped, plan)
    assert state_of(mapped) is None
    check()


@pytest.mark.cuda
@pytest.mark.skipif(bool(compiler.missing()), reason=compiler.missing() or "a GPU is there")
@pytest.mark.parametrize("mode", ["stability", "griffin"])
def test_low_memory_on_a_gpu(tmp_path, mode):
    dense = make().to(torch.bfloat16)
    dense.save_pretrained(tmp_path)
    plan = (
        stability(dense, 0.5) if mode == "stability" else calibrate(dense, None, None, method="griffin", sparsity=0.5)
    )
    size = sum(weight.nbytes for weight in dense.parameters())
    resident = sparsify(open_model(str(tmp_path), device="cuda"), plan)
    mapped = sparsify(open_mapped(str(tmp_path), device="cuda"), plan)
    host = state_of(mapped).host
    held = [weight for weight in mapped.parameters() if host.holds(weight)]
    assert len(held) == 6
    assert all(weight.is_pinned() for weight in held)
    assert all(weight.is_cuda for weight in swap.resident(mapped))
    assert sum(weight.nbytes for weight in swap.resident(mapped)) + host.nbytes == size
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 64, (2, 150), generator=generator).cuda()
    torch.testing.assert_close(mapped(tokens).logits, resident(tokens).logits, rtol=0, atol=0)
    assert generated(mapped, tokens) == generated(resident, tokens)
    decoders = [Decoder(one, 200) for one in (mapped, resident)]
    assert "cuda" in decoders[0].path
    for text in (tokens[0], tokens[1], tokens[0, :7]):
        both = []
        for decoder in decoders:
            decoder.reset()
            logits = [decoder.prefill(text).clone()]
            both.append(torch.stack(logits + [decoder.step(token).clone() for token in (1, 2, 3)]))
        assert torch.equal(*both)
    restore(mapped)
    assert not any(weight.is_cuda for layer in mapped.model.layers for weight in layer.mlp.parameters())

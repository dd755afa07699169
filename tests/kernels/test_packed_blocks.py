"""Packed matrices in the fused block and the decode step: the same as their products one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from actsparse import kernels
from actsparse.kernels import cpu, planes

pytestmark = pytest.mark.skipif(bool(cpu.missing), reason=cpu.missing)


class Site:
    """A random packed matrix with its rules."""

    def __init__(self, out: int, inputs: int, stored: int = 6, *, rules: bool = True) -> None:
        codes = torch.randint(0, 2**stored, (out, inputs), dtype=torch.uint8)
        mantissa = torch.randint(128, 256, (planes.groups_of(out), inputs)).to(torch.uint8)
        scale = (torch.rand(inputs) + 0.5) / inputs**0.5
        self.packed = planes.pack(codes, mantissa, scale, torch.rand(stored // 2) / 4 + 0.9, stored)
        self.thresholds = (torch.rand(stored // 2, inputs) * 0.4).cumsum(0) if rules else None
        self.center, self.start = torch.randn(inputs) / 8, torch.randn(out) / 4

    @property
    def matrix(self) -> cpu.Matrix:
        return kernels.packed_of(self.packed, self.thresholds, self.center, self.start)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.graded_linear(x, self.packed, self.thresholds, self.center, self.start)


def block(gated: bool = True, neurons: int = 300, hidden: int = 140) -> tuple[Site | None, Site, Site]:
    torch.manual_seed(3)
    return Site(neurons, hidden) if gated else None, Site(neurons, hidden), Site(hidden, neurons)


@pytest.fixture(params=[1, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_tasks_have_products_of_their_own_and_help_each_other(threads: int) -> None:
    gate, up, down = block(neurons=2600, hidden=700)
    # Nothing is read of all but a few inputs of up: whoever has it is soon done.
    up.thresholds[:, 30:] = torch.inf
    ffn = kernels.ffn_of(gate.matrix, up.matrix, down.matrix, kernels.Rules("relu"))
    x = torch.randn(2, 700)
    assert torch.equal(cpu.gated_ffn(x, ffn), down(F.relu(gate(x)) * up(x)))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("cut", [False, True])
def test_a_block_is_its_products(gated: bool, cut: bool, rows: int) -> None:
    gate, up, down = block(gated)
    activations = ("relu", "relu" if gated else "identity")
    gate_threshold, mean, value_threshold = torch.rand(300) / 2, torch.randn(300) / 8, torch.rand(300) / 8
    cuts = {"gate_threshold": gate_threshold, "mean": mean, "value_threshold": value_threshold} if cut else {}
    rules = kernels.Rules(*activations, **cuts)
    ffn = kernels.ffn_of(gate.matrix if gate else None, up.matrix, down.matrix, rules)
    x = torch.randn(rows, 140)
    kernels.reset_stats()
    found = cpu.gated_ffn(x, ffn)
    read = kernels.stats()
    kernels.reset_stats()
    g = F.relu((gate or up)(x))
    v = g * F.relu(up(x)) if gated else g
    if cut:
        dropped = (g.abs() < gate_threshold) | (v.abs() < value_threshold)
        v = torch.where(dropped, 0.0, v - mean)
    assert torch.equal(found, down(v))
    if gated:
        assert {**kernels.stats(), "product_ns": 0} == {**read, "product_ns": 0}


def test_a_block_packed_in_part_or_with_a_predictor_is_refused() -> None:
    gate, up, down = block()
    assert gate is not None
    x = torch.randn(1, 140)
    for matrices, rules in (
        ((torch.randn(300, 140), up.matrix, down.matrix), kernels.Rules("relu")),
        ((gate.matrix, up.matrix, torch.randn(140, 300)), kernels.Rules("relu")),
        ((gate.matrix, up.matrix, down.matrix), kernels.Rules("relu", neurons=torch.tensor([1], dtype=torch.int32))),
        ((gate.matrix, up.matrix, down.matrix), kernels.Rules("relu", up_in_threshold=torch.zeros(140))),
    ):
        ffn = kernels.ffn_of(*matrices, rules)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="gated_ffn: invalid arguments"):
            cpu.gated_ffn(x, ffn)


@pytest.mark.parametrize(("hidden", "heads", "dim"), [(130, 4, 32), (520, 8, 64)])
def test_a_decode_step_reads_packed_matrices_everywhere(hidden: int, heads: int, dim: int, threads: int) -> None:
    torch.manual_seed(4)
    kv, neurons, vocabulary, length = 2, 300, 90, 6
    shapes = {"q": (heads * dim, hidden), "k": (kv * dim, hidden), "v": (kv * dim, hidden), "o": (hidden, heads * dim),
              "gate": (neurons, hidden), "up": (neurons, hidden), "down": (hidden, neurons)}  # fmt: skip
    layers = [{name: Site(*shape, rules=False) for name, shape in shapes.items()} for _ in range(2)]
    head = Site(vocabulary, hidden, 8, rules=False)
    norm, embedding = torch.ones(hidden), torch.randn(vocabulary, hidden)
    cosine, sine = torch.ones(length, dim // 2), torch.zeros(length, dim // 2)
    caches = torch.zeros(2, 2, kv, length, dim)
    entries = [
        kernels.layer_of(
            input_norm=kernels.norm_of(norm, eps=1e-5), post_norm=kernels.norm_of(norm, eps=1e-5),
            ffn=kernels.ffn_of(*(layer[n].matrix for n in ("gate", "up", "down")), kernels.Rules("silu")),
            k_cache=cache[0], v_cache=cache[1], cosine=cosine, sine=sine, **{n: layer[n].matrix for n in "qkvo"},
        )
        for layer, cache in zip(layers, caches, strict=True)
    ]  # fmt: skip
    native = kernels.decoder_of(
        entries, heads=heads, kv_heads=kv, head_dim=dim, embedding=kernels.matrix_of(embedding), lm_head=head.matrix,
        final_norm=kernels.norm_of(norm, eps=1e-5), attention_scale=dim**-0.5,
    )  # fmt: skip

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean() + 1e-5).rsqrt()

    past: list[list[torch.Tensor]] = [[], []]
    weights = sum(site.packed.out * site.packed.inputs for layer in layers for site in layer.values())
    logits = torch.empty(vocabulary)
    for position, token in enumerate([5, 17, 80]):
        kernels.reset_stats()
        kernels.decode_step(native, token, position, logits)
        assert kernels.stats()["packed_weights"] == weights + vocabulary * hidden
        h = embedding[token].clone()
        for layer, seen in zip(layers, past, strict=True):
            x = rms(h)[None]
            q = layer["q"](x).view(heads, dim)
            seen.append(torch.stack([layer[n](x).view(kv, dim) for n in "kv"]))
            keys, values = (torch.stack(seen)[:, i].repeat_interleave(heads // kv, 1).transpose(0, 1) for i in range(2))
            share = (keys @ q[..., None] * dim**-0.5).softmax(1)
            h = h + layer["o"]((share * values).sum(1).reshape(1, -1))[0]
            x = rms(h)[None]
            h = h + layer["down"](F.silu(layer["gate"](x)) * layer["up"](x))[0]
        expected = head(rms(h)[None])[0]
        # A last bit of an activation moves some coefficients by one.
        assert (logits - expected).norm() < 0.01 * expected.norm()

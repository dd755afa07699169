"""The CUDA decode step against the model's own modules: emulated here, on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from actsparse.calibration.pack import Settings, pack
from actsparse.kernels.cuda import compiler, tiles
from actsparse.kernels.cuda import decoder as cuda_decoder
from actsparse.measure.bench.run import tolerance
from actsparse.runtime import decode, stepping, swap
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.packed import PackedLinear
from actsparse.runtime.prompts import read
from tests import cuda_emulator


class Emulated:
    """The CUDA decoder's functions, with steps run by the emulator for so many multiprocessors."""

    def __init__(self, processors: int) -> None:
        self._machine = replace(cuda_emulator.MACHINE, processors=processors)

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda_decoder, name)

    def decoder_of(self, layers: Any, **options: Any) -> Any:
        return cuda_decoder.decoder_of(layers, machine=self._machine, run=cuda_emulator.run, **options)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "gpu":
        if compiler.missing():
            pytest.skip(compiler.missing())
        return "cuda"
    if cuda_emulator.CXX is None:
        pytest.skip("no C++ compiler to emulate the kernels with")
    # Few blocks read a head's cache in many lots, more share it.
    processors = {"mistral": 3, "qwen2": 3}.get(request.node.callspec.params.get("family"), 9)
    monkeypatch.setattr(decode, "_kernels_for", lambda weight: Emulated(processors))
    return "cpu"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_steps_agree_with_the_modules(device: str, family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family, torch.bfloat16, intermediate_size=136).to(device)
    decoder = decode.Decoder(model, 160)
    # Enough positions that several blocks share a head's cache.
    prompt = torch.randint(4096, (150,), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache()
    with torch.no_grad():
        read(model, prompt[None].to(device), cache, None)
    decoder.prefill(prompt)
    for token in (5, 9, 11):
        with torch.no_grad():
            output = read(model, torch.tensor([[token]], device=device), cache, None)
        want = output.logits[0, -1].float()
        got = decoder.step(token).clone()
        assert float((got - want).norm() / want.norm()) <= tolerance(torch.bfloat16, 2, sparse=False)
    decoder.rewind(152)
    assert torch.equal(decoder.step(11), got)


def in_tiles(model: Any) -> Any:
    """The packed matrices of a model on the CPU in the order that a GPU reads: only the emulator takes that."""
    for module in model.modules():
        if isinstance(module, GradedLinear | PackedLinear) and not isinstance(module.packed, tiles.Tiles):
            module.packed = tiles.tiles_of(module.packed)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # a file's mapping is not aligned
    return model


def in_turn(model: Any) -> Any:
    """Graded columns read to 0, 1, 2 ... planes in turn: whatever rounding does to an input moves no decision."""
    for module in model.modules():
        if isinstance(module, GradedLinear):
            levels = len(module.level_threshold)
            depth = torch.arange(module.in_features) % (levels + 1)
            within = torch.arange(levels)[:, None] < depth
            module.level_threshold.copy_(torch.where(within, 0.0, float("inf")))
    return model


@pytest.mark.parametrize("plan", ["graded", "every plane"])
def test_packed_models_take_the_same_steps(
    device: str, plan: str, tmp_path: Path, tiny: Callable[..., Any], tokenizer: Any, text_file: Path
) -> None:
    source, packed = tmp_path / "dense", tmp_path / "packed"
    tiny("llama", torch.bfloat16, intermediate_size=136).save_pretrained(source)
    tokenizer.save_pretrained(source)
    pack(str(source), packed, Settings(bits_read=3.0, text=str(text_file), tokens=1024))
    model = swap.open_model(str(packed), device=device)
    model = in_turn(model) if plan == "graded" else swap.restore(model)
    model = in_tiles(model) if device == "cpu" else model
    decoder = decode.Decoder(model, 64)
    assert "packed" in decoder.path
    prompt = torch.randint(4096, (20,), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache()
    with torch.no_grad():
        read(model, prompt[None].to(device), cache, None)
    decoder.prefill(prompt)
    for token in (5, 9, 11):
        with torch.no_grad():
            want = read(model, torch.tensor([[token]], device=device), cache, None).logits[0, -1].float()
        got = decoder.step(token).clone()
        assert float((got - want).norm() / want.norm()) <= tolerance(torch.bfloat16, 2, sparse=False)
    decoder.rewind(22)
    assert torch.equal(decoder.step(11), got)


def test_packed_layers_after_plain_ones_are_refused(
    tmp_path: Path, tiny: Callable[..., Any], tokenizer: Any, text_file: Path
) -> None:
    source, packed = tmp_path / "dense", tmp_path / "packed"
    model = tiny("llama", torch.bfloat16, intermediate_size=136)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    pack(str(source), packed, Settings(bits_read=3.0, text=str(text_file), tokens=1024))
    other = in_tiles(swap.restore(swap.open_model(str(packed))))
    assert stepping.obstacle_of(other, cuda=True) is None
    layers = model.get_decoder().layers
    layers[1] = other.get_decoder().layers[1]
    want = "layer 1 is packed and layer 0 before it is not, which the CUDA decode step does not take"
    assert stepping.obstacle_of(model, cuda=True) == want
    layers[0], layers[1] = other.get_decoder().layers[0], layers[0]
    assert stepping.obstacle_of(model, cuda=True) is None

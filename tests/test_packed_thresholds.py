"""Published methods on packed weights: one level, exact against the same rules on the unpacked weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import actsparse
from actsparse.calibration.pack import Settings, pack
from actsparse.kernels import planes
from actsparse.measure.bench import run as bench
from actsparse.measure.evaluate import compare_perplexity
from actsparse.models import opening, sites, text
from actsparse.plan import PlanError
from actsparse.runtime.packed_ffn import PackedFFN
from actsparse.runtime.swap import open_model, restore, sparsify, state_of

WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_attention_heads": 4}


@pytest.fixture
def dense(tiny: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Any:
    path = tmp_path / "dense"
    tiny("llama", torch.float32, **WIDE).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return opening.open_model(str(path))


@pytest.fixture(params=[4, 8])
def packed(request: Any, dense: Any, text_file: Path, tmp_path: Path) -> Any:
    """Every plane, always; and no center."""
    settings = Settings(bits_stored=request.param, bits_read=None, text=str(text_file), tokens=512)
    plan = pack(str(tmp_path / "dense"), tmp_path / "packed", settings)
    assert (plan.method, plan.rules) == ("plain", {})
    return open_model(str(tmp_path / "packed"))


def unpacked(dense: Any, packed: Any) -> Any:
    """The dense model with the weights that the packed one reads."""
    restore(packed)
    for layer, other in zip(sites.layers_of(dense), sites.layers_of(packed), strict=True):
        for name, _ in layer.family.projections:
            product = other.product(name)
            assert not bool(product.center.any())
            layer.linear(name).weight.data = planes.unpack(product.packed)
    sites.set_fingerprint(dense, sites.fingerprint(packed))
    dense.get_output_embeddings().weight.data = planes.unpack(packed.get_output_embeddings().packed)
    return dense


@pytest.mark.parametrize("method", ["teal", "wina", "chess", "cats"])
def test_methods_do_on_packed_weights_what_they_do_on_unpacked_ones(
    dense: Any, packed: Any, tokenizer: Any, text_file: Path, method: str
) -> None:
    options = {"tokens": 512, "window": 64}
    plan = actsparse.calibrate(dense, tokenizer, str(text_file), method=method, sparsity=0.5, **options)
    windows = text.load_windows(str(text_file), tokenizer, **options)
    found = compare_perplexity(packed, plan, windows, reference=dense)
    other = compare_perplexity(unpacked(dense, packed), plan, windows)
    assert found.sparse.ppl == pytest.approx(other.sparse.ppl, rel=2e-3)
    assert found.sparsity.keys() == other.sparsity.keys()
    for site, value in found.sparsity.items():
        assert value == pytest.approx(other.sparsity[site], abs=0.01)
    assert found.weights_read.bits_read < 0.9 * found.weights_read.bits_stored

    sparsify(packed, plan)
    assert any(isinstance(module, PackedFFN) for module in packed.modules()) == (method in ("chess", "cats"))
    # Site by site in a decode step: it refuses what differs from the modules.
    row = bench.measure(packed, [plan], bench.Settings(8, 2, 1, llama_cpp=False), say=lambda line: None).rows[-1]
    assert (row.name, row.path) == (method, "native")
    assert row.bits_read is not None
    assert row.bits_read < 0.95 * found.weights_read.bits_stored
    restore(packed)
    assert state_of(packed) is None
    assert not any(isinstance(module, actsparse.runtime.layers.SparseModule) for module in packed.modules())


def test_columns_that_are_skipped_are_not_read(dense: Any, packed: Any, tokenizer: Any, text_file: Path) -> None:
    """What TEAL never keeps at a threshold of infinity may be anything."""
    plan = actsparse.calibrate(dense, tokenizer, str(text_file), method="chess", sparsity=0.5, tokens=512, window=64)
    rules = {name: rule.clone() for name, rule in plan.rules.items()}
    rules["layers.0.ffn.threshold"][:100] = torch.inf
    plan = actsparse.Plan(**{**vars(plan), "rules": rules})
    sparsify(packed, plan)
    x = torch.randn(1, 1, 128)
    block = sites.layers_of(packed)[0].ffn
    with torch.no_grad():
        want = block(x)
        down = sites.layers_of(packed)[0].product("down").packed
        for plane in (down.mantissa, *down.planes):
            plane[:100] = 255 - plane[:100]
        assert torch.equal(block(x), want)


def test_prompt_tokens_outside_the_scope_read_every_plane(
    dense: Any, packed: Any, tokenizer: Any, text_file: Path
) -> None:
    plan = actsparse.calibrate(dense, tokenizer, str(text_file), method="chess", sparsity=0.5, tokens=512, window=64)
    tokens = torch.arange(5, 25)[None]
    restore(packed)
    with torch.no_grad():
        every = packed(tokens).logits[0]
        sparsify(packed, plan, scope="last_half")
        half = packed(tokens).logits[0]
    torch.testing.assert_close(half[:10], every[:10], rtol=1e-4, atol=1e-4)
    assert float((half[10:] - every[10:]).norm()) > 0.01 * float(every[10:].norm())


def test_what_packed_weights_cannot_do_is_refused(
    dense: Any, packed: Any, tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    plan = actsparse.calibrate(dense, tokenizer, str(text_file), method="teal", sparsity=0.5, tokens=512, window=64)
    pack(str(tmp_path / "dense"), tmp_path / "graded", Settings(text=str(text_file), tokens=512, bits_read=4))
    graded = open_model(str(tmp_path / "graded"))
    with pytest.raises(PlanError, match="was packed for deviations from a center, the plan of method teal skips by"):
        sparsify(graded, plan)
    shapes = {"a": (4, 128), "b": (192, 4), "bias": (192,)}
    rules = {f"layers.0.ffn.predictor_{part}": torch.zeros(shape) for part, shape in shapes.items()}
    svdp = actsparse.Plan(**{**vars(plan), "method": "svdp", "rules": rules})
    with pytest.raises(PlanError, match="plan of method svdp has a predictor for layer 0: its weights are packed"):
        sparsify(packed, svdp)

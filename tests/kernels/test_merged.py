"""Gate and up whose activation and down are somebody else's: against float64, NaN in every row of up that must not be read.

Shape letters: B rows, H hidden, N neurons, R rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actsparse import kernels
from actsparse.kernels import Rules, merged
from tests import cuda_emulator

H, N, R = 72, 168, 16


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rules_of(name: str, dtype: torch.dtype) -> Rules:
    biases = {"gate_bias": random(N, seed=5), "up_bias": random(N, seed=6)}
    if name == "cats":
        return Rules("silu", gate_threshold=random(N, seed=7).abs() * 0.5, **biases)
    predictor: dict[str, Any] = {"predictor_a": random(R, H, seed=8, dtype=dtype), "predictor_bias": random(N, seed=9)}
    predictor["predictor_b"] = random(N, R, seed=10, dtype=dtype)
    return Rules("relu", gate_threshold=torch.full((N,), 1e-30), **predictor, **biases)


def problem(name: str, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Rules]:
    gate, up = (random(N, H, seed=seed, dtype=dtype) / H**0.5 for seed in (2, 3))
    return random(rows, H, seed=1, dtype=dtype), gate, up, rules_of(name, dtype)


def wanted(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, rules: Rules) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and which of its halves' values [B, N] are kept."""
    double = {
        key: getattr(rules, key).double() if getattr(rules, key) is not None else None
        for key in ("predictor_a", "predictor_b", "predictor_bias", "gate_bias", "up_bias")
    }
    y = merged.masked(
        x.double(), gate.double(), up.double(), Rules(rules.activation, gate_threshold=rules.gate_threshold, **double)
    )
    return y, y[:, N:] != 0


def same(got: torch.Tensor, want: torch.Tensor, kept: torch.Tensor, rules: Rules) -> None:
    """Up everywhere; gate wherever it can matter: a predictor leaves out the gates of the neurons that it drops."""
    tolerance = 30 * torch.finfo(got.dtype).eps
    assert bool(torch.isfinite(got).all())
    torch.testing.assert_close(got[:, N:].double(), want[:, N:], rtol=tolerance, atol=tolerance)
    assert bool((got[:, N:][~kept] == 0).all())
    matters = kept if rules.predictor_a is not None else torch.ones_like(kept)
    torch.testing.assert_close(got[:, :N][matters].double(), want[:, :N][matters], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_one_product_with_both_is_masked_alike(rows: int) -> None:
    x, gate, up, rules = problem("cats", rows, torch.float32)
    want, kept = wanted(x, gate, up, rules)
    assert rules.gate_bias is not None
    assert rules.up_bias is not None
    bias = torch.cat([rules.gate_bias, rules.up_bias])
    same(merged.on_cpu_whole(x, torch.cat([gate, up]), bias, rules), want, kept, rules)


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
@pytest.mark.parametrize("name", ["cats", "svdp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_nobody_keeps_are_not_read(name: str, rows: int, dtype: torch.dtype) -> None:
    x, gate, up, rules = problem(name, rows, dtype)
    want, kept = wanted(x, gate, up, rules)
    assert 0.1 < float(kept.float().mean()) < 0.9
    if rows <= kernels.MAX_BATCH:
        # A margin around the threshold would differ between types: only what is far from being kept is poisoned.
        y = merged.masked(
            x.float(), gate.float(), up.float(), rules if dtype == torch.float32 else rules_of(name, torch.float32)
        )
        up[~((y[:, N:] != 0) | kept).any(0)] = float("nan")
    if dtype == torch.float32:
        same(kernels.merged.gate_up(x, gate, up, rules), want, kept, rules)
    else:
        got = kernels.merged.gate_up(x, gate, up, rules)
        differ = (got[:, N:] != 0) != kept
        assert float(differ.float().mean()) < 0.02  # gates at their threshold, which 16 bits round across it
        torch.testing.assert_close(got[:, N:][~differ].double(), want[:, N:][~differ], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["cats", "svdp"])
def test_cuda_kernels_emulated(name: str, rows: int) -> None:
    if cuda_emulator.CXX is None:
        pytest.skip("no C++ compiler to emulate the kernels with")
    x, gate, up, rules = problem(name, rows, torch.bfloat16)
    want, kept = wanted(x, gate, up, rules)
    up[~kept.any(0)] = float("nan")
    got = merged.on_cuda(x, gate, up, rules, machine=cuda_emulator.MACHINE, run=cuda_emulator.run)
    differ = (got[:, N:] != 0) != kept
    assert float(differ.float().mean()) < 0.02
    torch.testing.assert_close(got[:, N:][~differ].double(), want[:, N:][~differ], rtol=0.02, atol=0.02)


def test_what_does_not_fit_is_named() -> None:
    x, gate, up, rules = problem("cats", 1, torch.float32)
    with pytest.raises(ValueError, match=r"do not fit"):
        kernels.merged.gate_up(x, gate[:-1], up, rules)

"""Rounding to nested codes: every level is close to the best its bits allow, and what cannot be rounded is refused."""

from __future__ import annotations

import pytest
import torch

from actsparse import kernels
from actsparse.kernels import planes
from actsparse.methods.rounding import each_block, residuals, round_columns, round_nearest


@pytest.mark.parametrize("stored", planes.STORED)
def test_errors_fall_with_every_level(stored: int) -> None:
    weight = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    packed = round_nearest(weight, stored)
    errors = (residuals(weight, packed) / weight.square().sum(0)).mean(1)
    assert errors[0] == 1
    # Relative squared errors of normal values: uniform mid-rise codes reach these with room to spare.
    for index, bound in enumerate((0.17, 0.018, 0.0015, 0.0002)[: stored // 2]):
        assert errors[index + 1] < bound


def test_gains_are_least_squares() -> None:
    weight = torch.randn(128, 9, generator=torch.Generator().manual_seed(1))
    packed = round_nearest(weight, 6)
    for level in packed.levels:
        value = planes.unpack(packed, level)
        torch.testing.assert_close((value * weight).sum(), value.square().sum(), rtol=1e-4, atol=1e-5)


def test_residuals_weigh_outputs() -> None:
    weight, sensitivity = torch.randn(70, 5), torch.rand(70)
    packed = round_nearest(weight, 4)
    expected = ((weight - planes.unpack(packed, 4)).square() * sensitivity[:, None]).sum(0)
    torch.testing.assert_close(residuals(weight, packed, sensitivity)[2], expected)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(65, 40).to(torch.bfloat16)
    whole = round_nearest(weight, 6)
    monkeypatch.setattr("actsparse.methods.rounding._BLOCK", 65 * 7)
    parts = round_nearest(weight, 6)
    assert torch.equal(planes.codes_of(whole), planes.codes_of(parts))
    torch.testing.assert_close(whole.gain, parts.gain)


def test_a_gpu_is_given_few_blocks_and_unpacks_those_columns_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = each_block(lambda block: (block.start, block.stop), 14336, 4096, torch.device("cuda"))
    assert len(blocks) <= 2
    assert blocks[0][0] == 0
    assert blocks[-1][1] == 4096
    packed, seen, unpack = round_nearest(torch.randn(64, 40), 6), [], planes.unpack
    monkeypatch.setattr(planes, "unpack", lambda some, *rest: seen.append(some.inputs) or unpack(some, *rest))
    monkeypatch.setattr(kernels, "_matrix_for", lambda *arguments: None)  # as where only the oracle runs
    monkeypatch.setattr(kernels, "_matrices", {})
    got = kernels.unpack_columns(packed, 7, 12, torch.float32, 4)
    assert seen == [5]
    assert torch.equal(got, unpack(packed, 4)[:, 7:12].T)


def test_columns_of_zeros_and_outliers_are_sound() -> None:
    weight = torch.randn(64, 3)
    weight[:, 1] = 0
    weight[5, 2] = 1e4
    packed = round_nearest(weight, 6)
    found = planes.unpack(packed)
    assert not found[:, 1].any()
    assert float(found[5, 2]) == pytest.approx(1e4, rel=0.02)


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = torch.randn(10, 4)
    weight[7, 2] = torch.nan
    with pytest.raises(ValueError, match=r"the weight at \[7, 2\] is nan"):
        round_columns(weight, 6)
    with pytest.raises(ValueError, match="5 bits stored"):
        round_columns(weight[:5], 5)

"""Rounding of a block of columns and coordinate descent: C++ and CUDA as the oracle, a cost that never rises, any threads.

Shape letters: O outputs, I inputs, L levels.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from actsparse import kernels
from actsparse.kernels import cpu, planes, rounding
from actsparse.methods import feedback
from actsparse.methods.feedback import curvature_of, round_with_feedback

I, O = 90, 192  # noqa: E741
PROMPTS = 0.3


@pytest.fixture(params=cpu.available_isas() if not cpu.missing else ())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.select_isa(request.param)
    yield request.param
    kernels.select_isa(before)


def problem(stored: int, seed: int = 0) -> tuple[rounding.Columns, torch.Tensor, torch.Tensor]:
    """Columns, a Hessian of correlated inputs, weights [I, O]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, I, generator=g) @ torch.randn(I, I, generator=g) / I**0.5
    shares = torch.rand(1 + stored // 2, I, generator=g)
    half_range = 1 + torch.rand(I, planes.groups_of(O), generator=g)
    gain = 0.9 + 0.1 * torch.rand(stored // 2, generator=g)
    columns = rounding.Columns(stored, half_range, shares / shares.sum(0), gain)
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(I)
    return columns, hessian, 0.5 * torch.randn(I, O, generator=g)


def cost(columns: rounding.Columns, hessian: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The cost of every output, float64 [O], from the format's own values at every level."""
    parts = [columns.errors(i, weight[i], codes[i]) for i in range(len(weight))]
    as_read, whole, square = (torch.stack(part).double() for part in zip(*parts, strict=True))
    h = hessian.double()
    own = h.diagonal().unsqueeze(1)
    decoding = (as_read * (h @ as_read)).sum(0) + (own * (square - as_read.square())).sum(0)
    return (1 - PROMPTS) * decoding + PROMPTS * (whole * (h @ whole)).sum(0)


def rounded(
    backend: rounding.Backend, columns: rounding.Columns, hessian: torch.Tensor, weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What a backend makes of two blocks that are not the whole, codes before descent too."""
    codes, rest = torch.zeros(I, O, dtype=torch.uint8), weight.clone()
    factor = 0.05 * hessian.triu(1)
    found = {"passed": backend.round_block(columns, 5, 70, factor, weight, rest, codes), "rest": rest}
    found["rounded"] = codes.clone()
    found["as_read"], found["whole"] = backend.code_errors(columns, weight, codes)
    found["stood"] = torch.zeros_like(weight)
    backend.descend_block(
        columns, 11, 83, hessian, PROMPTS, weight, codes, found["as_read"], found["whole"], found["stood"]
    )
    return {**found, "codes": codes}


@pytest.mark.parametrize("stored", [4, 6, 8])
def test_the_library_does_what_the_oracle_does(isa: str, stored: int) -> None:
    columns, hessian, weight = problem(stored)
    expected = rounded(rounding.Oracle(), columns, hessian, weight)
    found = rounded(cpu.Rounder(), columns, hessian, weight)
    # Outputs are independent: one in which a value lay within rounding of a step goes its own way from there.
    same = (expected["codes"] == found["codes"]).all(0) & (expected["rounded"] == found["rounded"]).all(0)
    assert float(same.float().mean()) > 0.95
    for name in ("passed", "rest", "as_read", "whole", "stood"):
        assert torch.allclose(expected[name][:, same], found[name][:, same], atol=1e-5), name


@pytest.mark.parametrize("stored", [4, 8])
def test_what_codes_leave_is_what_unpacking_leaves(stored: int) -> None:
    columns, _, weight = problem(stored)
    codes = torch.randint(0, 2**stored, (I, O), dtype=torch.uint8)
    scale = torch.ones(I, dtype=torch.bfloat16)
    mantissa = torch.randint(1, 256, (planes.groups_of(O), I), dtype=torch.uint8)
    packed = planes.pack(codes.T, mantissa, scale, columns.gain, stored)
    columns = rounding.Columns(stored, (mantissa.T / 255).contiguous(), columns.shares, columns.gain)
    off = torch.stack([weight - planes.unpack(packed, level).T for level in (0, *packed.levels)])
    for backend in (rounding.Oracle(), rounding.backend_of(weight.device)):
        as_read, whole = backend.code_errors(columns, weight, codes)
        assert torch.allclose(as_read, (columns.shares.unsqueeze(2) * off).sum(0), atol=1e-6)
        assert torch.allclose(whole, off[-1], atol=1e-6)


@pytest.mark.parametrize("stored", [4, 6, 8])
def test_the_cost_never_rises(stored: int) -> None:
    columns, hessian, weight = problem(stored)
    codes = torch.stack([columns.nearest(i, weight[i]) for i in range(I)]).to(torch.uint8)
    backend = rounding.backend_of(weight.device)
    as_read, whole = backend.code_errors(columns, weight, codes)
    costs = [cost(columns, hessian, weight, codes)]
    for _ in range(3):
        for begin in range(0, I, 32):
            backend.descend_block(
                columns, begin, min(begin + 32, I), hessian, PROMPTS, weight, codes, as_read, whole, torch.empty(I, O)
            )
            costs.append(cost(columns, hessian, weight, codes))
            assert bool((costs[-1] <= costs[-2] * (1 + 1e-5)).all())
    assert float(costs[3].sum()) < 0.97 * float(costs[0].sum())
    # Errors have followed the codes.
    for kept, anew in zip((as_read, whole), rounding.Oracle().code_errors(columns, weight, codes), strict=True):
        assert torch.allclose(kept, anew, atol=1e-5)


def test_a_column_takes_the_best_of_the_codes_around() -> None:
    """One column, so that a search of all codes is the answer: it lies within reach."""
    columns, hessian, weight = problem(6)
    hessian = torch.eye(I)
    codes = torch.full((I, O), 31, dtype=torch.uint8)
    backend = rounding.backend_of(weight.device)
    backend.descend_block(
        columns, 0, I, hessian, 1.0, weight, codes, *backend.code_errors(columns, weight, codes), torch.empty(I, O)
    )
    every = torch.arange(64).unsqueeze(1).expand(-1, O)
    for i in range(I):
        off = columns.errors(i, weight[i], every)[1].abs()
        assert torch.allclose(columns.errors(i, weight[i], codes[i])[1].abs(), off.amin(0), atol=1e-6)


def test_the_factor_of_feedback() -> None:
    """H = (F + 1) D (F + 1)^T, what arXiv:2307.13304 rounds with."""
    _, hessian, _ = problem(6)
    curvature = curvature_of(hessian)
    factor = curvature.feedback + torch.eye(I)
    assert bool((curvature.feedback.tril() == 0).all())
    inverse = torch.linalg.inv(factor.double())
    middle = inverse @ curvature.hessian.double() @ inverse.T
    assert float((middle - middle.diagonal().diag()).abs().max()) < 1e-4 * float(middle.diagonal().max())
    assert bool((hessian.diagonal()[curvature.order].diff() <= 0).all())


def test_descent_comes_after_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    columns, hessian, weight = problem(6)
    curvature = curvature_of(hessian)

    def total(packed: planes.Packed) -> float:
        half_range = packed.mantissa.float() * (packed.scale.float() / 255).unsqueeze(1)
        as_packed = rounding.Columns(6, half_range, columns.shares, packed.gain)
        damped = curvature.hessian[curvature.order.argsort()][:, curvature.order.argsort()]
        return float(cost(as_packed, damped, weight, planes.codes_of(packed).T.contiguous()).sum())

    def rounded_so() -> planes.Packed:
        return round_with_feedback(weight.T, 6, curvature, columns.shares, PROMPTS)[0]

    found = total(rounded_so())
    monkeypatch.setattr(rounding, "backend_of", lambda device: Still())
    assert found < 0.97 * total(rounded_so())


class Still(rounding.Oracle):
    """Leaves codes as feedback made them."""

    def descend_block(self, *arguments: object) -> None:
        pass


def test_codes_do_not_hang_on_the_number_of_threads() -> None:
    g = torch.Generator().manual_seed(0)
    inputs, outputs = 200, 400
    x = torch.randn(500, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)
    weight, shares = torch.randn(outputs, inputs, generator=g), torch.full((4, inputs), 0.25)
    curvature, before = curvature_of(x.T @ x / len(x)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            packed, stood = round_with_feedback(weight, 6, curvature, shares, 0.5)
            found.append((planes.codes_of(packed), packed.mantissa, packed.gain, stood))
    finally:
        torch.set_num_threads(before)
    assert feedback._OUTPUTS["cpu"] < outputs  # several pieces
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))

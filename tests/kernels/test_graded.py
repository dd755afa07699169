"""Packed products: bit for bit the whole-number arithmetic that docs/format.md states, and close to the format's oracle."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from actsparse import kernels
from actsparse.kernels import cpu, many, planes

pytestmark = pytest.mark.skipif(bool(cpu.missing), reason=cpu.missing)
f32 = np.float32


@pytest.fixture(params=kernels.available_isas() if not cpu.missing else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.select_isa(request.param)
    yield request.param
    kernels.select_isa(before)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Case:
    """A packed matrix with the rules that decide what is read of it, and activations."""

    def __init__(self, out: int, inputs: int, stored: int, rows: int = 1, seed: int = 0, outlier: float = 1.0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.codes = torch.randint(0, 2**stored, (out, inputs), generator=g, dtype=torch.uint8)
        mantissa = torch.randint(1, 256, (planes.groups_of(out), inputs), generator=g).to(torch.uint8)
        scale, gain = torch.rand(inputs, generator=g) + 0.1, torch.rand(stored // 2, generator=g) + 0.5
        self.packed = planes.pack(self.codes, mantissa, scale, gain, stored)
        self.thresholds = (torch.rand(stored // 2, inputs, generator=g) * 0.9).cumsum(0)
        self.center = torch.randn(inputs, generator=g) / 4
        self.start = torch.randn(out, generator=g)
        self.x = torch.randn(rows, inputs, generator=g)
        self.x[:, :: max(inputs // 3, 1)] *= outlier

    def native(self, x: torch.Tensor | None = None) -> torch.Tensor:
        matrix = cpu.packed_of(self.packed, self.thresholds, self.center, self.start)
        return cpu.graded_linear(self.x if x is None else x, matrix)

    def oracle(self, x: torch.Tensor | None = None, packed: planes.Packed | None = None) -> torch.Tensor:
        x = self.x if x is None else x
        return planes.linear(x.double(), packed or self.packed, self.thresholds, self.center, self.start)


def unit_of(magnitudes: np.ndarray, kept: int) -> np.float32:
    """The unit of a row's coefficients: sums of 64 columns each in sixteen lanes, joined pairwise."""
    total = f32(0)
    for block in np.split(np.pad(magnitudes, (0, -len(magnitudes) % 64)), -(-len(magnitudes) // 64)):
        lanes = np.zeros(16, f32)
        for part in block.reshape(4, 16):
            lanes = lanes + part
        for half in (8, 4, 2, 1):
            lanes[:half] += lanes[half : 2 * half]
        total = total + lanes[0]
    mean = total / f32(kept) * (f32(3) / f32(127)) if kept else f32(0)
    return max(mean, magnitudes.max() / f32(16000), f32(1e-30))


def whole_numbers(case: Case) -> np.ndarray:
    """y by the documented arithmetic."""
    packed, stored = case.packed, case.packed.stored
    scale, gain = packed.scale.float().numpy(), packed.gain.numpy()
    mantissa = packed.mantissa.numpy().astype(np.int64)  # [I, G]
    rows = []
    for x in case.x.numpy():
        v = x - case.center.numpy()
        level = (~(np.abs(v) < case.thresholds.numpy())).cumprod(0).sum(0)
        step = np.where(level > 0, scale * gain[np.maximum(level - 1, 0)], f32(0))
        a = v * step
        unit = unit_of(np.abs(a), int((level > 0).sum()))
        multiplier = np.rint(a * (f32(32768) / (f32(255) * unit))).astype(np.int64)
        coefficient = (mantissa * multiplier[:, None] + (1 << 14)) >> 15  # [I, G]
        left = stored - 2 * level
        codes = case.codes.numpy().astype(np.int64) >> left << left  # [O, I]
        doubled = 2 * codes + (1 << left) - (1 << stored)
        groups = np.arange(packed.out) // 64
        sums = (coefficient.T[groups] * np.where(level > 0, doubled, 0)).sum(1)
        assert np.abs(sums).max(initial=0) < 2**31
        rows.append(sums.astype(f32) * (unit / f32(2**stored)) + case.start.numpy())
    return np.stack(rows)


SHAPES = [(1, 1), (64, 3), (65, 64), (200, 65), (256, 130), (520, 77), (1100, 200), (2048, 70), (1, 300), (16640, 66)]


@pytest.mark.parametrize("stored", planes.STORED)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_every_bit_is_that_of_the_documented_arithmetic(isa: str, out: int, inputs: int, stored: int) -> None:
    case = Case(out, inputs, stored, rows=2, seed=out + stored)
    assert np.array_equal(case.native().numpy(), whole_numbers(case))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_rows_have_their_own_levels(isa: str, threads: int, rows: int, outlier: float) -> None:
    case = Case(700, 500, 6, rows, seed=rows, outlier=outlier)
    expected = whole_numbers(case)
    assert np.array_equal(case.native().numpy(), expected)
    one_by_one = torch.cat([case.native(case.x[b : b + 1]) for b in range(rows)])
    assert np.array_equal(one_by_one.numpy(), expected)


def test_many_tasks_share_large_matrices(isa: str, threads: int) -> None:
    for out, inputs in ((11264, 200), (300, 4000)):  # several strips of outputs to a block, many blocks
        case = Case(out, inputs, 4, rows=2)
        assert np.array_equal(case.native().numpy(), whole_numbers(case))


@pytest.fixture
def pages() -> Iterator[None]:
    before = cpu.pages_followed()
    yield
    cpu.select_pages(before)


@pytest.mark.parametrize("stored", planes.STORED)
def test_lists_are_as_long_as_pages_are_followed(isa: str, pages: None, threads: int, stored: int) -> None:
    # Lists of 8 to 64 columns, which end inside a block and at the end of the matrix, and of a whole and a part of a strip.
    for out, inputs in ((300, 1000), (8192, 213), (33100, 70)):
        case = Case(out, inputs, stored, rows=2, seed=out)
        expected = whole_numbers(case)
        for followed in (0, 1, 40, 100, 256):
            cpu.select_pages(followed)
            assert np.array_equal(case.native().numpy(), expected)
    for wrong in (-1, 257):
        with pytest.raises(ValueError, match=f"{wrong} pages, expected 0 to 256"):
            cpu.select_pages(wrong)


@pytest.mark.parametrize(("out", "inputs", "followed"), [(32000, 128, 0), (65024, 64, 256)])
def test_no_strip_is_longer_than_its_room(isa: str, pages: None, out: int, inputs: int, followed: int) -> None:
    # 125 and 254 tiles, in two strips of at most 64 and 128; one thread has the longest.
    case = Case(out, inputs, 4, outlier=100)
    case.thresholds.zero_()
    cpu.select_pages(followed)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = case.native()
    torch.set_num_threads(before)
    assert np.array_equal(found.numpy(), whole_numbers(case))


@pytest.mark.parametrize("stored", planes.STORED)
def test_planes_that_are_not_needed_are_not_read(isa: str, stored: int) -> None:
    case = Case(330, 140, stored, rows=3)
    before = case.native()
    deepest = planes.levels_read(case.x, case.thresholds, case.center).amax(0)
    assert set(deepest.tolist()) == set(range(stored // 2 + 1))
    for p, plane in enumerate(case.packed.planes):
        plane[deepest <= p] = ~plane[deepest <= p]
    case.packed.mantissa[deepest == 0] = 255
    assert torch.equal(case.native(), before)
    plane[deepest > p] = ~plane[deepest > p]
    assert not torch.equal(case.native(), before)


def bound(case: Case, x: torch.Tensor) -> torch.Tensor:
    """docs/format.md: half a unit, and a 2^-9 of the multiplier's, for each coefficient, times what the code stands for."""
    v = x.double() - case.center
    read = planes.levels_read(x, case.thresholds, case.center).long()
    steps = torch.cat((torch.zeros(1), case.packed.gain)).double()[read] * case.packed.scale.double()
    a = (v * steps).abs()
    kept = (read > 0).sum(-1, keepdim=True).clamp_min(1)
    unit = torch.maximum(a.sum(-1, keepdim=True) / kept * 3 / 127, a.amax(-1, keepdim=True) / 16000)
    per_column = unit * (0.5 + 2**-8) + 4e-7 * a
    return (per_column * (read > 0)).sum(-1, keepdim=True) + 1e-6 * (a.sum(-1, keepdim=True) + 1)


@pytest.mark.parametrize("outlier", [1.0, 100.0, 1e6])
def test_outliers_stay_inside_the_bound(isa: str, outlier: float) -> None:
    case = Case(512, 900, 8, rows=4, outlier=outlier)
    error = (case.native().double() - case.oracle()).abs()
    assert (error <= bound(case, case.x)).all()
    # And what is usual is far below it: rounding errors add up like a random walk.
    relative = error.square().mean().sqrt() / (case.oracle() - case.start).square().mean().sqrt()
    assert relative < 0.015


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_of_every_type(dtype: torch.dtype) -> None:
    case = Case(300, 200, 6)
    x = case.x.to(dtype)
    wide = case.native(x.float())
    assert torch.equal(case.native(x), wide.to(dtype))
    found = kernels.graded_linear(x, case.packed, case.thresholds, case.center, case.start)
    assert torch.equal(found, wide.to(dtype))
    assert kernels.graded_path(x, case.packed) == f"cpu-{kernels.isa()}"


def test_without_rules_every_plane_is_read(isa: str) -> None:
    case = Case(300, 200, 6, rows=2)
    kernels.reset_stats()
    found = kernels.graded_linear(case.x, case.packed)
    assert kernels.stats()["packed_planes"] == 3 * 200
    assert kernels.stats()["bytes"] == 200 * sum(case.packed.level_bytes)
    assert kernels.stats()["packed_weights"] == 300 * 200
    expected = planes.linear(case.x, case.packed)
    assert (found - expected).square().mean() < 0.015**2 * expected.square().mean()


def test_bytes_are_those_of_the_union(threads: int) -> None:
    case = Case(300, 200, 6, rows=3)
    deepest = planes.levels_read(case.x, case.thresholds, case.center).amax(0).long()
    costs = torch.tensor([0, *case.packed.level_bytes]).cumsum(0)
    kernels.reset_stats()
    case.native()
    assert kernels.stats()["bytes"] == int(costs[deepest].sum())
    assert kernels.stats()["packed_planes"] == int(deepest.sum())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_output_of_its_row(isa: str, value: float) -> None:
    case = Case(100, 90, 4, rows=2)
    case.x[1, 40] = value
    found = case.native()
    assert found[1].isnan().all()
    assert torch.equal(found[0], case.native(case.x[:1])[0])


def test_nothing_read_gives_the_start(isa: str) -> None:
    case = Case(100, 90, 4)
    case.thresholds += 1e9
    assert torch.equal(case.native()[0], case.start)
    case.thresholds.zero_()
    assert torch.equal(case.native(case.center[None].clone())[0], case.start)


def test_planes_and_mantissas_anywhere(isa: str) -> None:
    case = Case(130, 40, 6)
    expected = case.native()
    apart = torch.stack([p.contiguous() for p in case.packed.planes])
    moved = planes.Packed(130, case.packed.mantissa.contiguous(), tuple(apart), case.packed.scale, case.packed.gain)
    matrix = cpu.packed_of(moved, case.thresholds, case.center, case.start)
    assert torch.equal(cpu.graded_linear(case.x, matrix), expected)
    uneven = planes.Packed(
        130, moved.mantissa, (apart[0].clone(), apart[2].clone(), apart[1].clone()), moved.scale, moved.gain
    )
    if cpu.packed_obstacle(uneven):
        assert kernels.graded_path(case.x, uneven) == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", planes.STORED)
def test_unpacked_columns_are_the_oracles(isa: str, threads: int, stored: int, dtype: torch.dtype) -> None:
    packed = Case(700, 90, stored).packed
    for level in packed.levels:
        found = kernels.unpack_columns(packed, 13, 90, dtype, level)
        expected = planes.unpack(packed, level)[:, 13:].T
        torch.testing.assert_close(found.float(), expected, rtol=1e-6 if dtype is torch.float32 else 2**-8, atol=1e-6)
    assert kernels.unpack_columns(packed, 5, 5, dtype).shape == (0, 700)


@pytest.mark.parametrize("rows", [9, 31, 300])
@pytest.mark.parametrize("out", [40, 700])
@pytest.mark.parametrize("stored", planes.STORED)
def test_many_rows_in_bfloat16(isa: str, threads: int, stored: int, out: int, rows: int) -> None:
    case = Case(out, {9: 1091, 31: 91, 300: 1088}[rows], stored, rows)
    x = case.x.bfloat16()
    x[3] *= 0
    x[5, 7] = float("nan")
    assert many.fits(x) == cpu.has_many_rows()
    assert kernels.graded_path(x, case.packed) == (f"cpu-{isa}" if cpu.has_many_rows() else "reference")
    assert kernels.graded_path(case.x, case.packed) == "reference"
    found = kernels.graded_linear(x, case.packed, None, case.center, case.start)
    exact = planes.linear(x.double(), case.packed, None, case.center, case.start)
    whole = np.isnan(exact.numpy())
    assert whole[5].all()
    assert not np.delete(whole, 5, 0).any()
    # Weights, deviations, and y are rounded once each by up to 2^-8 of themselves; sums of float32 add inputs 2^-24.
    weight, deviation = planes.unpack(case.packed, None, torch.float64).abs(), (x.double() - case.center).abs()
    allowed = (2**-7 + 2**-16 + 2 * case.packed.inputs * 2**-24) * (
        deviation @ weight.T + case.start.abs()
    ) + 2**-8 * exact.abs()
    error = (found.double() - exact).abs()
    assert bool((error <= allowed)[~torch.tensor(whole)].all())
    assert bool(found[5].isnan().all())


def test_many_rows_that_do_not_fit_are_refused() -> None:
    case = Case(100, 90, 4, 20)
    matrix = cpu.packed_of(case.packed, None, case.center, case.start)
    with pytest.raises(ValueError, match=r"x is torch.float32 \(20, 90\), expected bfloat16 \[T, 90\]"):
        cpu.many_rows(case.x, matrix)
    with pytest.raises(ValueError, match="many_rows"):
        cpu.many_rows(case.x.bfloat16(), cpu.packed_of(case.packed, case.thresholds, case.center, case.start))
    assert cpu.many_rows(case.x[:0].bfloat16(), matrix).shape == (0, 100)


def test_many_rows_with_a_gradient() -> None:
    case = Case(100, 90, 4, 20)
    x = case.x.bfloat16().requires_grad_()
    kernels.graded_linear(x, case.packed, None, case.center, case.start).sum().backward()
    expected = planes.unpack(case.packed).sum(0)
    torch.testing.assert_close(
        x.grad.float(), expected.expand(20, -1), rtol=0.05, atol=0.05 * float(expected.abs().max())
    )


def test_many_rows_are_multiplied_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "UNPACKED_BYTES", 1)
    monkeypatch.setattr(many, "OUTPUTS_AT_ONCE", 128)
    case = Case(300, 200, 6, rows=20)
    found = kernels.graded_linear(case.x, case.packed, case.thresholds, case.center, case.start)
    torch.testing.assert_close(found, case.oracle().float(), rtol=1e-4, atol=1e-3)
    everything = kernels.graded_linear(case.x.view(4, 5, 200), case.packed)
    torch.testing.assert_close(everything, planes.linear(case.x, case.packed).view(4, 5, 300), rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    case = Case(100, 90, 4)
    with pytest.raises(ValueError, match=r"thresholds have shape \(3, 90\), expected \(2, 90\)"):
        cpu.packed_of(case.packed, torch.zeros(3, 90))
    with pytest.raises(ValueError, match="takes 90 features"):
        kernels.graded_linear(torch.zeros(1, 91), case.packed)
    with pytest.raises(ValueError, match="columns 5 to 91, expected some of 90"):
        kernels.unpack_columns(case.packed, 5, 91, torch.float32)
    with pytest.raises(ValueError, match="level is 6"):
        kernels.unpack_columns(case.packed, 0, 1, torch.float32, 6)


def test_columns_are_unpacked_into_the_room_given() -> None:
    matrix = cpu.packed_of(Case(100, 90, 4).packed)
    room = torch.full((50, 100), torch.nan)
    found = cpu.unpack_columns(matrix, 5, 45, 2, torch.float32, room)
    assert found.data_ptr() == room.data_ptr()
    assert torch.equal(found, cpu.unpack_columns(matrix, 5, 45, 2, torch.float32))
    assert bool(room[40:].isnan().all())
    with pytest.raises(ValueError, match="room has 50 rows, expected 51"):
        cpu.unpack_columns(matrix, 5, 56, 2, torch.float32, room)
    with pytest.raises(ValueError, match=r"room is torch.float32 \(50, 100\), expected contiguous torch.bfloat16"):
        cpu.unpack_columns(matrix, 5, 45, 2, torch.bfloat16, room)


def test_a_new_rule_is_not_taken_for_the_old_one() -> None:
    case = Case(100, 90, 4)
    first = kernels.graded_linear(case.x, case.packed, case.thresholds, case.center, case.start)
    second = kernels.graded_linear(case.x, case.packed, case.thresholds * 0, case.center, case.start)
    assert not torch.equal(first, second)
    assert torch.equal(kernels.graded_linear(case.x, case.packed, case.thresholds, case.center, case.start), first)

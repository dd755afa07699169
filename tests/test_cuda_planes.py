"""Packed products on CUDA against the format's oracle, codes that must not be read poisoned: emulated, and on a GPU.

Shape letters: B rows, I inputs, O outputs, L levels.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from actsparse.kernels import planes, rounding
from actsparse.kernels.cuda import Rounder, compiler, graded, tiles
from actsparse.kernels.cuda.launches import ACTIVATIONS, Builder
from tests import cuda_emulator

I, O = 1100, 584  # noqa: E741  more columns than a block looks at together; a tile and a bit, groups not whole


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.cuda)])
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "gpu":
        if compiler.missing():
            pytest.skip(compiler.missing())
        return {"device": "cuda"}
    if cuda_emulator.CXX is None:
        pytest.skip("no C++ compiler to emulate the kernels with")
    return {"device": "cpu", "machine": cuda_emulator.MACHINE, "run": cuda_emulator.run}


def options(where: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: where[name] for name in names if name in where}


def matrix(stored: int, outputs: int = O, inputs: int = I, seed: int = 0) -> planes.Packed:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << stored, (outputs, inputs), dtype=torch.uint8, generator=g)
    mantissa = torch.randint(1, 256, (planes.groups_of(outputs), inputs), dtype=torch.uint8, generator=g)
    scale = torch.rand(inputs, generator=g) + 0.1
    gain = 1 + 0.1 * torch.rand(stored // 2, generator=g)
    return planes.pack(codes, mantissa, scale, gain, stored)


def rules(stored: int, inputs: int = I, outputs: int = O) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    steps = 0.25 + 0.9 * torch.rand(stored // 2, inputs, generator=g)
    return {
        "thresholds": steps.cumsum(0),
        "center": 0.3 * torch.randn(inputs, generator=g),
        "start": torch.randn(outputs, generator=g),
    }


def poisoned(packed: planes.Packed, read: torch.Tensor) -> planes.Packed:
    """Other bits wherever no row reads (read uint8 [B, I]); mantissas and scales of columns that no row reads at all, too."""
    depth = read.amax(0)
    parts = [packed.mantissa.clone(), *(plane.clone() for plane in packed.planes)]
    for least, part in enumerate(parts):
        part[depth < max(least, 1)] ^= 0xFF
    return planes.Packed(packed.out, parts[0], tuple(parts[1:]), packed.scale, packed.gain)


def allowed(got: torch.Tensor, want: torch.Tensor, x: torch.Tensor, packed: planes.Packed, given: Any) -> torch.Tensor:
    """What docs/cuda.md derives: the result's own rounding, and that of N coefficients, six standard deviations of it."""
    read = planes.levels_read(x, given["thresholds"], given["center"]) if "thresholds" in given else None
    levels = len(packed.planes)
    depth = torch.full(x.shape, levels) if read is None else read.long()
    gain = torch.cat([torch.zeros(1), packed.gain]).double()[depth]
    factors = (x.double() - given.get("center", 0.0)).abs() * packed.scale.double() * gain
    unit = factors.amax(-1, keepdim=True) * 1.01 * 2**-16
    rounding = 6 * (1.25 / 12 * depth.sum(-1, keepdim=True)).sqrt() * unit
    return torch.finfo(got.dtype).eps * want.abs() + rounding + 1e-6 * factors.square().sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("stored", planes.STORED)
def test_tiles_hold_the_same_matrix(stored: int) -> None:
    packed = matrix(stored)
    back = tiles.packed_of(tiles.tiles_of(packed))
    back.check()
    assert all(torch.equal(a, b) for a, b in zip(packed.planes, back.planes, strict=True))
    assert torch.equal(packed.mantissa, back.mantissa)
    assert torch.equal(packed.scale, back.scale)


@pytest.mark.parametrize(
    ("stored", "dtype", "rows"),
    [
        (4, torch.float16, 1),
        (6, torch.bfloat16, 1),
        (6, torch.bfloat16, 3),
        (8, torch.bfloat16, 8),
        (8, torch.bfloat16, 1),
        (4, torch.float16, 8),
    ],
)
def test_columns_are_read_as_deep_as_they_deserve(
    where: dict[str, Any], stored: int, dtype: torch.dtype, rows: int
) -> None:
    device = where["device"]
    x = torch.randn(rows, I, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 7] = 60.0  # an outlier, and a row that is smaller than the others
    x[-1] *= 0.125 if rows > 1 else 1.0
    packed, given = matrix(stored), rules(stored)
    read = planes.levels_read(x, given["thresholds"], given["center"])
    assert {int(level) for level in read.unique()} == set(range(stored // 2 + 1))
    want = planes.linear(x.double(), packed, **given)
    for blocks in (0, 3, 11):
        held = tiles.tiles_of(poisoned(packed, read), device)
        on_device = {name: value.to(device) for name, value in given.items()}
        got = graded.linear(
            x.to(device), graded.plane_matrix(held, **on_device), blocks=blocks, **options(where, "machine", "run")
        ).cpu()
        assert got.dtype == dtype
        assert bool(((got.double() - want).abs() <= allowed(got, want, x, packed, given)).all())


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 7, 18])
def test_tiles_end_anywhere_in_a_block(where: dict[str, Any], rows: int, blocks: int) -> None:
    """Within the columns of one warp, between those of two that share their lists, and with nothing to read for some."""
    device, inputs, outputs = where["device"], 256, 1100
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    packed, given = matrix(6, outputs, inputs), rules(6, inputs, outputs)
    given["thresholds"][:, 40:120] = float("inf")
    read = planes.levels_read(x, given["thresholds"], given["center"])
    want = planes.linear(x.double(), packed, **given)
    held = tiles.tiles_of(poisoned(packed, read), device)
    on_device = {name: value.to(device) for name, value in given.items()}
    product = graded.plane_matrix(held, **on_device)
    got = graded.linear(x.to(device), product, blocks=blocks, **options(where, "machine", "run")).cpu()
    assert bool(((got.double() - want).abs() <= allowed(got, want, x, packed, given)).all())


def test_every_plane_without_thresholds(where: dict[str, Any]) -> None:
    x = torch.randn(2, I, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    packed = matrix(6)
    held = tiles.tiles_of(packed, where["device"])
    got = graded.linear(x.to(where["device"]), graded.plane_matrix(held), **options(where, "machine", "run")).cpu()
    want = planes.linear(x.double(), packed)
    assert bool(((got.double() - want).abs() <= allowed(got, want, x, packed, {})).all())


def test_nothing_read_gives_the_start_and_nan_is_not_hidden(where: dict[str, Any]) -> None:
    device = where["device"]
    held = tiles.tiles_of(matrix(6), device)
    high = torch.full((3, I), float("inf"), device=device)
    start = torch.arange(O, dtype=torch.float32, device=device)
    x = torch.ones(2, I, dtype=torch.float16, device=device)
    product = graded.plane_matrix(held, high, None, start)
    got = graded.linear(x, product, **options(where, "machine", "run"))
    assert torch.equal(got[0], start.half())
    x[0, 3] = float("nan")
    got = graded.linear(x, product, **options(where, "machine", "run"))
    assert bool(got[0].isnan().all())
    assert torch.equal(got[1], start.half())


def test_the_same_bits_every_time(where: dict[str, Any]) -> None:
    x = torch.randn(1, I, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(where["device"])
    given = {name: value.to(where["device"]) for name, value in rules(6).items()}
    product = graded.plane_matrix(tiles.tiles_of(matrix(6), where["device"]), **given)
    first = graded.linear(x, product, **options(where, "machine", "run"))
    for _ in range(3):
        assert torch.equal(first, graded.linear(x, product, **options(where, "machine", "run")))


def test_outliers_cost_the_others_little(where: dict[str, Any]) -> None:
    """A column a hundred times as large as the rest takes their coefficients' bits: the bound that docs/cuda.md derives."""
    x = torch.randn(1, I, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    x[0, 11] = 100.0
    packed = matrix(6)
    held, start = tiles.tiles_of(packed, where["device"]), torch.zeros(O, device=where["device"])
    got = graded.linear(
        x.to(where["device"]), graded.plane_matrix(held, start=start), **options(where, "machine", "run")
    ).cpu()
    rest = x.clone()
    rest[0, 11] = 0.0
    want, scale = planes.linear(x.double(), packed), planes.linear(rest.double(), packed).norm()
    rounding = torch.finfo(torch.float16).eps * want.norm()
    assert float((got.double() - want).norm()) <= float(rounding + 2e-3 * scale)


def test_matrices_of_one_input_share_blocks(where: dict[str, Any]) -> None:
    """Blocks end one matrix and begin the next; thresholds are each matrix's own; a residual is added once."""
    device = torch.device(where["device"])
    sizes, inputs = (1031, 96, 512), 200
    g = torch.Generator().manual_seed(7)
    value, second, residual = (
        torch.randn(inputs, generator=g),
        torch.randn(inputs, generator=g),
        torch.randn(sizes[0], generator=g),
    )
    given = [rules(6, inputs, size) for size in sizes]
    given[1]["thresholds"] = given[1]["thresholds"] * 0.5
    entered = [graded.sums_of(part.to(device))[0] for part in (value, second, residual)]
    squares = graded.sums_of(residual.to(device))[1]
    value, second, residual = (values_of(part) for part in entered)
    x = (torch.nn.functional.silu(value) * second).float()[None]
    packed = [matrix(6, size, inputs, seed) for seed, size in enumerate(sizes)]
    held = [
        graded.plane_matrix(
            tiles.tiles_of(poisoned(p, planes.levels_read(x, r["thresholds"], r["center"])), device),
            **{name: part.to(device) for name, part in r.items()},
        )
        for p, r in zip(packed, given, strict=True)
    ]
    entry = graded.PlaneInput(
        sum=entered[0].data_ptr(), second=entered[1].data_ptr(), activation=ACTIVATIONS["silu"],
        second_activation=ACTIVATIONS["identity"], size=inputs,
    )  # fmt: skip
    machine = where.get("machine") or compiler.machine(torch.cuda.current_device())
    build = Builder(machine, device, 1)
    results = [graded.zero_sums(size, device) for size in sizes]
    out = torch.full((sizes[0],), float("nan"), device=device)
    graded.product(build, entry, held, results, blocks=7)
    graded.product(build, entry, held[:1], entered[2:], out=out, kept=True, squares=squares, blocks=2)
    where.get("run", compiler.run)(build.launches, device, torch.bfloat16, 1)
    for got, p, r in zip(results, packed, given, strict=True):
        want, got = planes.linear(x.double(), p, **r)[0], values_of(got)[: p.out]
        assert bool(((got - want).abs() <= allowed(got.float(), want, x, p, r)[0]).all())
    want, added = (
        planes.linear(x.double(), packed[0], **given[0])[0] + residual[: sizes[0]],
        values_of(entered[2])[: sizes[0]],
    )
    assert bool(((added - want).abs() <= allowed(added.float(), want, x, packed[0], given[0])[0]).all())
    assert torch.equal(out.cpu(), added.float())
    followed, recomputed = squares[:64].view(-1, 2).sum(0), graded.sums_of(values_of(entered[2]).to(device))[1][:2]
    assert torch.equal(followed, recomputed)
    assert not int(squares[64])


def values_of(sums: torch.Tensor) -> torch.Tensor:
    return sums.cpu().double() / graded.SUM_STEPS


def test_sums_out_of_range_are_no_numbers_and_others_are_cleared(where: dict[str, Any]) -> None:
    """A part too large for the sums' steps, or a sum that is: not a number, whatever is added afterwards."""
    device, run = torch.device(where["device"]), where.get("run", compiler.run)
    machine = where.get("machine") or compiler.machine(torch.cuda.current_device())
    packed, inputs = matrix(6), torch.zeros(I, device=device)
    inputs[5] = 1e9
    held = graded.plane_matrix(tiles.tiles_of(packed, device))
    build, total = Builder(machine, device, 1), graded.zero_sums(O, device)
    other = torch.ones(4098, dtype=torch.int64, device=device)
    out, again = (torch.zeros(O, device=device) for _ in range(2))
    identity = ACTIVATIONS["identity"]

    def entry(values: torch.Tensor) -> graded.PlaneInput:
        return graded.PlaneInput(value=values.data_ptr(), activation=identity, second_activation=identity, size=I)

    small = torch.ones(I, device=device)
    graded.product(build, entry(inputs), [held], [total], out=out, kept=True, clear=other, blocks=3)
    graded.product(build, entry(small), [held], [total], out=again, blocks=3)
    run(build.launches, device, torch.bfloat16, 1)
    weight = planes.unpack(packed, None, torch.float64)[:, 5]
    large = (weight.abs() * 1e9 > 1.1 * 2**23).to(device)
    assert bool(large.any())
    assert bool(out[large].isnan().all())
    assert bool(again[large].isnan().all())
    assert bool(again[(weight.abs() * 1e9 < 0.9 * 2**23).to(device)].isfinite().all())
    assert not bool(other.any())
    assert not bool(total.any())


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_vector_of_sums_under_its_norm(where: dict[str, Any], scale: float) -> None:
    """Squares in fine steps, and in coarse ones where the sum of squares is large; one value too large is no number."""
    device, run = torch.device(where["device"]), where.get("run", compiler.run)
    machine = where.get("machine") or compiler.machine(torch.cuda.current_device())
    packed, given, g = matrix(6), rules(6), torch.Generator().manual_seed(9)
    value, weight = scale * torch.randn(I, generator=g), torch.rand(I, generator=g) + 0.5
    x = (value.double() * (value.double().square().mean() + 1e-5).rsqrt() * weight)[None]
    near = (x.abs() - given["thresholds"][:, None]).abs().amin(0) < 1e-3  # no rounding moves a decision
    given["thresholds"][:, near[0]] = 0.0
    given["center"].zero_()
    held = graded.plane_matrix(
        tiles.tiles_of(packed, device), **{name: part.to(device) for name, part in given.items()}
    )
    sums, squares = graded.sums_of(value.to(device))
    norm, out = weight.to(device), torch.zeros(O, device=device)
    entry = graded.PlaneInput(
        sum=sums.data_ptr(), squares=squares.data_ptr(), norm=norm.data_ptr(), activation=ACTIVATIONS["identity"],
        second_activation=ACTIVATIONS["identity"], size=I, eps=1e-5,
    )  # fmt: skip
    build = Builder(machine, device, 1)
    graded.product(build, entry, [held], [graded.zero_sums(O, device)], out=out, blocks=3)
    run(build.launches, device, torch.bfloat16, 1)
    want = planes.linear(x, packed, **given)
    # Of the norm's own rounding: float32, and squares in steps.
    bound = allowed(out.cpu(), want, x, packed, given) + 4e-6 * want.norm() / O**0.5
    assert bool(((out.cpu().double() - want).abs() <= bound).all())
    squares[64] = 1
    run(build.launches, device, torch.bfloat16, 1)
    assert bool(out.isnan().all())


@pytest.mark.parametrize("level", [None, 2, 4])
@pytest.mark.parametrize("outputs", [584, 1031])
def test_unpacked_weights(where: dict[str, Any], level: int | None, outputs: int) -> None:
    packed = matrix(6, outputs)
    held = tiles.tiles_of(packed, where["device"])
    run = options(where, "run")
    want = planes.unpack(packed, level, torch.float32).T
    got = graded.unpack(held, torch.float16, level, **run).cpu()
    assert torch.allclose(got.float(), want, rtol=2**-10, atol=1e-6)
    part = graded.unpack(held, torch.float16, level, begin=96, end=201, first=512, last=560, **run).cpu()
    assert torch.equal(part, got[96:201, 512:560])


def test_many_rows(where: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    device = where["device"]
    monkeypatch.setattr(graded, "_SCRATCH_BYTES", 1)  # two pieces of the outputs
    x = torch.randn(20, I, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    packed, given = matrix(6), rules(6)
    held = tiles.tiles_of(packed, device)
    on_device = {name: value.to(device) for name, value in given.items()}
    for thresholds in (None, "thresholds"):
        rule = given["thresholds"] if thresholds else None
        want = planes.linear(x.double(), packed, rule, given["center"], given["start"])
        got = graded.linear_rows(
            x.to(device), held, on_device["thresholds"] if thresholds else None, on_device["center"],
            on_device["start"], **options(where, "run"),
        ).cpu()  # fmt: skip
        error = (got.double() - want).norm() / want.norm()
        assert float(error) < 0.006


@pytest.mark.cuda
@pytest.mark.skipif(bool(compiler.missing()), reason=f"CUDA: {compiler.missing()}")
def test_a_product_does_not_keep_its_weights() -> None:
    held = tiles.tiles_of(matrix(6), "cuda")
    graded.graded_linear(torch.ones(1, I, dtype=torch.bfloat16, device="cuda"), held, None, None, None)
    alive = weakref.ref(held)
    del held
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("stored", [4, 6, 8])
def test_columns_rounded(where: dict[str, Any], stored: int) -> None:
    """As the oracle does, but for values that lie within rounding of a step."""
    g = torch.Generator().manual_seed(2)
    inputs, outputs = 100, 192
    x = torch.randn(300, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g) / 10
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(inputs)
    weight, shares = torch.randn(inputs, outputs, generator=g), torch.rand(1 + stored // 2, inputs, generator=g)
    given = (
        1.5 + torch.rand(inputs, planes.groups_of(outputs), generator=g),
        shares / shares.sum(0),
        0.9 + 0.1 * torch.rand(stored // 2, generator=g),
    )
    results = []
    for device, backend in (("cpu", rounding.Oracle()), (where["device"], Rounder(**options(where, "run")))):
        columns = rounding.Columns(stored, *(tensor.to(device) for tensor in given))
        h, w = hessian.to(device), weight.to(device)
        rest, codes = w.clone(), torch.zeros(inputs, outputs, dtype=torch.uint8, device=device)
        errors = backend.round_block(columns, 5, 87, 0.05 * h.triu(1), w, rest, codes)
        first = codes.clone()
        as_read, whole = backend.code_errors(columns, w, codes)
        stood = torch.zeros_like(w)
        backend.descend_block(columns, 3, 90, h, 0.4, w, codes, as_read, whole, stood)
        results.append([tensor.cpu() for tensor in (first, codes, errors, rest, as_read, whole, stood)])
    expected, got = results
    same = (expected[0] == got[0]).all(0) & (expected[1] == got[1]).all(0)  # outputs are independent
    assert float(same.float().mean()) > 0.95
    for one, other in zip(expected[2:], got[2:], strict=True):
        assert torch.allclose(one[:, same], other[:, same], atol=2e-5)

"""Packed products on CUDA against the format's oracle, codes that must not be read poisoned: emulated, and on a GPU.

Shape letters: B rows, I inputs, O outputs, L levels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from actsparse.kernels import planes
from actsparse.kernels.cuda import compiler, graded, round_block, tiles
from actsparse.kernels.cuda.launches import ACTIVATIONS, Builder
from actsparse.methods import feedback
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
    x = (torch.nn.functional.silu(value) * second)[None]
    packed = [matrix(6, size, inputs, seed) for seed, size in enumerate(sizes)]
    held = [
        graded.plane_matrix(
            tiles.tiles_of(poisoned(p, planes.levels_read(x, r["thresholds"], r["center"])), device),
            **{name: part.to(device) for name, part in r.items()},
        )
        for p, r in zip(packed, given, strict=True)
    ]
    on_device = [part.to(device) for part in (value, second, residual)]
    entry = graded.PlaneInput(
        value=on_device[0].data_ptr(), second=on_device[1].data_ptr(), activation=ACTIVATIONS["silu"],
        second_activation=ACTIVATIONS["identity"], size=inputs,
    )  # fmt: skip
    machine = where.get("machine") or compiler.machine(torch.cuda.current_device())
    build = Builder(machine, device, 1)
    results = graded.product(build, entry, held, blocks=7)
    (added,) = graded.product(build, entry, held[:1], residual=on_device[2], blocks=2)
    for _ in range(2):  # what blocks count arrivals with is left as it was
        where.get("run", compiler.run)(build.launches, device, torch.bfloat16, 1)
    for got, p, r in zip(results, packed, given, strict=True):
        want = planes.linear(x.double(), p, **r)[0]
        assert bool(((got.cpu().double() - want).abs() <= allowed(got, want, x, p, r)[0]).all())
    want = planes.linear(x.double(), packed[0], **given[0])[0] + residual
    assert bool(((added.cpu().double() - want).abs() <= allowed(added, want, x, packed[0], given[0])[0]).all())


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


def test_columns_rounded_with_feedback(where: dict[str, Any]) -> None:
    """As the loop on the CPU does, but for values that lie within rounding of a step."""
    g = torch.Generator().manual_seed(2)
    inputs, outputs, begin, end, stored = 40, 192, 5, 37, 6
    rest = torch.randn(inputs, outputs, generator=g)
    half_range = 1.5 + torch.rand(inputs, planes.groups_of(outputs), generator=g)
    upper = (torch.eye(inputs) + 0.1 * torch.rand(inputs, inputs, generator=g)).triu()
    shares, gain = torch.rand(3, inputs, generator=g) / 3, 0.9 + 0.1 * torch.rand(3, generator=g)
    results = []
    for device, function in (("cpu", feedback._round_block), (where["device"], None)):
        given = [tensor.clone().to(device) for tensor in (rest, half_range, upper, shares, gain)]
        codes = torch.zeros(inputs, outputs, dtype=torch.uint8, device=device)
        rounded = function or partial(round_block, **options(where, "run"))
        errors = rounded(given[0], begin, end, stored, *given[1:], codes)
        results.append([tensor.cpu() for tensor in (errors, codes, given[0])])
    (errors, codes, left), (got_errors, got_codes, got_left) = results
    same = (codes == got_codes).all(0)  # outputs are independent
    assert float(same.float().mean()) > 0.95
    assert torch.allclose(errors[:, same], got_errors[:, same], atol=1e-5)
    assert torch.allclose(left[:, same], got_left[:, same], atol=1e-5)

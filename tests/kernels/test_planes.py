"""The packed format and its oracle, against the formula written out weight by weight."""

from __future__ import annotations

import pytest
import torch

from actsparse.kernels import planes


def random_packed(
    out: int, inputs: int, stored: int, seed: int = 0
) -> tuple[planes.Packed, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**stored, (out, inputs), generator=generator, dtype=torch.uint8)
    mantissa = torch.randint(1, 256, (planes.groups_of(out), inputs), generator=generator).to(torch.uint8)
    scale = (torch.rand(inputs, generator=generator) + 0.1).to(torch.bfloat16)
    gain = torch.rand(stored // 2, generator=generator) + 0.5
    return planes.pack(codes, mantissa, scale, gain, stored), codes, mantissa


@pytest.mark.parametrize("stored", planes.STORED)
@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (64, 3), (65, 7), (200, 16), (1100, 5)])
def test_every_level_is_the_formula(stored: int, out: int, inputs: int) -> None:
    packed, codes, mantissa = random_packed(out, inputs, stored)
    assert torch.equal(planes.codes_of(packed), codes)
    for index, level in enumerate(packed.levels):
        found = planes.unpack(packed, level, torch.float64)
        for o, i in [(0, 0), (out - 1, inputs - 1), (out // 2, inputs // 2)]:
            code = int(codes[o, i]) >> (stored - level)
            step = float(packed.gain[index]) * float(packed.scale[i]) * int(mantissa[o // 64, i]) / 255
            expected = step * (code + 0.5 - 2 ** (level - 1)) * 2.0 ** (1 - level)
            assert float(found[o, i]) == pytest.approx(expected, rel=1e-6)
    assert not planes.unpack(packed, 0).any()
    with pytest.raises(ValueError, match="level is 3"):
        planes.unpack(packed, 3)


def test_a_level_reads_its_planes_only() -> None:
    packed, _, _ = random_packed(130, 12, 6)
    before = planes.unpack(packed, 4)
    packed.planes[2].bitwise_not_()
    assert torch.equal(planes.unpack(packed, 4), before)
    assert not torch.equal(planes.unpack(packed, 6), before)


def test_linear_reads_each_value_to_its_level() -> None:
    packed, _, _ = random_packed(70, 40, 6)
    x = torch.randn(3, 40, dtype=torch.float64)
    center, start = torch.randn(40) / 4, torch.randn(70)
    thresholds = torch.rand(3, 40).cumsum(0)
    levels = planes.levels_read(x, thresholds, center)
    assert set(levels.unique().tolist()) == {0, 1, 2, 3}
    expected = start.double().repeat(3, 1)
    for t in range(3):
        for i in range(40):
            weight = planes.unpack(packed, 2 * int(levels[t, i]), torch.float64)[:, i]
            expected[t] += (x[t, i] - center[i].double()) * weight
    torch.testing.assert_close(planes.linear(x, packed, thresholds, center, start), expected, rtol=1e-6, atol=1e-6)
    everything = planes.linear(x, packed, torch.zeros(3, 40))
    torch.testing.assert_close(everything, planes.linear(x, packed))


def test_nan_reads_everything() -> None:
    levels = planes.levels_read(torch.tensor([float("nan"), 0.5]), torch.tensor([[1.0, 0.1], [2.0, 0.5], [3.0, 9.0]]))
    assert levels.tolist() == [3, 2]


def test_what_does_not_fit_is_refused() -> None:
    packed, codes, mantissa = random_packed(70, 4, 4)
    with pytest.raises(ValueError, match="5 bits stored, expected 4, 6 or 8"):
        planes.pack(codes, mantissa, packed.scale, packed.gain, 5)
    with pytest.raises(ValueError, match="scale holds a value that is not finite"):
        planes.pack(codes, mantissa, packed.scale * torch.inf, packed.gain, 4)
    with pytest.raises(ValueError, match="gain is torch.float32"):
        planes.pack(codes, mantissa, packed.scale, packed.gain[:1], 4)


@pytest.mark.parametrize("stored", planes.STORED)
@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (65, 7), (1100, 5)])
def test_columns_of_a_plane_are_an_odd_number_of_lines_apart(stored: int, out: int, inputs: int) -> None:
    packed, codes, _ = random_packed(out, inputs, stored)
    assert packed.mantissa.is_contiguous()
    for part in (packed.mantissa, *packed.planes):
        assert part.data_ptr() % 64 == 0
    for plane in packed.planes:
        assert inputs == 1 or plane.stride(0) % 128 == 64
    tight = torch.cat([packed.mantissa, *packed.planes], 1)
    split = tight[:, packed.groups :].unflatten(1, (stored // 2, -1)).unbind(1)
    loose = planes.Packed(out, tight[:, : packed.groups], tuple(split), packed.scale, packed.gain)
    again = planes.relaid(loose)
    assert torch.equal(planes.codes_of(again), codes)
    assert torch.equal(again.mantissa, packed.mantissa)
    assert again.planes[0].stride() == packed.planes[0].stride()
    assert [len(each.storages) for each in (loose, again)] == [1, 1]
    assert again.storages[0].numel() >= inputs * packed.groups * (1 + 16 * stored // 2)

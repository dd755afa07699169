"""The CUDA kernel for one token's attention against float64: emulated here, on a GPU where there is one.

Letters: S parts, K key/value heads, L cache length, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from actsparse.kernels.cuda import compiler, graded
from actsparse.kernels.cuda.launches import Builder
from actsparse.kernels.cuda.machine import MOST_SPLITS, Machine, attention_bytes, attention_warps
from actsparse.kernels.cuda.structures import Attention, pointer
from tests import cuda_emulator

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One attention: ``parts`` of q, k and v, 0 for one vector of sums; ``subgroups`` blocks of ``group`` heads to a key."""

    head_dim: int
    group: int
    position: int
    kv_heads: int = 2
    subgroups: int = 1
    window: int = 0
    parts: int = 1
    norms: bool = False
    rotary: bool = True
    dtype: torch.dtype = torch.bfloat16


# Head dimensions whose pieces are even, odd or a multiple of eight; one head to eight; positions of one block and of several.
CASES = [
    Case(64, 4, 0),
    Case(64, 1, 128, window=100),
    Case(64, 8, 700, parts=0, norms=True),
    Case(128, 4, 128, parts=3, norms=True),
    Case(128, 7, 300, parts=0, dtype=torch.float16),
    Case(64, 3, 130, subgroups=2, parts=4),
    Case(96, 3, 200, rotary=False),
    Case(256, 2, 150, parts=2, norms=True, dtype=torch.float16),
    Case(72, 1, 40, parts=5),
]


def heads_of(parts: Tensor, norm: Tensor | None, tables: tuple[Tensor, Tensor] | None, position: int) -> Tensor:
    """Summed, normalised and rotated in float64 [heads, D]."""
    x = parts.double().sum(0)
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm.double()
    if tables is None:
        return x
    a, b = x.chunk(2, -1)
    c, s = (table[position].double() for table in tables)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.head_dim}-{case.group}-{case.position}")
@pytest.mark.parametrize("place", ["emulated", pytest.param("gpu", marks=pytest.mark.cuda)])
def test_attention_agrees_with_float64(place: str, case: Case) -> None:
    if place == "gpu" and compiler.missing():
        pytest.skip(compiler.missing())
    if place == "emulated" and cuda_emulator.CXX is None:
        pytest.skip("no C++ compiler to emulate the kernels with")
    device = torch.device("cuda", 0) if place == "gpu" else torch.device("cpu")
    d, kv, length, blocks = case.head_dim, case.kv_heads, case.position + 3, case.kv_heads * case.subgroups
    # Several blocks to a head, several lots to a warp.
    machine = compiler.machine(0) if place == "gpu" else replace(cuda_emulator.MACHINE, processors=3 * blocks)
    run = compiler.run if place == "gpu" else cuda_emulator.run
    g = torch.Generator().manual_seed(7)
    heads = blocks * case.group

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    parts = max(case.parts, 1)
    q, k, v = made(parts, heads, d), made(parts, kv, d), made(parts, kv, d)
    q_norm, k_norm = (made(d) if case.norms else None for _ in range(2))
    angles = made(length, d // 2)
    tables = (angles.cos(), angles.sin()) if case.rotary else None
    keys, values = (made(kv, length, d).to(case.dtype) for _ in range(2))
    # What is not in the cache, or no longer in the window, must not be read into anything.
    keys[:, case.position :], values[:, case.position :] = float("nan"), float("nan")
    oldest = max(0, case.position + 1 - case.window) if case.window else 0
    keys[:, :oldest], values[:, :oldest] = float("nan"), float("nan")
    new_key = heads_of(k, k_norm, tables, case.position)
    new_value = v.double().sum(0)

    y, state = torch.full((heads * d,), float("nan"), device=device), made(2).int()
    state[1] = case.position
    splits = max(1, min(MOST_SPLITS, machine.processors // blocks))
    partial = torch.full((blocks * splits * case.group * (d + 4),), float("nan"), device=device)
    arrived = torch.zeros(blocks, dtype=torch.int32, device=device)
    given = [x.reshape(-1) if case.parts else graded.sums_of(x.reshape(-1))[0] for x in (q, k, v)]
    p = Attention(
        *(pointer(x) for x in given), pointer(q_norm), pointer(k_norm), *(pointer(x) for x in tables or (None, None)),
        pointer(state), pointer(keys), pointer(values), pointer(y), pointer(partial), pointer(arrived),
        case.parts, case.parts, case.parts, heads, kv, length, case.window, splits, case.subgroups, case.group,
        d**-0.5, EPS, EPS,
    )  # fmt: skip
    build = Builder(machine, device, 1)
    build.launch(
        "attention", 32 * attention_warps(machine, d), attention_bytes(machine, d, case.group), p,
        (given, q_norm, k_norm, tables, state, keys, values, y, partial, arrived), blocks * splits,
    )  # fmt: skip
    run(build.launches, device, case.dtype, 1, d)

    rounding = torch.finfo(case.dtype).eps
    for cache, new in ((keys, new_key), (values, new_value)):
        assert float((cache[:, case.position].double() - new).norm() / new.norm()) <= rounding
    seen = slice(oldest, case.position + 1)
    query = heads_of(q, q_norm, tables, case.position).view(kv, -1, d)
    scores = query @ keys[:, seen].double().transpose(1, 2) * d**-0.5
    want = (scores.softmax(-1) @ values[:, seen].double()).reshape(-1)
    got = y.double()
    # Queries and shares are sums of two numbers of 16 bits; scores, of which shares are powers, lie within ten or so.
    assert float((got - want).norm() / want.norm()) <= 32 * (rounding / 2) ** 2
    assert int(arrived.abs().sum()) == 0
    again = y.clone()
    y.fill_(float("nan"))
    run(build.launches, device, case.dtype, 1, d)
    assert torch.equal(y, again)


def test_a_small_machine_holds_fewer_positions() -> None:
    small = Machine(processors=30, shared_bytes=99 << 10, lot=Machine().lot // 2)
    for head_dim in (64, 96, 128, 256):
        assert attention_bytes(small, head_dim, 8) <= small.shared_bytes
        assert 2 * (attention_bytes(Machine(), head_dim, 8) + 1024) <= 228 << 10

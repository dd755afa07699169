"""The CUDA products against float64, NaN in every weight that must not be read: emulated, and on a GPU where there is one.

Shape letters: B rows, I inputs, O outputs, H hidden, N neurons.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from actsparse import kernels
from actsparse.kernels import Rules, reference
from actsparse.kernels.cuda import (
    compiler,
    cores,
    ffn_obstacle,
    layout_obstacle,
    linear_obstacle,
    machine,
    many,
    products,
)
from tests import cuda_emulator

DTYPES = [torch.bfloat16, torch.float16]
H, N = 136, 328  # multiples of 8, as 16-byte reads need; of nothing larger


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.cuda)])
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How to run, and on which device."""
    if request.param == "gpu":
        if compiler.missing():
            pytest.skip(compiler.missing())
        return {"device": "cuda"}
    if cuda_emulator.CXX is None:
        pytest.skip("no C++ compiler to emulate the kernels with")
    return {"device": "cpu", "machine": cuda_emulator.MACHINE, "run": cuda_emulator.run}


def options(where: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in where.items() if (name in names if names else name != "device")}


def random(*shape: int, dtype: torch.dtype, seed: int, device: str, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def by_columns(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous().t()


def check(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> None:
    """Rounding of the result, and float32 sums whose terms have the magnitudes that ``scale`` adds up."""
    allowed = torch.finfo(got.dtype).eps * want.abs() + 2e-6 * scale + torch.finfo(got.dtype).smallest_normal
    assert bool(((got.double() - want).abs() <= allowed).all())


def exact_ffn(x: Any, gate: Any, up: Any, down: Any, rules: Rules) -> torch.Tensor:
    return reference.gated_ffn(x.double(), None if gate is None else gate.double(), up.double(), down.double(), rules)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_below_the_threshold_are_not_read(where: dict[str, Any], dtype: torch.dtype, rows: int) -> None:
    device = where["device"]
    x = random(rows, 264, dtype=dtype, seed=1, device=device)
    weight = by_columns(random(200, 264, dtype=dtype, seed=2, device=device))
    bias = random(200, dtype=torch.float32, seed=3, device=device)
    threshold = random(264, dtype=torch.float32, seed=4, device=device).abs() + 1.0
    want = reference.linear(x.double(), weight.double(), bias.double(), threshold)
    scale = x.double().abs() @ weight.double().abs().T
    weight[:, ~reference.keep(x, threshold).any(0)] = float("nan")
    for tile, splits in ((0, 0), (32, 1), (64, 3), (128, 2), (256, 5)):
        got = products.linear(x, weight, bias, threshold, tile=tile, splits=splits, **options(where))
        check(got, want, scale)


def test_more_rows_than_fit_shared_memory_are_read_in_slices(where: dict[str, Any]) -> None:
    device = where["device"]
    x = random(8, 8200, dtype=torch.bfloat16, seed=1, device=device)
    weight = by_columns(random(64, 8200, dtype=torch.bfloat16, seed=2, device=device))
    threshold = torch.full((8200,), 2.0, device=device)
    assert linear_obstacle(x, weight) == ""
    assert "8 rows of 8200 values do not fit" in linear_obstacle(x, weight.contiguous())
    want = reference.linear(x.double(), weight.double(), None, threshold)
    scale = x.double().abs() @ weight.double().abs().T
    weight[:, ~reference.keep(x, threshold).any(0)] = float("nan")
    check(products.linear(x, weight, None, threshold, **options(where)), want, scale)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_rows(where: dict[str, Any], dtype: torch.dtype, rows: int) -> None:
    x = random(rows, 2056, dtype=dtype, seed=1, device=where["device"])
    weight = random(104, 2056, dtype=dtype, seed=2, device=where["device"])
    got = products.linear(x, weight, **options(where))
    check(got, x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T)


def test_nothing_kept_gives_the_bias(where: dict[str, Any]) -> None:
    device = where["device"]
    x = random(1, H, dtype=torch.bfloat16, seed=1, device=device)
    weight = by_columns(torch.full((N, H), float("nan"), dtype=torch.bfloat16, device=device))
    bias = random(N, dtype=torch.float32, seed=3, device=device)
    got = products.linear(x, weight, bias, torch.full((H,), float("inf"), device=device), **options(where))
    assert torch.equal(got[0], bias.to(torch.bfloat16))


def rule_sets(device: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    vector = lambda size, seed, least: random(size, dtype=torch.float32, seed=seed, device=device).abs() + least  # noqa: E731
    return {
        "dense": {"activation": "silu"},
        "cats": {"activation": "silu", "gate_threshold": vector(N, 5, 0.1)},
        "mean": {"activation": "gelu_tanh", "gate_threshold": vector(N, 5, 0.1), "mean": vector(N, 6, 0)},
        "relu": {
            "activation": "relu",
            "up_activation": "relu",
            "gate_threshold": torch.full((N,), 1e-30, device=device),
            "value_threshold": torch.full((N,), 1e-30, device=device),
        },
        "teal": {
            "activation": "silu",
            "gate_in_threshold": vector(H, 7, 0.3),
            "up_in_threshold": vector(H, 8, 0.3),
            "value_threshold": vector(N, 9, 0.0),
        },
        "svdp": {
            "activation": "relu",
            "gate_threshold": torch.full((N,), 1e-30, device=device),
            "predictor_a": random(16, H, dtype=dtype, seed=10, device=device),
            "predictor_b": random(N, 16, dtype=dtype, seed=11, device=device),
            "predictor_bias": random(N, dtype=torch.float32, seed=12, device=device) - 20,
        },
        "coreinfer": {
            "activation": "silu",
            "neurons": torch.arange(3, N, 3, dtype=torch.int32, device=device),
        },
    }


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "cats", "mean", "relu", "teal", "svdp", "coreinfer"])
def test_block_reads_only_what_its_rules_keep(where: dict[str, Any], name: str, dtype: torch.dtype, rows: int) -> None:
    device = where["device"]
    rules = Rules(**rule_sets(device, dtype)[name])
    x = random(rows, H, dtype=dtype, seed=1, device=device)
    gate, up = (random(N, H, dtype=dtype, seed=seed, device=device, scale=H**-0.5) for seed in (2, 3))
    down = by_columns(random(H, N, dtype=dtype, seed=4, device=device, scale=N**-0.5))
    if rules.gate_in_threshold is not None:
        gate, up = by_columns(gate), by_columns(up)
    assert ffn_obstacle(x, gate, up, down, rules) == ""
    want = exact_ffn(x, gate, up, down, rules)
    scale = torch.ones_like(want)
    masks = reference.ffn_keep(x.double(), gate.double(), up.double(), rules)
    for key, weight, by_inputs in (("gate", gate, name == "teal"), ("up", up, name == "teal"), ("down", down, True)):
        mask = masks.get(key)
        if mask is not None:
            unread = ~mask.any(0)
            (weight.T if by_inputs else weight)[unread] = float("nan")
            assert name == "dense" or bool(unread.any())
    got = products.gated_ffn(x, gate, up, down, rules, **options(where))
    check(got, want, 4 * scale)


@pytest.mark.parametrize("name", ["cats", "svdp"])
def test_neurons_are_shared_out_over_many_blocks(where: dict[str, Any], name: str) -> None:
    """The kept lie together: most blocks' shares lie far from their own places."""
    device, dtype = where["device"], torch.bfloat16
    rules = Rules(**rule_sets(device, dtype)[name])
    x = random(1, H, dtype=dtype, seed=1, device=device)
    gate, up = (random(N, H, dtype=dtype, seed=seed, device=device, scale=H**-0.5) for seed in (2, 3))
    down = by_columns(random(H, N, dtype=dtype, seed=4, device=device, scale=N**-0.5))
    if name == "cats":
        rules.gate_threshold[:250] = float("inf")
    else:
        rules.predictor_bias[:250] = -1e9
    want = exact_ffn(x, gate, up, down, rules)
    unread = ~reference.ffn_keep(x.double(), gate.double(), up.double(), rules)["up"].any(0)
    up[unread], down[:, unread] = float("nan"), float("nan")
    given = options(where)
    if "machine" in given:
        given["machine"] = replace(cuda_emulator.MACHINE, processors=9)
    check(products.gated_ffn(x, gate, up, down, rules, **given), want, 4 * torch.ones_like(want))


def test_plain_block(where: dict[str, Any]) -> None:
    device, dtype = where["device"], torch.bfloat16
    x = random(2, H, dtype=dtype, seed=1, device=device)
    up = random(N, H, dtype=dtype, seed=2, device=device, scale=H**-0.5)
    down = by_columns(random(H, N, dtype=dtype, seed=4, device=device, scale=N**-0.5))
    bias = random(N, dtype=torch.float32, seed=5, device=device)
    rules = Rules(activation="relu", up_bias=bias, gate_threshold=torch.full((N,), 1e-30, device=device))
    want = exact_ffn(x, None, up, down, rules)
    check(products.gated_ffn(x, None, up, down, rules, **options(where)), want, 4 * torch.ones_like(want))


@pytest.mark.parametrize("neurons", [1, 38, 131])
def test_block_of_chosen_neurons_has_any_number_of_them(where: dict[str, Any], neurons: int) -> None:
    device = where["device"]
    x, gate, up, rest = (
        random(size, H, dtype=torch.bfloat16, seed=seed, device=device, scale=scale)
        for seed, (size, scale) in enumerate(
            [(2, 1.0), (neurons, H**-0.5), (neurons, H**-0.5), (neurons, neurons**-0.5)]
        )
    )
    rules = Rules(activation="silu")
    assert ffn_obstacle(x, gate, up, rest.t(), rules) == ""
    got = products.gated_ffn(x, gate, up, rest.t(), rules, **options(where))
    want = exact_ffn(x, gate, up, rest.t(), rules)
    check(got, want, 4 * torch.ones_like(want))


def test_odd_sizes_are_refused_with_the_reason() -> None:
    assert "multiples of 8" in layout_obstacle(torch.zeros(10, 12))
    assert layout_obstacle(torch.zeros(10, 16)) == ""
    assert "strides" in layout_obstacle(torch.zeros(16, 32)[:, ::2])


def test_a_block_of_more_inputs_than_a_list_holds_is_refused() -> None:
    for inputs, fits in ((machine.MOST_SLICE, True), (machine.MOST_SLICE + 8, False)):
        up, down = by_columns(torch.zeros(32, inputs)), by_columns(torch.zeros(inputs, 32))
        rules = Rules(activation="silu", up_in_threshold=torch.zeros(inputs))
        assert (ffn_obstacle(torch.zeros(1, inputs), up, up, down, rules) == "") == fits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "second_activation"), [("silu", "identity"), ("gelu_tanh", "relu"), ("identity", "")]
)
def test_what_thresholds_leave_of_many_rows(
    where: dict[str, Any], dtype: torch.dtype, activation: str, second_activation: str
) -> None:
    device, eps = where["device"], torch.finfo(dtype).eps
    value, second = (random(3, 300, N, dtype=dtype, seed=seed, device=device) for seed in (1, 2))
    least, product = (random(N, dtype=torch.float32, seed=seed, device=device).abs() / 4 for seed in (3, 4))
    value[0, 7, 5] = float("nan")
    least = least[:1].expand(N)  # one for all
    v = reference.ACTIVATIONS[activation](value)
    both = v * reference.ACTIVATIONS[second_activation](second) if second_activation else v
    want = torch.where(reference.keep(v, least) & reference.keep(both, product), both, 0.0)
    given = (second if second_activation else None, least, product, activation, second_activation or "identity")
    got = many.cut(value, *given, **options(where, "run"))
    # A value within rounding of its threshold may fall on either side.
    near = ((v.abs() - least).abs() <= 2 * eps * least) | ((both.abs() - product).abs() <= 2 * eps * product)
    assert near.float().mean() < 0.02
    assert bool(got[0, 7, 5].isnan())
    wrong = (got.float() - want.float()).abs() > 2 * eps * want.float().abs()
    assert not bool((wrong & ~near).any())
    assert 0.1 < float((got == 0).float().mean()) < 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "share"), [(1, 0.0), (20, 0.0), (0, 0.3), (330, 0.0)])
@pytest.mark.parametrize("positive", [False, True])
def test_core_neurons_of_a_text(
    where: dict[str, Any], dtype: torch.dtype, count: int, share: float, positive: bool
) -> None:
    device, channels = where["device"], 330
    x = random(75, channels, dtype=dtype, seed=1, device=device)
    x[:, :50] = x[:, 50:51]  # ties
    x[3, 1:] = 0
    x[4] = 0
    x[5, 7] = -0.0
    # More parts than one launch counts.
    stops = [1, 2, 5, *range(6, 75), 75]
    want = reference.core_parts(x, stops, count, share, positive=positive)
    got = cores.core_parts(x, stops, count, share, positive=positive, **options(where, "run"))
    assert torch.equal(got[:, 0], want[:, 0])
    torch.testing.assert_close(got[:, 1], want[:, 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cats", "teal", "relu"])
def test_blocks_of_many_rows(where: dict[str, Any], name: str) -> None:
    device, dtype = where["device"], torch.bfloat16
    rules = Rules(**rule_sets(device, dtype)[name])
    x = random(40, H, dtype=dtype, seed=1, device=device)
    gate, up = (random(N, H, dtype=dtype, seed=seed, device=device, scale=H**-0.5) for seed in (2, 3))
    down = by_columns(random(H, N, dtype=dtype, seed=4, device=device, scale=N**-0.5))
    want = reference.gated_ffn_masked(x, gate, up, down, rules)
    got = many.gated_ffn(x, gate, up, down, rules, **options(where, "run"))
    # Few values lie within rounding of a threshold; those that do weigh little.
    assert float((got.float() - want.float()).norm() / want.float().norm()) < 0.01


def test_many_rows_are_left_to_the_oracle_where_it_alone_knows_the_rules() -> None:
    x, weight = torch.zeros(20, 16, dtype=torch.bfloat16), torch.zeros(32, 16, dtype=torch.bfloat16)
    assert not many.fits(Rules("silu", neurons=torch.zeros(1, dtype=torch.int32)), x, weight)
    assert not many.fits(Rules("silu"), x.float(), weight)
    assert not many.fits(Rules("silu"), x, weight[:, :12])
    assert not many.fits(Rules("silu"), x, weight.float())
    assert not many.fits(Rules("silu"), x.clone().requires_grad_(), weight)


@pytest.mark.cuda
@pytest.mark.skipif(bool(compiler.missing()), reason=f"CUDA: {compiler.missing()}")
def test_operator_under_a_graph_and_compile() -> None:
    x = random(1, H, dtype=torch.bfloat16, seed=1, device="cuda")
    weight = by_columns(random(N, H, dtype=torch.bfloat16, seed=2, device="cuda"))
    threshold = torch.full((H,), 0.7, device="cuda")
    assert kernels.path_for(x, weight).startswith("cuda-sm_")
    want = kernels.linear(x, weight, None, threshold)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.linear(x, weight, None, threshold)
    x.copy_(-x)
    graph.replay()
    assert torch.equal(y, -want)
    compiled = torch.compile(lambda v: kernels.linear(v, weight, None, threshold) * 1, fullgraph=True)
    assert torch.equal(compiled(x), -want)

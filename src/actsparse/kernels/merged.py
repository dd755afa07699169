"""Gate and up of a block whose activation and down projection are someone else's: up is computed only where the rules keep.

Serving engines compute [gate | up] in one merged product, then act(gate) * up, then down.  Zeros in up are enough to carry a
decision through: what follows multiplies by them, and a down projection that skips exact zeros skips those neurons.

Shape letters: H hidden, N neurons, R rank, B rows of x; "..." any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cpu, cuda
from .cuda.launches import Builder, Kept, Matrix, input_of
from .cuda.machine import Machine
from .cuda.products import Run, machine_of
from .cuda.structures import Parts
from .reference import ACTIVATIONS, keep
from .rules import Rules

# x [B, I], a weight [O, I] and its bias to [B, O].
_Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def gate_up(x: Tensor, gate: Tensor, up: Tensor, rules: Rules) -> Tensor:
    """[gate x~ + bias | up x~ + bias, 0 where the rules drop the neuron], for a block whose rest somebody else computes.

    x [..., H]; gate and up [N, H]; ``rules`` as in :func:`actsparse.kernels.gated_ffn`, as far as they decide before up:
    predictor, input thresholds and ``gate_threshold``, which looks at activation(gate).  Returns [..., 2 N] in x's type, gate
    before its activation.  1 to 8 rows read up (and, with a predictor, gate) only where some row keeps the neuron.  Raises
    ValueError when shapes do not fit.
    """
    if gate.shape != up.shape or x.dim() == 0 or up.dim() != 2 or x.shape[-1] != up.shape[1]:
        raise ValueError(f"x {tuple(x.shape)}, gate {tuple(gate.shape)} and up {tuple(up.shape)} do not fit")
    neurons, hidden = up.shape
    rules.check(neurons, hidden, hidden)
    path = path_of(x, gate, up, rules)
    if path.startswith("cpu-"):
        return on_cpu(x, gate, up, rules)
    return on_cuda(x, gate, up, rules) if path.startswith("cuda-") else masked(x, gate, up, rules)


def path_of(x: Tensor, gate: Tensor, up: Tensor, rules: Rules) -> str:
    """The path of :func:`gate_up` with these operands, named as by :func:`actsparse.kernels.path_for`."""
    from . import path_for  # the choice, which imports this module

    if obstacle(gate, up, rules) or (x.is_cuda and cuda.linear_obstacle(x)):
        return "reference"
    path = path_for(x, gate, up, rules.predictor_a, rules.predictor_b)
    return "reference" if path == "portable" else path


def obstacle(gate: Tensor, up: Tensor, rules: Rules) -> str:
    """Why :func:`on_cpu` and :func:`on_cuda` cannot; empty when they can."""
    for name, weight in (("gate", gate), ("up", up)):
        layout = cpu.layout_of(weight)
        if layout is None or layout[0] != cpu.ROWS:
            return f"{name} is not stored by rows"
    if rules.gate_in_threshold is not None or rules.up_in_threshold is not None:
        return "an input threshold meets a matrix stored by rows"
    if rules.gate_threshold is None:
        return "no threshold decides over the gate"
    return ""


def masked(x: Tensor, gate: Tensor, up: Tensor, rules: Rules) -> Tensor:
    """The oracle, as dense products in x's own type: [gate x~ + bias | up x~ + bias where kept, else 0], [..., 2 N]."""
    gate_in = x if rules.gate_in_threshold is None else torch.where(keep(x, rules.gate_in_threshold), x, 0.0)
    up_in = x if rules.up_in_threshold is None else torch.where(keep(x, rules.up_in_threshold), x, 0.0)
    g, u = _dense(gate_in, gate, rules.gate_bias), _dense(up_in, up, rules.up_bias)
    kept = _kept(g, rules, _predicted(x, rules, _dense))
    return torch.cat([g, u if kept is None else torch.where(kept, u, 0.0)], -1)


def on_cpu(x: Tensor, gate: Tensor, up: Tensor, rules: Rules) -> Tensor:
    """As :func:`masked` by the native kernels, for calls without :func:`obstacle`: 1 to 8 rows."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count, neurons = len(rows), up.shape[0]
    allowed = _predicted(rows, rules, _native)
    if allowed is None:
        g = _native(rows, gate, rules.gate_bias)
    else:
        g = torch.zeros(count, neurons, dtype=x.dtype)
        cpu.linear_rows(rows, gate, _union(allowed), g, rules.gate_bias)
    kept = _kept(g, rules, allowed)
    assert kept is not None
    u = torch.zeros(count, neurons, dtype=x.dtype)
    cpu.linear_rows(rows, up, _union(kept), u, rules.up_bias)
    if count > 1:
        u = torch.where(kept, u, 0.0)
    return torch.cat([g, u], -1).reshape(*x.shape[:-1], 2 * neurons)


def on_cpu_whole(x: Tensor, gate_up: Tensor, bias: Tensor | None, rules: Rules) -> Tensor:
    """As :func:`masked` by one native product that skips nothing, for rows that together keep nearly every neuron.

    x [..., H], 1 to 8 rows; gate_up [2 N, H], gate above up, stored by rows; bias [2 N].  Of the rules only ``gate_threshold``
    counts.
    """
    y = _native(x, gate_up, bias)
    g, u = y.chunk(2, -1)
    kept = _kept(g, rules, None)
    assert kept is not None
    u.masked_fill_(~kept, 0.0)
    return y


def on_cuda(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    rules: Rules,
    *,
    machine: Machine | None = None,
    run: Run = cuda.compiler.run,
) -> Tensor:
    """As :func:`masked` by the CUDA kernels, for calls without :func:`obstacle`: 1 to 8 rows of 16-bit values.

    The grid is fixed and the host waits for nothing, so that it may be captured in a graph.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count, neurons = len(rows), up.shape[0]
    machine = machine or machine_of(x)
    source = input_of(rows, rows.shape[-1])
    g, u = rows.new_zeros(count, neurons, dtype=torch.float32), rows.new_zeros(count, neurons)
    build = Builder(machine, x.device, count)
    allowed: Tensor | None = None
    if rules.predictor_a is None or rules.predictor_b is None:
        build.rows_product(source, [Matrix(gate, rules.gate_bias)], out=g)
    else:
        low, scores = (rows.new_empty(count, size, dtype=torch.float32) for size in (len(rules.predictor_a), neurons))
        build.rows_product(source, [Matrix(rules.predictor_a)], out=low)
        build.rows_product(
            input_of(Parts(low, 1, low.shape[1]), low.shape[1]), [Matrix(rules.predictor_b, rules.predictor_bias)],
            out=scores, keep=(low,),
        )  # fmt: skip
        run(build.launches, x.device, x.dtype, count)
        allowed = ~(scores <= 0)
        build = Builder(machine, x.device, count)
        build.rows_product(source, [Matrix(gate, rules.gate_bias)], out=g, chosen=_chosen(allowed))
    run(build.launches, x.device, x.dtype, count)
    kept = _kept(g, rules, allowed)
    assert kept is not None
    build = Builder(machine, x.device, count)
    build.rows_product(source, [Matrix(up, rules.up_bias)], rounded=u, chosen=_chosen(kept))
    run(build.launches, x.device, x.dtype, count)
    # A row's neurons that another row keeps were computed too.
    return torch.cat([g.to(x.dtype), torch.where(kept, u, 0.0)], -1).reshape(*x.shape[:-1], 2 * neurons)


def _chosen(kept: Tensor) -> Kept:
    """The neurons that some row of kept [B, N] has, in one segment; how many stays on the device."""
    count = kept.any(0).sum(dtype=torch.int32).reshape(1)
    return Kept(Parts(kept.float().contiguous(), 1, kept.shape[1]), torch.zeros_like(count), count, 1)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cpu.linear(x, weight, bias, None)


def _kept(g: Tensor, rules: Rules, allowed: Tensor | None) -> Tensor | None:
    """Who is left after predictor and gate threshold, [..., N]; None: everyone."""
    if rules.gate_threshold is None:
        return allowed
    passes = keep(ACTIVATIONS[rules.activation](g.float()), rules.gate_threshold)
    return passes if allowed is None else allowed & passes


def _predicted(x: Tensor, rules: Rules, product: _Linear) -> Tensor | None:
    """Whom the predictor names, [..., N]; None without one."""
    if rules.predictor_a is None or rules.predictor_b is None:
        return None
    # NaN counts as active.
    return ~(product(product(x, rules.predictor_a, None), rules.predictor_b, rules.predictor_bias) <= 0)


def _union(kept: Tensor) -> Tensor:
    return kept.any(0).nonzero()[:, 0].int()

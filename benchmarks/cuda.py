"""The CUDA kernels at Llama-3-8B's shape on random weights, without a model: decode steps, and products beside cuBLAS.

    python benchmarks/cuda.py steps dense chess:0.5 teal:0.5 coreinfer:0.6 relu svdp
    python benchmarks/cuda.py products [cuts]

A step is checked against a float32 forward pass; what it reads of the weights is set against the rate at which the card adds
up 2 GiB.  Its thresholds are quantiles of the token's own activations, layer by layer, so that the sparsity is exact.  ReGLU
models have a gate of rank 512 with a bias that leaves 10 % positive, and a predictor, its factors, that names 25 %.  Times are
medians of CUDA-graph replays.  Products give one 16-bit result, as ``kernels.linear`` does, so those whose inputs are split
have a kernel that adds the parts up; with ``cuts`` others than the formula's are tried.
"""

from __future__ import annotations

import functools
import statistics
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from actsparse.kernels import Rules
from actsparse.kernels.cuda import compiler, decoder, products
from actsparse.kernels.cuda.launches import Builder, Matrix, input_of

H, N, LAYERS, HEADS, KV, D, V = 4096, 14336, 32, 32, 8, 128, 128256
CONTEXT, LENGTH, EPS, TOKEN = 128, 256, 1e-5, 17
DEVICE, DTYPE = "cuda", torch.bfloat16


def timed(run: Any, times: int = 12, repeats: int = 5) -> tuple[float, float, float]:
    """Median, least and most of ``repeats`` means, in ms."""
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / times)
    return statistics.median(found), min(found), max(found)


def copy_rate() -> float:
    """Of a large copy on the device, bytes read and written, in GB/s."""
    source = torch.empty(1 << 30, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    return 8 * source.numel() / timed(lambda: target.copy_(source), 5)[0] / 1e6


def read_rate() -> float:
    """Of adding up 2 GiB, GB/s."""
    source = torch.ones(1 << 29, dtype=torch.float32, device=DEVICE)
    return 4 * source.numel() / timed(source.sum, 5)[0] / 1e6


def random(*shape: int, scale: float) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE).mul_(scale)


def by_columns(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


# ---- the decode step ----------------------------------------------------------------------------------------------------


def weights_of_layer() -> SimpleNamespace:
    return SimpleNamespace(
        q=random(H, H, scale=H**-0.5), k=random(KV * D, H, scale=H**-0.5), v=random(KV * D, H, scale=H**-0.5),
        o=random(H, H, scale=H**-0.5), gate=random(N, H, scale=H**-0.5), up=random(N, H, scale=H**-0.5),
        down=random(H, N, scale=N**-0.5), keys=random(KV, LENGTH, D, scale=1.0), values=random(KV, LENGTH, D, scale=1.0),
    )  # fmt: skip


def make_relu(w: SimpleNamespace) -> None:
    w.b, w.a = random(N, 512, scale=512**-0.5), random(512, H, scale=H**-0.5)
    w.gate = (w.b.float() @ w.a.float()).to(DTYPE)
    w.gate_bias = torch.full((N,), -1.2816, device=DEVICE)
    w.predictor_bias = torch.full((N,), -0.6745, device=DEVICE)


def threshold_of(values: Tensor, sparsity: float) -> float:
    """Near the quantile, in the widest gap there: no rounding moves a value across it."""
    v = values.abs().sort().values
    k, near = int(len(v) * sparsity), max(8, len(v) // 100)
    low, high = max(0, k - near), min(len(v) - 1, k + near)
    i = int((v[low + 1 : high + 1] - v[low:high]).argmax()) + low
    return float(v[i] + v[i + 1]) / 2


def cut(values: Tensor, sparsity: float) -> tuple[Tensor, float]:
    least = threshold_of(values, sparsity)
    return torch.where(values.abs() < least, torch.zeros_like(values), values), least


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean() + EPS)


def rotary() -> tuple[Tensor, Tensor]:
    frequencies = 500000 ** -(torch.arange(0, D, 2, device=DEVICE).float() / D)
    angles = torch.arange(LENGTH, device=DEVICE).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotated(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    a, b = x.view(-1, D)[:, : D // 2], x.view(-1, D)[:, D // 2 :]
    c, s = (table[CONTEXT] for table in tables)
    return torch.cat([a * c - b * s, b * c + a * s], 1)


def attended(w: SimpleNamespace, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    q, k = rotated(q, tables).view(KV, HEADS // KV, D), rotated(k, tables)
    keys = torch.cat([w.keys[:, :CONTEXT].float(), k.to(DTYPE).float()[:, None]], 1)
    values = torch.cat([w.values[:, :CONTEXT].float(), v.view(KV, 1, D).to(DTYPE).float()], 1)
    return ((q @ keys.transpose(1, 2) * D**-0.5).softmax(-1) @ values).reshape(-1)


def forward(
    layers: list[SimpleNamespace], embedding: Tensor, head: Tensor, method: str, sparsity: float
) -> tuple[Any, ...]:
    """Float32 logits, for each layer its attention thresholds and the rules of its block, and the bytes of weights to read."""
    tables, found, read = rotary(), [], V * H
    x = embedding[TOKEN].float()
    full = lambda value, size: torch.full((size,), value, device=DEVICE)  # noqa: E731
    for w in layers:
        sites: dict[str, Tensor] = {}
        a = normed(x)
        cut_a, least = cut(a, sparsity) if method in ("chess", "teal") else (a, 0.0)
        if method in ("chess", "teal"):
            names = ("q",) if method == "chess" else ("q", "k", "v")
            sites |= {f"{name}_threshold": full(least, H) for name in names}
        kv = cut_a if method == "teal" else a
        read += count(cut_a) * H + 2 * count(kv) * KV * D
        y = attended(w, w.q.float() @ cut_a, w.k.float() @ kv, w.v.float() @ kv, tables)
        if method in ("chess", "teal"):
            y, least = cut(y, sparsity)
            sites["o_threshold"] = full(least, H)
        read += count(y) * H
        x = x + w.o.float() @ y
        a = normed(x)
        rules: dict[str, Any] = {"activation": "silu"}
        if method == "teal":
            a, least = cut(a, sparsity)
            rules |= {"gate_in_threshold": full(least, H), "up_in_threshold": full(least, H)}
        inputs, gates, ups = count(a), N, N
        gate = w.gate.float() @ a
        if method in ("relu", "svdp"):
            rules = {"activation": "relu", "gate_bias": w.gate_bias, "gate_threshold": full(1e-30, N)}
            gate = torch.relu(gate + w.gate_bias)
            if method == "svdp":
                rules |= {"predictor_a": w.a, "predictor_b": w.b, "predictor_bias": w.predictor_bias}
                named = w.b.float() @ (w.a.float() @ a) + w.predictor_bias > 0
                gate, gates = torch.where(named, gate, torch.zeros_like(gate)), int(named.sum())
                read += 512 * (H + N)
            ups = count(gate)
        else:
            gate = torch.nn.functional.silu(gate)
        if method in ("chess", "cats"):
            gate, least = cut(gate, sparsity)
            rules["gate_threshold"] = full(least, N)
            ups = count(gate)
        if method == "coreinfer":
            rules["neurons"] = torch.randperm(N, device=DEVICE)[: round(N * (1 - sparsity))].sort().values.int()
            gates = ups = len(rules["neurons"])
            gate = torch.zeros_like(gate).index_copy(0, rules["neurons"].long(), gate[rules["neurons"].long()])
        h = gate * (w.up.float() @ a)
        if method == "teal":
            h, least = cut(h, sparsity)
            rules["value_threshold"] = full(least, N)
        read += inputs * (gates + ups) + count(h) * H
        x = x + w.down.float() @ h
        found.append((sites, rules))
    return head.float() @ normed(x), found, 2 * read


def count(values: Tensor) -> int:
    return int((values != 0).sum())


def decoder_for(
    layers: list[SimpleNamespace], embedding: Tensor, head: Tensor, method: str, found: Any
) -> decoder.Decoder:
    norm = decoder.norm_of(torch.ones(H, device=DEVICE), eps=EPS)
    cosine, sine = rotary()
    columns = {"teal": "q k v o gate up down", "chess": "q o down", "dense": ""}.get(method, "down").split()
    made = []
    for w, (sites, rules) in zip(layers, found, strict=True):
        part = {
            name: by_columns(getattr(w, name)) if name in columns else getattr(w, name)
            for name in ("q", "k", "v", "o", "gate", "up", "down")
        }
        made.append(
            decoder.layer_of(
                input_norm=norm, post_norm=norm, k_cache=w.keys, v_cache=w.values,
                **{name: decoder.matrix_of(part[name]) for name in "qkvo"},
                ffn=decoder.ffn_of(part["gate"], part["up"], part["down"], Rules(**rules)), **sites,
            )
        )  # fmt: skip
    return decoder.decoder_of(
        made, heads=HEADS, kv_heads=KV, head_dim=D, embedding=decoder.matrix_of(embedding), lm_head=decoder.matrix_of(head),
        final_norm=norm, cosine=cosine, sine=sine, attention_scale=D**-0.5,
    )  # fmt: skip


def kernels_of_a_layer(step: decoder.Decoder) -> str:
    """From each kernel's end to the next one's, medians over the layers of three replays, in us."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step.step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if "_kernel" in event.name]
    events = sorted(events, key=lambda event: event.time_range.end)[-len(step.launches) :]
    each = (len(events) - 2) // LAYERS
    found = []
    for j in range(each):
        pairs = zip(events[j:-1:each], events[1 + j : -1 : each], strict=False)
        took = statistics.median(after.time_range.end - before.time_range.end for before, after in pairs)
        found.append(f"{events[1 + j].name.removesuffix('_kernel')} {took:.1f}")
    return ", ".join(found)


def steps(modes: list[str]) -> None:
    layers = [weights_of_layer() for _ in range(LAYERS)]
    embedding, head = random(V, H, scale=1.0), random(V, H, scale=H**-0.5)
    rate = read_rate()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy {copy_rate():.0f} GB/s, reading {rate:.0f} GB/s"
    )
    first = 0.0
    for mode in modes:
        method, _, sparsity = mode.partition(":")
        if method in ("relu", "svdp") and not hasattr(layers[0], "gate_bias"):
            for w in layers:
                make_relu(w)
        want, found, read = forward(layers, embedding, head, method, float(sparsity or 0))
        step = decoder_for(layers, embedding, head, method, found)
        step.state.copy_(torch.tensor([TOKEN, CONTEXT], dtype=torch.int32))
        step.step()
        got = step.logits.clone()
        step.step()
        assert torch.equal(got, step.logits), "the same token gave other bits"
        took, least, most = timed(step.step)
        first = first or took
        error = float((got - want).norm() / want.norm())
        print(
            f"{mode}: {took:.3f} ms ({least:.3f} to {most:.3f}), {first / took:.2f} x the first; reads {read / 1e9:.2f} GB, "
            f"which takes {read / rate / 1e6:.3f} ms ({read / rate / took / 1e4:.0f} %); error {error:.1e}"
        )  # fmt: skip
        print(f"    {kernels_of_a_layer(step)}", flush=True)
        del step
        torch.cuda.empty_cache()


# ---- single products ----------------------------------------------------------------------------------------------------


def captured(run: Any, count: int) -> float:
    """One of ``count`` launches in a graph, in us."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e3 * timed(graph.replay, 2, 7)[0] / count


CUTS = ((64, 2), (128, 1), (128, 2), (128, 4), (256, 4), (256, 8))  # columns of a block, splits


def products_beside_cublas(cuts: bool) -> None:
    """Weights are rotated past L2; several rows keep the same columns."""
    for name, out, inn in (("qkv", 6144, H), ("o", H, H), ("gate", N, H), ("down", H, N)):
        count = max(8, int(600e6 // (2 * out * inn)) + 1)
        weights = [random(out, inn, scale=inn**-0.5) for _ in range(count)]
        columns = [by_columns(weight) for weight in weights]
        for rows in (1, 4, 8):
            x = random(1, inn, scale=1.0).expand(rows, inn).contiguous()
            y = [torch.empty(rows, out, device=DEVICE, dtype=DTYPE) for _ in range(count)]
            pairs = list(zip(weights, y, strict=True))
            cublas = captured(lambda pairs=pairs: [torch.mm(x, w.t(), out=to) for w, to in pairs], count)  # noqa: B023
            print(f"{name} {rows} rows: cuBLAS {cublas:.1f} us")

            def ours(product: Any, x: Tensor = x, rows: int = rows, count: int = count) -> float:
                build = Builder(products.machine_of(x), x.device, rows)
                for k in range(count):
                    product(build, k)
                return captured(lambda: compiler.run(build.launches, x.device, DTYPE, rows), count)

            try:
                took = ours(lambda b, k: b.rows_product(input_of(x, inn), [Matrix(weights[k])], rounded=y[k]))  # noqa: B023
                print(f"    by rows {took:.1f} ({cublas / took:.2f} x)")
            except ValueError as error:
                print(f"    by rows: {error}")
            for density in (1.0, 0.5, 0.1):
                least = torch.full(
                    (inn,), threshold_of(x[0].float(), 1 - density) if density < 1 else 0.0, device=DEVICE
                )

                def product(build: Builder, k: int, tile: int = 0, splits: int = 0, least: Tensor = least) -> None:
                    build.columns_product(
                        input_of(x, inn), [(Matrix(columns[k]), least)], rounded=y[k], tile=tile, splits=splits  # noqa: B023
                    )  # fmt: skip

                try:
                    took = ours(product)
                    line = f"    {density:.0%} of the columns: {took:.1f} ({cublas / took:.2f} x)"
                    if cuts:
                        best = min((ours(functools.partial(product, tile=t, splits=s)), t, s) for t, s in CUTS)
                        line += f"; of others best {best[1]}/{best[2]} {best[0]:.1f} ({cublas / best[0]:.2f} x)"
                    print(line, flush=True)
                except ValueError as error:
                    print(f"    {density:.0%} of the columns: {error}")


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1:2] == ["steps"]:
        steps(sys.argv[2:])
    elif sys.argv[1:] in (["products"], ["products", "cuts"]):
        products_beside_cublas(len(sys.argv) > 2)
    else:
        sys.exit(__doc__)

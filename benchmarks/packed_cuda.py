"""Packed weights on a GPU at Llama-3-8B's shape, random codes, without a model: decode steps, products, and others' beside.

    python benchmarks/packed_cuda.py steps 3.0 4.0 2.5 all nothing
    python benchmarks/packed_cuda.py products 3.0 all nothing
    python benchmarks/packed_cuda.py steps 4.0 all stored=8
    python benchmarks/packed_cuda.py rows        # 8 rows at a time, and prompts of 2,048 beside cuBLAS
    python benchmarks/packed_cuda.py int4        # torch's 4-bit products alone

How deep a column is read is drawn at random, with the shares that thresholds give for Gaussian inputs at such bits: what is
read does not hang on rounding, and a step's bits must be the same again.  Times are medians of CUDA-graph replays; weights are
rotated past L2.  A fresh process a run: weights that lie scattered are read more slowly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from cuda import CONTEXT, DEVICE, DTYPE, HEADS, KV, LAYERS, LENGTH, TOKEN, D, H, N, V, copy_rate, timed
from torch import Tensor

from actsparse.kernels import Rules
from actsparse.kernels.cuda import compiler, decoder, graded
from actsparse.kernels.cuda.launches import ACTIVATIONS, Builder, Matrix
from actsparse.kernels.cuda.tiles import RUN, TILE, Tiles

# Shares of the columns that are read to at least one, two, three and four planes of two bits.
DEPTHS = {
    "2.5": (0.77, 0.43, 0.0, 0.0), "3.0": (0.84, 0.585, 0.03, 0.0), "4.0": (0.915, 0.775, 0.255, 0.0),
    "all": (1.0, 1.0, 1.0, 1.0), "nothing": (0.0, 0.0, 0.0, 0.0),
}  # fmt: skip
PLANE_BITS = [2 + 8 / 64, 2.0, 2.0]  # with a group's mantissa; of 6 bits stored
PRODUCTS = {
    "qkv": ((H, KV * D, KV * D), H),
    "o": ((H,), H),
    "gate_up": ((N, N), H),
    "down": ((H,), N),
    "head": ((V,), H),
}
ROTATED = 200e6  # bytes of weights that replays go through: L2 has 50 MB


def thresholds(inputs: int, depths: Sequence[float]) -> Tensor:
    """Zero where a plane is read, else infinite: [L, I]."""
    drawn = torch.rand(inputs, device=DEVICE)
    return torch.stack([torch.where(drawn < share, 0.0, float("inf")) for share in depths[: len(PLANE_BITS)]])


def random_matrix(outputs: int, inputs: int, depths: Sequence[float]) -> graded.PlaneMatrix:
    """Random codes."""
    levels = len(PLANE_BITS)
    tiles = -(-outputs // TILE)
    codes = torch.randint(0, 256, (tiles, inputs, levels, RUN), dtype=torch.uint8, device=DEVICE)
    mantissa = torch.randint(128, 256, (tiles, inputs, 8), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(inputs, device=DEVICE) * 0.5 + 0.75).mul_(1.3 * inputs**-0.5).to(torch.bfloat16)
    held = Tiles(outputs, codes, mantissa, scale, torch.ones(levels, device=DEVICE), (1.0,) * levels)
    center, start = torch.zeros(inputs, device=DEVICE), torch.zeros(outputs, device=DEVICE)
    return graded.plane_matrix(held, thresholds(inputs, depths), center, start)


def redrawn(matrix: graded.PlaneMatrix, depths: Sequence[float]) -> graded.PlaneMatrix:
    """The same weights read to other depths."""
    return replace(matrix, thresholds=thresholds(matrix.inn, depths))


def bytes_read(matrices: Sequence[graded.PlaneMatrix]) -> float:
    """Of codes and mantissas."""
    total = 0.0
    for matrix in matrices:
        assert matrix.thresholds is not None
        kept = (matrix.thresholds == 0).float().mean(1).tolist()
        total += sum(bits * share for bits, share in zip(PLANE_BITS, kept, strict=True)) * matrix.out * matrix.inn / 8
    return total


# ---- the decode step ----------------------------------------------------------------------------------------------------


def random_decoder(depths: Sequence[float]) -> decoder.Decoder:
    def norm() -> decoder.Norm:
        return decoder.norm_of(torch.ones(H, device=DEVICE), eps=1e-5)

    def cache() -> Tensor:
        return torch.randn(KV, LENGTH, D, device=DEVICE, dtype=DTYPE)

    def packed(outputs: int, inputs: int) -> graded.PlaneMatrix:
        return random_matrix(outputs, inputs, depths)

    layers = [
        decoder.layer_of(
            input_norm=norm(), post_norm=norm(), q=packed(H, H), k=packed(KV * D, H), v=packed(KV * D, H), o=packed(H, H),
            ffn=decoder.ffn_of(packed(N, H), packed(N, H), packed(H, N), Rules("silu")), k_cache=cache(), v_cache=cache(),
        )
        for _ in range(LAYERS)
    ]  # fmt: skip
    angles = torch.rand(LENGTH, D // 2, device=DEVICE)
    embedding = Matrix(torch.randn(V, H, device=DEVICE, dtype=DTYPE))
    return decoder.decoder_of(
        layers, heads=HEADS, kv_heads=KV, head_dim=D, embedding=embedding, lm_head=packed(V, H), final_norm=norm(),
        cosine=angles.cos(), sine=angles.sin(), attention_scale=D**-0.5,
    )  # fmt: skip


def redraw(made: decoder.Decoder, depths: Sequence[float]) -> list[graded.PlaneMatrix]:
    """Other depths for every matrix; the matrices."""
    found: list[Any] = []
    for layer in made.layer:
        for name in "qkvo":
            setattr(layer, name, redrawn(getattr(layer, name), depths))
            found.append(getattr(layer, name))
        gate, up, down = (redrawn(getattr(layer.ffn, name), depths) for name in ("gate", "up", "down"))
        layer.ffn = decoder.FFN(gate, up, down, layer.ffn.rules)
        found += [gate, up, down]
    assert isinstance(made.lm_head, graded.PlaneMatrix)
    made.lm_head = redrawn(made.lm_head, depths)
    return [*found, made.lm_head]


def steps(names: Sequence[str]) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy {copy_rate():.0f} GB/s")
    made = random_decoder(DEPTHS["3.0"])
    for name in names:
        matrices = redraw(made, DEPTHS[name])
        read, weights = bytes_read(matrices), sum(matrix.out * matrix.inn for matrix in matrices)
        decoder.decode_step(made, TOKEN, CONTEXT)
        first = decoder.decode_step(made, TOKEN, CONTEXT).clone()
        same = torch.equal(first, decoder.decode_step(made, TOKEN, CONTEXT))
        middle, least, most = timed(made.step)
        print(
            f"{name}: {middle:.3f} ms ({least:.3f} to {most:.3f}), {8 * read / weights:.2f} bits, {read / 1e9:.2f} GB, "
            f"{read / middle / 1e6:.0f} GB/s, {len(made.launches)} launches, same bits again {same}",
            flush=True,
        )


# ---- products -----------------------------------------------------------------------------------------------------------


def replays(launch: Callable[[], Any], each: int) -> tuple[float, float, float]:
    """Median, least and most of a captured call that does ``each`` products, in microseconds a product."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    graph.replay()
    middle, least, most = (1e3 * value / each for value in timed(graph.replay, 5))
    return middle, least, most


def products(names: Sequence[str], rows: int = 1, of: Sequence[str] = tuple(PRODUCTS)) -> None:
    machine, device = compiler.machine(torch.cuda.current_device()), torch.device(DEVICE, torch.cuda.current_device())
    for product in of:
        outputs, inputs = PRODUCTS[product]
        stored = sum(outputs) * inputs * sum(PLANE_BITS) / 8
        copies = max(2, int(ROTATED / stored) + 1)
        sets = [[random_matrix(out, inputs, DEPTHS["3.0"]) for out in outputs] for _ in range(copies)]
        value, second = (torch.randn(rows, inputs, device=DEVICE) for _ in range(2))
        x, weight = value.to(DTYPE), torch.ones(inputs, device=DEVICE)
        (sums, squares), (factor, _) = graded.sums_of(value[0]), graded.sums_of(second[0])
        identity = ACTIVATIONS["identity"]
        given = graded.PlaneInput(activation=identity, second_activation=identity, size=inputs, eps=1e-5)
        if rows > 1:
            given.x = x.data_ptr()
        elif product == "o":  # as in a step: what attention gives, gate and up, the stream under its norm
            given.value = value.data_ptr()
        elif product == "down":
            given.sum, given.second, given.activation = sums.data_ptr(), factor.data_ptr(), ACTIVATIONS["silu"]
        else:
            given.sum, given.squares, given.norm = sums.data_ptr(), squares.data_ptr(), weight.data_ptr()
        stream = product in ("o", "down") and rows == 1
        results = [graded.zero_sums(rows * out, device) for out in outputs]
        rounded = (
            torch.empty(rows * sum(outputs), dtype=DTYPE, device=DEVICE) if rows > 1 and len(outputs) == 1 else None
        )
        out = torch.empty(outputs[0], device=DEVICE) if product == "head" else None
        followed = graded.zero_sums(graded.SQUARES, device) if stream else None
        for name in names:
            build, read = Builder(machine, device, rows), 0.0
            for matrices in sets:
                drawn = [redrawn(matrix, DEPTHS[name]) for matrix in matrices]
                graded.product(
                    build, given, drawn, results, out=out, rounded=rounded, squares=followed,
                    keep=(value, x, weight, sums, squares, factor),
                )  # fmt: skip
                read = bytes_read(drawn)
            launches = build.launches * max(1, 20 // copies)
            middle, least, most = replays(lambda: compiler.run(launches, device, DTYPE, rows), len(launches))  # noqa: B023
            print(
                f"{product} {rows} row(s), {name}: {middle:.2f} us ({least:.2f} to {most:.2f}), {read / middle / 1e3:.0f} GB/s",
                flush=True,
            )


def many_rows() -> None:
    products(("3.0", "all"), rows=8, of=("qkv", "o", "gate_up", "down"))
    for product in ("qkv", "o", "gate_up", "down"):
        outputs, inputs = PRODUCTS[product]
        packed = [random_matrix(out, inputs, DEPTHS["all"]) for out in outputs]
        plain = [torch.randn(out, inputs, device=DEVICE, dtype=DTYPE) for out in outputs]
        x = torch.randn(2048, inputs, device=DEVICE, dtype=DTYPE)
        ours = timed(lambda: [graded.linear_rows(x, m.tiles, None, m.center, m.start) for m in packed], 3)[0]  # noqa: B023
        theirs = timed(lambda: [x @ weight.T for weight in plain], 3)[0]  # noqa: B023
        print(f"{product}, 2048 rows: packed {1e3 * ours:.0f} us, cuBLAS bf16 {1e3 * theirs:.0f} us", flush=True)


def int4() -> None:
    shapes = {"qkv": (H + 2 * KV * D, H), "o": (H, H), "gate": (N, H), "up": (N, H), "down": (H, N), "head": (V, H)}
    for group in (32, 128):
        total = 0.0
        for name, (outputs, inputs) in shapes.items():
            copies = max(2, int(ROTATED / (outputs * inputs / 2)) + 1)
            x = torch.randn(1, inputs, device=DEVICE, dtype=DTYPE)
            held = []
            for _ in range(copies):
                codes = torch.randint(0, 256, (outputs, inputs // 2), device=DEVICE, dtype=torch.uint8)
                scales = torch.rand(inputs // group, outputs, 2, device=DEVICE, dtype=DTYPE)
                held.append((torch._convert_weight_to_int4pack(codes, 8), scales))
            middle = replays(lambda: [torch._weight_int4pack_mm(x, w, group, s) for w, s in held], copies)[0]  # noqa: B023
            total += middle * (1 if name == "head" else LAYERS)
            print(f"int4 in groups of {group}, {name}: {middle:.1f} us", flush=True)
        print(f"int4 in groups of {group}, all products of a token: {total / 1e3:.2f} ms", flush=True)


def main() -> None:
    stored = next((int(one.partition("=")[2]) for one in sys.argv[2:] if one in ("stored=6", "stored=8")), 6)
    PLANE_BITS[3:] = [2.0] * (stored // 2 - 3)
    names = [one for one in sys.argv[2:] if one != f"stored={stored}"]
    verbs = {"steps": steps, "products": products, "rows": lambda names: many_rows(), "int4": lambda names: int4()}
    if len(sys.argv) < 2 or sys.argv[1] not in verbs or not set(names) <= DEPTHS.keys():
        raise SystemExit(__doc__)
    verbs[sys.argv[1]](names or ["3.0"])


if __name__ == "__main__":
    main()

"""How close the CPU kernels come to the machine's read bandwidth, on the bytes that they need.

    python benchmarks/kernels.py [--shape 2048x8192] [--dtype bfloat16] [--density 1.0 0.5] [--isa avx512] [--json]

The read bandwidth of the machine is printed first; the column "read" is the one measured between the calls of that line,
and the ceiling of its share: the median over rows of calls, each against the reads just before and after it. Calls are made
and timed in C, sixteen in a row on other weights, as a decode step makes them; what the Python layer adds to a call is
measured at the end, on a tiny matrix. Every kernel is compared with the float32 oracle before it is timed. Weights rotate
through buffers far larger than any cache, and the kept set changes at every call. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import time
import timeit
from collections.abc import Callable

import torch
from torch import Tensor

from actsparse import kernels

SHAPES = ("2048x8192", "4096x14336")
DENSITIES = (1.0, 0.7, 0.5, 0.3, 0.1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POOL_BYTES = 1 << 30
KEPT_SETS = 7
CALLS_IN_A_ROW = 16
DROP = 3e38  # a threshold that nothing reaches

Call = Callable[[int], Tensor]
Native = Callable[[int], kernels.cpu.Call]
Rates = tuple[float, float, float]


def pool(rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Distinct weights [rows, columns], together at least POOL_BYTES; shifted copies of one random matrix."""
    count = max(11, math.ceil(POOL_BYTES / (rows * columns * dtype.itemsize)))
    while count % KEPT_SETS == 0 or count % 3 == 0:  # so that every buffer meets every kept set
        count += 1
    first = (torch.randn(rows, columns) / math.sqrt(columns)).to(dtype)
    return [first.roll(i, 0) for i in range(count)]


def kept_sets(size: int, density: float) -> list[Tensor]:
    """Random thresholds [size] that keep exactly round(density * size) values."""
    kept = round(density * size)
    sets = []
    for _ in range(KEPT_SETS):
        threshold = torch.full((size,), DROP)
        threshold[torch.randperm(size)[:kept]] = 0.0
        sets.append(threshold)
    return sets


def check(name: str, found: Tensor, expected: Tensor) -> None:
    """The two differ by accumulation order and one rounding to the output type."""
    bound = 4 * torch.finfo(found.dtype).eps * expected.abs().max() + 1e-6
    if not (found - expected).abs().max() <= bound:
        raise SystemExit(f"{name}: wrong result, error {(found - expected).abs().max():.3g}, bound {bound:.3g}")


def rates(
    native: Native, dtype: torch.dtype, needed: int, seconds: float, weights: list[Tensor]
) -> tuple[Rates, float, float]:
    """Median, 10th and 90th percentile GB/s of rows of calls, the median GB/s of plain reads, and the rows' share of it.

    The read bandwidth of a shared machine drifts within seconds, so each row of calls is compared with the reads right
    before and after it, of other buffers of the same pool; that also leaves nothing of these calls' weights in the caches.
    """
    lib = kernels.cpu.library()

    def read(i: int) -> float:
        # A call uses buffers 3 i to 3 i + 2. This one is as far from the last call as from the next.
        other = weights[3 * (i + len(weights) // 2) % len(weights)]
        start = time.perf_counter()
        lib.as_read(other.data_ptr(), other.nbytes)
        return (time.perf_counter() - start) / other.nbytes * 1e9

    found, costs = [], [read(0)]
    end = time.perf_counter() + seconds
    i = 0
    while time.perf_counter() < end or len(found) < 16:
        calls = [native(i + k) for k in range(CALLS_IN_A_ROW)]
        found.append(CALLS_IN_A_ROW * needed / kernels.cpu.time_calls(calls, dtype) / 1e9)
        i += CALLS_IN_A_ROW
        costs.append(read(i))
    shares = [rate * (before + after) / 2 for rate, before, after in zip(found, costs, costs[1:], strict=False)]
    deciles = statistics.quantiles(found, n=10)
    return (statistics.median(found), deciles[0], deciles[-1]), 1 / statistics.median(costs), statistics.median(shares)


def cases(
    hidden: int, neurons: int, dtype: torch.dtype, density: float, weights: list[Tensor]
) -> list[tuple[str, Native, Tensor, int, Call]]:
    """(name, native call, its result, bytes needed, oracle call) of each kernel; weights are [neurons, hidden] storage."""
    count, native, pointer = len(weights), kernels.cpu.Call, ctypes.pointer
    kept = round(density * neurons)
    row = hidden * dtype.itemsize
    x_neurons, x_hidden = torch.randn(1, neurons).to(dtype), torch.randn(1, hidden).to(dtype)
    y_hidden, y_neurons = torch.zeros(1, hidden, dtype=dtype), torch.zeros(1, neurons, dtype=dtype)
    thresholds = kept_sets(neurons, density)
    lists = [(t == 0).nonzero().flatten().int() for t in thresholds]
    by_columns = [kernels.matrix_of(weight.T) for weight in weights]
    by_rows = [kernels.matrix_of(weight) for weight in weights]
    blocks = [
        [
            kernels.ffn_of(
                weights[i],
                weights[(i + 1) % count],
                weights[(i + 2) % count].T,
                kernels.Rules("silu", gate_threshold=threshold),
            )
            for threshold in thresholds
        ]
        for i in range(count)
    ]

    def columns(i: int) -> kernels.cpu.Call:
        matrix, threshold = pointer(by_columns[3 * i % count]), thresholds[i % KEPT_SETS].data_ptr()
        return native(w=matrix, threshold=threshold, row_count=-1, x=x_neurons.data_ptr(), y=y_hidden.data_ptr())

    def columns_oracle(i: int) -> Tensor:
        return kernels.reference.linear(x_neurons, weights[3 * i % count].T, None, thresholds[i % KEPT_SETS])

    def rows(i: int) -> kernels.cpu.Call:
        matrix, names = pointer(by_rows[3 * i % count]), lists[i % KEPT_SETS].data_ptr()
        return native(w=matrix, rows=names, row_count=kept, x=x_hidden.data_ptr(), y=y_neurons.data_ptr())

    def rows_oracle(i: int) -> Tensor:
        whole = kernels.reference.linear(x_hidden, weights[3 * i % count])
        return torch.where(thresholds[i % KEPT_SETS] == 0, whole, 0.0)

    def ffn(i: int) -> kernels.cpu.Call:
        block = pointer(blocks[3 * i % count][i % KEPT_SETS])
        return native(ffn=block, x=x_hidden.data_ptr(), y=y_hidden.data_ptr())

    def ffn_oracle(i: int) -> Tensor:
        gate, up, down = (weights[(3 * i + k) % count] for k in range(3))
        threshold = thresholds[i % KEPT_SETS]
        return kernels.reference.gated_ffn(x_hidden, gate, up, down.T, kernels.Rules("silu", gate_threshold=threshold))

    return [
        ("columns", columns, y_hidden, kept * row, columns_oracle),
        ("rows", rows, y_neurons, kept * row, rows_oracle),
        ("ffn", ffn, y_hidden, (neurons + 2 * kept) * row, ffn_oracle),
    ]


def python_overhead() -> dict[str, float]:
    """Microseconds of whole calls on matrices too small to matter."""
    x, weight, threshold = torch.randn(1, 64), torch.randn(64, 64), torch.rand(64)
    calls: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: kernels.linear(x, weight, None, threshold),
        "linear op": lambda: torch.ops.actsparse.linear(x, weight, None, threshold),
        "gated_ffn": lambda: kernels.gated_ffn(x, weight, weight, weight, activation="silu", gate_threshold=threshold),
        "torch linear": lambda: torch.nn.functional.linear(x, weight),
    }
    return {name: min(timeit.repeat(call, number=500, repeat=7)) / 500 * 1e6 for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="hidden x neurons")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--density", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--kernel", nargs="+", default=["columns", "rows", "ffn"], choices=["columns", "rows", "ffn"])
    parser.add_argument("--isa", choices=kernels.available_isas(), default=kernels.isa())
    parser.add_argument("--seconds", type=float, default=0.4, help="per measurement")
    parser.add_argument("--small-pages", action="store_true", help="leave the weights on 4 KiB pages")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args()

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    torch.manual_seed(0)
    kernels.select_isa(options.isa)
    ceiling, least, greatest = kernels.read_bandwidth()
    threads = torch.get_num_threads()
    say(f"read bandwidth {ceiling:.1f} GB/s ({least:.1f} to {greatest:.1f}), {threads} threads, {options.isa}")
    say("kernel         shape     dtype density   GB/s   10 %   90 %   read  share      us")
    table = []
    for shape in options.shape:
        hidden, neurons = (int(part) for part in shape.split("x"))
        for dtype_name in options.dtype:
            dtype = DTYPES[dtype_name]
            weights = pool(neurons, hidden, dtype)
            if not options.small_pages:
                moved = kernels.use_huge_pages(*weights)
                say(f"{shape}: {moved / sum(weight.nbytes for weight in weights):.0%} of the weights on huge pages")
            for density in options.density:
                for name, native, result, needed, oracle in cases(hidden, neurons, dtype, density, weights):
                    if name not in options.kernel:
                        continue
                    kernels.cpu.time_calls([native(1)], dtype)
                    check(name, result, oracle(1))
                    (median, low, high), read, share = rates(native, dtype, needed, options.seconds, weights)
                    say(
                        f"{name:8} {shape:>11} {dtype_name:>9} {density:7.2f} {median:6.1f} {low:6.1f} {high:6.1f} "
                        f"{read:6.1f} {share:6.0%} {needed / median / 1e3:7.0f}"
                    )
                    table.append(
                        {
                            "kernel": name,
                            "shape": shape,
                            "dtype": dtype_name,
                            "density": density,
                            "gb_s": round(median, 2),
                            "low": round(low, 2),
                            "high": round(high, 2),
                            "read_gb_s": round(read, 2),
                            "of_read": round(share, 3),
                            "needed_bytes": needed,
                        }
                    )
    overhead = python_overhead()
    say("Python layer, whole call on a 64 x 64 matrix: " + ", ".join(f"{k} {v:.1f} us" for k, v in overhead.items()))
    after, _, _ = kernels.read_bandwidth()
    say(f"read bandwidth afterwards {after:.1f} GB/s")
    print(
        json.dumps(
            {
                "read_gb_s": round(ceiling, 2),
                "read_gb_s_after": round(after, 2),
                "threads": threads,
                "isa": options.isa,
                "torch": torch.__version__,
                "python_us": {name: round(value, 2) for name, value in overhead.items()},
                "results": table,
            }
        )
    )


if __name__ == "__main__":
    main()

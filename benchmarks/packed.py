"""How close the CPU kernels of packed matrices come to the machine's read bandwidth, on the bytes that the levels need.

    python benchmarks/packed.py [--shape 8192x2048] [--bits 6 4 3 2] [--pages 0] [--seconds 2] [--json]

Shapes are outputs x inputs. Activations are normal, thresholds those that read so many bits a weight (as many as are stored:
none, every plane). Calls are made and timed in C, a row of them on matrices that hold a gigabyte together; each row is compared
with the plain reads of another gigabyte right before and after it. One call of each is compared with the oracle first. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import time

import torch
from torch import Tensor

from actsparse import kernels
from actsparse.kernels import cpu, planes
from actsparse.kernels.planes import Packed
from actsparse.methods.graded import alone, reading_of, unit_thresholds
from actsparse.methods.rounding import residuals

# Of the 1.1 B shape down, q and o, gate and up; of the 8 B shape down, gate and up.
SHAPES = ("2048x8192", "2048x2048", "8192x2048", "4096x14336", "14336x4096")
POOL_BYTES = 1 << 30
INPUTS = 7


def shape(text: str) -> tuple[int, int]:
    """Outputs and inputs of "8192x2048"."""
    out, _, inputs = text.partition("x")
    if not (out.isdecimal() and inputs.isdecimal() and int(out) and int(inputs)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: expected outputs x inputs, such as 8192x2048")
    return int(out), int(inputs)


def matrices(out: int, inputs: int, stored: int) -> list[Packed]:
    """Random codes, together at least POOL_BYTES."""
    codes = torch.randint(0, 2**stored, (out, inputs), dtype=torch.uint8)
    mantissa = torch.randint(128, 256, (planes.groups_of(out), inputs)).to(torch.uint8)
    first = planes.pack(codes, mantissa, torch.full((inputs,), 0.05), torch.ones(stored // 2), stored)
    count = max(3, math.ceil(POOL_BYTES / first.nbytes)) | 1
    if count % INPUTS == 0:  # so that every matrix meets every input
        count += 2
    found = [first, *(planes.relaid(first) for _ in range(count - 1))]
    kernels.use_huge_pages(*(storage for each in found for storage in each.storages))
    return found


def thresholds_for(packed: Packed, bits: float) -> Tensor | None:
    """Thresholds [L, I] under which normal activations read so many bits a weight; None: all."""
    if bits >= packed.stored:
        return None
    part = planes.columns_of(packed, 0, 16)
    left = residuals(planes.unpack(part), part).mean(1, keepdim=True)
    unit = unit_thresholds(left.expand(-1, packed.inputs), packed.level_bytes)
    reading = reading_of(torch.randn(64, packed.inputs), unit, packed, torch.zeros(packed.inputs))
    return (reading.unit.double() * alone(reading, bits)).float()


def bytes_needed(packed: Packed, x: Tensor, thresholds: Tensor | None) -> int:
    """Of planes, mantissas and scales."""
    cost = torch.tensor([0, *packed.level_bytes]).cumsum(0)
    if thresholds is None:
        return packed.inputs * int(cost[-1])
    return int(cost[planes.levels_read(x, thresholds, torch.zeros(packed.inputs)).long()].sum())


def measure(found: list[Packed], bits: float, seconds: float, plain: cpu.ReadTest) -> dict[str, float]:
    """Medians of rows of calls: GB/s, those of plain reads around them, the share, microseconds a call."""
    first, count = found[0], len(found)
    thresholds, start = thresholds_for(first, bits), torch.zeros(first.out)
    structures = [kernels.packed_of(each, thresholds, torch.zeros(each.inputs), start) for each in found]
    xs = [torch.randn(1, first.inputs) for _ in range(INPUTS)]
    y = torch.zeros(1, first.out)
    calls = [
        cpu.Call(w=ctypes.pointer(structures[i % count]), row_count=-1, x=xs[i % INPUTS].data_ptr(), y=y.data_ptr())
        for i in range(count * INPUTS)
    ]
    needed = [bytes_needed(first, x, thresholds) for x in xs]
    cpu.time_calls(calls[:1], torch.float32)
    everything = torch.zeros(first.stored // 2, first.inputs) if thresholds is None else thresholds
    oracle = planes.linear(xs[0].double(), first, everything, torch.zeros(first.inputs), start)
    # Coefficients of seven bits leave 5e-5 of the energy (docs/format.md).
    if not (y - oracle).norm() < 0.02 * oracle.norm():
        raise SystemExit(f"wrong result: {float((y - oracle).norm() / oracle.norm()):.2g} of the oracle's norm away")
    rates, reads = [], [plain.gb_s()]
    end, at = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or len(rates) < 5:
        row = [(at + k) % len(calls) for k in range(count)]
        took = cpu.time_calls([calls[k] for k in row], torch.float32)
        rates.append(sum(needed[k % INPUTS] for k in row) / took / 1e9)
        reads.append(plain.gb_s())
        at += count
    shares = [rate * (1 / before + 1 / after) / 2 for rate, before, after in zip(rates, reads, reads[1:], strict=False)]
    rate = statistics.median(rates)
    return {
        "bits": bits, "gb_s": rate, "low": min(rates), "high": max(rates), "read_gb_s": statistics.median(reads),
        "of_read": statistics.median(shares), "us": statistics.mean(needed) / rate / 1e3,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", nargs="+", type=shape, default=[shape(each) for each in SHAPES], help="outputs x inputs"
    )
    parser.add_argument("--bits", nargs="+", type=float, default=[6.0, 4.0, 3.0, 2.0], help="bits read per weight")
    parser.add_argument("--stored", type=int, default=6, choices=planes.STORED)
    parser.add_argument(
        "--pages", type=int, default=cpu.pages_followed(), help="that the prefetchers follow; 0: unknown"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args()
    torch.manual_seed(0)
    try:
        cpu.select_pages(options.pages)
    except ValueError as error:
        parser.error(str(error))
    plain = cpu.ReadTest(POOL_BYTES)
    table = []
    if not options.json:
        print(f"{torch.get_num_threads()} threads, {kernels.isa()}, {options.pages} pages followed")
        print("      shape  bits    GB/s  least  most    read  share      us")
    for out, inputs in options.shape:
        found = matrices(out, inputs, options.stored)
        for bits in options.bits:
            row = measure(found, bits, options.seconds, plain)
            table.append({"shape": f"{out}x{inputs}", **{name: round(value, 3) for name, value in row.items()}})
            if not options.json:
                print(
                    f"{out:>5}x{inputs:<5} {bits:5.1f} {row['gb_s']:7.1f} {row['low']:6.1f} {row['high']:5.1f} "
                    f"{row['read_gb_s']:7.1f} {row['of_read']:6.0%} {row['us']:7.0f}",
                    flush=True,
                )
    print(
        json.dumps({"threads": torch.get_num_threads(), "isa": kernels.isa(), "pages": options.pages, "results": table})
    )


if __name__ == "__main__":
    main()

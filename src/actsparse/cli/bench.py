"""actsparse bench."""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import TYPE_CHECKING, Any

from actsparse.cli.terminal import (
    add_device_argument,
    add_thread_argument,
    positive,
    print_json,
    print_table,
    progress_bar,
    set_threads,
    sparsities,
    sparsity_list,
)

if TYPE_CHECKING:
    from actsparse.measure.bench.run import Report
    from actsparse.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    from actsparse.methods import METHODS

    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", metavar="MODEL", help="a Hugging Face model directory or hub id")
    what.add_argument("--shape", help="random weights of a named shape instead: llama-1b or llama-3-8b")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="weights (default: bfloat16; packed ones as they are)",
    )
    parser.add_argument(
        "--plan", metavar="PLAN", action="append", help="measure this plan (may be given several times)"
    )
    parser.add_argument(
        "--method",
        help=f"without a plan: one of {', '.join(METHODS)} (default: chess; a directory's own plan if it has one)",
    )
    parser.add_argument(
        "--sparsity", type=sparsity_list, help="without a plan: such as 0.3,0.5 (default: the method's)"
    )
    parser.add_argument(
        "--bits-read",
        type=sparsity_list,
        metavar="B",
        help="graded: bits read per weight, such as 3.0,4.0 (default: 3.0)",
    )
    parser.add_argument("--bits-stored", type=int, choices=[4, 6, 8], help="graded: bits stored (default: 6)")
    parser.add_argument(
        "--attention",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="chess: also skip in q and o (default: yes)",
    )
    parser.add_argument(
        "--calibration-tokens", type=positive, help="without a plan: random tokens to calibrate on (default: 1024)"
    )
    parser.add_argument("--prompt-tokens", type=positive, default=32, help="tokens of the prompt (default: 32)")
    parser.add_argument("--new-tokens", type=positive, default=32, help="decode steps (default: 32)")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds; the table shows medians (default: 5)")
    add_device_argument(parser)
    add_thread_argument(parser)
    parser.add_argument(
        "--teal-kernel", metavar="FILE", help="on a GPU: also time TEAL's published kernel, sparse_gemv.py (it is run)"
    )
    parser.add_argument(
        "--llama-cpp",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time llama.cpp on the same shape, if it is installed (default: yes)",
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line only")


def run(options: argparse.Namespace) -> None:
    """Measure and report; the last line is one JSON document."""
    from actsparse.measure.bench import packed, shapes
    from actsparse.measure.bench.run import Settings, measure
    from actsparse.methods import make
    from actsparse.methods.graded import DENSE_BITS, Graded
    from actsparse.models import directory
    from actsparse.models.sites import ModelError
    from actsparse.plan import Plan, PlanError
    from actsparse.runtime.swap import open_model, restore, state_of

    if options.shape and options.plan:
        raise PlanError(f"plan {options.plan[0]} cannot fit the random weights of --shape: expected --method instead")
    given = {
        name: getattr(options, name) for name in ("attention", "bits_stored") if getattr(options, name) is not None
    }
    calibrating = ("method", "sparsity", "bits_read", *given, "calibration_tokens")
    asked = [name for name in calibrating if getattr(options, name) is not None]
    own = not options.plan and not asked
    packed_there = not options.shape and directory.is_packed(options.model)
    if packed_there and asked and not options.plan:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ModelError(f"model {options.model} is packed, {names} would calibrate: expected a dense model, or --plan")
    options.method = options.method or "chess"
    options.calibration_tokens = options.calibration_tokens or 1024
    method = make(options.method, **given)
    targets = sparsities(options, method.sparsity)
    set_threads(options)
    plans = [Plan.load(path) for path in options.plan or []]
    if options.shape:
        what = f"{options.shape}, random weights"
        dtype = "bfloat16" if options.dtype in (None, "auto") else options.dtype
        config = shapes.config_of(options.shape)
        stored = options.bits_stored or Graded().bits_stored
        if method.name == "graded" and options.device == "cpu" and not shapes.fits_with_codes(config, dtype, stored):
            print(f"{options.shape} in {dtype} and packed does not fit the memory: made packed only", file=sys.stderr)
            model = packed.random_packed(config, stored, name=options.shape)
            bits = [DENSE_BITS * (1 - target) for target in targets]
            plans = packed.plans_on_random_tokens(model, bits, tokens=options.calibration_tokens)
        else:
            model = shapes.random_model(config, dtype, name=options.shape, device=options.device)
    else:
        what = options.model
        model = open_model(options.model, options.dtype or ("auto" if packed_there else "bfloat16"), options.device)
        state = state_of(model)
        if state is not None and own:
            plans = [state.plan]
        elif state is not None:
            restore(model)  # another method's thresholds come from the dense model
    if not plans:
        plans = _calibrate(options, model, method, targets)
    settings = Settings(options.prompt_tokens, options.new_tokens, options.repeats, options.llama_cpp)
    report = measure(
        model,
        plans,
        settings,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        teal_kernel=options.teal_kernel,
    )
    document = {"model": what, "machine": machine(options.device), **report.document()}
    if not options.json:
        _show(what, report, document)
    print_json(document)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    from actsparse import kernels
    from actsparse.cli.doctor import cpu_model, usable_cores

    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "isa": kernels.isa(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def _calibrate(options: argparse.Namespace, model: Any, method: Any, targets: list[float]) -> list[Plan]:
    from actsparse.measure.bench.run import calibrate_on_random_tokens

    with progress_bar("calibrating on random tokens") as progress:
        return calibrate_on_random_tokens(model, method, targets, tokens=options.calibration_tokens, progress=progress)


def _target(result: dict[str, Any]) -> str:
    if result["bits_read"] is not None:
        return f"{result['bits_read']:.2f} bits"
    return "" if result["sparsity"] is None else f"{result['sparsity']:g} / {result['ffn_sparsity']:.3f}"


def _own(result: dict[str, Any], on_gpu: bool) -> str:
    """What one kind of machine has in the table and the other has not."""
    value = result["memory_bytes"] if on_gpu else result["overhead_share"]
    if value is None:
        return ""
    return f"{value / 1e9:.2f}" if on_gpu else f"{value:.1%}"


def _show(what: str, report: Report, document: dict[str, Any]) -> None:
    here = document["machine"]
    where = here["gpu"] or f"{here['cpu']}, {here['threads']} threads, {here['isa']}"
    print(f"{what} on {where}, torch {here['torch']}")
    print(
        f"physical ceiling: memory delivers {document['read_gb_s']:.1f} GB/s "
        f"({min(report.read_gb_s):.1f} to {max(report.read_gb_s):.1f} over the run), "
        "and a token cannot be faster than its weights are read"
    )
    on_gpu = here["gpu"] is not None
    eager = statistics.median(report.rows[0].decode_tok_s)
    rows = []
    for result in document["results"]:
        low, high = result["decode_spread"]
        rows.append(
            [
                result["name"],
                result["weights"],
                _target(result),
                f"{result['weights_read_bytes'] / 1e6:,.0f}",
                f"{result['ceiling_tok_s']:.2f}",
                f"{result['decode_tok_s']:.2f} ({low:.2f}-{high:.2f})",
                f"{result['decode_tok_s'] / eager:.2f}",
                f"{result['achieved_gb_s']:.1f} ({result['share_of_ceiling']:.0%})",
                _own(result, on_gpu),
                "" if result["prefill_tok_s"] is None else f"{result['prefill_tok_s']:.1f}",
            ]
        )
    header = [
        "path",
        "weights",
        "sparsity / FFN, bits read",
        "MB/token",
        "ceiling",
        "decode tokens/s",
        "x hf-eager",
        "GB/s",
    ]
    own = "GB on the card" if on_gpu else "overhead"
    print_table("medians over the rounds (least-greatest)", [*header, own, "prefill"], rows)
    for row in report.rows:
        if row.ffn_sparsity is not None and row.sparsity is not None and abs(row.ffn_sparsity - row.sparsity) > 0.05:
            print(f"{row.name} {row.sparsity:g}: {row.ffn_sparsity:.3f} of the neurons were skipped, not the target")
    for name, reason in report.skipped.items():
        print(f"{name}: skipped, {reason}")

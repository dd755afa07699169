"""actsparse pack."""

from __future__ import annotations

import argparse
from typing import Any

from actsparse.cli.terminal import (
    add_device_argument,
    add_evaluation_arguments,
    add_thread_argument,
    evaluated,
    fraction,
    positive,
    progress_bar,
    set_threads,
)

ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    from actsparse.calibration.presets import DEEP, QUALITIES

    parser.add_argument("model", metavar="MODEL", help="a Hugging Face model directory, a hub id or a GGUF file")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the directory to make")
    parser.add_argument(
        "--bits-stored",
        type=int,
        choices=[4, 6, 8],
        help=f"bits stored of each weight (default: 8 where {DEEP:g} or more are read, otherwise 6)",
    )
    read = parser.add_mutually_exclusive_group()
    read.add_argument(
        "--bits-read",
        type=_bits,
        metavar="B",
        help="bits read per weight, on average, scales included; or all: plain quantisation, read whole",
    )
    read.add_argument(
        "--max-ppl-increase",
        type=fraction,
        metavar="F",
        help="find the fewest bits that cost this much perplexity on the text (1%%)",
    )
    names = ", ".join(f"{name} ({bits:g} bits read)" for name, bits in QUALITIES.items())
    read.add_argument("--quality", choices=list(QUALITIES), help=f"{names}; default: balanced")
    parser.add_argument(
        "--text", metavar="FILE|DATASET", help="calibration text (default: a small one that comes along)"
    )
    parser.add_argument(
        "--tokens", type=positive, help="calibration tokens (default: 2,048 to 16,384, by the model's size)"
    )
    add_device_argument(parser)
    add_evaluation_arguments(parser)
    add_thread_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Pack and say what was made."""
    from pathlib import Path

    from actsparse.calibration.budget import percent
    from actsparse.calibration.pack import Settings, pack
    from actsparse.calibration.presets import QUALITIES, quality_for
    from actsparse.measure import card, evaluate

    budget = options.max_ppl_increase
    quality = options.quality or ("balanced" if budget is None else quality_for(budget))
    bits = QUALITIES[quality] if options.bits_read is None else options.bits_read
    settings = Settings(options.bits_stored, None if bits == ALL else bits, budget, options.text, options.tokens)
    settings.check()
    set_threads(options)
    with progress_bar("packing") as progress:
        plan = pack(
            options.model,
            options.output,
            settings,
            device=options.device,
            scorer=evaluate.scorer,
            progress=progress,
        )
    card.write(Path(options.output), plan, options.model, _measured(options))
    size = sum(file.stat().st_size for file in Path(options.output).iterdir())
    print(
        f"wrote {options.output}: {size / 1e6:,.1f} MB, {settings.stored} bits stored, "
        f"{plan.settings['bits_read']:.2f} bits read per weight on {plan.text['tokens']} tokens"
    )
    if budget is not None:
        print(
            f"perplexity {plan.settings['measured_ppl_increase']:+.2%} on that text, asked for at most {percent(budget)}"
        )


def _measured(options: argparse.Namespace) -> Any:
    """The packed model against the dense one on ``--evaluate``; None without it."""
    if options.evaluate is None:
        return None
    from actsparse.models import opening
    from actsparse.runtime.swap import open_model, state_of

    model, tokenizer = open_model(options.output), opening.open_tokenizer(options.output)
    state = state_of(model)
    assert state is not None
    gguf = options.model.endswith(".gguf")
    dense = opening.open_gguf(options.model)[0] if gguf else opening.open_model(options.model)
    return evaluated(options, model, tokenizer, state.plan, dense)


def _bits(value: str) -> float | str:
    """An argument type: a number of bits, or all."""
    try:
        return value if value == ALL else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither a number of bits nor {ALL}") from None

"""actsparse generate."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actsparse.cli.terminal import add_model_arguments, positive, print_json, seed, set_threads

if TYPE_CHECKING:
    from actsparse.runtime.generate import Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_model_arguments(parser)
    parser.add_argument(
        "--plan", metavar="PLAN", help="the plan to obey; without one as MODEL is: dense, or with its own"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT|-", help="text to continue, - for standard input")
    source.add_argument("--prompt-file", metavar="FILE", help="a text file to continue")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="at most so many (default: 128)")
    add_sampling_arguments(parser, temperature=0.0)
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    parser.add_argument(
        "--compare", action="store_true", help="show the dense and the sparse greedy text side by side (needs --plan)"
    )
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="keep feed-forward weights in their file (with a GPU: in the host's memory), and in memory only the neurons that "
        "the plan chose for the prompt",
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def add_sampling_arguments(parser: argparse.ArgumentParser, *, temperature: float) -> None:
    """How the next token is chosen."""
    parser.add_argument(
        "--temperature", type=_at_least_zero, default=temperature, help=f"0 is greedy (default: {temperature:g})"
    )
    parser.add_argument("--top-p", type=_probability, default=1.0, help="keep the likeliest tokens adding up to this")
    parser.add_argument("--top-k", type=positive, default=0, help="keep so many likeliest tokens (default: all)")
    parser.add_argument("--seed", type=seed, help="of the sampling (default: another one every time)")


def run(options: argparse.Namespace) -> None:
    """Generate and report."""
    prompt = _prompt(options)
    from actsparse.models import opening
    from actsparse.plan import Plan, PlanError
    from actsparse.runtime import generate as engine
    from actsparse.runtime.lowmemory import open_mapped
    from actsparse.runtime.swap import open_model, restore, sparsify

    if options.compare and (not options.plan or options.temperature):
        wrong = "no --plan" if not options.plan else f"--temperature {options.temperature:g}"
        raise PlanError(f"--compare got {wrong}, expected a plan and greedy decoding (--temperature 0)")
    set_threads(options)
    plan = Plan.load(options.plan) if options.plan else None
    if options.low_memory:
        if plan is None or not plan.prompt or options.compare:
            wrong = "--compare" if options.compare else f"--plan {options.plan}"
            raise PlanError(f"--low-memory got {wrong}, expected only a plan that chooses neurons per prompt")
        model, tokenizer = open_mapped(options.model, device=options.device), opening.open_tokenizer(options.model)
    else:
        model, tokenizer = (
            open_model(options.model, options.dtype, options.device),
            opening.open_tokenizer(options.model),
        )

    def reply(**more: Any) -> Generation:
        return engine.generate(
            model,
            tokenizer,
            prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            stop_at_eos=not options.ignore_eos,
            **more,
        )

    if options.compare and plan is not None:
        restore(model)  # a directory may come with a plan of its own
        dense = reply()
        sparsify(model, plan)
        sparse = reply()
        _show_both(prompt, dense, sparse, f"{plan.method} {plan.sparsity:g}", tokenizer)
        if options.json:
            print_json({"dense": _document(dense), "sparse": _document(sparse), "diverged_at": diverged(dense, sparse)})
        return
    if plan is not None:
        sparsify(model, plan)
    result = reply(stream=show)
    print(flush=True)
    print(result.speed(), file=sys.stderr)
    if options.json:
        print_json(_document(result))
    if result.stopped == "interrupted":
        raise KeyboardInterrupt


def show(text: str) -> None:
    """Write a piece of an answer at once."""
    print(text, end="", flush=True)


def diverged(dense: Generation, sparse: Generation) -> int | None:
    """Index of the first token in which two generations differ; None when they are equal."""
    if dense.tokens == sparse.tokens:
        return None
    pairs = zip(dense.tokens, sparse.tokens, strict=False)
    shorter = min(len(dense.tokens), len(sparse.tokens))
    return next((index for index, (one, other) in enumerate(pairs) if one != other), shorter)


def _show_both(prompt: str, dense: Generation, sparse: Generation, name: str, tokenizer: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    at = diverged(dense, sparse)
    table = Table(title=f"after {prompt[-60:]!r}", title_justify="left", show_lines=True)
    cells, speeds = [], []
    for title, result in (("dense", dense), (name, sparse)):
        table.add_column(title, ratio=1)
        common = tokenizer.decode(result.tokens[:at], skip_special_tokens=True)
        rest = result.text[len(common) :] if at is not None else ""
        cells.append(Text.assemble((common, ""), (rest, "bold yellow")))
        counted = result.weights_read_bytes
        read = "not counted" if counted is None else f"{counted / 1e6:,.1f} MB a token"
        speeds.append(
            f"decode {result.decode_tok_s:,.1f} tokens/s, prefill {result.prefill_tok_s:,.1f} tokens/s\n"
            f"weights read: {read}\n{result.path}"
        )
    table.add_row(*cells)
    table.add_row(*speeds)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if at is None:
        print(f"the {len(dense.tokens)} tokens are equal")
    else:
        print(f"the texts diverge at new token {at + 1} of {max(len(dense.tokens), len(sparse.tokens))}")


def _document(result: Generation) -> dict[str, Any]:
    return {**asdict(result), "prefill_tok_s": result.prefill_tok_s, "decode_tok_s": result.decode_tok_s}


def _prompt(options: argparse.Namespace) -> str:
    from actsparse.models.text import TextError, check_text

    try:
        if options.prompt_file is not None:
            text = Path(options.prompt_file).read_text(encoding="utf-8")
        else:
            text = sys.stdin.read() if options.prompt == "-" else options.prompt
    except OSError as error:
        raise TextError(f"prompt file {options.prompt_file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TextError(f"prompt is not UTF-8 text: {error.reason} at byte {error.start}") from None
    check_text(text, "prompt")
    if not text.strip():
        raise TextError("prompt is empty, expected some text")
    return text


def _at_least_zero(value: str) -> float:
    number = _number(value)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return number


def _probability(value: str) -> float:
    number = _number(value)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and at most 1")
    return number


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None

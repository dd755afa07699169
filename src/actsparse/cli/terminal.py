"""What the verbs share on the terminal: argument types, progress bars, tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

MOST_THREADS = 4096


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to load it."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face model directory or hub id")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="weights (default: as stored)",
    )
    add_device_argument(parser)
    add_thread_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """--device, where the model is and runs."""
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="where the model runs: cpu, cuda or cuda:1 (default: cpu)"
    )


def add_thread_argument(parser: argparse.ArgumentParser) -> None:
    """--threads, which is torch's own setting."""
    parser.add_argument("--threads", type=_threads, help="CPU threads (default: torch's choice)")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """--evaluate and how much of it: what a model card's numbers come from."""
    parser.add_argument(
        "--evaluate",
        metavar="FILE|DATASET",
        help="text to measure perplexity on, for the model card (default: none, and the card says so)",
    )
    parser.add_argument(
        "--evaluate-tokens",
        type=positive,
        default=40960,
        help="tokens of --evaluate, in windows of 512 (default: 40960)",
    )


def evaluated(options: argparse.Namespace, model: Any, tokenizer: Any, plan: Any, reference: Any = None) -> Any:
    """What ``--evaluate`` asks to be measured of ``model`` under ``plan``, against ``reference`` or itself dense; or None."""
    if options.evaluate is None:
        return None
    from actsparse.cli.bench import machine
    from actsparse.measure.card import Measured
    from actsparse.measure.evaluate import compare_perplexity
    from actsparse.models.text import TextError, load_windows

    windows = load_windows(options.evaluate, tokenizer, tokens=options.evaluate_tokens, window=512)
    if len(windows.tokens) < 2:
        raise TextError(f"--evaluate {options.evaluate} gives one window of 512 tokens, expected two or more")
    # Graded plans leave prompts alone when they are used: scored so, half the text would count for nothing.
    scored = plan.with_scope("all") if plan.method == "graded" else plan
    with progress_bar("measuring") as progress:
        comparison = compare_perplexity(model, scored, windows, progress=progress, reference=reference)
    return Measured(comparison, windows.source, machine(str(model.device)), options.command)


def set_threads(options: argparse.Namespace) -> None:
    """Obey --threads."""
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)


def positive(value: str) -> int:
    """An argument type: an integer of at least 1."""
    number = whole(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return number


def whole(value: str) -> int:
    """An argument type: an integer that a machine word of 32 bits holds."""
    try:
        number = int(value)
    except ValueError:
        if value.strip().lstrip("+-").isdigit():  # so many digits that Python itself refuses
            raise argparse.ArgumentTypeError(_too_large(value)) from None
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number") from None
    if abs(number) >= 1 << 31:
        raise argparse.ArgumentTypeError(_too_large(value))
    return number


def _too_large(value: str) -> str:
    shown = value if len(value) <= 24 else f"{value[:16]}... ({len(value)} characters)"
    return f"{shown} is out of range, expected less than 2^31"


def _threads(value: str) -> int:
    number = positive(value)
    if number > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{value} is out of range, expected 1 to {MOST_THREADS}")
    return number


def seed(value: str) -> int:
    """An argument type: a seed that torch takes."""
    if not value.isascii() or not value.isdigit() or len(value) > 19 or int(value) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"seed is {value}, expected a whole number from 0 to 2^63 - 1")
    return int(value)


def sparsity_list(value: str) -> list[float]:
    """An argument type: comma-separated sparsities (their range is checked where they are used)."""
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a list of numbers such as 0.3,0.5") from None


def sparsities(options: argparse.Namespace, default: float) -> list[float]:
    """The targets of ``--sparsity``, for method graded those of ``--bits-read``, or the method's ``default``."""
    from actsparse.methods.base import MethodError
    from actsparse.methods.graded import DENSE_BITS, Graded

    if options.bits_read is None:
        return [default] if options.sparsity is None else list(options.sparsity)
    if options.method != "graded":
        raise MethodError(f"method {options.method} does not take --bits-read: expected graded")
    if options.sparsity is not None:
        raise MethodError("--bits-read and --sparsity were given, expected one of them")
    stored = options.bits_stored or Graded().bits_stored
    for read in options.bits_read:
        if not 0 < read <= stored + 1:  # scales come on top
            raise MethodError(
                f"bits read is {read:g}, expected more than 0 and at most the {stored} stored (and scales)"
            )
    return [1 - read / DENSE_BITS for read in options.bits_read]


def fraction(value: str) -> float:
    """An argument type: a fraction, as 0.6 or 60%."""
    try:
        return float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a fraction such as 0.6 or 60%") from None


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        # A short text is done with the first call, which leaves the bar no two times to tell a speed from.
        since_entry = task.completed / (time.perf_counter() - task.fields["entered"])
        return Text(f"{task.finished_speed or task.speed or since_entry:,.0f} tokens/s")


@contextmanager
def progress_bar(what: str) -> Iterator[Any]:
    """A bar with tokens/s and time left on stderr; yields the function to call with (done, total).

    It shows with the first call, so that what is refused before any work leaves one line only.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,} tokens"))
    bar = Progress(*columns, _Speed(), TimeRemainingColumn(), console=Console(file=sys.stderr))

    entered = time.perf_counter()

    def update(done: int, total: int) -> None:
        if not bar.tasks:
            bar.add_task(what, total=total, entered=entered)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield update
    finally:
        if bar.tasks:
            bar.stop()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is left-aligned, the others right."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_json(document: Any) -> None:
    """``document``, plain data or an instance of a dataclass, as the last line of the output, on one line."""
    plain = asdict(document) if is_dataclass(document) and not isinstance(document, type) else document
    print(json.dumps(plain))

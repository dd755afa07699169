"""actsparse compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from actsparse.cli.terminal import add_model_arguments, positive, progress_bar, set_threads, sparsity_list


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    from actsparse.measure.grid import VARIANTS, Grid
    from actsparse.methods import METHODS

    add_model_arguments(parser)
    parser.add_argument(
        "--methods",
        default="cats,chess,teal,wina,plain,graded",
        help=f"comma-separated, of {', '.join([*METHODS, *VARIANTS])} (default: cats,chess,teal,wina,plain,graded)",
    )
    parser.add_argument("--sparsity", type=sparsity_list, default=[0.3, 0.5], help="levels (default: 0.3,0.5)")
    parser.add_argument(
        "--weights",
        type=_whole_numbers,
        default=[16, 4],
        metavar="BITS",
        help="weights that thresholds are put on, of 16 (as they come), 8, 6, 4 (default: 16,4)",
    )
    parser.add_argument(
        "--bits-read",
        type=sparsity_list,
        default=[2.5, 3.0, 4.0],
        metavar="B",
        help="levels of graded (default: 2.5,3,4)",
    )
    parser.add_argument("--text", required=True, metavar="FILE|DATASET", help="calibration text")
    parser.add_argument(
        "--evaluation-text", metavar="FILE|DATASET", help="text to score (default: the end of --text, held back)"
    )
    parser.add_argument(
        "--tokens", type=positive, default=Grid.tokens, help=f"to calibrate on (default: {Grid.tokens})"
    )
    parser.add_argument(
        "--evaluation-tokens",
        type=positive,
        default=Grid.evaluation_tokens,
        help=f"to score (default: {Grid.evaluation_tokens})",
    )
    parser.add_argument("--window", type=positive, help="calibration window (default: 1024 or the model's context)")
    parser.add_argument("--scope", default="all", help="tokens to sparsify and score: all, decode or last_half")
    parser.add_argument("--tasks", default="", help="comma-separated tasks of lm-evaluation-harness, as for eval")
    parser.add_argument("--tasks-folder", metavar="DIR", help="more task files (default: reference/tasks)")
    parser.add_argument("--limit", type=positive, help="documents per task (default: all)")
    parser.add_argument("--no-speed", action="store_true", help="leave out the measurement of tokens/s")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds of the measurement (default: 5)")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for results; an unfinished run goes on"
    )


def run(options: argparse.Namespace) -> None:
    """Compare, and say where the results are."""
    from actsparse.measure import compare, report, table
    from actsparse.measure.grid import Grid
    from actsparse.models import opening
    from actsparse.runtime.decode import Decoder

    grid = Grid(
        methods=[name for name in options.methods.split(",") if name],
        sparsities=options.sparsity,
        weights=options.weights,
        bits_read=options.bits_read,
        text=options.text,
        evaluation_text=options.evaluation_text,
        tokens=options.tokens,
        evaluation_tokens=options.evaluation_tokens,
        window=options.window,
        scope=options.scope,
        tasks=[name for name in options.tasks.split(",") if name],
        tasks_folder=options.tasks_folder,
        limit=options.limit,
    )
    grid.check()
    report.check_plotting()
    set_threads(options)
    directory = Path(options.output)
    model, tokenizer = (
        opening.open_model(options.model, options.dtype, options.device),
        opening.open_tokenizer(options.model),
    )
    with progress_bar("comparing") as progress:
        results = compare.compare(model, tokenizer, grid, directory, name=options.model, progress=progress)
    if not options.no_speed:
        obstacle = Decoder.supports(model)
        if obstacle is None:
            from actsparse.measure.bench.run import Settings

            settings = Settings(repeats=options.repeats, llama_cpp=False)
            compare.measure_speed(model, directory, results, settings, say=_say)
        else:
            _say(f"no tokens/s: {obstacle}")
    page = report.write(directory, results)
    print(table.markdown(results))
    print(f"wrote {page}")


def _whole_numbers(value: str) -> list[int]:
    """An argument type: whole numbers between commas."""
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a list of whole numbers such as 16,4") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr)

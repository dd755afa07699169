"""actsparse neurons."""

from __future__ import annotations

import argparse

from actsparse.cli.terminal import add_model_arguments, positive, print_table, progress_bar, set_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, metavar="FILE|DATASET", help="a text or .jsonl file, or a hub dataset")
    parser.add_argument("--alpha", type=float, default=0.02, help="fraction of a token's neurons in its core")
    parser.add_argument("--beta", type=float, default=0.4, help="fraction of the neurons in a set (default: 0.4)")
    parser.add_argument("--tokens", type=positive, default=32768, help="tokens to look at (default: 32768)")
    parser.add_argument("--window", type=positive, default=512, help="tokens of each text (default: 512)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="where neurons.json and the plots go")


def run(options: argparse.Namespace) -> None:
    """Measure, write, and show the two claims as tables."""
    from actsparse.measure.neuron_report import neuron_report, write
    from actsparse.models import opening

    set_threads(options)
    model, tokenizer = (
        opening.open_model(options.model, options.dtype, options.device),
        opening.open_tokenizer(options.model),
    )
    with progress_bar("comparing") as progress:
        report = neuron_report(
            model,
            tokenizer,
            options.text,
            alpha=options.alpha,
            beta=options.beta,
            tokens=options.tokens,
            window=options.window,
            progress=progress,
        )
    files = write(report, options.output)
    header = ["first t tokens", *(str(position) for position in report.positions)]
    for rows, what in ((report.whole, "the whole text's set"), (report.following, "the next t tokens' set")):
        cells = [[f"layer {layer}", *(f"{value:.3f}" for value in row)] for layer, row in enumerate(rows)]
        width = len(rows[0]) + 1
        print_table(f"overlap with {what} (random: {report.beta:.2f})", header[:width], cells)
    cells = [
        [f"{name or '(none)'} ({count})", *("" if cell is None else f"{cell:.3f}" for cell in row)]
        for name, count, row in zip(report.domains, report.texts, report.similarity, strict=True)
    ]
    print_table("overlap between texts of two domains", ["domain (texts)", *report.domains], cells)
    print("wrote " + ", ".join(str(file) for file in files))

"""actsparse predictors."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from actsparse.cli.terminal import add_thread_argument, positive, print_json, print_table, progress_bar, set_threads

DTYPES = ["float32", "bfloat16", "float16"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True, parser_class=type(parser))

    report = tasks.add_parser("report", help="recall, precision, sparsity, ROC-AUC and energy lost per layer")
    report.add_argument("plan", metavar="PLAN", help="a plan with predictors")
    report.add_argument("--model", required=True, help="the model it was made for: a directory or hub id")
    report.add_argument("--text", required=True, metavar="FILE|DATASET", help="a text or .jsonl file, or a hub dataset")
    report.add_argument("--tokens", type=positive, default=20480, help="tokens to look at (default: 20480)")
    report.add_argument("--window", type=positive, default=512, help="tokens per window (default: 512)")
    report.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="weights (default: as stored)")
    report.add_argument("--plot", metavar="FILE", help="also draw the report (.png, .pdf, .svg; needs matplotlib)")
    report.add_argument("--json", action="store_true", help="end with one line of JSON")
    add_thread_argument(report)

    export = tasks.add_parser("export", help="write model_{layer}.pt files as PowerInfer and SVDP read them")
    export.add_argument("plan", metavar="PLAN", help="a plan with predictors")
    export.add_argument("directory", metavar="DIRECTORY", help="where the files go")
    export.add_argument("--dtype", default="float16", choices=DTYPES, help="of the tensors (default: float16)")
    export.add_argument(
        "--relu", action="store_true", help="for readers with a ReLU between the layers (PowerInfer): twice the rank"
    )

    bring = tasks.add_parser("import", help="make a plan of model_{layer}.pt files")
    bring.add_argument("plan", metavar="PLAN", help="the plan to write")
    bring.add_argument("directory", metavar="DIRECTORY", help="where the files are")
    bring.add_argument("--model", required=True, help="the model they were made for: a directory or hub id")
    bring.add_argument("--linear", action="store_true", help="accept files without fc2.bias as linear predictors")


def run(options: argparse.Namespace) -> None:
    """Do the task."""
    {"report": _report, "export": _export, "import": _import}[options.task](options)


def _report(options: argparse.Namespace) -> None:
    from actsparse.measure import predictor_report
    from actsparse.models import opening, text
    from actsparse.models.sites import describe
    from actsparse.plan import ModelIdentity, Plan

    set_threads(options)
    plan = Plan.load(options.plan)
    model, tokenizer = opening.open_model(options.model, options.dtype), opening.open_tokenizer(options.model)
    plan.check_model(ModelIdentity(**describe(model)))
    windows = text.load_windows(options.text, tokenizer, tokens=options.tokens, window=options.window)
    with progress_bar("looking") as progress:
        qualities = predictor_report.measure(model, plan, windows, progress=progress)
    rows = [
        [
            str(quality.layer),
            f"{quality.recall:.1%}",
            f"{quality.precision:.1%}",
            f"{quality.predicted_sparsity:.1%}",
            f"{quality.true_sparsity:.1%}",
            f"{quality.roc_auc:.4f}",
            f"{quality.energy_lost:.2%}",
        ]
        for quality in qualities
    ]
    header = ["layer", "recall", "precision", "predicted sparsity", "true sparsity", "ROC-AUC", "energy lost"]
    print_table(f"{options.plan}: {qualities[0].tokens:,} tokens of {windows.source}", header, rows)
    if options.plot:
        predictor_report.plot(qualities, options.plot)
        print(f"wrote {options.plot}")
    if options.json:
        print_json({"layers": [asdict(quality) for quality in qualities], "text": windows.describe()})


def _export(options: argparse.Namespace) -> None:
    from actsparse.models.interchange import export_predictors
    from actsparse.models.opening import DTYPES as types
    from actsparse.plan import Plan

    plan = Plan.load(options.plan)
    files = export_predictors(plan, options.directory, dtype=types[options.dtype], relu=options.relu)
    print(f"wrote {len(files)} files to {options.directory}")


def _import(options: argparse.Namespace) -> None:
    from actsparse.models import opening
    from actsparse.models.interchange import import_predictors
    from actsparse.models.sites import describe
    from actsparse.plan import ModelIdentity

    model = ModelIdentity(**describe(opening.open_model(options.model)))
    import_predictors(options.directory, model, linear=options.linear).save(options.plan)
    print(f"wrote {options.plan}: predictors of {model.layers} layers from {options.directory}")

"""actsparse ppl."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from actsparse.cli.terminal import (
    add_model_arguments,
    positive,
    print_json,
    print_table,
    progress_bar,
    set_threads,
    whole,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_model_arguments(parser)
    parser.add_argument("--plan", metavar="PLAN", help="the plan to measure; without one only the dense model is")
    parser.add_argument("--text", required=True, metavar="FILE|DATASET", help="a text or .jsonl file, or a hub dataset")
    parser.add_argument("--tokens", type=whole, default=40960, help="evaluation tokens (default: 40960)")
    parser.add_argument("--window", type=positive, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--scope", help="tokens to sparsify and score: all, decode or last_half (default: the plan's)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(options: argparse.Namespace) -> None:
    """Measure and report."""
    from actsparse.measure import evaluate
    from actsparse.models import opening, text
    from actsparse.models.text import TextError
    from actsparse.plan import Plan
    from actsparse.runtime.swap import open_model

    set_threads(options)
    plan = Plan.load(options.plan) if options.plan else None
    if plan is not None and options.scope:
        plan = plan.with_scope(options.scope)
    model, tokenizer = open_model(options.model, options.dtype), opening.open_tokenizer(options.model)
    if plan is not None:
        from actsparse.models.sites import describe
        from actsparse.plan import ModelIdentity

        plan.check_model(ModelIdentity(**describe(model)))
    windows = text.load_windows(options.text, tokenizer, tokens=options.tokens, window=options.window)
    if len(windows.tokens) < 2:
        raise TextError(
            f"text gives one window of {windows.tokens.shape[1]} tokens, expected two or more for a standard error: "
            "pass more text or a smaller --window"
        )
    with progress_bar("scoring") as progress:
        if plan is None:
            dense = evaluate.perplexity(evaluate.window_losses(model, windows, progress=progress))
        else:
            result = evaluate.compare_perplexity(model, plan, windows, progress=progress)
    if plan is None:
        print_table(
            f"{options.model}", ["model", "perplexity", "+-"], [["dense", f"{dense.ppl:.4f}", f"{dense.stderr:.4f}"]]
        )
        if options.json:
            print_json({"dense": asdict(dense), "tokens": evaluate.scored_tokens(windows, "all"), "scope": "all"})
        return
    assert result.divergence is not None
    assert result.agreement is not None
    increase = result.sparse.ppl - result.dense.ppl
    rows = [
        ["dense", f"{result.dense.ppl:.4f}", f"{result.dense.stderr:.4f}", "", "", "", "100.0%", "100.0%"],
        [
            f"{plan.method} {plan.sparsity:g}",
            f"{result.sparse.ppl:.4f}",
            f"{result.sparse.stderr:.4f}",
            f"{increase:+.4f} +- {result.delta_stderr:.4f} ({increase / result.dense.ppl:+.2%})",
            f"{result.divergence.value:.4f} +- {result.divergence.stderr:.4f}",
            f"{result.agreement.value:.2%} +- {result.agreement.stderr:.2%}",
            f"{result.weights_read.fraction:.1%}",
            f"{result.weights_read.ffn_fraction:.1%}",
        ],
    ]
    title = f"{result.tokens:,} tokens of {windows.source}, scope {result.scope}"
    header = [
        "model",
        "perplexity",
        "+-",
        "increase (paired)",
        "KL to dense",
        "same top token",
        "weights read",
        "of the FFN",
    ]
    print_table(title, header, rows)
    print(f"weights read per token: {result.weights_read.bytes / 1e6:,.1f} MB")
    if options.json:
        print_json(result)

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
    parser.add_argument(
        "--against", metavar="MODEL", help="the dense model to compare with (default: the same one, every weight read)"
    )
    parser.add_argument("--text", required=True, metavar="FILE|DATASET", help="a text or .jsonl file, or a hub dataset")
    parser.add_argument("--tokens", type=whole, default=40960, help="evaluation tokens (default: 40960)")
    parser.add_argument("--window", type=positive, default=512, help="tokens per window (default: 512)")
    parser.add_argument(
        "--scope", help="tokens to sparsify and score: all, decode or last_half (default: the plan's; all for graded)"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(options: argparse.Namespace) -> None:
    """Measure and report."""
    from actsparse.measure import evaluate
    from actsparse.models import opening, text
    from actsparse.models.sites import ModelError, describe
    from actsparse.models.text import TextError
    from actsparse.plan import ModelIdentity, Plan
    from actsparse.runtime.swap import open_model, state_of

    set_threads(options)
    plan = Plan.load(options.plan) if options.plan else None
    model, tokenizer = open_model(options.model, options.dtype, options.device), opening.open_tokenizer(options.model)
    state = state_of(model)
    if state is not None and plan is None:
        plan = state.plan  # a packed directory's own
    if options.against and plan is None:
        raise ModelError(f"--against got {options.against}, expected it with a plan or a packed model")
    if plan is not None and (options.scope or plan.method == "graded"):
        # Graded plans leave prompts alone when they are used: scored so, half the text would count for nothing.
        plan = plan.with_scope(options.scope or "all")
    if plan is not None:
        plan.check_model(ModelIdentity(**describe(model)))
    reference = opening.open_model(options.against, options.dtype, options.device) if options.against else None
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        raise ModelError(
            f"{options.against} has a vocabulary of {reference.config.vocab_size} tokens, expected that of "
            f"{options.model}, {model.config.vocab_size}"
        )
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
            result = evaluate.compare_perplexity(model, plan, windows, progress=progress, reference=reference)
    if plan is None:
        print_table(
            f"{options.model}", ["model", "perplexity", "+-"], [["dense", f"{dense.ppl:.4f}", f"{dense.stderr:.4f}"]]
        )
        if options.json:
            print_json({"dense": asdict(dense), "tokens": evaluate.scored_tokens(windows, "all"), "scope": "all"})
        return
    assert result.divergence is not None
    assert result.agreement is not None
    read = result.weights_read
    increase = result.sparse.ppl - result.dense.ppl
    rows = [
        [
            "dense" if state is None or reference is not None else "every plane",
            f"{result.dense.ppl:.4f}",
            f"{result.dense.stderr:.4f}",
            *[""] * 6,
        ],
        [
            f"{plan.method} {plan.sparsity:g}" if plan.method != "graded" else plan.method,
            f"{result.sparse.ppl:.4f}",
            f"{result.sparse.stderr:.4f}",
            f"{increase:+.4f} +- {result.delta_stderr:.4f} ({increase / result.dense.ppl:+.2%})",
            f"{result.divergence.value:.4f} +- {result.divergence.stderr:.4f}",
            f"{result.agreement.value:.2%} +- {result.agreement.stderr:.2%}",
            f"{read.bits_read:.2f}",
            f"{read.fraction:.1%}",
            f"{read.ffn_fraction:.1%}",
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
        "bits read",
        "weights read",
        "of the FFN",
    ]
    print_table(title, header, rows)
    print(
        f"read per token: {read.bytes / 1e6:,.1f} MB, the output head included; {read.bits_read:.2f} bits a weight of the "
        f"layers' matrices, of {read.bits_stored:.2f} stored"
    )
    if options.json:
        document = asdict(result)
        document["sparse"] |= {"bits_read": read.bits_read, "bits_stored": read.bits_stored}
        document["increase"] = increase / result.dense.ppl
        print_json(document)

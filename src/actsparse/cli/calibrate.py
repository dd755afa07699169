"""actsparse calibrate."""

from __future__ import annotations

import argparse

from actsparse.cli.terminal import (
    add_model_arguments,
    fraction,
    positive,
    progress_bar,
    set_threads,
    sparsities,
    sparsity_list,
    whole,
)

EVALUATION_TOKENS = 40960
EVALUATION_WINDOW = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    from actsparse.methods import METHODS

    add_model_arguments(parser)
    parser.add_argument("--method", default="chess", help=f"one of {', '.join(METHODS)} (default: chess)")
    parser.add_argument(
        "--sparsity",
        type=sparsity_list,
        help="fraction skipped, 0 <= s < 1; a list 0.3,0.5 costs one run (default: 0.5, svdp 0.4)",
    )
    parser.add_argument(
        "--bits-read", type=sparsity_list, metavar="B", help="graded: bits read per weight, such as 3.0 (default: 3.0)"
    )
    for name, takers in _options().items():
        arguments = {"default": None, **METHODS[takers[0]].options[name]}
        arguments["help"] = f"{', '.join(takers)}: {arguments['help']}"
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **arguments)
    parser.add_argument(
        "--text", metavar="FILE|DATASET", help="a text or .jsonl file, or a hub dataset (some need none)"
    )
    parser.add_argument("--tokens", type=whole, default=65536, help="calibration tokens (default: 65536)")
    parser.add_argument(
        "--window", type=positive, help="tokens per window (default: the method's or the model's context)"
    )
    parser.add_argument(
        "--scope", help="tokens to sparsify: all, decode or last_half (default: the method's, mostly all)"
    )
    parser.add_argument(
        "--allocation", default="uniform", help="uniform, or greedy: skip more where it hurts least (default: uniform)"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--weights-read",
        type=fraction,
        metavar="F",
        help="find the sparsity that reads this much of the weights (0.6, 60%%)",
    )
    budget.add_argument(
        "--max-ppl-increase", type=fraction, metavar="F", help="find the sparsity that costs this much perplexity (1%%)"
    )
    parser.add_argument(
        "--evaluation-text",
        metavar="FILE|DATASET",
        help="other text to report on what --weights-read and the like found",
    )
    parser.add_argument("-o", "--output", required=True, metavar="PLAN", help="the plan to write")


def run(options: argparse.Namespace) -> None:
    """Calibrate and say what was written."""
    from actsparse.calibration import collect as engine
    from actsparse.calibration.allocation import ALLOCATIONS
    from actsparse.calibration.budget import Budget
    from actsparse.measure import evaluate
    from actsparse.methods import make
    from actsparse.methods.statistics import CalibrationError
    from actsparse.models import opening, text

    settings = {name: getattr(options, name) for name in _options() if getattr(options, name) is not None}
    # Everything that can be refused is refused before the model is read.
    method = make(options.method, **settings)
    targets = sparsities(options, method.sparsity)
    engine.check_sparsity(targets)
    for target in targets:
        method.check_target(target)
    engine.check_scope(method, options.scope)
    if options.text is None and method.phases:
        raise text.TextError(f"no --text given, {method.name} needs some to calibrate on")
    engine.check_writable(options.output)
    budget = None
    if options.weights_read is not None or options.max_ppl_increase is not None:
        budget = Budget(options.weights_read, options.max_ppl_increase)
        if len(targets) > 1:
            raise CalibrationError("a budget finds one sparsity, expected no list of them with it")
    if options.allocation not in ALLOCATIONS:
        raise CalibrationError(
            f"allocation {options.allocation!r} is unknown: expected one of {', '.join(ALLOCATIONS)}"
        )
    if options.evaluation_text:
        next(text.read_documents(options.evaluation_text))
    set_threads(options)
    model, tokenizer = (
        opening.open_model(options.model, options.dtype, options.device),
        opening.open_tokenizer(options.model),
    )
    with progress_bar("calibrating") as progress:
        plans = engine.calibrate(
            model,
            tokenizer,
            options.text,
            method=options.method,
            sparsity=targets,
            tokens=options.tokens,
            window=options.window,
            scope=options.scope,
            allocation=options.allocation,
            budget=budget,
            scorer=evaluate.scorer,
            output=options.output,
            progress=progress,
            **settings,
        )
    plans = plans if isinstance(plans, list) else [plans]
    paths = engine.plan_paths(options.output, targets)
    for plan, path in zip(plans, paths, strict=True):
        mean = sum(plan.achieved.values()) / max(1, len(plan.achieved))
        print(
            f"wrote {path}: {plan.method}, target {plan.sparsity:g}, achieved {mean:.3f} on {plan.text['tokens']} tokens"
        )

    if options.evaluation_text or budget:
        source = options.evaluation_text or options.text
        windows = text.load_windows(source, tokenizer, tokens=EVALUATION_TOKENS, window=EVALUATION_WINDOW)
        for plan in plans:
            with progress_bar("evaluating") as progress:
                result = evaluate.compare_perplexity(model, plan, windows, progress=progress, divergence=False)
            increase, error = result.sparse.ppl / result.dense.ppl - 1, result.delta_stderr / result.dense.ppl
            own = "" if options.evaluation_text else ", the text it was calibrated on (--evaluation-text names another)"
            print(
                f"{plan.method} {plan.sparsity:.4g} reads {result.weights_read.fraction:.1%} of the weights, perplexity "
                f"{increase:+.2%} +- {error:.2%} on {result.tokens:,} tokens of {source}{own}"
            )


def _options() -> dict[str, list[str]]:
    """The methods' own options, and which methods take each."""
    from actsparse.methods import METHODS

    takers: dict[str, list[str]] = {}
    for method in METHODS.values():
        for name in method.options:
            takers.setdefault(name, []).append(method.name)
    return takers

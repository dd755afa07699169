"""actsparse eval."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from actsparse.cli.terminal import add_model_arguments, positive, print_json, print_table, set_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_model_arguments(parser)
    parser.add_argument("--plan", metavar="PLAN", help="the plan to evaluate beside the dense model")
    parser.add_argument(
        "--tasks",
        required=True,
        help="comma-separated tasks of lm-evaluation-harness; chess8 for those of the CHESS paper, actsparse_offline for "
        "those shipped with the project",
    )
    parser.add_argument("--tasks-folder", metavar="DIR", help="more task files (default: reference/tasks)")
    parser.add_argument("--limit", type=positive, help="documents per task (default: all)")
    parser.add_argument("--batch-size", type=positive, default=16, help="sequences in a forward (default: 16)")
    parser.add_argument("--scope", help="tokens to sparsify: all, decode or last_half (default: the plan's)")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense model out")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the JSON document to a file")


def run(options: argparse.Namespace) -> None:
    """Run the tasks and report."""
    from actsparse.calibration.collect import check_writable
    from actsparse.measure import harness
    from actsparse.models import directory, opening
    from actsparse.models.sites import describe
    from actsparse.plan import ModelIdentity, Plan, PlanError, atomic_path
    from actsparse.runtime.swap import open_model, state_of

    if options.output:
        check_writable(options.output)
    plan = Plan.load(options.plan) if options.plan else None
    if options.no_dense and plan is None and directory.description(options.model) is None:
        raise PlanError("--no-dense leaves nothing to evaluate: expected --plan with it")
    if plan is not None and options.scope:
        plan = plan.with_scope(options.scope)
    set_threads(options)
    names = [name for name in options.tasks.split(",") if name]
    tasks = harness.Tasks(names, folder=options.tasks_folder, limit=options.limit, batch_size=options.batch_size)
    tasks.check(plan)
    model, tokenizer = open_model(options.model, options.dtype, options.device), opening.open_tokenizer(options.model)
    state = state_of(model)
    if plan is None and state is not None:
        plan = state.plan  # a packed directory's own
        plan = plan.with_scope(options.scope or "all")
    if plan is not None:
        plan.check_model(ModelIdentity(**describe(model)))
    dense = None if options.no_dense else tasks.run(model, tokenizer)
    sparse = None if plan is None else tasks.run(model, tokenizer, plan)
    shown = sparse or dense or []
    rows, document = [], []
    for index, score in enumerate(shown):
        row = [score.task, score.metric, f"{score.samples:,}"]
        entry: dict[str, Any] = {"task": score.task, "metric": score.metric, "samples": score.samples}
        if dense is not None:
            row.append(_value(dense[index]))
            entry["dense"] = dense[index].document()
        if sparse is not None:
            row.append(_value(score))
            entry["sparse"] = score.document()
        if dense is not None and sparse is not None:
            difference, stderr = harness.paired(score, dense[index])
            row.append(f"{difference:+.4f} +- {stderr:.4f}")
            entry |= {"difference": difference, "difference_stderr": None if math.isnan(stderr) else stderr}
        rows.append(row)
        document.append(entry)
    header = ["task", "metric", "documents"]
    header += ["dense"] if dense is not None else []
    header += [f"{plan.method} {plan.sparsity:g}"] if plan is not None else []
    header += ["difference (paired)"] if dense is not None and plan is not None else []
    print_table(f"{options.model}, {tasks.note(plan)}", header, rows)
    for name, scores in (("dense", dense), ("sparse", sparse)):
        mean = harness.mean_accuracy(scores or [])
        if mean is not None and len(tasks.names) > 0:
            print(f"mean acc, {name}: {mean:.4f}")
    report = {
        "model": options.model,
        "plan": options.plan,
        "method": plan.method if plan else "dense",
        "sparsity": plan.sparsity if plan else 0.0,
        "scope": plan.scope if plan else None,
        "limit": options.limit,
        "scores": document,
    }
    if options.output:
        with atomic_path(options.output) as temporary:
            Path(temporary).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print_json(report)


def _value(score: Any) -> str:
    return f"{score.value:.4f} +- {score.stderr:.4f}"

"""actsparse info."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from actsparse.cli.terminal import print_json, print_table

_LONGEST = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("plan", metavar="PLAN", help="a plan file, or the directory of a sparse model")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")


def run(options: argparse.Namespace) -> None:
    """Show a plan."""
    from actsparse.methods.graded import DENSE_BITS
    from actsparse.models import directory
    from actsparse.plan import Plan, short

    of_directory = Path(options.plan).is_dir() and directory.description(options.plan) is not None
    plan = Plan.load(f"{options.plan}/{directory.PLAN}" if of_directory else options.plan)
    if options.json:
        head = {name: getattr(plan, name) for name in ("method", "sparsity", "scope", "settings", "text", "achieved")}
        print_json({**head, "prompt": plan.prompt, "model": asdict(plan.model), "version": plan.version})
        return
    facts = {
        "method": plan.method,
        "target sparsity": f"{plan.sparsity:g}",
        "scope": plan.scope,
        **{f"setting: {name}": short(value) for name, value in plan.settings.items()},
        **{f"prompt: {name}": short(value) for name, value in plan.prompt.items()},
        **{f"model: {name}": str(value) for name, value in asdict(plan.model).items()},
        **{f"text: {name}": str(value) for name, value in plan.text.items()},
        "written by": f"actsparse {plan.version}",
    }
    print_table(str(options.plan), ["what", "value"], [[_plain(what), _plain(value)] for what, value in facts.items()])
    sites = sorted({site.rpartition(".")[2] for site in plan.achieved})
    if sites and plan.method == "graded":
        sites.remove("head")
        read = {site: f"{DENSE_BITS * (1 - value):.2f}" for site, value in plan.achieved.items()}
        rows = [[str(layer), *(read[f"layers.{layer}.{site}"] for site in sites)] for layer in range(plan.model.layers)]
        print_table("bits read per weight on the calibration text", ["layer", *sites], rows)
        print(f"the output head reads {read['head']} bits a weight")
    elif sites:
        rows = [
            [str(layer), *(_percent(plan.achieved.get(f"layers.{layer}.{site}")) for site in sites)]
            for layer in range(plan.model.layers)
        ]
        print_table("sparsity on the calibration text", ["layer", *sites], rows)


def _plain(value: str) -> str:
    """A plan may come from anywhere: nothing in it may steer the terminal or flood it."""
    shown = "".join(c if c.isprintable() else "?" for c in value[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "..."


def _percent(value: float | None) -> str:
    return "dense" if value is None else f"{value:.1%}"

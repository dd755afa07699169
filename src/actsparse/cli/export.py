"""actsparse export."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face model directory or hub id, or a packed directory"
    )
    parser.add_argument("--plan", metavar="PLAN", help="the plan (a packed directory has its own)")
    parser.add_argument("--engine", choices=["vllm"], required=True, help="who will serve it")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the directory to make")


def run(options: argparse.Namespace) -> None:
    """Write the directory and say how to serve it."""
    from actsparse.plan import Plan
    from actsparse.runtime.export import export

    plan = export(options.model, None if options.plan is None else Plan.load(options.plan), options.output)
    print(
        f"wrote {options.output}: {plan.method}, scope {plan.scope}; with actsparse-vllm: vllm serve {options.output}"
    )

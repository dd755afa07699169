"""actsparse apply."""

from __future__ import annotations

import argparse

from actsparse.cli.terminal import (
    add_evaluation_arguments,
    add_model_arguments,
    evaluated,
    set_threads,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_model_arguments(parser)
    parser.add_argument("--plan", required=True, metavar="PLAN", help="the plan that the directory is to hold")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the directory to make")
    add_evaluation_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Write the directory, and its card."""
    import os
    import shutil
    import tempfile
    from pathlib import Path

    from actsparse.measure import card
    from actsparse.models import opening
    from actsparse.models.sites import ModelError, describe
    from actsparse.plan import ModelIdentity, Plan
    from actsparse.runtime.swap import sparsify

    target = Path(options.output)
    if target.exists():
        raise ModelError(f"{target} exists, expected a new directory")
    if not target.parent.is_dir():
        raise ModelError(f"cannot write {target}: {target.parent} is no directory")
    set_threads(options)
    plan = Plan.load(options.plan)
    plan.check_decodable()
    model = opening.open_model(options.model, options.dtype, options.device)
    tokenizer = opening.open_tokenizer(options.model)
    plan.check_model(ModelIdentity(**describe(model)))
    measured = evaluated(options, model, tokenizer, plan)
    sparsify(model, plan)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.applying-", dir=target.parent))
    try:
        home = folder / target.name
        with opening.quiet():
            model.save_pretrained(home)
        tokenizer.save_pretrained(home)
        card.write(home, plan, options.model, measured)
        os.replace(home, target)
    finally:
        shutil.rmtree(folder)
    size = sum(file.stat().st_size for file in target.iterdir())
    noted = "" if measured else "; its card says that nothing was measured: --evaluate TEXT does"
    print(f"wrote {target}: {size / 1e6:,.1f} MB, {plan.method} {plan.sparsity:g}{noted}")

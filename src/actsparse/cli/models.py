"""actsparse models."""

from __future__ import annotations

import argparse
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from actsparse.cli.terminal import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")


def run(options: argparse.Namespace) -> None:
    """Show what the package knows of families of models."""
    versions = tested_range("transformers")
    rows = families()
    if options.json:
        print_json({"transformers": versions, "families": rows})
        return
    table = [
        [
            row["family"],
            row["example"],
            *("yes" if row[name] else "no" for name in ("cpu", "cuda")),
            versions,
            row["notes"],
        ]
        for row in rows
    ]
    header = ["family", "example", "native step, CPU", "native step, CUDA", "transformers", "notes"]
    print_table("families", header, table)
    print(
        "Others work if their layers are shaped like Llama's, and decode through their own modules (docs/families.md)."
    )


def families() -> list[dict[str, Any]]:
    """A row for each family: its name, an example, which native steps there are, and notes."""
    from actsparse.models.families import FAMILIES
    from actsparse.runtime.stepping import cuda_lacks

    return [
        {
            "family": name,
            "example": family.example,
            "cpu": family.step is not None,
            "cuda": family.step is not None and not cuda_lacks(family.step),
            "notes": family.notes,
        }
        for name, family in FAMILIES.items()
    ]


def tested_range(package: str) -> str:
    """The releases of a dependency that this package declares, and is tested with at both ends."""
    for line in metadata.requires("actsparse") or []:
        requirement = Requirement(line)
        if requirement.name == package and requirement.marker is None:
            return ", ".join(sorted(map(str, requirement.specifier), reverse=True))
    return ""

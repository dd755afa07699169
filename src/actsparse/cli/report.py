"""actsparse report."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("directory", metavar="DIR", help="what actsparse compare wrote")


def run(options: argparse.Namespace) -> None:
    """Make the table, the plots and the page anew."""
    from actsparse.measure import report, results

    report.check_plotting()
    directory = Path(options.directory)
    print(f"wrote {report.write(directory, results.load(directory))}")

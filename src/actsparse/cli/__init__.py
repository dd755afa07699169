"""The command line: one verb per file of this folder, imported only when it is used."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

VERBS = {
    "calibrate": "find out on some text which channels may be skipped, and write a plan",
    "pack": "make a directory of low-bit weights that are read only as deep as each activation needs",
    "export": "make a directory that a serving engine opens",
    "apply": "make of a model and a plan a directory that transformers opens as the sparse model",
    "info": "show a plan as a table",
    "ppl": "perplexity dense and sparse on the same tokens, with the weights read",
    "generate": "continue a prompt, dense or sparse",
    "chat": "talk to a model, dense or sparse",
    "serve": "answer over HTTP as OpenAI's API does, up to 8 sequences decoded together, with a page to chat on",
    "eval": "tasks of lm-evaluation-harness, dense and sparse",
    "compare": "many methods under one protocol: table, plots and an HTML page",
    "report": "make a comparison's table, plots and page anew",
    "bench": "decode speed: Hugging Face, our dense path, the sparse path, llama.cpp",
    "predictors": "report on a plan's predictors, or exchange them with PowerInfer",
    "neurons": "test on a model whether a text's most active neurons are stable and shared by similar texts",
    "models": "list the families of models, and which of them decode natively",
    "doctor": "show what this machine offers and which kernels will run",
}

# How often a thread of torch's OpenMP library looks for the others before it sleeps. The library's own 300,000 times are some
# milliseconds: beside any busy program the waiting thread keeps the awaited one off its core. 10,000 cover a wake-up.
SPINS = "10000"

DESCRIPTION = "Decode language models faster by reading only the weights that each token needs."


class _Parser(argparse.ArgumentParser):
    """Bad usage is one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        from actsparse.plan import one_line

        self.exit(2, f"actsparse: {one_line(message)}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog="actsparse", description=DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="show the version and leave")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    with _sleeping_soon():
        for name, summary in VERBS.items():
            sub = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
            if name in arguments[:1]:
                importlib.import_module(f"actsparse.cli.{name}").add_arguments(sub)
        options = parser.parse_args(arguments)
        if options.verb is not None:
            import torch  # noqa: F401
    options.command = shlex.join(["actsparse", *arguments])
    if options.version:
        from importlib.metadata import version

        print(f"actsparse {version('actsparse')}")
        return 0
    if options.verb is None:
        parser.print_help()
        return 2
    return _run(options)


@contextlib.contextmanager
def _sleeping_soon() -> Iterator[None]:
    """While torch is loaded: its threads are to sleep soon, unless the user has said how they should wait."""
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = SPINS  # read when the library is loaded, and not meant for programs that we start
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


def _run(options: argparse.Namespace) -> int:
    from actsparse.methods.base import MethodError
    from actsparse.methods.statistics import CalibrationError
    from actsparse.models.opening import ModelError
    from actsparse.models.text import TextError
    from actsparse.plan import PlanError

    warnings.showwarning = _show_warning
    # SIGTERM unwinds like an exception, so that temporary files are removed on the way.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        importlib.import_module(f"actsparse.cli.{options.verb}").run(options)
    except (ModelError, MethodError, PlanError, CalibrationError, TextError) as error:
        return _refuse(error)
    except (OSError, UnicodeError, OverflowError, RecursionError, MemoryError) as error:
        # What no check foresaw: the machine's limits and the values beyond them.
        return _refuse(f"{type(error).__name__}: {error}")
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        return _refuse("out of memory: expected a smaller model, window or number of tokens")
    except KeyboardInterrupt:
        print("actsparse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left (`| head`); nothing is wrong, and Python must not complain at exit.
        sys.stdout = None
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _refuse(message: object) -> int:
    from actsparse.plan import one_line

    print(f"actsparse: {one_line(message)}", file=sys.stderr)
    return 2


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, *place: object, **more: object
) -> None:
    """Our own warnings are one line for the user; everybody else's keep quiet."""
    if category is UserWarning and "actsparse" in Path(filename).parts:
        from actsparse.plan import one_line

        print(f"actsparse: warning: {one_line(message)}", file=sys.stderr)

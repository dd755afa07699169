"""actsparse serve."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from actsparse.cli.terminal import add_model_arguments, positive, set_threads

DEFAULT_CONTEXT = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_model_arguments(parser)
    parser.add_argument(
        "--plan", metavar="PLAN", help="the plan to obey; without one as MODEL is: dense, or with its own"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=_port, default=8000, help="port, 0 for a free one (default: 8000)")
    parser.add_argument("--api-key", metavar="KEY", help="that clients must send; @FILE reads it from a file")
    parser.add_argument("--name", help="of the model, for clients (default: the last part of MODEL)")
    parser.add_argument(
        "--context",
        type=positive,
        help=f"tokens of prompt and answer (default: the model's, at most {DEFAULT_CONTEXT})",
    )
    parser.add_argument("--slots", type=positive, default=8, help="sequences decoded at once, 1 to 8 (default: 8)")
    parser.add_argument(
        "--queue", type=positive, default=256, help="requests that may wait; more get 429 (default: 256)"
    )
    parser.add_argument(
        "--grace", type=positive, default=60, metavar="S", help="seconds to finish in at the end (default: 60)"
    )


def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what runs."""
    from actsparse.models.sites import ModelError

    try:
        from actsparse.serve.app import Limits, Server
        from actsparse.serve.run import listen, serve_until_told
    except ModuleNotFoundError as error:
        raise ModelError(f"serve needs the package {error.name}: pip install 'actsparse[serve]'") from None
    from actsparse.runtime import generate as engine
    from actsparse.runtime.swap import load

    key = _key(options.api_key)
    if not 1 <= options.slots <= 8:
        raise ModelError(f"slots is {options.slots}, expected 1 to 8")
    set_threads(options)
    with listen(options.host, options.port) as socket:
        model, tokenizer = load(options.model, options.plan, dtype=options.dtype, device=options.device)
        most = engine.context_of(model)
        if options.context and options.context > most:
            raise ModelError(f"context is {options.context} tokens, expected at most the model's {most}")
        context = options.context or min(most, DEFAULT_CONTEXT)
        name = options.name or Path(str(options.model).rstrip("/")).name or "model"
        server = Server(
            _lanes(name, model, context, options.slots), model, tokenizer, Limits(waiting=options.queue), key
        )
        for lane in server.engine.lanes.values():
            how = f"up to {lane.slots} sequences together" if lane.together else f"one after another ({lane.obstacle})"
            print(f"{lane.name}: {lane.sequences.path}; {how}", file=sys.stderr)
        if key is None and options.host not in ("127.0.0.1", "::1", "localhost"):
            print(f"warning: everybody who reaches {options.host} may use this server: see --api-key", file=sys.stderr)
        serve_until_told(server, socket, options.grace)


def _lanes(name: str, model: Any, context: int, slots: int) -> list[Any]:
    """The model, and beside a sparse one its dense self on the same weights."""
    from actsparse.runtime.swap import prompts_of, state_of
    from actsparse.serve.lanes import Lane

    lanes = [Lane(name, model, context, slots)]
    if state_of(model) is not None and prompts_of(model) is None:
        lanes.append(Lane(f"{name}-dense", model, context, slots, rules=False))
    return lanes


def _key(given: str | None) -> str | None:
    from actsparse.models.text import TextError

    if given is None:
        return None
    if given.startswith("@"):
        try:
            given = Path(given[1:]).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise TextError(f"API key file {given[1:]} cannot be read: {error.strerror}") from None
    if not given:
        raise TextError("the API key is empty, expected some characters")
    return given


def _port(value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 5 or int(value) > 65535:
        raise argparse.ArgumentTypeError(f"{value} is no port, expected 0 to 65535")
    return int(value)

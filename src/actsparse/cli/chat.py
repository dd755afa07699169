"""actsparse chat."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from actsparse.cli.generate import add_sampling_arguments, show
from actsparse.cli.terminal import add_model_arguments, positive, set_threads

HELP = "/quit leaves, /reset starts over, Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_model_arguments(parser)
    parser.add_argument(
        "--plan", metavar="PLAN", help="the plan to obey; without one as MODEL is: dense, or with its own"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="of one answer, at most (default: 512)")
    parser.add_argument(
        "--context", type=positive, help="tokens to remember (default: the model's context, at most 8192)"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message, where the chat template knows one")
    add_sampling_arguments(parser, temperature=0.7)


def run(options: argparse.Namespace) -> None:
    """Talk until /quit or the end of the input."""
    from actsparse.models.sites import ModelError
    from actsparse.models.text import check_text
    from actsparse.runtime import generate as engine
    from actsparse.runtime.swap import load

    if options.system:
        check_text(options.system, "--system")
    set_threads(options)
    model, tokenizer = load(options.model, options.plan, dtype=options.dtype, device=options.device)
    context = engine.context_of(model)
    if options.context and options.context > context:
        raise ModelError(f"context is {options.context} tokens, expected at most the model's {context}")
    session = engine.Session(model, tokenizer, cache_length=options.context or min(context, 8192))
    sampling = engine.Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    talk: _Templated | _Plain
    if getattr(tokenizer, "chat_template", None):
        talk = _Templated(tokenizer, options.system)
    else:
        talk = _Plain(tokenizer, options.system)
        _note("the tokenizer has no chat template: what you type is simply continued")
    _note(f"{session.path}; {HELP}")
    talk.clear()
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            talk.clear()
            session.reset()
            _note("started over")
            continue
        if not line.strip():
            continue
        tokens = talk.ask(line)
        try:
            answer = session.reply(tokens, sampling, max_new_tokens=options.max_new_tokens, stream=show)
        except ModelError as error:
            talk.take_back()
            _note(f"{error}; /reset starts over")
            continue
        print(flush=True)
        talk.answered(answer.text, answer.tokens)
        _note(f"[{answer.stopped}] {answer.speed()}")


class _Templated:
    """Turns in the tokenizer's own chat template."""

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self._tokenizer = tokenizer
        self._first = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []

    def clear(self) -> None:
        """Forget all turns."""
        self._messages = list(self._first)

    def ask(self, text: str) -> list[int]:
        """The whole conversation's tokens, with the user's new turn."""
        self._messages.append({"role": "user", "content": text})
        encoded = self._tokenizer.apply_chat_template(self._messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def answered(self, text: str, tokens: list[int]) -> None:
        """Remember the model's turn."""
        self._messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the turn that could not be answered."""
        self._messages.pop()


class _Plain:
    """One growing text, for models without a chat template."""

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self._tokenizer = tokenizer
        self._first = list(tokenizer(system)["input_ids"]) if system else []
        self._tokens: list[int] = []
        self._before = 0

    def clear(self) -> None:
        """Forget the text."""
        self._tokens = list(self._first)

    def ask(self, text: str) -> list[int]:
        """The whole text's tokens, with the user's new line."""
        self._before = len(self._tokens)
        self._tokens += self._tokenizer(text, add_special_tokens=not self._tokens)["input_ids"]
        return list(self._tokens)

    def answered(self, text: str, tokens: list[int]) -> None:
        """Remember the continuation."""
        self._tokens += tokens

    def take_back(self) -> None:
        """Forget the line that could not be continued."""
        del self._tokens[self._before :]


def _lines() -> Iterator[str]:
    """Lines of the user: with a prompt on a terminal, as they come in a pipe; Ctrl-C there ends the program."""
    from actsparse.models.text import TextError, check_text

    read = _typed if sys.stdin.isatty() else sys.stdin.readline
    while True:
        try:
            line = read()
        except UnicodeDecodeError as error:
            raise TextError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None
        if not line:
            return
        yield check_text(line.rstrip("\n"), "standard input")


def _typed() -> str:
    try:
        return input("> ") + "\n"
    except EOFError:
        print()
        return ""


def _note(text: str) -> None:
    """What is not the model's speech goes to stderr, so that a pipe carries answers only."""
    print(text, file=sys.stderr, flush=True)

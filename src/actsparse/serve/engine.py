"""Who is decoded when: one thread owns the models; sequences join and leave their lane's batch between its steps.

An answer depends on its request alone: prompts are run in fixed pieces, every sequence draws from its own generator, and rows
of a batch do not touch each other.  Events go out through callbacks that must not block.

Shape letters: V vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from actsparse.models.sites import ModelError
from actsparse.runtime.sampling import Sampling, choose
from actsparse.serve.lanes import Lane
from actsparse.serve.text import Detokenizer, Stops

_log = logging.getLogger("actsparse.serve")


class Busy(Exception):
    """So many requests wait that another one is refused."""


class Closing(Exception):
    """The server shuts down."""


@dataclass(frozen=True)
class TokenLogprob:
    """One token, the logarithm of its probability at temperature 1, and the likeliest alternatives [(token, logarithm)]."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """Text that became final, with the tokens since the last piece where their probabilities were asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    layer_bits: tuple[float, ...] = ()


@dataclass(frozen=True)
class End:
    """An answer's end: ``stop``, ``length``, or an error; and what it took.

    ``read_bytes``: weight bytes per decode step, those of a step shared by all sequences in it; None where not counted.
    ``bits_read``: bits per weight that its steps looked at, mean; ``together``: sequences in them, mean.
    """

    reason: str = "stop"
    error: str | None = None
    tokens: int = 0
    waited_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    read_bytes: float | None = None
    bits_read: float | None = None
    together: float = 0.0


@dataclass
class Request:
    """One text to continue.

    Attributes:
        lane: name of the model.
        prompt: tokens, at least one.
        sampling: how tokens are chosen.
        max_tokens: new ones, at most; prompt and answer must fit the lane's context.
        ends: tokens that end the answer.
        stops: strings that end it, and are not shown.
        logprobs: so many alternatives of each token; None: no probabilities.
        layer_bits: whether pieces carry the bits read by layer.
        joined: whether the text must join the prompt's without a seam.
        emit: called from the engine's thread with each :class:`Piece` and then one :class:`End`.
    """

    lane: str
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    emit: Callable[[Piece | End], None]
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    layer_bits: bool = False
    joined: bool = False
    cancelled: bool = field(default=False, init=False)
    asked: float = field(default_factory=time.perf_counter, init=False)


class _Answer:
    """A request being answered, in one slot of its lane."""

    def __init__(self, request: Request, slot: int, tokenizer: Any) -> None:
        self.request, self.slot = request, slot
        self.fed = 0  # tokens of the prompt that were run
        self.tokens: list[int] = []
        self.began = time.perf_counter()
        self.first: float | None = None
        self.steps = self.rows = 0
        self.read = self.bits = 0.0
        sampling = request.sampling
        self._warpers = sampling.processors()
        self._greedy = sampling.temperature == 0
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._text = Detokenizer(tokenizer, request.prompt if request.joined else ())
        self._stops = Stops(request.stops)
        self._logprobs: list[TokenLogprob] = []

    def take(self, logits: torch.Tensor, layer_bits: Sequence[float] = ()) -> str | None:
        """Choose the next token from ``logits`` [V] and show what it completes; the reason where the answer ends."""
        request = self.request
        token = choose(logits, [0], self._warpers, greedy=self._greedy, generator=self._generator)
        self.first = self.first or time.perf_counter()
        self.tokens.append(token)
        if request.logprobs is not None:
            self._logprobs.append(_logprob(logits, token, request.logprobs))
        ended = token in request.ends
        text = "" if ended else self._stops.add(self._text.add(token))
        if ended or self._stops.found or len(self.tokens) == request.max_tokens:
            if not self._stops.found:
                text += self._stops.add(self._text.end())
                if not self._stops.found:
                    text += self._stops.end()
            self._show(text, layer_bits)
            return "stop" if ended or self._stops.found else "length"
        if text or (layer_bits and request.layer_bits):
            self._show(text, layer_bits)
        return None

    def count(self, read: list[int] | None, bits: float | None, rows: int) -> None:
        """Note a decode step of ``rows`` sequences."""
        self.steps += 1
        self.rows += rows
        if read is not None and bits is not None:
            self.read += sum(read) / rows
            self.bits += bits

    def end(self, reason: str, error: str | None = None) -> End:
        """The last event."""
        now, steps = time.perf_counter(), max(self.steps, 1)
        first = self.first or now
        return End(
            reason=reason,
            error=error,
            tokens=len(self.tokens),
            waited_s=self.began - self.request.asked,
            prefill_s=first - self.began,
            decode_s=now - first,
            read_bytes=self.read / steps if self.read else None,
            bits_read=self.bits / steps if self.read else None,
            together=self.rows / steps,
        )

    def _show(self, text: str, layer_bits: Sequence[float]) -> None:
        logprobs, self._logprobs = tuple(self._logprobs), []
        self.request.emit(Piece(text, logprobs, tuple(layer_bits) if self.request.layer_bits else ()))


class _Slots:
    """The requests of one lane: those that wait, the one whose prompt is being run, those being decoded."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.waiting: deque[Request] = deque()
        self.filling: _Answer | None = None
        self.active: dict[int, _Answer] = {}

    @property
    def running(self) -> list[_Answer]:
        return [*self.active.values(), *([self.filling] if self.filling else [])]

    def free(self) -> int | None:
        taken = {answer.slot for answer in self.running}
        return next((slot for slot in range(self.lane.slots) if slot not in taken), None)


class Engine:
    """Answers requests for its lanes until it is closed.

    Args:
        lanes: the served models.
        tokenizer: theirs.
        most_waiting: requests that may wait for a slot, over all lanes.
        observe: called after each step with the lane's name, its sequences and the bytes that it read (None: not counted).
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        tokenizer: Any,
        *,
        most_waiting: int = 256,
        observe: Callable[[str, int, int | None], None] = lambda lane, rows, read: None,
    ) -> None:
        self.lanes = {lane.name: lane for lane in lanes}
        self._tokenizer, self._most_waiting, self._observe = tokenizer, most_waiting, observe
        self._slots = {lane.name: _Slots(lane) for lane in lanes}
        self._changed = threading.Condition()
        self._draining = self._stopping = False
        # OpenMP's number of threads belongs to the thread that asks.
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="actsparse-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._draining

    def load(self) -> dict[str, tuple[int, int]]:
        """By lane: requests in a slot, and waiting."""
        with self._changed:
            return {name: (len(each.running), len(each.waiting)) for name, each in self._slots.items()}

    def submit(self, request: Request) -> None:
        """Take a request in; its events come through its callback.

        Raises:
            Busy: too many wait.
            Closing: the engine is being closed.
        """
        with self._changed:
            if self._draining or not self._thread.is_alive():
                raise Closing("the server is shutting down")
            if sum(len(each.waiting) for each in self._slots.values()) >= self._most_waiting:
                raise Busy(f"{self._most_waiting} requests are waiting already")
            self._slots[request.lane].waiting.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Nobody wants the answer any more; no event follows once the engine has seen it."""
        request.cancelled = True
        with self._changed:
            self._changed.notify()

    def drain(self) -> None:
        """Refuse what comes and what waits; finish what runs."""
        with self._changed:
            self._draining = True
            refused = [request for each in self._slots.values() for request in each.waiting]
            for each in self._slots.values():
                each.waiting.clear()
            self._changed.notify()
        for request in refused:
            request.emit(End(reason="error", error="the server is shutting down"))

    def close(self, timeout_s: float | None = None) -> None:
        """Drain, and end what has not finished after ``timeout_s``."""
        self.drain()
        self._thread.join(timeout_s)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._wait():
                for each in self._slots.values():
                    self._fill(each)
                    self._step(each)
        finally:
            self.drain()
            for each in self._slots.values():
                for answer in each.running:
                    answer.request.emit(answer.end("error", "the server stopped before the answer was complete"))
                each.active, each.filling = {}, None

    def _wait(self) -> bool:
        """Until there is work; False at the end."""
        with self._changed:
            while not self._stopping:
                for each in self._slots.values():
                    self._forget_cancelled(each)
                if any(each.waiting or each.running for each in self._slots.values()):
                    return True
                if self._draining:
                    return False
                self._changed.wait()
            return False

    @staticmethod
    def _forget_cancelled(each: _Slots) -> None:
        each.waiting = deque(request for request in each.waiting if not request.cancelled)
        each.active = {slot: answer for slot, answer in each.active.items() if not answer.request.cancelled}
        if each.filling and each.filling.request.cancelled:
            each.filling = None

    def _fill(self, each: _Slots) -> None:
        """Run the next piece of a waiting request's prompt, if there is a slot for it."""
        if each.filling is None:
            with self._changed:
                slot = each.free()
                if slot is None or not each.waiting:
                    return
                each.filling = _Answer(each.waiting.popleft(), slot, self._tokenizer)
            each.lane.sequences.rewind(slot, 0)
        answer = each.filling
        prompt = answer.request.prompt
        count = each.lane.piece(len(prompt) - answer.fed)
        try:
            logits = each.lane.prefill(answer.slot, prompt[answer.fed : answer.fed + count])
            answer.fed += count
            if answer.fed < len(prompt):
                return
            each.filling = None
            self._take(each, answer, logits, ())
        except Exception as error:  # one request's trouble, whatever it is, must not end the others'
            each.filling = None
            self._fail(each, [answer], error)

    def _step(self, each: _Slots) -> None:
        """One more token of every sequence of a lane."""
        if not each.active:
            return
        answers = dict(each.active)
        lane, before = each.lane, each.lane.sequences.bytes_read()
        try:
            rows = lane.step({slot: answer.tokens[-1] for slot, answer in answers.items()})
        except Exception as error:
            self._fail(each, list(answers.values()), error)
            return
        after = lane.sequences.bytes_read()
        read = [now - then for now, then in zip(after, before, strict=True)] if after and before else None
        bits, layer_bits = (None, []) if read is None else lane.bits(read)
        self._observe(lane.name, len(answers), None if read is None else sum(read))
        for answer, logits in zip(answers.values(), rows, strict=True):
            answer.count(read, bits, len(answers))
            try:
                self._take(each, answer, logits, layer_bits)
            except Exception as error:
                self._fail(each, [answer], error)

    def _take(self, each: _Slots, answer: _Answer, logits: torch.Tensor, layer_bits: Sequence[float]) -> None:
        reason = answer.take(logits, layer_bits)
        if reason is None:
            each.active[answer.slot] = answer
            return
        each.active.pop(answer.slot, None)
        answer.request.emit(answer.end(reason))

    def _fail(self, each: _Slots, answers: list[_Answer], error: Exception) -> None:
        foreseen = isinstance(error, ModelError | MemoryError)
        _log.error("an answer of %s failed: %s", each.lane.name, error, exc_info=None if foreseen else error)
        for answer in answers:
            each.active.pop(answer.slot, None)
            answer.request.emit(answer.end("error", str(error)))


def _logprob(logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
    logs = logits.float().log_softmax(-1)
    values, tokens = logs.topk(min(count, len(logs)))
    return TokenLogprob(token, float(logs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))

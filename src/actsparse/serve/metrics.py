"""Counters for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily

from actsparse.serve.engine import End

if TYPE_CHECKING:
    from actsparse.serve.engine import Engine

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """What one server counts; nothing is kept by client, so that its size does not grow."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = ["model"]

        def counter(name: str, what: str, *more: str) -> Counter:
            return Counter(f"actsparse_{name}", what, [*labels, *more], registry=self.registry)

        self.requests = counter("requests", "Answers by how they ended", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts answered")
        self.generated_tokens = counter("generated_tokens", "Tokens generated")
        self.steps = counter("decode_steps", "Decode steps, each of one or several sequences")
        self.step_tokens = counter("decode_step_tokens", "Sequences in decode steps, summed")
        self.bytes = counter("weights_read_bytes", "Weight bytes read by decode steps")
        self.refused = Counter("actsparse_refused", "Requests refused by status", ["status"], registry=self.registry)
        self.first = Histogram(
            "actsparse_time_to_first_token_seconds",
            "From the request to its first token",
            labels,
            buckets=_SECONDS,
            registry=self.registry,
        )

    def watch(self, engine: Engine) -> None:
        """Report how many requests run and wait."""
        self.registry.register(_Load(engine))

    def step(self, lane: str, rows: int, read: int | None) -> None:
        """Note a decode step."""
        self.steps.labels(lane).inc()
        self.step_tokens.labels(lane).inc(rows)
        if read is not None:
            self.bytes.labels(lane).inc(read)

    def answer(self, lane: str, prompt_tokens: int, end: End) -> None:
        """Note an answer's end."""
        self.requests.labels(lane, end.reason).inc()
        self.prompt_tokens.labels(lane).inc(prompt_tokens)
        self.generated_tokens.labels(lane).inc(end.tokens)
        if end.tokens:
            self.first.labels(lane).observe(end.waited_s + end.prefill_s)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class _Load:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running = GaugeMetricFamily("actsparse_running", "Requests being answered", labels=["model"])
        waiting = GaugeMetricFamily("actsparse_waiting", "Requests waiting for a slot", labels=["model"])
        for name, (run, wait) in self._engine.load().items():
            running.add_metric([name], run)
            waiting.add_metric([name], wait)
        yield running
        yield waiting

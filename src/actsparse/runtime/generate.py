"""Text in, text out: greedy or sampled continuation of one sequence, through the native decode step where there is one.

Which path ran is part of every result; the other path is transformers' own ``generate``.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    TextStreamer,
)

from actsparse.models import caches
from actsparse.models.sites import ModelError
from actsparse.models.text import TextError, check_text
from actsparse.runtime.decode import Decoder
from actsparse.runtime.finite import Finite
from actsparse.runtime.prompts import read
from actsparse.runtime.sampling import Sampling, choose, seeded
from actsparse.runtime.swap import prompts_of, state_of


@dataclass
class Generation:
    """What came out, and how fast.

    Attributes:
        tokens: the new tokens, the end-of-text token included where one came.
        text: they as text, without special tokens.
        path: which path decoded, with its reason.
        stopped: ``eos``, ``length`` or ``interrupted``.
        prompt_tokens: length of the prompt, and of its part that was not in the cache yet and had to be run.
        prefill_tokens: as above.
        prefill_s: time to the prompt's logits.
        decode_s: time of the decode steps, which are one fewer than the tokens (the first comes from the prefill).
        weights_read_bytes: weight bytes read per decode step, as counted by the CPU kernels; None elsewhere.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    path: str = ""
    stopped: str = "length"
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    weights_read_bytes: float | None = None

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens run per second."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Decode steps per second; 0 when there was none."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s and len(self.tokens) > 1 else 0.0

    def speed(self) -> str:
        """Both speeds and the path, on one line."""
        read = ""
        if self.weights_read_bytes is not None:
            read = f", {self.weights_read_bytes / 1e6:,.1f} MB of weights a token"
        return (
            f"{len(self.tokens)} tokens: prefill {self.prefill_tok_s:,.1f}, decode {self.decode_tok_s:,.1f} tokens/s"
            f"{read} ({self.path})"
        )


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop_at_eos: bool = True,
    stream: Callable[[str], None] | None = None,
) -> Generation:
    """Continue ``prompt`` with a dense or sparsified model.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        prompt: text.
        max_new_tokens: at most so many, fewer where the model's context ends.
        temperature: 0 is greedy.
        top_p: keep the most likely tokens that add up to so much probability.
        top_k: keep so many most likely tokens; 0 keeps all.
        seed: of the sampling.
        stop_at_eos: end at the model's end-of-text token.
        stream: called with each piece of text as soon as it is final.

    Raises:
        TextError: the prompt is empty, or no new tokens are asked for.
        ModelError: the prompt fills the model's context, or the logits hold NaN.
        ValueError: a sampling setting is out of range.
    """
    tokens = encode(tokenizer, prompt)
    if max_new_tokens < 1:
        raise TextError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if len(tokens) >= (context := context_of(model)):
        raise ModelError(f"{len(tokens)} tokens leave no room for an answer, expected fewer than {context}")
    session = Session(model, tokenizer, cache_length=min(len(tokens) + max_new_tokens, context))
    sampling = Sampling(temperature, top_p, top_k, seed)
    return session.reply(tokens, sampling, max_new_tokens=max_new_tokens, stop_at_eos=stop_at_eos, stream=stream)


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens; TextError when there are none."""
    tokens = tokenizer(check_text(prompt, "prompt"), verbose=False)["input_ids"]
    if not tokens:
        raise TextError("prompt is empty, expected some text")
    return list(tokens)


def context_of(model: Any) -> int:
    """How many tokens the model can look at."""
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)


class Session:
    """One sequence that can go on: what it has in common with the next prompt stays in the key/value cache.

    Args:
        model: a Hugging Face causal language model, dense or sparsified (and left as it is while the session lives).
        tokenizer: its tokenizer.
        cache_length: tokens that the cache can hold, prompts and answers together.
    """

    def __init__(self, model: Any, tokenizer: Any, cache_length: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.cache_length = cache_length
        state = state_of(model)
        if state is not None:
            state.plan.check_decodable()
        reason = Decoder.supports(model, cache_length)
        self._engine: _Native | _Transformers
        if reason is None:
            self._engine = _Native(model, cache_length)
        else:
            self._engine = _Transformers(model, reason)

    @property
    def path(self) -> str:
        """Which path decodes, and why."""
        return self._engine.path

    def reset(self) -> None:
        """Forget every token."""
        self._engine.forget(0)

    def reply(
        self,
        tokens: list[int],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_at_eos: bool = True,
        stream: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continue ``tokens``, the whole sequence so far.  Ctrl-C ends the answer (``stopped`` says so).

        Raises:
            ModelError: they leave no room in the cache.
        """
        room = self.cache_length - len(tokens)
        if room < 1:
            raise ModelError(
                f"{len(tokens)} tokens leave no room for an answer, expected fewer than {self.cache_length} "
                "(the model's context or the cache)"
            )
        # The last token always runs again: its logits are not in the cache.
        known = min(_common(self._engine.tokens, tokens), len(tokens) - 1)
        self._engine.forget(known)
        prefill = len(tokens) - len(self._engine.tokens)
        result = Generation(path=self.path, prompt_tokens=len(tokens), prefill_tokens=prefill)
        streamer = _Streamer(self._tokenizer, stream)
        ends = end_tokens(self._model, self._tokenizer) if stop_at_eos else frozenset()
        with seeded(sampling.seed):
            try:
                self._engine.run(tokens, sampling, min(max_new_tokens, room), ends, streamer, result)
            except KeyboardInterrupt:
                result.stopped = "interrupted"
        streamer.end()
        if result.tokens and result.tokens[-1] in ends:
            result.stopped = "eos"
        result.text = self._tokenizer.decode(result.tokens, skip_special_tokens=True)
        return result


class _Native:
    """The native decode step; transformers' warpers choose the tokens."""

    def __init__(self, model: Any, cache_length: int) -> None:
        self._decoder = Decoder(model, cache_length)
        self._fed: list[int] = []
        self.path = f"native decode step, {self._decoder.path}"

    @property
    def tokens(self) -> list[int]:
        """Tokens in the cache."""
        return self._fed[: self._decoder.position]

    def forget(self, position: int) -> None:
        """Keep the first ``position`` tokens, or fewer where a fresh run would not leave them so in the cache."""
        self._decoder.rewind(self._decoder.resumable(position))

    def run(
        self,
        tokens: list[int],
        sampling: Sampling,
        count: int,
        ends: frozenset[int],
        streamer: _Streamer,
        result: Generation,
    ) -> None:
        """Up to ``count`` new tokens into ``result``."""
        decoder = self._decoder
        self._fed = list(tokens)
        began = time.perf_counter()
        logits = decoder.prefill(torch.tensor(tokens[decoder.position :]))
        result.prefill_s = time.perf_counter() - began
        warpers = sampling.processors()
        bytes_before = decoder.stats()["bytes"]
        while True:
            began = time.perf_counter()
            token = choose(logits, self._fed, warpers, greedy=sampling.temperature == 0)
            chosen_s = time.perf_counter() - began
            result.tokens.append(token)
            streamer.put(torch.tensor([token]))
            if token in ends or len(result.tokens) == count:
                return
            self._fed.append(token)
            began = time.perf_counter()
            logits = decoder.step(token)
            result.decode_s += chosen_s + time.perf_counter() - began
            if decoder.counts:
                result.weights_read_bytes = (decoder.stats()["bytes"] - bytes_before) / len(result.tokens)


class _Transformers:
    """transformers' own generate, for everything that the native decode step does not take."""

    def __init__(self, model: Any, reason: str) -> None:
        self._model = model
        self.path = f"transformers generate: {reason}"
        self._cache = DynamicCache(config=model.config)
        self.tokens: list[int] = []
        self._prompts = prompts_of(model)

    def forget(self, position: int) -> None:
        """Keep the first ``position`` tokens, or fewer where a fresh run would not leave them so in the cache."""
        if self._prompts is not None:
            position = self._prompts.resumable(self._prompts.session(self._cache), position)
        if position == len(self.tokens):
            return
        if position == 0 or any(layer.is_sliding for layer in self._cache.layers):
            # A sliding layer has dropped what it would need to go back.
            self._cache, self.tokens = DynamicCache(config=self._model.config), []
        else:
            self._cache.crop(position - len(self.tokens))
            self.tokens = self.tokens[:position]

    def run(
        self,
        tokens: list[int],
        sampling: Sampling,
        count: int,
        ends: frozenset[int],
        streamer: _Streamer,
        result: Generation,
    ) -> None:
        """Up to ``count`` new tokens into ``result``."""
        streamer.skip_prompt = True
        clock = _Clock(streamer, result)
        settings = GenerationConfig(
            max_new_tokens=count,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_k=sampling.top_k or None,
            top_p=sampling.top_p,
            # None would mean the model's own end: a token outside the vocabulary never comes.
            eos_token_id=sorted(ends) or self._model.config.vocab_size,
            pad_token_id=min(ends, default=0),
        )
        prompt = torch.tensor([tokens], device=self._model.device)
        try:
            with torch.no_grad():
                if self._prompts is not None:
                    self._read_ahead(prompt)
                self._model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([Finite()]),
                    streamer=clock,
                    **caches.cache_argument(self._model.forward, self._cache),
                )
        except (KeyboardInterrupt, ModelError):
            # Some layers may have taken in a token that others have not: start over next time.
            self._cache, self.tokens = DynamicCache(config=self._model.config), []
            raise
        self.tokens = [*tokens, *result.tokens[:-1]]

    def _read_ahead(self, prompt: torch.Tensor) -> None:
        """Run all of a prompt [1, T] but its last stride, which generate runs; see :func:`actsparse.runtime.prompts.read`."""
        assert self._prompts is not None
        begin = len(self.tokens)
        last = prompt.shape[1] - 1
        last -= last % self._prompts.stride
        if begin < last:
            read(self._model, prompt[:, begin:last], self._cache, self._prompts)
        self._prompts.expect_text(self._cache)


class _Streamer(TextStreamer):
    """transformers' own way to hold text back until its characters are whole, with a callback at its end."""

    def __init__(self, tokenizer: Any, callback: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._callback = callback

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._callback and text:
            self._callback(text)


class _Clock:
    """A streamer that also notes the tokens and when they came; the first call brings the prompt."""

    def __init__(self, streamer: _Streamer, result: Generation) -> None:
        self._streamer = streamer
        self._result = result
        self._last: float | None = None
        self._began = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take in the prompt, or one token."""
        now = time.perf_counter()
        prompt = self._streamer.next_tokens_are_prompt
        if not prompt:
            self._result.tokens += value.tolist()
            if self._last is None:
                self._result.prefill_s = now - self._began
            else:
                self._result.decode_s += now - self._last
        self._streamer.put(value)
        if not prompt:
            self._last = time.perf_counter()

    def end(self) -> None:
        """Nothing: the session ends the stream on both paths."""


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The end-of-text tokens of the model's generation settings, or else of its tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)

"""The OpenAI protocol: what a request may ask for, and the documents that answer it.

Beside OpenAI's fields requests may have ``top_k``, ``ignore_eos`` and ``layer_bits`` (bits read of each weight, by layer, with
every piece of a stream), and usage carries ``actsparse``: what was read and how fast.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from actsparse.serve.engine import End, TokenLogprob

MOST_STOPS = 16


class ServeError(Exception):
    """A request that is refused: an HTTP status, OpenAI's type of error, the parameter and a code."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def document(self) -> dict[str, Any]:
        """OpenAI's JSON."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """What a stream carries."""

    include_usage: bool = False


class TextPart(BaseModel):
    """A part of a message; images and sound are refused."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation; a template may use further fields."""

    model_config = ConfigDict(extra="allow")
    role: str = Field(max_length=64)
    content: str | list[TextPart]
    tool_calls: None = None

    def plain(self) -> dict[str, Any]:
        """What a chat template is given."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class Asked(BaseModel):
    """What both kinds of request have in common."""

    # Whatever is not known is looked at by name in `unsupported`.
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    layer_bits: bool = False

    def stops(self) -> tuple[str, ...]:
        """The stop strings; 400 for an empty one or too many."""
        stops = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > MOST_STOPS or not all(0 < len(stop) <= 1000 for stop in stops):
            raise ServeError(400, f"expected at most {MOST_STOPS} stop strings of 1 to 1000 characters", param="stop")
        return stops

    def unsupported(self) -> None:
        """400, naming the parameter, for what this server would have to ignore."""
        if self.n != 1:
            raise ServeError(400, f"n is {self.n}, expected 1: send a request for each answer", param="n")
        given = self.model_extra or {}
        for name, harmless in _UNSUPPORTED.items():
            if given.get(name) not in (None, *harmless):
                raise ServeError(400, f"{name} is not supported", param=name, code="unsupported_parameter")


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
    "echo": (False,),
    "use_beam_search": (False,),
}


class ChatRequest(Asked):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def alternatives(self) -> int | None:
        """How many alternatives of each token; None: no probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ServeError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Asked):
    """``/v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)

    def one_prompt(self) -> str | list[int]:
        """Text or tokens; 400 for several prompts."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ServeError(400, f"{len(prompt)} prompts, expected one: send a request for each", param="prompt")
            prompt = prompt[0]
        return cast("str | list[int]", prompt)


def usage_of(prompt_tokens: int, end: End) -> dict[str, Any]:
    """OpenAI's counts, and what was read and how fast."""
    steps = max(end.tokens - 1, 0)
    rounded = {
        "bits_read": end.bits_read,
        "weights_read_mb_per_token": None if end.read_bytes is None else end.read_bytes / 1e6,
        "waited_s": end.waited_s,
        "prefill_s": end.prefill_s,
        "decode_tokens_per_s": steps / end.decode_s if steps and end.decode_s else None,
        "sequences_together": end.together,
    }
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": end.tokens,
        "total_tokens": prompt_tokens + end.tokens,
        "actsparse": {name: None if value is None else round(value, 4) for name, value in rounded.items()},
    }


class Shape:
    """The documents of one answer, whole or streamed; ``chat`` chooses which of the two protocols."""

    def __init__(self, identity: str, model: str, tokenizer: Any, *, chat: bool) -> None:
        self._chat, self._tokenizer = chat, tokenizer
        self._offset = 0
        self._head = {"id": identity, "created": int(time.time()), "model": model}

    def whole(
        self, text: str, logprobs: Sequence[TokenLogprob] | None, reason: str, usage: dict[str, Any]
    ) -> dict[str, Any]:
        """The answer in one document."""
        body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": self._logprobs(logprobs), "finish_reason": reason}
        return {**self._head, "object": self._kind(), "choices": [choice], "usage": usage}

    def begin(self) -> dict[str, Any] | None:
        """What a stream of a chat begins with."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None, None) if self._chat else None

    def piece(self, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """One piece of a stream."""
        return self._chunk({"delta": {"content": text}} if self._chat else {"text": text}, logprobs, None)

    def end(self, reason: str) -> dict[str, Any]:
        """The last piece, without text."""
        return self._chunk({"delta": {}} if self._chat else {"text": ""}, None, reason)

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The counts after a stream."""
        return {**self._head, "object": self._kind(chunk=True), "choices": [], "usage": usage}

    def _kind(self, *, chunk: bool = False) -> str:
        if not self._chat:
            return "text_completion"
        return "chat.completion.chunk" if chunk else "chat.completion"

    def _chunk(
        self, body: dict[str, Any], logprobs: Sequence[TokenLogprob] | None, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": 0, **body, "logprobs": self._logprobs(logprobs), "finish_reason": reason}
        return {**self._head, "object": self._kind(chunk=True), "choices": [choice]}

    def _logprobs(self, found: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        if self._chat:
            return {
                "content": [
                    {**self._entry(each.token, each.logprob), "top_logprobs": [self._entry(*one) for one in each.top]}
                    for each in found
                ]
            }
        texts = [self._text(each.token) for each in found]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": [{self._text(token): value for token, value in each.top} for each in found],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text

"""The routes: requests in, documents and server-sent events out."""

from __future__ import annotations

import asyncio
import hmac
import json
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message as Event
from starlette.types import Send

from actsparse.models.text import TextError, check_text
from actsparse.runtime.generate import end_tokens
from actsparse.runtime.sampling import Sampling
from actsparse.serve import engine as engines
from actsparse.serve.engine import End, Engine, Piece, TokenLogprob
from actsparse.serve.lanes import Lane
from actsparse.serve.metrics import Metrics
from actsparse.serve.protocol import Asked, ChatRequest, CompletionRequest, ServeError, Shape, usage_of

COMPLETION_TOKENS = 16  # OpenAI's default for completions
Kind = TypeVar("Kind", bound=Asked)


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        body_bytes: of a request.
        body_s: to send it.
        stall_s: that a client may take in nothing of its answer.
        waiting: requests in the queue.
    """

    body_bytes: int = 1 << 20
    body_s: float = 30.0
    stall_s: float = 60.0
    waiting: int = 256


class Server:
    """The application around an engine.

    Args:
        lanes: the served models, the first one the default.
        model: the Hugging Face model behind them (for its end tokens).
        tokenizer: its tokenizer.
        api_key: that ``/v1`` asks for; None: nobody is asked.
    """

    def __init__(
        self, lanes: list[Lane], model: Any, tokenizer: Any, limits: Limits, api_key: str | None = None
    ) -> None:
        self.limits, self._tokenizer, self._api_key = limits, tokenizer, api_key
        self._ends = end_tokens(model, tokenizer)
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self.metrics = Metrics()
        self.engine = Engine(lanes, tokenizer, most_waiting=limits.waiting, observe=self.metrics.step)
        self.metrics.watch(self.engine)
        self._default = lanes[0].name
        self.app = self._application()

    def _application(self) -> FastAPI:
        app = FastAPI(title="actsparse", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_exception_handler(ServeError, self._refuse)
        app.add_exception_handler(HTTPException, self._refuse_http)
        app.add_exception_handler(Exception, self._refuse_unforeseen)
        app.add_exception_handler(ClientDisconnect, _nobody_listens)
        page = resources.files("actsparse.serve").joinpath("page.html").read_text(encoding="utf-8")

        @app.get("/")
        async def show_page() -> HTMLResponse:
            return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"})

        @app.get("/health")
        async def health() -> JSONResponse:
            return JSONResponse(self._health(), 200 if self.engine.alive else 503)

        @app.get("/metrics")
        async def metrics() -> Response:
            return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

        @app.get("/v1/models")
        async def models(request: Request) -> dict[str, Any]:
            self._authorise(request)
            return {"object": "list", "data": [_model(name) for name in self.engine.lanes]}

        @app.get("/v1/models/{name:path}")
        async def model(name: str, request: Request) -> dict[str, Any]:
            self._authorise(request)
            return _model(self._lane(name).name)

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            asked = await self._read(request, CompletionRequest)
            return await self._answer(request, asked, *await asyncio.to_thread(self._completion, asked))

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            asked = await self._read(request, ChatRequest)
            return await self._answer(request, asked, *await asyncio.to_thread(self._chat, asked))

        return app

    def _health(self) -> dict[str, Any]:
        load = self.engine.load()
        models = []
        for name, lane in self.engine.lanes.items():
            running, waiting = load[name]
            models.append(
                {
                    "id": name,
                    "obeys_plan": lane.rules,
                    "path": lane.sequences.path,
                    "sequences": f"up to {lane.slots} together" if lane.together else "one after another",
                    "because": lane.obstacle,
                    "slots": lane.slots,
                    "context": lane.context,
                    "weights": lane.weights,
                    "dense_bits": lane.dense_bits,
                    "running": running,
                    "waiting": waiting,
                }
            )
        return {
            "status": "ok" if self.engine.alive else "closing",
            "chat_template": self._has_template(),
            "models": models,
        }

    def _has_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def _authorise(self, request: Request) -> None:
        if (
            request.headers.get("sec-fetch-site") == "cross-site"
        ):  # a page of somebody else's, in a browser that can reach us
            raise ServeError(403, "a page of another site may not use this server")
        if self._api_key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._api_key.encode()):
            raise ServeError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _read(self, request: Request, kind: type[Kind]) -> Kind:
        """The body as a request of that kind, once its sender is known and its size and form are right."""
        self._authorise(request)
        try:
            async with asyncio.timeout(self.limits.body_s):
                body = await self._body(request)
        except TimeoutError:
            raise ServeError(408, f"the request took more than {self.limits.body_s:g} s to arrive") from None
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ServeError(400, f"the body is not JSON: {str(error)[:200]}") from None
        if not isinstance(document, dict):
            raise ServeError(400, f"the body is a JSON {type(document).__name__}, expected an object")
        try:
            asked = kind.model_validate(document)
        except (ValidationError, RecursionError) as error:
            if isinstance(error, RecursionError):
                raise ServeError(400, "the body is nested too deeply") from None
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part)[:40] for part in first["loc"][:6])
            raise ServeError(422, f"{where}: {first['msg']}"[:300], param=where) from None
        asked.unsupported()
        return asked

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        declared = request.headers.get("content-length", "")
        body, size = bytearray(), 0
        # A client that is still sending does not read the refusal: some more is taken in, and thrown away.
        drained = _DRAINED * most
        if not (declared.isdigit() and int(declared) > drained):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    body += part
                elif size > drained:
                    break
            if size <= most:
                return bytes(body)
        raise ServeError(413, f"the request has more than {most} bytes", code="request_too_large")

    def _lane(self, name: str | None) -> Lane:
        lane = self.engine.lanes.get(self._default if name is None else name)
        if lane is None:
            known = ", ".join(self.engine.lanes)
            raise ServeError(
                404, f"model {str(name)[:80]!r} is not served: expected {known}", param="model", code="model_not_found"
            )
        return lane

    def _completion(self, asked: CompletionRequest) -> tuple[engines.Request, Shape]:
        prompt = asked.one_prompt()
        if isinstance(prompt, str):
            tokens = list(self._tokenizer(_checked(prompt, "prompt"), verbose=False)["input_ids"])
        else:
            tokens = prompt
        wrong = [token for token in tokens if not 0 <= token < self._vocabulary]
        if wrong or not tokens:
            problem = f"token {wrong[0]} is not in the vocabulary of {self._vocabulary}" if wrong else "prompt is empty"
            raise ServeError(400, problem, param="prompt")
        request = self._request(asked, tokens, asked.max_tokens or COMPLETION_TOKENS, asked.logprobs)
        request.joined = True
        return request, self._shape(request, chat=False)

    def _chat(self, asked: ChatRequest) -> tuple[engines.Request, Shape]:
        if not self._has_template():
            raise ServeError(
                400, "the model's tokenizer has no chat template: use /v1/completions", code="no_chat_template"
            )
        messages = [message.plain() for message in asked.messages]
        for message in messages:
            _checked(message["content"], "messages")
            _checked(message["role"], "messages")
        try:
            encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            problem = f"the chat template refuses these messages: {str(error)[:200]}"
            raise ServeError(400, problem, param="messages") from None
        tokens = list(encoded["input_ids"])
        request = self._request(asked, tokens, asked.max_completion_tokens or asked.max_tokens, asked.alternatives())
        return request, self._shape(request, chat=True)

    def _request(self, asked: Asked, tokens: list[int], new: int | None, logprobs: int | None) -> engines.Request:
        lane = self._lane(asked.model)
        room = lane.context - len(tokens)
        if room < 1 or (new or 1) > room:
            wanted = f"{len(tokens)} tokens of prompt and {new or 1} new ones"
            raise ServeError(400, f"{wanted}, expected at most {lane.context} together", code="context_length_exceeded")
        seed = None if asked.seed is None else asked.seed % (1 << 63)
        return engines.Request(
            lane=lane.name,
            prompt=tokens,
            sampling=Sampling(asked.temperature, asked.top_p, asked.top_k, seed),
            max_tokens=new or room,
            emit=lambda event: None,
            ends=frozenset() if asked.ignore_eos else self._ends,
            stops=asked.stops(),
            logprobs=logprobs,
            layer_bits=asked.layer_bits,
        )

    def _shape(self, request: engines.Request, *, chat: bool) -> Shape:
        identity = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        return Shape(identity, request.lane, self._tokenizer, chat=chat)

    async def _answer(self, request: Request, asked: Asked, wanted: engines.Request, shape: Shape) -> Response:
        events = self._submit(wanted)
        if asked.stream:
            return Stream(self._stream(events, asked, wanted, shape), self.limits.stall_s)
        answer = asyncio.ensure_future(self._whole(events, wanted, shape))
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await answer) if answer.done() else Response(status_code=_GONE)
        finally:
            self.engine.cancel(wanted)
            for task in (answer, gone):
                task.cancel()

    def _submit(self, wanted: engines.Request) -> asyncio.Queue[Piece | End]:
        """Its events; there are never more of them than tokens asked for, so a client that does not read holds up nobody."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Piece | End] = asyncio.Queue()

        def emit(event: Piece | End) -> None:
            if isinstance(event, End):
                self.metrics.answer(wanted.lane, len(wanted.prompt), event)
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        wanted.emit = emit
        try:
            self.engine.submit(wanted)
        except engines.Busy as error:
            raise ServeError(429, str(error), code="queue_full") from None
        except engines.Closing as error:
            raise ServeError(503, str(error), code="closing") from None
        return events

    async def _whole(self, events: asyncio.Queue[Piece | End], wanted: engines.Request, shape: Shape) -> dict[str, Any]:
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        while isinstance(event := await events.get(), Piece):
            texts.append(event.text)
            logprobs += event.logprobs
        if event.error is not None:
            raise ServeError(503 if event.error.startswith("the server") else 500, event.error)
        found = None if wanted.logprobs is None else logprobs
        return shape.whole("".join(texts), found, event.reason, usage_of(len(wanted.prompt), event))

    async def _stream(
        self, events: asyncio.Queue[Piece | End], asked: Asked, wanted: engines.Request, shape: Shape
    ) -> AsyncGenerator[bytes, None]:
        try:
            if (begin := shape.begin()) is not None:
                yield _event(begin)
            while True:
                try:
                    async with asyncio.timeout(_QUIET_S):
                        event = await events.get()
                except TimeoutError:
                    yield b": waiting\n\n"
                    continue
                if isinstance(event, End):
                    break
                piece = shape.piece(event.text, None if wanted.logprobs is None else event.logprobs)
                if event.layer_bits:
                    piece["layer_bits"] = event.layer_bits
                yield _event(piece)
            if event.error is not None:
                yield _event(ServeError(500, event.error).document())
                return
            yield _event(shape.end(event.reason))
            if asked.stream_options and asked.stream_options.include_usage:
                yield _event(shape.usage(usage_of(len(wanted.prompt), event)))
            yield b"data: [DONE]\n\n"
        finally:
            self.engine.cancel(wanted)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ServeError)
        self.metrics.refused.labels(str(error.status)).inc()
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status, {})
        if error.status in (408, 413):
            headers["Connection"] = "close"  # what is left of the body is not read
        return JSONResponse(error.document(), error.status, headers)

    async def _refuse_http(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return await self._refuse(request, ServeError(error.status_code, what))

    async def _refuse_unforeseen(self, request: Request, error: Exception) -> Response:
        return await self._refuse(request, ServeError(500, f"{type(error).__name__} in the server, see its log"))


_GONE = 499  # nobody sees it
_DRAINED = 16  # times the most bytes of a request
_QUIET_S = 15.0  # proxies close connections on which nothing comes
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Stream(StreamingResponse):
    """Server-sent events to a client that must go on taking them in."""

    def __init__(self, content: AsyncGenerator[bytes, None], stall_s: float) -> None:
        self._events = content
        super().__init__(
            content, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._stall_s = stall_s

    async def stream_response(self, send: Send) -> None:
        """Give up where one event does not go out in time."""

        async def send_in_time(event: Event) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(event)

        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            pass
        finally:
            await self._events.aclose()


def _event(document: dict[str, Any]) -> bytes:
    return (
        b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"
    )


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "actsparse"}


def _checked(text: str, what: str) -> str:
    try:
        return check_text(text, what)
    except TextError as error:
        raise ServeError(400, str(error), param=what) from None


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE)


async def _until_gone(request: Request) -> None:
    """Until the client of a request whose body was read has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.25)

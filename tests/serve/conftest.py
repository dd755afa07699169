"""A server in this process: a small random model, dense and under a plan, behind a real socket."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from actsparse.runtime.swap import sparsify

from ..conftest import tiny_model
from ..test_decode import random_plan

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
import uvicorn

from actsparse.serve.app import Limits, Server
from actsparse.serve.lanes import Lane
from actsparse.serve.run import listen

TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message.role + ' is unknown') }}{% endif %}{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}assistant:"
)


@contextlib.contextmanager
def running(
    lanes: list[Lane], model: Any, tokenizer: Any, limits: Limits | None = None, key: str | None = None
) -> Iterator[Any]:
    """The server and its address."""
    server = Server(lanes, model, tokenizer, limits or Limits(), key)
    with listen("127.0.0.1", 0) as socket:
        runner = uvicorn.Server(
            uvicorn.Config(server.app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        while not runner.started:
            time.sleep(0.01)
        try:
            yield server, f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            server.engine.drain()
            runner.should_exit = True
            thread.join(20)
            server.engine.close(0)


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer: Any) -> Any:
    """The reference tokenizer with a chat template."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


@pytest.fixture(scope="session")
def sparse_model() -> Any:
    """A random model under random rules."""
    model = tiny_model("llama", vocab_size=4096, max_position_embeddings=1024, eos_token_id=4095)
    return sparsify(model, random_plan(model))


@pytest.fixture(scope="session")
def served(sparse_model: Any, chat_tokenizer: Any) -> Iterator[Any]:
    """The server and its address, with the lanes ``tiny`` and ``tiny-dense``."""
    torch.set_num_threads(1)
    lanes = [Lane("tiny", sparse_model, 1024), Lane("tiny-dense", sparse_model, 1024, rules=False)]
    with running(lanes, sparse_model, chat_tokenizer) as found:
        yield found


@pytest.fixture
def address(served: Any) -> str:
    """Of the server."""
    return str(served[1])

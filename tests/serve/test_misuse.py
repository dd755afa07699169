"""Requests that are wrong, too big, slow or abandoned: each is refused or dropped, and nobody else notices."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from actsparse.cli import main
from actsparse.serve.app import Limits
from actsparse.serve.lanes import Lane

from ..conftest import REFERENCE
from .conftest import running

BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0}


def post(address: str, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, raw, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    document = json.loads(response.read())
    connection.close()
    return response.status, document


@pytest.mark.parametrize(
    ("status", "change", "says"),
    [
        (404, {"model": "other"}, "expected tiny, tiny-dense"),
        (400, {"n": 2}, "n is 2, expected 1"),
        (400, {"echo": True}, "echo is not supported"),
        (400, {"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        (400, {"prompt": ["a", "b"]}, "2 prompts, expected one"),
        (400, {"prompt": []}, "prompt is empty"),
        (400, {"prompt": [1, 4096]}, "token 4096 is not in the vocabulary of 4096"),
        (400, {"prompt": "half \ud800 a character"}, "lone surrogate U+D800"),
        (400, {"max_tokens": 1024}, "expected at most 1024 together"),
        (400, {"prompt": "word " * 3000}, "expected at most 1024 together"),
        (400, {"stop": [""]}, "stop strings of 1 to 1000"),
        (400, {"stop": ["x"] * 17}, "at most 16 stop strings"),
        (422, {"temperature": 3}, "temperature: "),
        (422, {"temperature": float("nan")}, "temperature: "),
        (422, {"temperature": "hot"}, "temperature: "),
        (422, {"top_p": 0}, "top_p: "),
        (422, {"max_tokens": 0}, "max_tokens: "),
        (422, {"logprobs": 21}, "logprobs: "),
        (422, {"seed": 1 << 70}, "seed: "),
        (422, {"prompt": {"a": 1}}, "prompt"),
    ],
)
def test_wrong_fields(address: str, status: int, change: dict[str, Any], says: str) -> None:
    found, document = post(address, {**BODY, **change})
    assert found == status, document
    assert says in document["error"]["message"]
    assert len(document["error"]["message"]) <= 320
    assert set(document["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("status", "messages", "says"),
    [
        (422, [], "messages: "),
        (422, [{"role": "user"}], "messages.0.content"),
        (422, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content"),
        (400, [{"role": "robot", "content": "x"}], "role robot is unknown"),
    ],
)
def test_wrong_messages(address: str, status: int, messages: Any, says: str) -> None:
    found, document = post(address, {"messages": messages, "max_tokens": 2}, "/v1/chat/completions")
    assert found == status, document
    assert says in document["error"]["message"]


def test_bodies_that_are_none(address: str) -> None:
    for raw in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"3", b'{"prompt": 1e999999}'):
        status, document = post(address, raw)
        assert status in (400, 422), (raw[:10], document)
    status, document = post(address, b'{"prompt": "' + b"a" * (1 << 20) + b'"}')
    assert (status, document["error"]["code"]) == (413, "request_too_large")
    assert post(address, BODY, "/v1/nothing")[0] == 404
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("GET", "/v1/completions")
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["type"]) == (405, "invalid_request_error")
    assert post(address, BODY)[0] == 200


def test_a_body_without_length_is_measured_too(address: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request("POST", "/v1/completions", iter([b" " * 65536] * 20), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # closed while it was still being sent
    assert post(address, BODY)[0] == 200


def test_keys_queues_and_slow_senders(sparse_model: Any, tokenizer: Any) -> None:
    limits = Limits(body_s=0.5, waiting=1)
    with running([Lane("tiny", sparse_model, 1024, 1)], sparse_model, tokenizer, limits, "secret") as (server, address):
        assert post(address, BODY)[0] == 401
        assert post(address, BODY, Authorization="Bearer wrong")[0] == 401
        assert post(address, BODY, Authorization="Bearer secret")[0] == 200
        # No chat template, and it says so.
        chat = post(
            address,
            {"messages": [{"role": "user", "content": "x"}]},
            "/v1/chat/completions",
            Authorization="Bearer secret",
        )
        assert (chat[0], chat[1]["error"]["code"]) == (400, "no_chat_template")
        with socket.create_connection(urlsplit(address).netloc.split(":")) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 99\r\n\r\n{"
            )
            assert b" 408 " in slow.recv(200)
        long = {**BODY, "max_tokens": 400, "ignore_eos": True}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: post(address, long, Authorization="Bearer secret"), range(8)))
        statuses = sorted(status for status, _ in answers)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        assert all(document["error"]["code"] == "queue_full" for status, document in answers if status == 429)
        assert server.engine.load() == {"tiny": (0, 0)}


def test_a_client_that_leaves_frees_its_slot(served: Any) -> None:
    server, address = served
    body = json.dumps({**BODY, "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()
    sockets = []
    for stream in (True, False) * 6:
        each = socket.create_connection(urlsplit(address).netloc.split(":"))
        text = body if stream else body.replace(b'"stream": true', b'"stream": false')
        each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
        sockets.append(each)
    assert sockets[0].recv(100).startswith(b"HTTP/1.1 200")
    for each in sockets:
        each.close()
    deadline = time.monotonic() + 20
    while server.engine.load()["tiny"] != (0, 0):
        assert time.monotonic() < deadline, server.engine.load()
        time.sleep(0.05)


def test_a_client_that_does_not_read_holds_up_nobody(sparse_model: Any, tokenizer: Any) -> None:
    with running([Lane("tiny", sparse_model, 1024, 2)], sparse_model, tokenizer, Limits(stall_s=1)) as (
        server,
        address,
    ):
        lazy = []
        for _ in range(4):
            each = socket.socket()
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = urlsplit(address).netloc.split(":")
            each.connect((host, int(port)))
            body = json.dumps({**BODY, "max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": 20}).encode()
            each.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            lazy.append(each)
        began = time.monotonic()
        assert post(address, BODY)[0] == 200
        while server.engine.load()["tiny"] != (0, 0):
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        for each in lazy:
            each.close()


def test_a_stalled_client_is_given_up(sparse_model: Any, tokenizer: Any) -> None:
    with running([Lane("tiny", sparse_model, 1024, 1)], sparse_model, tokenizer, Limits(stall_s=0.5)) as (
        server,
        address,
    ):
        each = socket.socket()
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = urlsplit(address).netloc.split(":")
        each.connect((host, int(port)))
        for _ in range(30):  # pipelined, so that answers outgrow every buffer on the way
            body = json.dumps({**BODY, "max_tokens": 300, "ignore_eos": True, "stream": True, "logprobs": 20}).encode()
            each.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
        time.sleep(3)
        deadline = time.monotonic() + 40
        while server.engine.load()["tiny"] != (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert post(address, BODY)[0] == 200
        each.close()


def test_an_error_in_one_answer_leaves_the_others_alone(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, address = served
    lane = server.engine.lanes["tiny"]
    step, calls = lane.step, []

    def broken(tokens: Any) -> Any:
        logits = step(tokens)
        calls.append(len(tokens))
        if len(calls) == 3:
            logits[0] = float("nan")
        return logits

    monkeypatch.setattr(lane, "step", broken)
    status, document = post(address, {**BODY, "max_tokens": 20, "ignore_eos": True})
    assert status == 500
    assert "logits" in document["error"]["message"]
    monkeypatch.undo()
    assert post(address, BODY)[0] == 200


def test_pages_of_other_sites_are_refused(address: str) -> None:
    assert post(address, BODY, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert post(address, BODY, **{"Sec-Fetch-Site": "same-origin"})[0] == 200


def test_health_and_metrics(address: str) -> None:
    post(address, BODY)
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("GET", "/health")
    health = json.loads(connection.getresponse().read())
    assert health["status"] == "ok"
    assert [(each["id"], each["obeys_plan"]) for each in health["models"]] == [("tiny", True), ("tiny-dense", False)]
    assert health["models"][0]["sequences"] == "up to 8 together"
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    for name in (
        "actsparse_generated_tokens_total",
        "actsparse_weights_read_bytes_total",
        "actsparse_decode_steps_total",
    ):
        assert f'{name}{{model="tiny"}}' in text
    assert 'actsparse_running{model="tiny"} 0.0' in text


@pytest.fixture(scope="module")
def references() -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    """Two servers in processes of their own, for a test each to end, and their addresses; started together: it takes long."""
    code = "import sys; from actsparse.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(REFERENCE / "swiglu"), "--port", "0", "--threads", "1"]
    command += ["--slots", "1", "--context", "512"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    try:
        yield [(process, address_of(process)) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("http://"):
            return line.split("/ ")[0]
    raise AssertionError("no address")


def test_sigterm_finishes_what_runs(references: list[tuple[subprocess.Popen[str], str]]) -> None:
    process, address = references[0]
    with ThreadPoolExecutor(2) as pool:
        running_one = pool.submit(post, address, {"prompt": "Once", "max_tokens": 300, "ignore_eos": True})
        time.sleep(0.7)
        waiting = pool.submit(post, address, {"prompt": "Twice", "max_tokens": 300, "ignore_eos": True})
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        status, document = running_one.result()
        assert (status, document["usage"]["completion_tokens"]) == (200, 300)
        assert waiting.result()[0] in (200, 503)  # it may have got the slot just before
    assert process.wait(20) == 0
    with pytest.raises(ConnectionRefusedError):
        post(address, BODY)


def test_sigterm_is_obeyed_when_nobody_reads_the_messages(references: list[tuple[subprocess.Popen[str], str]]) -> None:
    process, address = references[1]
    assert process.stderr is not None
    process.stderr.close()
    assert post(address, {"prompt": "Once", "max_tokens": 3})[0] == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--host", "256.0.0.1"), "cannot listen on 256.0.0.1"),
        (("--slots", "9"), "slots is 9"),
        (("--context", "1000000"), "context is 1000000"),
        (("--api-key", "@/none"), "/none cannot be read"),
    ],
)
def test_bad_options_are_one_line(options: tuple[str, str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(REFERENCE / "swiglu"), "--port", "0", *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert says in said[0]

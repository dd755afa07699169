"""``vllm serve`` of an exported directory, asked by the openai client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, STEPS, Wanted
from openai import OpenAI

CLIENTS = 32
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def client(
    models: dict[str, Path], plans: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("server")
    export = [str(Path(sys.executable).parent / "actsparse"), "export", str(models["swiglu"]), "--engine", "vllm"]
    subprocess.run([*export, "--plan", str(plans["chess"][1]), "-o", str(folder / "served")], check=True)
    (folder / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The module form: `vllm serve` looks for the metadata of a distribution named vllm, which the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "served")]
    command += ["--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "128", "--max-num-seqs", str(CLIENTS), "--enforce-eager"]
    command += ["--chat-template", str(folder / "chat.jinja")]
    with (folder / "log").open("wb") as log:
        environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait(process, f"http://127.0.0.1:{port}/health", folder / "log")
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        finally:
            process.terminate()
            process.wait(60)


def wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text(encoding="utf-8", errors="replace")[-6000:])


def complete(client: OpenAI, prompt: Any, tokens: int = STEPS) -> str:
    answer = client.completions.create(
        model="served", prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text


def test_completions_are_those_of_actsparse(client: OpenAI, wanted: Callable[[str], Wanted], tokenizer: Any) -> None:
    known = wanted("chess")
    for prompt, tokens in zip(known.prompts, known.tokens, strict=True):
        assert complete(client, prompt) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_chat_and_streaming_say_the_same(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "The function returns"}]
    options: dict[str, Any] = {"model": "served", "messages": messages, "max_tokens": STEPS, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**options, stream=True)]
    assert whole
    assert "".join(parts) == whole
    assert sum(bool(part) for part in parts) > 2
    # The prompt as the template writes it.
    prompt = "user: The function returns\nassistant:"
    answer = client.completions.create(model="served", prompt=prompt, max_tokens=STEPS, temperature=0)
    assert answer.choices[0].text == whole


def test_concurrent_clients_get_their_own_answers(client: OpenAI) -> None:
    """Another batch may round a value across its threshold and a text then goes on differently, but never like another's."""
    prompts = [[100 + 13 * number, 7 + number, 900 + 5 * number] for number in range(CLIENTS)]
    alone = [complete(client, prompt, 8) for prompt in prompts]
    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt, 8), prompts))
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= CLIENTS - 2
    assert len(set(alone)) > CLIENTS / 2
    for number, text in enumerate(together):
        assert text == alone[number] or text not in alone

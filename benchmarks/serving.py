"""What `actsparse serve` costs and keeps: speed beside `generate` in the same process, and answers under many clients.

    python benchmarks/serving.py speed --shape llama-1b [--plan PLAN]        # random weights of a shape
    python benchmarks/serving.py soak MODEL [--plan PLAN] --clients 64 --minutes 10

`speed` decodes with `generate` and through the server in turn, rounds paired, and then 2, 4 and 8 streams at once; it also
compares the time to the first token with the prefill alone. `soak` asks a fixed set of questions again and again from many
streaming clients, some of which leave early, and counts answers that are lost or not what one client alone gets, and its
memory. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn

NEW_TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    speed = verbs.add_parser("speed")
    speed.add_argument("--shape", default="llama-1b")
    speed.add_argument("--method", help="sparsify with this method, calibrated on random tokens")
    speed.add_argument("--sparsity", type=float, default=0.5)
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--threads", type=int)
    soak = verbs.add_parser("soak")
    soak.add_argument("model")
    soak.add_argument("--plan")
    soak.add_argument("--clients", type=int, default=64)
    soak.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    print(json.dumps(measure_speed(options) if options.verb == "speed" else measure_soak(options)))


class Words:
    """Stands in for a tokenizer: a shape has none. A token is a word."""

    eos_token_id = None
    chat_template = None

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join(f" w{token}" for token in tokens)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


@contextlib.contextmanager
def serving(model: Any, tokenizer: Any, context: int) -> Iterator[int]:
    """The port of a server in this process."""
    from actsparse.serve.app import Limits, Server
    from actsparse.serve.lanes import Lane
    from actsparse.serve.run import listen

    server = Server([Lane("m", model, context)], model, tokenizer, Limits())
    with listen("127.0.0.1", 0) as socket:
        runner = uvicorn.Server(uvicorn.Config(server.app, log_level="warning", lifespan="off"))
        threading.Thread(target=runner.run, kwargs={"sockets": [socket]}, daemon=True).start()
        while not runner.started:
            time.sleep(0.01)
        yield socket.getsockname()[1]
        runner.should_exit = True
        server.engine.close(0)


def ask(port: int, body: dict[str, Any]) -> tuple[str, dict[str, Any], list[float]]:
    """A streamed answer: its text, usage, and when each piece came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"stream": True, "stream_options": {"include_usage": True}, **body}
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body).encode())
    response = connection.getresponse()
    text, usage, times = [], {}, []
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(event["error"]["message"])
        usage = event.get("usage") or usage
        if event["choices"] and event["choices"][0]["text"]:
            times.append(time.perf_counter() - began)
            text.append(event["choices"][0]["text"])
    connection.close()
    if not usage:
        raise RuntimeError(f"no end of an answer, status {response.status}")
    return "".join(text), usage, times


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    from actsparse.measure.bench.run import calibrate_on_random_tokens
    from actsparse.measure.bench.shapes import config_of, random_model
    from actsparse.methods import make
    from actsparse.runtime.decode import Decoder
    from actsparse.runtime.generate import Session
    from actsparse.runtime.sampling import Sampling
    from actsparse.runtime.swap import sparsify

    if options.threads:
        torch.set_num_threads(options.threads)
    model = random_model(config_of(options.shape), "bfloat16")
    if options.method:
        plans = calibrate_on_random_tokens(
            model, make(options.method), [options.sparsity], tokens=256, progress=print_nothing
        )
        sparsify(model, plans[0])
    tokenizer = Words()
    prompt = [int(token) for token in torch.randint(5, 30000, (32,), generator=torch.Generator().manual_seed(0))]
    body = {"model": "m", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    session = Session(model, tokenizer, 128)
    decoder = Decoder(model, 128)
    generated, served, prefills, firsts = [], [], [], []
    many: dict[int, list[float]] = {2: [], 4: [], 8: []}
    with serving(model, tokenizer, 128) as port:
        ask(port, body)
        for _ in range(options.rounds):
            session.reset()
            found = session.reply(prompt, Sampling(), max_new_tokens=NEW_TOKENS, stop_at_eos=False)
            generated.append(found.decode_tok_s)
            text, _, times = ask(port, body)
            assert text == tokenizer.decode(found.tokens), "the server's answer is not generate's"
            served.append((len(times) - 1) / (times[-1] - times[0]))
            decoder.reset()
            began = time.perf_counter()
            decoder.prefill(torch.tensor(prompt))
            prefills.append(time.perf_counter() - began)
            firsts.append(times[0])
        for count, found_speeds in many.items():
            for _ in range(max(2, options.rounds // 2)):
                with ThreadPoolExecutor(count) as pool:
                    answers = list(pool.map(lambda _: ask(port, body), range(count)))
                assert all(answer[0] == text for answer in answers), "an answer changed with others beside it"
                # From when all decode until the first one ends.
                begin, end = max(times[0] for *_, times in answers), min(times[-1] for *_, times in answers)
                steps = sum(sum(begin <= moment < end for moment in times) for *_, times in answers)
                found_speeds.append(steps / (end - begin))
    print(f"generate          {spread(generated)} tokens/s")
    print(
        f"serve, one stream {spread(served)} tokens/s: {spread([s / g for s, g in zip(served, generated, strict=True)])} of it"
    )
    for count, speeds in many.items():
        gain = statistics.median(speeds) / statistics.median(served)
        print(f"serve, {count} streams  {spread(speeds)} tokens/s in all: {gain:.2f} x one")
    late = [1000 * (first - prefill) for first, prefill in zip(firsts, prefills, strict=True)]
    print(f"first token       {spread(late)} ms after the prefill's {spread([1000 * p for p in prefills])} ms")
    return {"generate_tok_s": generated, "serve_tok_s": served, "streams_tok_s": many, "first_token_late_ms": late}


def print_nothing(done: int, total: int) -> None:
    """Progress is of no interest here."""


def measure_soak(options: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable,
        "-c",
        "import sys; from actsparse.cli import main; sys.exit(main())",
        "serve",
        options.model,
    ]
    command += ["--port", "0", "--context", "512", *(["--plan", options.plan] if options.plan else [])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = next(line for line in process.stderr if line.startswith("http://"))
            return soak(int(address.split(":")[2].split("/")[0]), process.pid, options)
        finally:
            process.terminate()


def soak(port: int, process: int, options: argparse.Namespace) -> dict[str, Any]:
    prompts = [
        "The function returns",
        "Once upon a time",
        "In 1905",
        "class Engine:",
        "The mountains of",
        "To install it, run",
    ]
    questions = [
        {"prompt": f"{prompts[number % 6]} {number}", "max_tokens": 10 + 5 * (number % 9), "seed": number,
         "temperature": 0.8 * (number % 3 > 0), "ignore_eos": True}
        for number in range(48)
    ]  # fmt: skip
    expected = [ask(port, question)[0] for question in questions]
    end = time.monotonic() + 60 * options.minutes
    counts = {"answers": 0, "wrong": 0, "lost": 0, "left": 0}
    lock, memory = threading.Lock(), []

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            number = draw.randrange(len(questions))
            kind = "answers"
            if draw.random() < 0.05:
                leave(port, questions[number])
                kind = "left"
            else:
                try:
                    kind = "answers" if ask(port, questions[number])[0] == expected[number] else "wrong"
                except Exception as error:
                    print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
                    kind = "lost"
            with lock:
                counts[kind] += 1

    with ThreadPoolExecutor(options.clients) as pool:
        for seed in range(options.clients):
            pool.submit(client, seed)
        while time.monotonic() < end:
            memory.append((round(60 * options.minutes - (end - time.monotonic())), resident_mb(process)))
            time.sleep(min(10.0, max(0.1, end - time.monotonic())))
    memory.append((round(60 * options.minutes), resident_mb(process)))
    print(f"{options.clients} clients, {options.minutes:g} minutes: {counts}")
    print("memory, MB at s:", " ".join(f"{size:.0f}@{at}" for at, size in memory))
    return {**counts, "memory_mb": memory}


def leave(port: int, question: dict[str, Any]) -> None:
    """Ask, and hang up after the first piece."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps({**question, "stream": True}).encode())
    connection.getresponse().read(50)
    connection.close()


def resident_mb(process: int) -> float:
    """Linux: memory that a process has in use."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 1e6


if __name__ == "__main__":
    main()

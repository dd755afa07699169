"""Decode speed of vLLM's CPU build with and without plans, on a random-weight shape; in the environment of environment.py.

    python integrations/vllm/benchmark.py make FOLDER [--shape llama-1b]
    python integrations/vllm/benchmark.py time FOLDER [--batch 1,8] [--rounds 3]

``make`` writes the model, a CHESS plan at 0.5 and a packed one that reads 3.0 of 6 bits. ``time`` starts vLLM without the
plug-in's method, with CHESS and with the packed directory, a process each, and times them in turn within every round: decoded
tokens a second of all sequences together, by the median of the steps; median, least and greatest of the rounds. It says what
other processes took of the CPUs meanwhile. Environment variables are inherited.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

PROMPT = 8
PLAN = "chess.safetensors"
CONTENDERS = ("dense", "chess", "graded")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    """Make or time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["make", "time", "worker"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    options = parser.parse_args()
    if options.action == "make":
        make(options.folder, options.shape)
    elif options.action == "worker":
        work(options)
    else:
        measure(options)


def make(folder: Path, shape: str) -> None:
    """The models and the plan."""
    import actsparse
    from actsparse.measure.bench import packed, run, shapes
    from actsparse.methods import make as method_of
    from actsparse.runtime import saving

    config = shapes.config_of(shape)
    dense = shapes.random_model(config, "bfloat16", name=shape)
    (plan,) = run.calibrate_on_random_tokens(dense, method_of("chess"), [0.5], tokens=1024, progress=None)
    dense.save_pretrained(folder / "dense")
    plan.save(folder / PLAN)
    del dense
    model = packed.random_packed(config, 6, name=shape)
    (graded,) = packed.plans_on_random_tokens(model, [3.0], tokens=512)
    actsparse.sparsify(model, graded.with_scope("all"))
    saving.save_pretrained(model, folder / "graded")


def measure(options: argparse.Namespace) -> None:
    """Time every contender once a round."""
    names, batches = options.contenders.split(","), [int(batch) for batch in options.batch.split(",")]
    workers = {name: Worker(name, options) for name in names}
    rates: dict[tuple[str, int], list[float]] = {}
    for number in range(options.rounds):
        for batch in batches:
            for name, worker in workers.items():
                rate, others = worker.ask(batch)
                rates.setdefault((name, batch), []).append(rate)
                print(
                    f"round {number + 1}: batch {batch} {name}: {rate:.1f} tokens/s, others took {others:.0%} of the CPUs",
                    flush=True,
                )
    for worker in workers.values():
        worker.end()
    for batch in batches:
        base = statistics.median(rates[names[0], batch])
        for name in names:
            found = rates[name, batch]
            middle = statistics.median(found)
            print(f"batch {batch:2} {name:7} {middle:6.1f} ({min(found):.1f}-{max(found):.1f}) {middle / base:.2f} x")


class Worker:
    """An engine in a process of its own, which has been loaded once this is made."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "worker", str(options.folder), "--contenders", name]
        command += ["--steps", str(options.steps), "--engine", json.dumps(options.engine)]
        environment = {**ENVIRONMENT, **os.environ}  # what is set already counts first
        self._name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def ask(self, batch: int) -> tuple[float, float]:
        """Tokens a second, and what others took of the CPUs."""
        assert self._process.stdin is not None
        print(batch, file=self._process.stdin, flush=True)
        rate, others = self._answer()
        return rate, others

    def end(self) -> None:
        """Wait until it is gone."""
        self._process.communicate()

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # vLLM writes there too
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"{self._name} ended with code {self._process.wait()}")


def work(options: argparse.Namespace) -> None:
    """One engine: a line with a batch size in, a line with what was measured out."""
    from vllm import LLM

    name = options.contenders
    arguments: dict[str, Any] = {"model": str(options.folder / ("graded" if name == "graded" else "dense"))}
    if name == "chess":
        method = {"quant_method": "actsparse", "plan": str(options.folder / PLAN)}
        arguments["hf_overrides"] = {"quantization_config": method}
    llm = LLM(
        **{
            **arguments, "dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 8, "enable_prefix_caching": False,
            "skip_tokenizer_init": True, "enforce_eager": True, **options.engine,
        }
    )  # fmt: skip
    print("answer []", flush=True)
    for line in sys.stdin:
        batch = int(line)
        steps(llm, batch, 4)
        load = Load()
        rate = batch / statistics.median(steps(llm, batch, options.steps))
        print("answer", json.dumps([rate, load.others()]), flush=True)


class Load:
    """What other processes take of the CPUs from now on: threads that share a region wait for one that was put off."""

    def __init__(self) -> None:
        self._before = self._now()

    def others(self) -> float:
        """Their share of all CPUs, 0 to 1."""
        (busy, own, at), (busy_before, own_before, before) = self._now(), self._before
        return max(0.0, (busy - busy_before - own + own_before) / ((at - before) * psutil.cpu_count()))

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        me = psutil.Process()
        own = 0.0
        for process in (me, *me.children(recursive=True)):
            used = process.cpu_times()
            own += used.user + used.system
        return busy, own, time.monotonic()


def steps(llm: Any, batch: int, count: int) -> list[float]:
    """Seconds of each decode step of so many sequences."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count + 2, ignore_eos=True, detokenize=False)
    engine, seconds = llm.llm_engine, []
    for number in range(batch):
        prompt = [1 + (97 * number + 31 * place) % 31000 for place in range(PROMPT)]
        engine.add_request(f"{time.monotonic_ns()}-{number}", {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds[-count - 1 : -1]


if __name__ == "__main__":
    main()

"""Decode speed of vLLM's CPU build with and without plans, on a random-weight shape; in the environment of environment.py.

    python integrations/vllm/benchmark.py make FOLDER [--shape llama-1b]
    python integrations/vllm/benchmark.py time FOLDER [--batch 1,8] [--rounds 3]

``make`` writes the model, a CHESS plan at 0.5 and a packed one that reads 3.0 of 6 bits. ``time`` starts vLLM without the
plug-in's method, with CHESS and with the packed directory, a process each, one after the other within every round, and
prints decoded tokens a second of all sequences together: median, least and greatest of the rounds' medians over steps.
Options of the engine come after ``--``, as JSON; environment variables are inherited.
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
    """Time every contender once a round, each in a process of its own."""
    names, batches = options.contenders.split(","), [int(batch) for batch in options.batch.split(",")]
    rates: dict[tuple[str, int], list[float]] = {}
    for number in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, "worker", str(options.folder), "--contenders", name]
            command += ["--batch", options.batch, "--steps", str(options.steps)]
            command += ["--engine", json.dumps(options.engine)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment())
            if done.returncode:
                raise SystemExit(f"{name} ended with code {done.returncode}")
            for batch, (rate, others) in json.loads(done.stdout.strip().splitlines()[-1]).items():
                rates.setdefault((name, int(batch)), []).append(rate)
                print(
                    f"round {number + 1}: {name} batch {batch}: {rate:.1f} tokens/s, others took {others:.0%} of the CPUs",
                    flush=True,
                )
    for batch in batches:
        base = statistics.median(rates[names[0], batch])
        for name in names:
            found = rates[name, batch]
            middle = statistics.median(found)
            print(f"batch {batch:2} {name:7} {middle:6.1f} ({min(found):.1f}-{max(found):.1f}) {middle / base:.2f} x")


def environment() -> dict[str, str]:
    """What engines get: what is set here counts first."""
    return {**ENVIRONMENT, **os.environ}


def work(options: argparse.Namespace) -> None:
    """One engine: the rate of each batch size as one line of JSON."""
    from vllm import LLM

    (name,) = options.contenders.split(",")
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
    found = {}
    for batch in map(int, options.batch.split(",")):
        steps(llm, batch, 4)
        load = Load()
        rate = batch / statistics.median(steps(llm, batch, options.steps))
        found[batch] = rate, load.others()
    print(json.dumps(found))


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

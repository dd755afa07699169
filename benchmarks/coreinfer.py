"""CoreInfer and GRIFFIN measured: perplexity against beta, short prompts, decode speed, cost of choosing, memory.

    python benchmarks/coreinfer.py quality reference/swiglu --text reference/text/evaluation.jsonl \
        --calibration-text reference/text/calibration.jsonl
    python benchmarks/coreinfer.py speed     # 1.1 B shape, random weights
    python benchmarks/coreinfer.py memory    # the same, each run in a process of its own, watched from outside
    python benchmarks/coreinfer.py card      # 8 B shape on a GPU of limited memory, beside accelerate's offload

Every speed is checked against the masked dense model before it is timed.  The last line is JSON.

Shape letters: W windows, P prompt tokens, C continuation tokens, N neurons.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from actsparse import calibrate, kernels, restore, sparsify
from actsparse.measure.bench.shapes import config_of, random_model
from actsparse.methods.prompt import Choice, PromptRule, best
from actsparse.models import caches, opening, text
from actsparse.plan import Plan
from actsparse.runtime.decode import Decoder
from actsparse.runtime.lowmemory import open_mapped
from actsparse.runtime.prompts import read
from actsparse.runtime.swap import prompts_of, state_of

BETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
SHORT = (8, 16, 64)
CONTINUATION = 256
# Weights that only decoding reads, so that a child process proves what it needs itself.
MEMORY_PROMPT, MEMORY_TOKENS = 64, 16
PROMPTS_ON_A_CARD = (128, 2048)


class Fixed(PromptRule):
    """A baseline: neurons that do not depend on the prompt, by a score per layer (None: at random, anew each time)."""

    def __init__(self, rule: PromptRule, scores: Mapping[int, torch.Tensor] | None) -> None:
        self.layers, self.counts, self._scores, self._rule = rule.layers, rule.counts, scores, rule

    def score(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(1, values.shape[1], dtype=torch.float32)

    def choose(self, scores: Mapping[int, torch.Tensor]) -> Choice:
        source = self._scores or {layer: torch.rand_like(score[0, 0]) for layer, score in scores.items()}
        return Choice({layer: best(source[layer].to(scores[layer].device), n) for layer, n in self.counts.items()})


def losses(model: Any, tokens: torch.Tensor, prompt: int, batch: int = 16) -> tuple[torch.Tensor, list[str]]:
    """Mean loss of each window's continuation, float64 [W], and where the sets came from."""
    rows, modes = [], []
    state = state_of(model)
    modules = state.modules if state else []
    with torch.inference_mode():
        for part in tokens.split(batch):
            part, cache = part.to(model.device), DynamicCache()
            read(model, part[:, :prompt], cache, None)
            for module in modules:
                module.scope = "all"
            logits = model(part[:, prompt:], **caches.cache_argument(model.forward, cache)).logits[:, :-1].float()
            for module in modules:
                module.scope = "decode"
            targets = part[:, prompt + 1 :]
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
            rows.append(loss.double().mean(1).cpu())
            session = state.prompts.session(cache) if state else None
            modes += [choice.facts.get("mode", "") for choice in session.choices] if session else []
    return torch.cat(rows), modes


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of continuations, per prompt length, beta and rule."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = opening.open_model(options.model, "float32").to(device), opening.open_tokenizer(options.model)
    windows = text.load_windows(
        options.text, tokenizer, tokens=options.windows * 512, window=512, packing="documents"
    ).tokens
    common = {"method": "coreinfer", "sparsity": [1 - beta for beta in BETAS], "tokens": options.tokens}
    if options.layers:
        common["layers"] = options.layers
    plans: dict[str, list[Plan]] = {
        f"similarity ({clusters})": calibrate(
            model, tokenizer, options.calibration_text, mode="similarity", clusters=clusters, **common
        )
        for clusters in ("elbow", "domains")
    }
    basis = plans["similarity (elbow)"]

    def variant(plans: list[Plan], **prompt: Any) -> list[Plan]:
        return [Plan(**{**vars(plan), "prompt": {**plan.prompt, **prompt}}) for plan in plans]

    plans["stability"] = variant(basis, mode="stability")
    plans["auto"] = variant(basis, mode="auto")
    plans["blend"] = variant(basis, mode="blend")
    griffin = {**common, "method": "griffin", "layers": basis[0].prompt["layers"]}
    plans["griffin"] = calibrate(model, tokenizer, None, **griffin)
    one = calibrate(model, tokenizer, options.calibration_text, mode="similarity", clusters=1, **common)
    first = basis[0].prompt["layers"][0]
    overall = {first + index: scores[0] for index, scores in enumerate(one[0].rules["prompt.frequency"])}
    plans["random"] = plans["frequency only"] = basis
    document: dict[str, Any] = {
        "model": options.model, "windows": len(windows), "layers": basis[0].prompt["layers"],
        "clusters": basis[0].settings["windows_per_cluster"], "alpha": basis[0].prompt["alpha"], "ppl": {},
    }  # fmt: skip
    for prompt in options.prompts:
        tokens = windows[:, : prompt + CONTINUATION]
        dense = losses(model, tokens, prompt)[0]
        table: dict[str, Any] = {"dense": math.exp(dense.mean())}
        for name, of_betas in plans.items():
            for beta, plan in zip(BETAS, of_betas, strict=True):
                sparsify(model, plan)
                prompts = state_of(model).prompts
                if name in ("random", "frequency only"):
                    prompts.rule = Fixed(prompts.rule, overall if name == "frequency only" else None)
                loss, modes = losses(model, tokens, prompt)
                restore(model)
                paired = math.exp(loss.mean()) * loss.sub(dense).std() / math.sqrt(len(loss))
                cell = {"ppl": math.exp(loss.mean()), "stderr": float(paired)}
                if name == "auto":
                    cell["stability_share"] = modes.count("stability") / len(modes)
                table.setdefault(name, {})[str(beta)] = cell
        document["ppl"][str(prompt)] = table
        print(f"\nprompt {prompt}, continuation {CONTINUATION}, {len(windows)} texts, dense {table['dense']:.3f}")
        print(f"{'beta':22}" + "".join(f"{beta:>9}" for beta in BETAS))
        for name in plans:
            print(f"{name:22}" + "".join(f"{table[name][str(beta)]['ppl']:9.3f}" for beta in BETAS), flush=True)
    return document


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Decode at beta against our dense path, index lists against copies, and what choosing costs in prefill."""
    config = config_of("llama-1b")
    model = random_model(config, options.dtype)
    tokens = torch.randint(0, config.vocab_size, (options.prompt,), generator=torch.Generator().manual_seed(0))
    plan = calibrate(model, None, None, method="coreinfer", mode="stability", sparsity=1 - options.beta)
    if options.layers:
        plan = calibrate(
            model, None, None, method="coreinfer", mode="stability", sparsity=1 - options.beta, layers=options.layers
        )
    first, last = plan.prompt["layers"]
    document: dict[str, Any] = {
        "dtype": options.dtype, "threads": torch.get_num_threads(), "beta": options.beta, "layers": [first, last],
        "prompt": options.prompt,
    }  # fmt: skip
    length = options.prompt + options.steps + 16

    # Prefill, dense and with the choice, taking turns.
    with torch.inference_mode():
        model(tokens[None, :16], logits_to_keep=1)
        dense_s, chosen_s, score_s = [], [], []
        for _ in range(options.repeats):
            dense_s.append(timed(lambda: read(model, tokens[None], DynamicCache(), prompts_of(model))))
            sparsify(model, plan)
            rule, spent = state_of(model).prompts.rule, [0.0]
            for name in ("score", "choose"):
                setattr(rule, name, _counted(getattr(rule, name), spent))
            chosen_s.append(timed(lambda: read(model, tokens[None], DynamicCache(), prompts_of(model))))
            score_s.append(spent[0])
            restore(model)
    document["prefill"] = {
        "dense_s": statistics.median(dense_s), "with_choice_s": statistics.median(chosen_s),
        "choice_s": statistics.median(score_s), "share": statistics.median(score_s) / statistics.median(chosen_s),
    }  # fmt: skip
    print(f"prefill of {options.prompt} tokens: {document['prefill']}", flush=True)

    # Decode.  The dense decoder is made first and points at the weights as they lay then.
    decoders = {"dense": Decoder(model, length)}
    decoders["dense"].prefill(tokens)
    sparsify(model, plan)
    prompts = state_of(model).prompts
    # Strides differ with ``gather``: one for the whole prompt, so that rounding cannot make the sets differ.
    prompts.rule.block = options.prompt + 1
    for name, gather in (("index lists", False), ("copies", True)):
        prompts.gather = gather
        decoders[name] = Decoder(model, length)
        decoders[name].prefill(tokens)
    # Against the modules' own decoding, before anything is timed.
    prompts.gather = False
    cache = DynamicCache()
    with torch.inference_mode():
        read(model, tokens[None], cache, prompts)
        neurons = prompts.session(cache).neurons(last)
        sets = [decoders[name]._session.neurons(last) for name in ("index lists", "copies")]
        want = read(model, torch.tensor([[5]]), cache, None).logits[0, -1].float()
    for name, found in zip(("index lists", "copies"), sets, strict=True):
        error = float((decoders[name].step(5) - want).norm() / want.norm())
        if not torch.equal(found, neurons) or error > 0.05:
            raise SystemExit(f"{name} is wrong: relative error {error}")
    logits = torch.empty(config.vocab_size)
    steps: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(options.steps + 2):
        for name, decoder in decoders.items():
            # The native step itself: the dense decoder's own `step` would refuse a model that was sparsified since.
            seconds = timed(partial(kernels.decode_step, decoder.native, 5, options.prompt + 2 + number, logits))
            if number > 1:
                steps[name].append(seconds)
    for name, seconds in steps.items():
        ordered = sorted(seconds)
        document[name] = {
            "ms": 1e3 * statistics.median(ordered), "p10_ms": 1e3 * ordered[len(ordered) // 10],
            "p90_ms": 1e3 * ordered[-1 - len(ordered) // 10],
            "times_dense": statistics.median(steps["dense"]) / statistics.median(ordered),
        }  # fmt: skip
        print(name, document[name], flush=True)
    width = 2 if options.dtype != "float32" else 4
    kept = sum(plan.prompt["counts"])
    document["extra_bytes"] = {"index lists": 4 * kept, "copies": 3 * kept * config.hidden_size * width}
    print("memory beside the weights:", document["extra_bytes"])
    return document


def _counted(call: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        spent[0] += time.perf_counter() - start
        return result

    return counted


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of a process that opens the model, prefills and decodes: dense, and low-memory."""
    document: dict[str, Any] = {"beta": options.beta, "dtype": options.dtype}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for name in ("make", "nothing", "dense", "low memory"):
            command = [sys.executable, __file__, "child", directory, "--path", name, "--dtype", options.dtype]
            command += ["--beta", str(options.beta), *(["--layers", options.layers] if options.layers else [])]
            # This process has loaded no weights: a child's peak starts from its parent's.
            _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
            if status:
                raise SystemExit(f"the process {name!r} failed")
            document[name] = {"peak_mb": usage.ru_maxrss * 1024 / 1e6}
            print(name, document[name], flush=True)
        document["weights_mb"] = sum(e.stat().st_size for e in os.scandir(directory) if "safetensors" in e.name) / 1e6
    return document


def card(options: argparse.Namespace) -> dict[str, Any]:
    """Decode on a GPU whose memory the dense model exceeds: ours in low memory beside transformers with accelerate's offload.

    The resident model, without a limit, shows what the low-memory one has to give: the same logits, to the last bit.
    """
    document: dict[str, Any] = {"beta": options.beta, "dtype": options.dtype, "limit_gib": options.limit}
    tokens: list[Any] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for name in ("resident", "low memory on the card", "offloaded"):
            command = [sys.executable, __file__, "child", directory, "--path", name, "--dtype", options.dtype]
            command += ["--beta", str(options.beta), *(["--layers", options.layers] if options.layers else [])]
            command += ["--limit", str(options.limit), "--shape", options.shape, "--steps", str(options.steps)]
            found = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
            document[name] = json.loads(found[-1])
            tokens.append(document[name].pop("tokens"))
            print(name, document[name], flush=True)
    if tokens[1] != tokens[0]:
        raise SystemExit("low memory gives other tokens than the resident model")
    ours, theirs = document["low memory on the card"], document["offloaded"]
    for prompt in PROMPTS_ON_A_CARD:
        ratio = theirs[f"prompt {prompt}"]["step_ms"] / ours[f"prompt {prompt}"]["step_ms"]
        print(f"prompt {prompt}: {ratio:.1f} x the tokens/s of accelerate's offload")
    return document


def child_on_card(options: argparse.Namespace) -> dict[str, Any]:
    """One measured process of :func:`card`."""
    name, began = options.path, time.perf_counter()
    if name == "resident":
        model = random_model(config_of(options.shape), options.dtype, device="cuda")
        settings = {"mode": "stability", "sparsity": 1 - options.beta, "layers": options.layers}
        calibrate(model, None, None, method="coreinfer", output=f"{options.model}/plan", **settings)
        model.save_pretrained(options.model)
        began = time.perf_counter()
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.limit * 2**30 / total)
    if name == "offloaded":
        from transformers import AutoModelForCausalLM

        # Room for activations; accelerate itself leaves some for the layer that is on its way.
        memory = {0: f"{options.limit - 1}GiB", "cpu": "100GiB"}
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", device_map="auto", max_memory=memory)
    else:
        model = model if name == "resident" else open_mapped(options.model, device="cuda")
        sparsify(model, f"{options.model}/plan")
    torch.cuda.synchronize()
    document: dict[str, Any] = {"open_s": time.perf_counter() - began, "tokens": []}
    document["weights_on_the_card_gb"] = sum(weight.nbytes for weight in model.parameters() if weight.is_cuda) / 1e9
    generator = torch.Generator().manual_seed(0)
    decoder = None if name == "offloaded" else Decoder(model, max(PROMPTS_ON_A_CARD) + options.steps)
    torch.cuda.reset_peak_memory_stats()
    for prompt in PROMPTS_ON_A_CARD:
        tokens = torch.randint(0, model.config.vocab_size, (prompt,), generator=generator)
        first, steps = [], []
        for _ in range(options.repeats if decoder else 1):
            if decoder is None:
                step = iter(_offloaded_steps(model, tokens))
            else:
                decoder.reset()
                step = iter(_steps(decoder, tokens))
            first.append(timed(lambda: next(step)))  # noqa: B023
            produced = []
            count = options.steps if decoder else options.steps // 8
            steps += [timed(lambda: produced.append(next(step))) for _ in range(count)]  # noqa: B023
        steps = sorted(steps[1:])
        document[f"prompt {prompt}"] = {
            "first_token_ms": 1e3 * statistics.median(first), "step_ms": 1e3 * statistics.median(steps),
            "p10_ms": 1e3 * steps[len(steps) // 10], "p90_ms": 1e3 * steps[-1 - len(steps) // 10],
        }  # fmt: skip
        if decoder is not None:
            document["tokens"].append(produced)
    document["peak_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
    document["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return document


def _steps(decoder: Decoder, tokens: torch.Tensor) -> Iterator[int]:
    """Greedy tokens after a prompt."""
    logits = decoder.prefill(tokens)
    while True:
        yield (token := int(logits.argmax()))
        logits = decoder.step(token)


def _offloaded_steps(model: Any, tokens: torch.Tensor) -> Iterator[int]:
    """The same through a model's own forward."""
    cache, step = DynamicCache(), tokens[None].cuda()
    while True:
        with torch.inference_mode():
            logits = read(model, step, cache, None).logits[0, -1]
        yield (token := int(logits.argmax()))
        step = torch.tensor([[token]], device="cuda")


def child(options: argparse.Namespace) -> None:
    """One measured process of :func:`memory`."""
    if options.path in ("resident", "low memory on the card", "offloaded"):
        print(json.dumps(child_on_card(options)))
        return
    if options.path == "nothing":
        return
    if options.path == "make":
        made = random_model(config_of("llama-1b"), options.dtype)
        made.save_pretrained(options.model)
        settings = {"mode": "stability", "sparsity": 1 - options.beta, "layers": options.layers}
        calibrate(made, None, None, method="coreinfer", output=f"{options.model}/plan", **settings)
        return
    if options.path == "dense":
        model = opening.open_model(options.model)
    else:
        model = sparsify(open_mapped(options.model), f"{options.model}/plan")
    decoder = Decoder(model, MEMORY_PROMPT + MEMORY_TOKENS)
    decoder.prefill(torch.arange(MEMORY_PROMPT))
    seconds = [timed(lambda: decoder.step(5)) for _ in range(MEMORY_TOKENS)]
    print(f"{options.path}: {1e3 * statistics.median(seconds):.1f} ms a token", flush=True)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("quality")
    one.add_argument("model")
    one.add_argument("--text", required=True)
    one.add_argument("--calibration-text", required=True)
    one.add_argument("--windows", type=int, default=160)
    one.add_argument("--tokens", type=int, default=93440)
    one.add_argument("--layers")
    one.add_argument("--prompts", type=int, nargs="+", default=(*SHORT, 256), metavar="TOKENS", help="prompt lengths")
    for name in ("speed", "memory", "card"):
        two = parts.add_parser(name)
        two.add_argument("--beta", type=float, default=0.4)
        two.add_argument("--dtype", default="bfloat16")
        two.add_argument("--layers")
        two.add_argument("--prompt", type=int, default=256)
        two.add_argument("--steps", type=int, default=64 if name == "card" else 12)
        two.add_argument("--repeats", type=int, default=3)
        two.add_argument("--directory", default=None, help="where the checkpoint is written for a while")
        two.add_argument("--limit", type=float, default=11.0, help="GiB of the card that `card` may use")
        two.add_argument("--shape", default="llama-3-8b", help="of the model of `card`")
    three = parts.add_parser("child")
    three.add_argument("model")
    three.add_argument("--path")
    three.add_argument("--beta", type=float)
    three.add_argument("--dtype")
    three.add_argument("--layers")
    three.add_argument("--limit", type=float)
    three.add_argument("--shape")
    three.add_argument("--steps", type=int)
    three.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.part == "child":
        child(options)
        return
    document = {"quality": quality, "speed": speed, "memory": memory, "card": card}[options.part](options)
    print(json.dumps(document))


if __name__ == "__main__":
    main()

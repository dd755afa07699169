#!/usr/bin/env python3
"""SVDP: the paper's ablation on the reference ReGLU model, the time to build a predictor, and decode speed at 1.1 B.

    python benchmarks/svdp.py ablation         perplexity and weights read of every variant (minutes)
    python benchmarks/svdp.py build            one layer of 14336 x 4096 from calibration statistics to biases
    python benchmarks/svdp.py decode           CPU decode at the 1.1 B shape with 90 % natural sparsity

The last line is one JSON document.

The decode model has random weights, so its sparsity and its predictability are arranged: every gate row is a mix of a few
shared directions (rank 96) and a tenth of noise of its own, scaled to unit length, and its bias stands at the quantile of
a standard normal that leaves 10 % of the neurons active, for inputs as RMSNorm makes them.  Nothing is masked by hand: the
gates' signs are computed from the token like in any other model, and what is skipped is measured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from actsparse.calibration.collect import Calibration, load_calibration_windows
from actsparse.cli.bench import machine
from actsparse.cli.terminal import print_json, print_table
from actsparse.measure import evaluate
from actsparse.measure.bench import shapes
from actsparse.measure.bench.run import Settings, calibrate_on_random_tokens, measure
from actsparse.methods import make
from actsparse.methods.base import Calibrated, Layer, Targets
from actsparse.methods.relu import Zeros
from actsparse.methods.statistics import Batch, TokenSample
from actsparse.methods.svdp import Svdp, sample_tokens
from actsparse.methods.whitening import Covariance
from actsparse.models import opening, text
from actsparse.plan import ModelIdentity, Plan

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
NATURAL = 0.9
GATE_RANK, GATE_NOISE = 96, 0.1

# Rank and s of each block of rows, and the paper's four steps with the further variants.
POINTS = ((32, 0.5), (64, 0.4))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain SVD": {"whitening": False, "bias": "none"},
    "+ whitening": {"bias": "none"},
    "+ full bias, penalty g": {"bias": "full", "penalty": "gate"},
    "+ full bias, penalty g u": {"bias": "full", "penalty": "gate-up"},
    "+ full bias, full penalty (the paper's)": {"bias": "full"},
    "the same without whitening": {"bias": "full", "whitening": False},
    "constant bias": {"bias": "constant"},
    "smooth bias (ours)": {"bias": "smooth"},
}


def ablation(options: argparse.Namespace) -> dict[str, Any]:
    """Every variant on the same calibration statistics and the same evaluation tokens."""
    model, tokenizer = opening.open_model(options.model, "float32"), opening.open_tokenizer(options.model)
    windows = load_calibration_windows(
        model, tokenizer, options.calibration, tokens=options.tokens, window=512, packing="packed"
    )
    scored = text.load_windows(options.evaluation, tokenizer, tokens=options.evaluation_tokens, window=512)
    dense = evaluate.window_losses(model, scored)
    base = evaluate.perplexity(dense)
    svdp, relu = make("svdp", rank=POINTS[0][0]), make("relu")
    run = Calibration(model, windows, [svdp, relu])
    statistics = run.collect()
    rows, table = [], []

    def row(name: str, rank: str, s: str, plan: Any) -> None:
        result = evaluate.compare_perplexity(model, plan, scored, dense=dense)
        increase = (result.sparse.ppl - base.ppl) / base.ppl
        read, lost = result.weights_read.ffn_fraction, plan.settings.get("energy_lost", [])
        mean_lost = sum(lost) / len(lost) if lost else 0.0
        error = result.delta_stderr / base.ppl
        gates = [value for site, value in result.sparsity.items() if site.endswith(".gate")]
        inactive = sum(gates) / len(gates) if gates else 0.0
        rows.append(
            [name, rank, s, f"{increase:+.2%} +- {error:.2%}", f"{read:.1%}", f"{inactive:.1%}", f"{mean_lost:.2%}"]
        )
        print(*rows[-1], sep=" | ", flush=True)
        table.append(
            {
                "variant": name,
                "rank": rank,
                "s": s,
                "increase": increase,
                "stderr": error,
                "ffn_read": read,
                "energy_lost_calibration": mean_lost,
            }
        )

    row("exact gate, no predictor (relu)", "", "", run.solve(relu, statistics["relu"], Targets(0.0)))
    for rank, s in POINTS:
        for name, settings in VARIANTS.items():
            plan = run.solve(make("svdp", rank=rank, s=s, **settings), statistics["svdp"], Targets(s))
            row(name, str(rank), f"{s:g}", plan)
    header = ["variant", "rank", "s", "perplexity", "FFN read", "predicted inactive", "energy lost (calibration)"]
    print_table(f"{options.model}: dense {base.ppl:.4f}, {scored.count:,} tokens", header, rows)
    return {"dense_ppl": base.ppl, "calibration_tokens": windows.count, "tokens": scored.count, "rows": table}


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Solve one layer of an 8 B model from statistics as calibration leaves them."""
    hidden, neurons, rank = 4096, 14336, 352
    generator = torch.Generator().manual_seed(0)
    # Inputs whose variance falls off, as hidden states' does, in a random basis of a few directions at a time.
    fall = torch.logspace(0, -1.5, hidden)
    weights = {name: torch.randn(neurons, hidden, generator=generator).bfloat16() for name in ("gate", "up")}
    weights["down"] = torch.randn(hidden, neurons, generator=generator).bfloat16()
    identity = ModelIdentity("llama", 1, hidden, neurons, 32, 8, 128, "relu", "")
    covariance, sample = Covariance("ffn_in", hidden), TokenSample("ffn_in", hidden, sample_tokens(hidden))
    halves = [Zeros("gate"), Zeros("gate")]
    for _ in range(4):
        x = torch.randn(2048, hidden, generator=generator) * fall
        covariance.update({"ffn_in": x}, Batch(0, ("",)))
        sample.update({"ffn_in": (torch.randn(2048, hidden, generator=generator) * fall).bfloat16()}, Batch(0, ("",)))
        for zeros in halves:
            zeros.update({"gate": torch.randn(4096, generator=generator).sub(1.28).relu()}, Batch(0, ("",)))
    statistics = {
        "ffn_in/covariance": covariance,
        "ffn_in/sample": sample,
        "gate/zeros/first": halves[0],
        "gate/zeros/second": halves[1],
    }
    layer = Layer(0, identity, weights.__getitem__)
    started, busy = time.perf_counter(), time.process_time()
    solution = Svdp(rank=rank, s=0.5).solve([Calibrated(layer, statistics)], Targets(0.5))
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    facts = {key: solution.facts[key][0] for key in ("energy_lost", "ridge", "residual")}
    spent = f"{seconds:.1f} s ({busy:.1f} s of CPU)"
    print(f"one layer of {neurons} x {hidden}, rank {rank}, {len(sample.tokens())} tokens: {spent}, {facts}")
    return {"seconds": seconds, "cpu_seconds": busy, "rank": rank, "bias_tokens": len(sample.tokens()), **facts}


def arranged_model(dtype: str, shape: str) -> Any:
    """The 1.1 B shape with ReLU, gate biases, and the arrangement of the module docstring."""
    config = shapes.config_of(shape)
    config.hidden_act, config.mlp_bias = "relu", True
    model = shapes.random_model(config, dtype, name=shape)
    generator = torch.Generator().manual_seed(1)
    hidden, neurons = config.hidden_size, config.intermediate_size
    quantile = float(torch.special.ndtri(torch.tensor(NATURAL)))
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            shared = torch.randn(neurons, GATE_RANK, generator=generator) @ torch.randn(
                GATE_RANK, hidden, generator=generator
            )
            own = torch.randn(neurons, hidden, generator=generator) * GATE_NOISE
            rows = shared / shared.norm(dim=1, keepdim=True) + own / hidden**0.5
            # RMSNorm hands every token a vector of length sqrt(H): against unit rows that is a standard normal value.
            layer.mlp.gate_proj.weight.copy_(rows / rows.norm(dim=1, keepdim=True))
            layer.mlp.gate_proj.bias.fill_(-quantile)
            layer.mlp.up_proj.bias.zero_()
            layer.mlp.down_proj.bias.zero_()
    return model


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """Hugging Face eager, our dense path, the exact path and SVDP, in turns in one process."""
    model = arranged_model("bfloat16", options.shape)
    # Inputs of random weights have no preferred direction, so there is nothing to whiten (and few tokens to do it with).
    methods = (make("relu"), make("svdp", rank=options.rank, s=options.s, whitening=False))
    plans = []
    for method in methods:
        kept = options.plans and Path(options.plans) / f"{method.name}.safetensors"
        if kept and kept.is_file():
            plans.append(Plan.load(kept))
            continue
        plans += calibrate_on_random_tokens(
            model, method, [options.s], tokens=options.calibration_tokens, progress=lambda done, total: None
        )
        if kept:
            plans[-1].save(kept)
    if options.calibrate_only:
        return {"energy_lost": plans[1].settings["energy_lost"], "achieved": plans[1].achieved}
    report = measure(
        model, plans, Settings(32, options.new_tokens, options.repeats, False), say=lambda line: print(line, flush=True)
    )
    document = report.document()
    eager = document["results"][0]["decode_tok_s"]
    rows = [
        [
            result["name"],
            f"{result['decode_tok_s']:.2f} ({result['decode_spread'][0]:.2f}-{result['decode_spread'][1]:.2f})",
            f"{result['decode_tok_s'] / eager:.2f}",
            f"{result['weights_read_bytes'] / 1e6:,.0f}",
            "" if result["ffn_sparsity"] is None else f"{result['ffn_sparsity']:.1%}",
        ]
        for result in document["results"]
    ]
    print_table(f"{options.shape}, bfloat16", ["path", "tokens/s", "x hf-eager", "MB/token", "neurons skipped"], rows)
    document["energy_lost"] = plans[1].settings["energy_lost"]
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["ablation", "build", "decode"])
    parser.add_argument("--model", default=str(REFERENCE / "reglu"))
    parser.add_argument("--calibration", default=str(REFERENCE / "text" / "calibration.jsonl"))
    parser.add_argument("--evaluation", default=str(REFERENCE / "text" / "evaluation.jsonl"))
    parser.add_argument(
        "--tokens", type=int, default=40960, help="calibration tokens (half of them for the thresholds)"
    )
    parser.add_argument("--evaluation-tokens", type=int, default=20480)
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--s", type=float, default=0.7)
    parser.add_argument("--calibration-tokens", type=int, default=1024)
    parser.add_argument("--plans", metavar="DIR", help="keep the decode model's plans here, or take them from here")
    parser.add_argument("--calibrate-only", action="store_true", help="stop before the timing")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    document = {"ablation": ablation, "build": build, "decode": decode}[options.task](options)
    print_json({"task": options.task, "machine": machine(), **document})


if __name__ == "__main__":
    main()

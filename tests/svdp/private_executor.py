"""A program: the portable executor on a device that is neither CPU nor CUDA; prints what it found as one line of JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import DynamicCache

from actsparse import kernels
from actsparse.calibration.collect import Calibration
from actsparse.kernels import Rules, reference
from actsparse.methods import make
from actsparse.methods.base import Targets
from actsparse.models.text import Windows
from actsparse.runtime.prompts import read
from actsparse.runtime.swap import path_of, sparsify

from ..conftest import tiny_model
from ..private_device import CALLED, NAME, Probe, upload
from .test_executors import ffn_case


def blocks() -> dict[str, Any]:
    """The largest difference from the oracle, with NaN in every weight that must not be read, and the operators called."""
    CALLED.clear()
    worst = 0.0

    def compare(found: torch.Tensor, expected: torch.Tensor) -> None:
        nonlocal worst
        assert isinstance(found, Probe)
        difference = float((found.values - expected).abs().max())
        worst = max(worst, difference if difference == difference else float("inf"))

    for rows in (1, 3):
        x, gate, up, down, options = ffn_case(torch.float32, rows=rows)
        assert gate is not None
        expected = reference.gated_ffn(x, gate, up, down, Rules(**options))
        used = {name: mask.any(0) for name, mask in reference.ffn_keep(x, gate, up, Rules(**options)).items()}
        poisoned = {"gate": gate.clone(), "up": up.clone()}
        for name, weight in poisoned.items():
            weight[~used[name]] = torch.nan
        columns = down.t().clone()
        columns[~used["down"]] = torch.nan
        weights = (upload(poisoned["gate"]), upload(poisoned["up"]), upload(columns.t()))
        assert kernels.path_for(upload(x), *weights) == "portable"
        there = {name: upload(value) if torch.is_tensor(value) else value for name, value in options.items()}
        compare(kernels.gated_ffn(upload(x), *weights, **there), expected)

        threshold, weight = torch.full((40,), 1.0), torch.randn(7, 40).t().contiguous().t()
        expected = reference.linear(x, weight, None, threshold)
        weight[:, ~reference.keep(x, threshold).any(0)] = torch.nan
        compare(kernels.linear(upload(x), upload(weight), None, upload(threshold)), expected)
    return {"worst": worst, "operators": sorted({name.split(".")[1] for name in CALLED})}


def model(name: str) -> dict[str, Any]:
    """A whole sparsified model: largest difference of decode steps' logits from the CPU's, and the path they took."""
    dense = tiny_model(hidden_act="relu" if name in ("svdp", "relu") else "silu")
    method = make(name, **({"rank": 16} if name == "svdp" else {}))
    tokens = torch.randint(4096, (4, 64), generator=torch.Generator().manual_seed(3))
    run = Calibration(dense, Windows(tokens, "random tokens", ("",) * len(tokens)), [method])
    sparsify(dense, run.solve(method, run.collect()[name], Targets(0.5)))
    logits = []
    with torch.no_grad():
        for place in ("cpu", NAME):
            dense.to(place)
            cache, steps = DynamicCache(config=dense.config), []
            for at in (slice(0, 12), slice(12, 13), slice(13, 14)):
                steps.append(read(dense, tokens[:1, at].to(place), cache, None).logits[0, -1].cpu())
            logits.append(torch.stack(steps))
    worst = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    return {"worst": worst, "path": path_of(dense).split(":")[0]}


if __name__ == "__main__":
    print(json.dumps({what: blocks() if what == "blocks" else model(what) for what in sys.argv[1:]}))

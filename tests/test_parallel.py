"""A model that transformers has divided among two processes gives what it gives in one, under plans of four methods."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import actsparse
from actsparse.models import sites
from actsparse.plan import SKIP_ZEROS, ModelIdentity, Plan

HERE = Path(__file__).resolve().parent
H, N, R = 48, 132, 8


def rules(method: str) -> dict[str, torch.Tensor]:
    """Rules that skip about half, other for every channel, so that a wrong part of them shows."""
    generator = torch.Generator().manual_seed(5)
    made: dict[str, torch.Tensor] = {}

    def vector(size: int, least: float, most: float) -> torch.Tensor:
        return torch.rand(size, generator=generator) * (most - least) + least

    for layer in range(2):
        prefix = f"layers.{layer}"
        if method == "chess":
            made |= {f"{prefix}.q.threshold": vector(H, 0.3, 1.0), f"{prefix}.o.threshold": vector(H, 0.05, 0.3)}
        if method in ("chess", "cats"):
            made[f"{prefix}.ffn.threshold"] = vector(N, 0.05, 0.3)
        if method == "teal":
            made |= {f"{prefix}.{name}.threshold": vector(H, 0.3, 1.0) for name in ("q", "k", "v", "gate", "up")}
            made |= {f"{prefix}.o.threshold": vector(H, 0.05, 0.3), f"{prefix}.down.threshold": vector(N, 0.05, 0.3)}
        if method == "svdp":
            made[f"{prefix}.ffn.predictor_a"] = torch.randn(R, H, generator=generator)
            made[f"{prefix}.ffn.predictor_b"] = torch.randn(N, R, generator=generator)
            made[f"{prefix}.ffn.predictor_bias"] = vector(N, -1.0, 1.0)
            made[f"{prefix}.ffn.threshold"] = torch.tensor([SKIP_ZEROS])
    return made


def test_two_processes(tiny: Any, tmp_path: Path) -> None:
    methods = ("chess", "cats", "teal", "svdp")
    tokens = torch.randint(1, 4096, (1, 12), generator=torch.Generator().manual_seed(3))
    models = {}
    for bias in (False, True):
        folder = tmp_path / f"bias-{bias}"
        model = tiny(hidden_act="relu", attention_bias=bias, mlp_bias=bias)
        if bias:
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / "model")
        (folder / "plans").mkdir()
        identity = ModelIdentity(**sites.describe(model))
        for method in methods:
            Plan(method, 0.5, identity, rules(method)).save(folder / "plans" / method)
        prompt = {"rule": "griffin", "layers": [0, 1], "counts": [10, 10]}
        Plan("griffin", 0.5, identity, {}, scope="decode", prompt=prompt).save(folder / "plans" / "griffin")
        torch.save(tokens, folder / "tokens")
        models[folder] = model
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(HERE / "divided.py"), "cpu", *map(str, models)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    for folder, model in models.items():
        made = torch.load(folder / "result")
        assert made["restored"]
        assert "the model is divided among 2 processes" in made["griffin"]
        with torch.inference_mode():
            dense = model(tokens).logits
            torch.testing.assert_close(made["dense"], dense, rtol=0, atol=1e-4)
            for method in methods:
                actsparse.sparsify(model, folder / "plans" / method)
                wanted = model(tokens).logits
                assert float((wanted - dense).abs().max()) > 0.05
                torch.testing.assert_close(made[method], wanted, rtol=0, atol=1e-4)
                torch.testing.assert_close(made[f"{method} step"], wanted[:, -1:], rtol=0, atol=1e-4)

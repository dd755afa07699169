"""A small model with trained weights, plans for it, and what actsparse itself makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import actsparse
from actsparse.kernels import reference

REFERENCE = Path(__file__).resolve().parents[3] / "reference"
HERE = Path(__file__).resolve().parent
LAYERS, STEPS, PROMPTS = 2, 16, 3
# Thresholds are not continuous: a value this close to one, in units of its vector's root mean square, may fall on either side
# of it by rounding alone, and then everything after it differs. Such prompts compare nothing.
MARGIN = 4e-6
TOLERANCE = 1e-4
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}


def small(name: str, folder: Path) -> Path:
    """The first layers of a reference model, in float32, as a directory."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE / name, dtype=torch.float32)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(REFERENCE / name).save_pretrained(folder / name)
    return folder / name


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by name."""
    folder = tmp_path_factory.mktemp("models")
    return {name: small(name, folder) for name in ("swiglu", "reglu")}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The reference models'."""
    return AutoTokenizer.from_pretrained(REFERENCE / "swiglu")


@pytest.fixture(scope="session")
def calibration() -> str:
    """The file of calibration text."""
    return str(REFERENCE / "text" / "calibration.jsonl")


@pytest.fixture(scope="session")
def plans(models: dict[str, Path], tokenizer: Any, calibration: str) -> dict[str, tuple[str, Path]]:
    """By method: the model's name and the plan's file."""
    made = {}
    for name, methods in (("swiglu", ("chess", "cats", "teal", "wina")), ("reglu", ("relu", "svdp"))):
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
        for method in methods:
            options = {} if method == "relu" else {"sparsity": 0.5}
            tokens = 4096 if method == "svdp" else 1024
            plan = actsparse.calibrate(model, tokenizer, calibration, method=method, tokens=tokens, **options)
            plan.save(models[name] / f"{method}.plan")
            made[method] = (name, models[name] / f"{method}.plan")
    return made


@pytest.fixture(scope="session")
def packed(models: dict[str, Path], calibration: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed directory of the small model."""
    target = tmp_path_factory.mktemp("packed") / "packed"
    command = [Path(sys.executable).parent / "actsparse", "pack", models["swiglu"], "-o", target, "--text", calibration]
    subprocess.run([*map(str, command), "--tokens", "1024"], check=True, capture_output=True)
    return target


class Wanted:
    """What actsparse makes of prompts on which no decision hangs on rounding."""

    def __init__(self, model: Any) -> None:
        self.prompts: list[list[int]] = []
        self.tokens: list[list[int]] = []
        self.logits: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(1)
        for _ in range(60):
            length = int(torch.randint(2, 9, (1,), generator=generator))
            prompt = torch.randint(1, model.config.vocab_size, (length,), generator=generator).tolist()
            ids, nearest = list(prompt), 0.0
            for _ in range(STEPS):
                with torch.no_grad(), closest() as margins:
                    logits = model(torch.tensor([ids])).logits[0]
                ids.append(int(logits[-1].argmax()))
                nearest = min(margins, default=1.0)
            if nearest > MARGIN:
                self.prompts.append(prompt)
                self.tokens.append(ids[len(prompt) :])
                self.logits.append(logits[len(prompt) - 1 :])
            if len(self.prompts) == PROMPTS:
                return
        raise AssertionError("no prompts without decisions at their thresholds")


def same(results: list[Any], wanted: Wanted, what: str = "") -> None:
    """Equal tokens, and logits within the tolerance, prompt by prompt."""
    for result, tokens, logits in zip(results, wanted.tokens, wanted.logits, strict=True):
        assert result["tokens"] == tokens, what
        assert float((result["logits"] - logits).abs().max()) < TOLERANCE, what


class closest:
    """``with closest() as margins``: how far decisions of the oracle were from their thresholds."""

    def __enter__(self) -> list[float]:
        self._keep = reference.keep
        margins: list[float] = []

        def keep(values: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
            # Exact zeros are skipped for nothing: on either side of such a threshold the result is the same.
            if float(threshold.max()) > 1e-30:
                scale = values.float().square().mean().sqrt().clamp(min=1e-30)
                margins.append(float(((values.abs() - threshold).abs() / scale).min()))
            return self._keep(values, threshold)

        reference.keep = keep
        return margins

    def __exit__(self, *_: object) -> None:
        reference.keep = self._keep


@pytest.fixture(scope="session")
def wanted(models: dict[str, Path], plans: dict[str, tuple[str, Path]]) -> Callable[[str], Wanted]:
    """By method, made once each."""
    known: dict[str, Wanted] = {}

    def of(method: str) -> Wanted:
        if method not in known:
            name, plan = plans[method]
            model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
            known[method] = Wanted(actsparse.sparsify(model, str(plan)))
        return known[method]

    return of


@pytest.fixture
def run_engines(tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a list of (arguments of the engine, prompts) in one process of its own and returns their results."""

    def run(requests: list[tuple[dict[str, Any], list[list[int]]]], **environment: str) -> list[Any]:
        specifications = [
            {
                "engine": {
                    "dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "enable_prefix_caching": False,
                    "skip_tokenizer_init": True, **engine,
                },
                "prompts": prompts, "steps": STEPS, "result": str(tmp_path / f"{number}.pt"),
            }
            for number, (engine, prompts) in enumerate(requests)
        ]  # fmt: skip
        (tmp_path / "specifications.json").write_text(json.dumps(specifications), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(HERE / "engines.py"), str(tmp_path / "specifications.json")],
            env={**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(tmp_path / "cache"), **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        return [torch.load(specification["result"]) for specification in specifications]

    return run


def arguments(model: Path, method: str, plan: Path, **options: Any) -> dict[str, Any]:
    """The engine's arguments for an unmodified checkpoint and a plan."""
    overrides: dict[str, Any] = {"quantization_config": {"quant_method": "actsparse", "plan": str(plan)}}
    if method in ("relu", "svdp"):
        overrides["architectures"] = ["ReluLlamaForCausalLM"]
    return {"model": str(model), "hf_overrides": overrides, **options}

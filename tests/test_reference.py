"""The embedded reference models, texts and tasks are whole and do what their card says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
MODELS = {"swiglu": "silu", "reglu": "relu"}
DOMAINS = ("man", "doc", "python", "rustdoc")


def rows(name: str) -> list[dict[str, str]]:
    with (REFERENCE / "text" / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module", params=sorted(MODELS))
def loaded(request: pytest.FixtureRequest):
    transformers = pytest.importorskip("transformers")
    path = REFERENCE / request.param
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return request.param, model, transformers.AutoTokenizer.from_pretrained(path)


def slice_ids(tokenizer, domain: str, documents: int = 6, tokens: int = 384) -> list[torch.Tensor]:
    """The first tokens of the first documents of a domain."""
    texts = [row["text"] for row in rows("evaluation.jsonl") if row["domain"] == domain][:documents]
    return [torch.tensor([tokenizer(text[:4000])["input_ids"][:tokens]]) for text in texts]


def test_model_opens_with_transformers(loaded) -> None:
    name, model, tokenizer = loaded
    assert model.config.hidden_act == MODELS[name]
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert 12e6 < sum(weight.numel() for weight in model.parameters()) < 14e6
    assert (REFERENCE / name / "model.safetensors").stat().st_size < 30e6
    assert tokenizer.is_fast
    text = "def main():\n    return 'é', 1\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@torch.no_grad()
def test_perplexity_is_near_the_stated_figure(loaded) -> None:
    name, model, tokenizer = loaded
    stated = json.loads((REFERENCE / name / "measured.json").read_text())["slice_perplexity"]
    loss = count = 0.0
    for domain in DOMAINS:
        for ids in slice_ids(tokenizer, domain):
            logits = model(ids).logits[0, :-1]
            loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    assert math.exp(loss / count) == pytest.approx(stated, rel=0.03)


@torch.no_grad()
def test_reglu_gates_are_sparse_in_each_domain(loaded) -> None:
    name, model, tokenizer = loaded
    if name != "reglu":
        pytest.skip("the dense model")
    shares: list[torch.Tensor] = []
    hooks = [
        layer.mlp.act_fn.register_forward_hook(lambda _m, _a, out: shares.append((out == 0).float().mean()))
        for layer in model.model.layers
    ]
    for domain in DOMAINS:
        shares.clear()
        for ids in slice_ids(tokenizer, domain):
            model(ids)
        assert float(torch.stack(shares).mean()) >= 0.88, domain
    for hook in hooks:
        hook.remove()


def test_texts_are_disjoint_and_cover_the_domains() -> None:
    calibration, evaluation = rows("calibration.jsonl"), rows("evaluation.jsonl")
    for name, part in (("calibration.jsonl", calibration), ("evaluation.jsonl", evaluation)):
        assert {row["domain"] for row in part} == set(DOMAINS)
        assert all(row["text"].strip() and row["licence"] and row["source"] for row in part)
        assert 1e6 < (REFERENCE / "text" / name).stat().st_size < 2e6
    paths = [(row["source"], row["path"]) for row in calibration + evaluation]
    assert len(paths) == len(set(paths))
    texts = [row["text"] for row in calibration + evaluation]
    assert len(texts) == len(set(texts))
    sources = (REFERENCE / "text" / "SOURCES.md").read_text()
    assert all(f"| {row['source'].split('/')[0]} |" in sources for row in calibration + evaluation)


def test_tasks_hold_their_items() -> None:
    known = {(row["source"], row["path"]) for name in ("calibration", "evaluation") for row in rows(f"{name}.jsonl")}
    for domain in DOMAINS:
        with (REFERENCE / "tasks" / f"{domain}.jsonl").open(encoding="utf-8") as file:
            items = [json.loads(line) for line in file]
        assert len(items) >= 200
        for item in items:
            assert len(set(item["choices"])) == 4
            assert 0 <= item["label"] < 4
            assert (item["source"], item["path"]) not in known
        share = [sum(item["label"] == label for item in items) / len(items) for label in range(4)]
        assert max(share) < 0.35


def test_tasks_load_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    manager = TaskManager(include_path=str(REFERENCE / "tasks"), include_defaults=False)
    assert "actsparse_offline" in manager.all_groups
    assert {f"actsparse_{domain}" for domain in DOMAINS} <= set(manager.all_subtasks)


@pytest.mark.parametrize(("script", "option"), [("build_text.py", "--cache"), ("train.py", "--activation")])
def test_scripts_find_their_parts_from_any_directory(script: str, option: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REFERENCE / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert option in done.stdout

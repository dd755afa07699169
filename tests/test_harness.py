"""Tasks through lm-evaluation-harness: scores, scope, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import actsparse
from actsparse.cli import main
from actsparse.measure import harness
from actsparse.measure.harness import Score, TaskError, Tasks, paired
from actsparse.models.sites import ModelError
from actsparse.plan import Plan, PlanError

pytest.importorskip("lm_eval")

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task of twelve questions."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "tasks"
    place.mkdir()
    generator = torch.Generator().manual_seed(0)
    with (place / "data.jsonl").open("w") as file:
        for number in range(12):
            answer = int(torch.randint(3, (1,), generator=generator))
            row = {
                "question": f"Number {number} is",
                "choices": ["small", "large", "neither of both"],
                "answer": answer,
            }
            file.write(json.dumps(row) + "\n")
    (place / "tiny.yaml").write_text(TASK.format(data=place / "data.jsonl"))
    return place


@pytest.fixture
def model_folder(tiny: Any, tokenizer: Any, tmp_path: Path) -> Path:
    place = tmp_path / "model"
    tiny("llama").save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def plan_for(model: Any, tokenizer: Any, text_file: Path, **options: Any) -> Plan:
    return actsparse.calibrate(model, tokenizer, str(text_file), tokens=512, window=64, **options)


def accuracy_by_hand(model: Any, tokenizer: Any, folder: Path) -> float:
    right = 0
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["question"])["input_ids"]
            whole = tokenizer(f"{row['question']} {choice}")["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[at - 1, whole[at]]) for at in range(len(context), len(whole))))
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


def test_scores_are_the_models_dense_and_sparse(tiny: Any, tokenizer: Any, text_file: Path, folder: Path) -> None:
    model = tiny("llama")
    plan = plan_for(model, tokenizer, text_file, sparsity=0.9)
    tasks = Tasks(["tiny_choice"], folder=folder)
    (dense,) = tasks.run(model, tokenizer)
    (sparse,) = tasks.run(model, tokenizer, plan)
    assert dense.task == "tiny_choice"
    assert dense.metric == "acc"
    assert dense.samples == len(dense.each) == 12
    assert dense.value == pytest.approx(accuracy_by_hand(model, tokenizer, folder))
    actsparse.sparsify(model, plan)
    assert sparse.value == pytest.approx(accuracy_by_hand(model, tokenizer, folder))
    assert tasks.run(actsparse.restore(model), tokenizer) == [dense]
    assert Tasks(["tiny_choice"], folder=folder, limit=5).run(model, tokenizer)[0].samples == 5


def test_weights_of_nan_get_no_score(tiny: Any, tokenizer: Any, folder: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    tasks = Tasks(["tiny_choice"], folder=folder, limit=2)
    with pytest.raises(ModelError, match="logits hold nan"):
        tasks.run(model, tokenizer)


def test_a_decode_scope_is_refused_and_half_a_scope_is_said(
    tiny: Any, tokenizer: Any, text_file: Path, folder: Path
) -> None:
    model = tiny("llama")
    plan = plan_for(model, tokenizer, text_file)
    tasks = Tasks(["tiny_choice"], folder=folder)
    with pytest.raises(PlanError, match="scope decode leaves task tiny_choice dense"):
        tasks.run(model, tokenizer, plan.with_scope("decode"))
    assert "FIRST HALF OF EVERY SEQUENCE IS DENSE" in tasks.note(plan.with_scope("last_half"))


def test_paired_differences() -> None:
    one = Score("t", "acc", 0.75, 0.2, 4, (1.0, 1.0, 1.0, 0.0))
    other = Score("t", "acc", 0.5, 0.2, 4, (1.0, 1.0, 0.0, 0.0))
    difference, stderr = paired(one, other)
    assert difference == pytest.approx(0.25)
    assert stderr == pytest.approx(0.25)
    assert paired(one, one) == (0.0, 0.0)


def test_unknown_tasks_and_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="task folder .* does not exist"):
        Tasks(["tiny_choice"], folder=tmp_path / "nowhere")
    with pytest.raises(TaskError, match="expected at least one name"):
        Tasks([], folder=folder)
    (folder / "data.jsonl").unlink()
    with pytest.raises(TaskError, match="tiny_choice cannot be loaded"):
        Tasks(["tiny_choice"], folder=folder)


def test_the_papers_tasks_have_one_name() -> None:
    assert len(harness.expand(["chess8"])) == 8
    assert harness.expand(["chess8", "piqa"]) == harness.expand(["chess8"])


def test_the_command(
    tokenizer: Any,
    text_file: Path,
    folder: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = tmp_path / "plan"
    calibrate = ["calibrate", str(model_folder), "--text", str(text_file), "--tokens", "512", "--window", "64"]
    assert main([*calibrate, "-o", str(plan)]) == 0
    arguments = ["eval", str(model_folder), "--tasks", "tiny_choice", "--tasks-folder", str(folder)]
    capsys.readouterr()
    assert main([*arguments, "--plan", str(plan), "--json", "-o", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "scope all" in out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads((tmp_path / "out.json").read_text())
    assert document["scores"][0]["dense"]["samples"] == 12
    assert main([*arguments, "--plan", str(plan), "--scope", "decode"]) == 2
    assert "leaves task tiny_choice dense" in capsys.readouterr().err
    assert main([*arguments, "--no-dense"]) == 2
    assert "expected --plan" in capsys.readouterr().err

"""``actsparse apply``: the directory, its card, the verbs and lm-evaluation-harness on it, and directories that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import actsparse
from actsparse.cli import main
from actsparse.plan import Plan
from actsparse.runtime.swap import open_model
from tests.test_harness import TASK, folder  # noqa: F401  (a fixture)
from tests.test_pretrained import calibrated, logits


@pytest.fixture
def dense(tiny: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    """A dense checkpoint with a card of its own."""
    place = tmp_path / "dense"
    tiny("llama", hidden_size=128, head_dim=32, num_attention_heads=4).save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "README.md").write_text("---\nlicense: mit\nlanguage: en\ntags: [other]\n---\n# dense\n")
    return place


@pytest.fixture
def plan(dense: Path, tokenizer: Any, text_file: Path, tmp_path: Path) -> Path:
    """A plan file for it."""
    calibrated(AutoModelForCausalLM.from_pretrained(dense), tokenizer, text_file).save(tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors"


@pytest.fixture
def directory(dense: Path, plan: Path, tmp_path: Path) -> Path:
    """What ``apply`` makes of both."""
    assert main(["apply", str(dense), "--plan", str(plan), "-o", str(tmp_path / "made")]) == 0
    return tmp_path / "made"


def test_the_directory_is_the_sparse_model(dense: Path, plan: Path, directory: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert main(["apply", str(dense), "--plan", str(plan), "-o", str(directory.parent / "again")]) == 0
    said = capsys.readouterr()
    assert f"wrote {directory.parent / 'again'}" in said.out
    assert "nothing was measured" in said.out
    assert said.err == ""
    expected = actsparse.sparsify(AutoModelForCausalLM.from_pretrained(dense), plan)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), logits(expected))
    text = "The function returns"
    assert AutoTokenizer.from_pretrained(directory)(text) == AutoTokenizer.from_pretrained(dense)(text)
    assert load_file(directory / "model.safetensors").keys() == load_file(dense / "model.safetensors").keys()
    assert [path.name for path in directory.parent.iterdir() if path.name.startswith(".")] == []


def test_a_card_without_a_measurement_says_so(directory: Path) -> None:
    card = ModelCard.load(directory / "README.md")
    assert "Nothing was measured of this model." in card.content
    assert card.data.eval_results is None
    assert (card.data.license, card.data.language) == ("mit", "en")
    assert card.data.library_name == "transformers"
    assert "actsparse" in card.data.tags
    assert "chess" in card.data.tags
    assert card.data.base_model is None  # a path is none


@pytest.mark.parametrize("verb", ["apply", "pack"])
def test_a_cards_numbers_are_those_of_ppl(
    dense: Path, plan: Path, text_file: Path, tmp_path: Path, capsys: Any, verb: str
) -> None:
    made = ["--evaluate", str(text_file), "--evaluate-tokens", "2048", "-o", str(tmp_path / "made")]
    made += ["--plan", str(plan)] if verb == "apply" else ["--text", str(text_file), "--tokens", "600"]
    assert main([verb, str(dense), *made]) == 0
    scored = ["ppl", str(tmp_path / "made"), "--text", str(text_file), "--tokens", "2048", "--json"]
    assert main([*scored, *(["--against", str(dense)] if verb == "pack" else [])]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    card = ModelCard.load(tmp_path / "made" / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["perplexity"] == pytest.approx(found["sparse"]["ppl"], abs=1e-4)
    assert results["kl_divergence"] == pytest.approx(found["divergence"]["value"], abs=1e-4)
    assert results["bits_read"] == pytest.approx(found["sparse"]["bits_read"], abs=1e-4)
    assert f"| perplexity, dense | {found['dense']['ppl']:.4f} " in card.content
    assert f"| read per token, output head included | {found['weights_read']['bytes'] / 1e6:,.1f} MB" in card.content
    assert f"actsparse {verb} {dense} --evaluate" in card.content
    assert "threads" in card.content


def test_verbs_take_the_directory_as_model(
    directory: Path, dense: Path, plan: Path, text_file: Path, capsys: Any
) -> None:
    generate = ["--prompt", "The function returns", "--max-new-tokens", "8", "--json"]
    assert main(["generate", str(directory), *generate]) == 0
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["generate", str(dense), "--plan", str(plan), *generate]) == 0
    theirs = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ours["tokens"] == theirs["tokens"]
    assert ours["weights_read_bytes"] == theirs["weights_read_bytes"] is not None
    assert main(["info", str(directory)]) == 0
    assert "chess" in capsys.readouterr().out
    score = ["--text", str(text_file), "--tokens", "1024", "--json"]
    assert main(["ppl", str(directory), *score]) == 0
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["ppl", str(dense), "--plan", str(plan), *score]) == 0
    assert ours == json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_apply_refuses(dense: Path, plan: Path, directory: Path, tiny: Any, tmp_path: Path, capsys: Any) -> None:
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "other")
    oracle = Plan.load(plan)
    object.__setattr__(oracle, "settings", {**oracle.settings, "evaluation_only": True})
    oracle.save(tmp_path / "oracle.safetensors")
    capsys.readouterr()
    for model, file, target, message in (
        (dense, plan, directory, "exists, expected a new directory"),
        (dense, plan, tmp_path / "no" / "way", "is no directory"),
        (tmp_path / "other", plan, tmp_path / "new", "plan is for another model"),
        (dense, tmp_path / "none", tmp_path / "new", "does not exist"),
        (dense, tmp_path / "oracle.safetensors", tmp_path / "new", "for evaluation only"),
    ):
        assert main(["apply", str(model), "--plan", str(file), "-o", str(target)]) == 2
        said = capsys.readouterr().err.strip()
        assert message in said
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("shape", "stores in another shape than config.json says model.layers.0.mlp.up_proj.weight"),
        ("missing", "lacks model.norm.weight"),
        ("extra", "holds model.layers.9.mlp.up_proj.weight"),
        ("nan", "its weights hold NaN or infinity"),
        ("other weights", "plan is for another model"),
        ("no plan", "plan.safetensors does not exist"),
        ("damaged plan", "is truncated or damaged"),
        ("plan elsewhere", "names the plan '../plan.safetensors', expected plan.safetensors"),
        ("version", "has format '9', expected 2"),
        ("linked weights", "is a link that leads out of its directory"),
        ("linked plan", "is a link that leads out of its directory"),
        ("linked config", "is a link that leads out of its directory"),
        ("index", "lie elsewhere"),
    ],
)
def test_hostile_directories_are_refused(
    directory: Path, plan: Path, tmp_path: Path, capsys: Any, damage: str, message: str
) -> None:
    capsys.readouterr()
    file = directory / "model.safetensors"
    tensors = load_file(file)
    config = json.loads((directory / "config.json").read_text())
    if damage == "shape":
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1].clone()
    elif damage == "missing":
        del tensors["model.norm.weight"]
    elif damage == "extra":
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(3, 3)
    elif damage == "nan":
        tensors["model.layers.1.mlp.up_proj.weight"][5, 100] = torch.nan
    elif damage == "other weights":
        tensors["model.layers.1.mlp.up_proj.weight"] += 1
    elif damage == "no plan":
        (directory / "plan.safetensors").unlink()
    elif damage == "damaged plan":
        (directory / "plan.safetensors").write_bytes(plan.read_bytes()[:-9])
    elif damage == "plan elsewhere":
        config["quantization_config"]["plan"] = "../plan.safetensors"
    elif damage == "version":
        config["quantization_config"]["format_version"] = 9
    elif damage.startswith("linked"):
        name = {"weights": "model.safetensors", "plan": "plan.safetensors", "config": "config.json"}[damage.split()[1]]
        (directory / name).rename(tmp_path / f"outside-{name}")
        (directory / name).symlink_to(tmp_path / f"outside-{name}")
    elif damage == "index":
        file.rename(tmp_path / "elsewhere.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../elsewhere.safetensors")}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if damage in ("shape", "missing", "extra", "nan", "other weights"):
        save_file(tensors, file, metadata={"format": "pt"})
    if damage in ("plan elsewhere", "version"):
        (directory / "config.json").write_text(json.dumps(config))
    assert main(["generate", str(directory), "--prompt", "The function returns", "--max-new-tokens", "2"]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
    if damage not in ("missing", "extra", "nan"):  # about which transformers warns, as for any checkpoint
        with pytest.raises((ValueError, RuntimeError)):
            AutoModelForCausalLM.from_pretrained(directory)


def test_a_snapshot_of_the_hubs_cache_is_read(directory: Path, tmp_path: Path) -> None:
    # There every file is a link to a blob of the same repository.
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert torch.equal(logits(open_model(str(snapshot))), logits(AutoModelForCausalLM.from_pretrained(snapshot)))


HARNESS = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[2], include_defaults=False)
arguments = f"pretrained={sys.argv[1]},trust_remote_code=True"
found = simple_evaluate("hf", arguments, tasks=["tiny_choice"], task_manager=manager, device="cpu", bootstrap_iters=0)
print(json.dumps([[score for score, _ in sample["filtered_resps"]] for sample in found["samples"]["tiny_choice"]]))
"""


def test_the_harness_opens_it_with_remote_code_alone(
    directory: Path,
    folder: Path,  # noqa: F811
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(directory), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])

    def expected(model: Any) -> list[list[float]]:
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(directory), device="cpu"),
            tasks=["tiny_choice"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
        assert found is not None
        return [[score for score, _ in sample["filtered_resps"]] for sample in found["samples"]["tiny_choice"]]

    sparse = open_model(str(directory))
    assert torch.allclose(torch.tensor(scores), torch.tensor(expected(sparse)), atol=1e-4)
    assert not torch.allclose(torch.tensor(scores), torch.tensor(expected(actsparse.restore(sparse))), atol=1e-2)

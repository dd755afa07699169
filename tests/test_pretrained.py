"""Sparse models saved to directories, and opened again by transformers: here, in another process, and without the package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import actsparse
from actsparse.calibration.pack import Settings, pack
from actsparse.cli import main
from actsparse.models import directory, opening
from actsparse.models.sites import ModelError
from actsparse.plan import Plan, PlanError
from actsparse.runtime.layers import SparseFFN, is_columns
from actsparse.runtime.pretrained import ActsparseConfig
from actsparse.runtime.swap import open_model, restore, state_of

TOKENS = torch.arange(1, 60).view(1, -1) * 7 % 4096
# What a process does that has not imported the package: opens DIR, and saves the logits on TOKENS to FILE.
ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM
model, found = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"], found
with torch.no_grad():
    torch.save(model(torch.arange(1, 60).view(1, -1) * 7 % 4096).logits, sys.argv[2])
print("sparse" if hasattr(model, "actsparse_state") else "dense", hasattr(model.config, "quantization_config"))
"""
# What a process does that does not find the package: opens DENSE and PACKED, first as transformers alone does, then with the
# code that lies beside the weights; saves logits to FOLDER, and prints a line of what came of each.
WITHOUT = """
import sys, torch
sys.modules["actsparse"] = None
from pathlib import Path
from transformers import AutoModelForCausalLM
for trusted in (False, True):
    for path in sys.argv[1:3]:
        print("opening", file=sys.stderr, flush=True)
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                path, trust_remote_code=trusted, output_loading_info=True
            )
            assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"], found
            with torch.no_grad():
                logits = model(torch.arange(1, 60).view(1, -1) * 7 % 4096).logits
            torch.save(logits, Path(sys.argv[3]) / f"{trusted}.pt")
            sparse = "sparse" if hasattr(model, "actsparse_state") else "dense"
            print(sparse, hasattr(model.config, "quantization_config"))
        except Exception as error:
            print(type(error).__name__, " ".join(str(error).split()))
"""


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def calibrated(model: Any, tokenizer: Any, text_file: Path, **options: Any) -> Plan:
    plan = actsparse.calibrate(
        model,
        tokenizer,
        str(text_file),
        **{
            "sparsity": 0.5 if options.get("method") != "graded" else 1 - 3.5 / 16,
            "tokens": 512,
            "window": 64,
            **options,
        },
    )
    assert isinstance(plan, Plan)
    return plan


def as_opened(model: Any, path: Path) -> Any:
    """``model`` as transformers opens it: ``.to(dtype)`` also rounds the rotary frequencies, which no checkpoint has."""
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture
def saved(tiny: Callable[..., Any], tokenizer: Any, text_file: Path, tmp_path: Path) -> tuple[Path, Any]:
    """The directory of a sparsified model with columns to lay and thresholds in attention, and the model."""
    model = as_opened(tiny("llama", torch.bfloat16), tmp_path / "ordinary")
    actsparse.sparsify(model, calibrated(model, tokenizer, text_file))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


@pytest.fixture
def packed(tiny: Callable[..., Any], tokenizer: Any, text_file: Path, tmp_path: Path) -> Path:
    """A packed directory."""
    model = tiny("llama", torch.bfloat16, hidden_size=128, head_dim=32, num_attention_heads=4)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    settings = Settings(bits_stored=6, bits_read=3.2, text=str(text_file), tokens=512)
    pack(str(tmp_path / "dense"), tmp_path / "packed", settings)
    return tmp_path / "packed"


@pytest.mark.parametrize(
    ("family", "dtype", "method", "changes"),
    [
        ("llama", torch.float32, "chess", {"tie_word_embeddings": True}),
        ("qwen3", torch.bfloat16, "chess", {}),
        ("mistral", torch.float16, "cats", {}),
        ("gemma", torch.bfloat16, "chess", {}),
        ("llama", torch.bfloat16, "teal", {}),
        ("llama", torch.bfloat16, "graded", {"tie_word_embeddings": True}),
        ("llama", torch.float32, "graded", {"hidden_act": "relu", "mlp_bias": True}),
        ("opt", torch.float32, "relu", {"activation_function": "relu", "ffn_dim": 132, "word_embed_proj_dim": 48}),
        ("llama", torch.float32, "griffin", {}),
    ],
)
def test_a_saved_model_opens_as_the_same_sparse_model(
    tiny: Any,
    tokenizer: Any,
    text_file: Path,
    tmp_path: Path,
    family: str,
    dtype: torch.dtype,
    method: str,
    changes: Any,
) -> None:
    model = as_opened(tiny(family, dtype, **changes), tmp_path / "ordinary")
    before = logits(model)
    options = {"scope": "all"} if method != "griffin" else {}
    plan = calibrated(model, tokenizer, text_file, method=method)
    actsparse.sparsify(model, plan, **options)
    model.save_pretrained(tmp_path / "saved")
    opened, found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(logits(opened), logits(model))
    if method not in ("griffin", "relu"):  # the one answers a prompt densely, the other skips zeros
        assert not torch.equal(logits(opened), before)
    state = state_of(opened)
    assert state is not None
    assert state.plan.rules.keys() == plan.rules.keys()
    # It is a model like any other: nothing of a quantised one.
    assert not getattr(opened, "is_quantized", False)
    assert not hasattr(opened.config, "quantization_config")
    assert torch.equal(logits(restore(opened)), before)
    # And the checkpoint is an ordinary dense one.
    assert torch.equal(logits(opening.open_model(str(tmp_path / "saved"))), before)
    assert torch.equal(logits(open_model(str(tmp_path / "saved"))), logits(model))


def test_generation_and_a_second_round_trip_stay_the_same(saved: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = saved
    opened = AutoModelForCausalLM.from_pretrained(path)
    prompt = TOKENS[:, :9]
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(opened.generate(prompt, **options), model.generate(prompt, **options))
    opened.save_pretrained(tmp_path / "again")
    assert sorted(file.name for file in path.iterdir()) == sorted(file.name for file in (tmp_path / "again").iterdir())
    for file in ("model.safetensors", "plan.safetensors", "config.json", directory.INDEX):
        assert (path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_shards_are_saved_and_opened_and_replace_a_single_file(saved: tuple[Path, Any]) -> None:
    path, model = saved
    model.save_pretrained(path, max_shard_size="200KB")
    shards = sorted(file.name for file in path.glob("model*.safetensors"))
    assert len(shards) > 2
    assert "model.safetensors" not in shards
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))
    model.save_pretrained(path)
    assert [file.name for file in path.glob("model*.safetensors")] == ["model.safetensors"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))


def test_other_readers_are_told_which_files_hold_weights(saved: tuple[Path, Any], packed: Path) -> None:
    # Some take every *.safetensors file unless an index says otherwise; the plan is none of them.
    for path in (saved[0], packed):
        index = json.loads((path / directory.INDEX).read_text())
        named = set(index["weight_map"].values())
        assert named == {file.name for file in path.glob("*.safetensors")} - {directory.PLAN}
        for file in named:
            with safe_open(path / file, framework="pt") as tensors:
                assert {name for name, place in index["weight_map"].items() if place == file} == set(tensors.keys())
        about = json.loads((path / "config.json").read_text())["quantization_config"]
        assert (about["quant_method"], about["plan"]) == ("actsparse", "plan.safetensors")


def test_a_dense_checkpoint_opens_under_a_plan_of_any_path(
    tiny: Any, tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    plan = calibrated(model, tokenizer, text_file)
    plan.save(tmp_path / "any.safetensors")
    opened = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=ActsparseConfig(plan=tmp_path / "any.safetensors")
    )
    assert torch.equal(logits(opened), logits(actsparse.sparsify(model, plan)))


def test_weights_exist_once(saved: tuple[Path, Any]) -> None:
    opened = AutoModelForCausalLM.from_pretrained(saved[0])
    ffn = opened.model.layers[0].mlp
    assert isinstance(ffn, SparseFFN)
    assert is_columns(ffn.projection("down").weight)
    stored = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for parameter in opened.parameters()
    }
    assert sum(stored.values()) == sum(
        parameter.numel() * parameter.element_size() for parameter in opened.parameters()
    )


def test_bench_times_a_packed_directory_with_its_own_plan(packed: Path, capsys: Any) -> None:
    options = ["--repeats", "1", "--new-tokens", "2", "--prompt-tokens", "4", "--no-llama-cpp", "--json"]
    assert main(["bench", str(packed), *options]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [row["name"] for row in rows] == ["hf-eager", "packed", "graded-3.2"]
    # What is asked for is not passed over.
    assert main(["bench", str(packed), "--dtype", "float32", *options]) == 2
    assert "is packed: expected auto" in capsys.readouterr().err
    for asked in (
        ["--method", "griffin"],
        ["--bits-read", "3"],
        ["--bits-stored", "8"],
        ["--no-attention"],
        ["--calibration-tokens", "64"],
    ):
        assert main(["bench", str(packed), *asked, *options]) == 2
        assert f"is packed, {asked[0].replace('--no-', '--')} would calibrate" in capsys.readouterr().err


def test_bench_times_another_method_on_a_saved_directory(saved: tuple[Path, Any], capsys: Any) -> None:
    options = ["--repeats", "1", "--new-tokens", "2", "--prompt-tokens", "4", "--no-llama-cpp", "--json"]
    assert (
        main(["bench", str(saved[0]), "--method", "teal", "--sparsity", "0.4", "--calibration-tokens", "64", *options])
        == 0
    )
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [row["name"] for row in rows] == ["hf-eager", "dense", "teal"]
    # So does a setting alone: the directory's own plan is not of it.
    read = []
    for setting in ([], ["--no-attention", "--calibration-tokens", "64"]):
        assert main(["bench", str(saved[0]), *setting, *options]) == 0
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
        assert [row["name"] for row in rows] == ["hf-eager", "dense", "chess"]
        read.append(rows[-1]["weights_read_bytes"])
    assert read[1] != read[0]


@pytest.mark.parametrize("tied", [False, True])
def test_packed_directories_open_through_transformers(
    tiny: Any, tokenizer: Any, text_file: Path, tmp_path: Path, tied: bool
) -> None:
    model = tiny("llama", torch.bfloat16, hidden_size=128, head_dim=32, num_attention_heads=4, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    path = tmp_path / "packed"
    pack(str(tmp_path / "dense"), path, Settings(bits_read=3.2, text=str(text_file), tokens=512))
    expected = open_model(str(path))
    opened, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(logits(opened), logits(expected))
    assert torch.equal(logits(opened, TOKENS[:, :1]), logits(expected, TOKENS[:, :1]))
    assert opened.dtype == torch.bfloat16
    # Saved again, it is the same directory.
    for one in (opened, expected):
        one.save_pretrained(tmp_path / "again")
        for file in path.glob("*.safetensors"):
            with (
                safe_open(file, framework="pt") as old,
                safe_open(tmp_path / "again" / file.name, framework="pt") as new,
            ):
                assert old.keys() == new.keys()
                assert all(torch.equal(old.get_tensor(name), new.get_tensor(name)) for name in old.keys())  # noqa: SIM118
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(expected))
    restore(opened)
    with pytest.raises(ModelError, match="was restored: expected it sparsified"):
        opened.save_pretrained(tmp_path / "restored")
    with pytest.raises(ModelError, match="got max_shard_size, expected no options"):
        expected.save_pretrained(tmp_path / "restored", max_shard_size="1GB")
    assert not (tmp_path / "restored").exists()


def test_version_1_of_packed_directories_is_still_read(packed: Path) -> None:
    from safetensors.torch import load_file, save_file

    expected = logits(open_model(str(packed)))
    for file in packed.glob("actsparse-*.safetensors"):
        tensors = load_file(file)
        codes = {name.removesuffix(".gain") for name in tensors if name.endswith(".gain")}
        save_file(
            {
                f"{name[:-7]}.codes" if name[:-7] in codes and name.endswith(".weight") else name: one
                for name, one in tensors.items()
            },
            file,
        )
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (packed / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(open_model(str(packed))), expected)


def test_other_processes_open_them_without_importing_the_package(
    saved: tuple[Path, Any], packed: Path, tmp_path: Path
) -> None:
    paths = (saved[0], packed)
    # Together: what takes long is importing transformers.
    started = [start(ELSEWHERE, str(path), str(tmp_path / f"{path.name}.pt")) for path in paths]
    for path, process in zip(paths, started, strict=True):
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.split()[-2:] == ["sparse", "False"]
        assert torch.equal(torch.load(tmp_path / f"{path.name}.pt"), logits(open_model(str(path))))


def test_without_the_package_a_dense_checkpoint_is_the_dense_model_and_packed_weights_are_refused(
    saved: tuple[Path, Any], packed: Path, tmp_path: Path
) -> None:
    path, model = saved
    done = run(WITHOUT, str(path), str(packed), str(tmp_path))
    assert done.returncode == 0, done.stderr
    alone, alone_packed, beside, beside_packed = done.stdout.splitlines()
    said = done.stderr.split("opening\n")
    # transformers alone.
    assert alone.split()[0] == "dense"
    assert "Unknown quantization type, got actsparse" in said[1]
    assert alone_packed.split()[0] not in ("dense", "sparse")
    assert "q_proj.weight" in alone_packed + said[2]  # of another shape
    # The code that lies beside the weights.
    assert beside == "dense False"
    assert "actsparse is not installed" in said[3]
    assert "opens as the dense model" in said[3]
    assert "holds packed weights, which only actsparse reads: pip install actsparse" in beside_packed
    for trusted in (False, True):
        assert torch.equal(torch.load(tmp_path / f"{trusted}.pt"), logits(restore(model)))


def test_the_order_of_imports_does_not_matter(saved: tuple[Path, Any]) -> None:
    code = "import sys, {}\nimport actsparse\nfrom transformers import AutoModelForCausalLM\n"
    code += "print(hasattr(AutoModelForCausalLM.from_pretrained(sys.argv[1]), 'actsparse_state'))"
    orders = ("actsparse", "transformers", "torch, transformers.quantizers")
    for process in [start(code.format(first), str(saved[0])) for first in orders]:
        out, err = process.communicate()
        assert out.split() == ["True"], err


def test_importing_the_package_alone_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, actsparse; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert run(code).returncode == 0


def test_a_plan_for_another_model_is_refused(
    saved: tuple[Path, Any], tiny: Any, tokenizer: Any, text_file: Path
) -> None:
    other = tiny("llama", torch.bfloat16, seed=1)
    calibrated(other, tokenizer, text_file).save(saved[0] / "plan.safetensors")
    with pytest.raises(PlanError, match="plan is for another model"):
        AutoModelForCausalLM.from_pretrained(saved[0])


def test_loading_says_nothing_when_all_is_well(saved: tuple[Path, Any], packed: Path, capfd: Any) -> None:
    logging.disable_progress_bar()
    for path in (saved[0], packed):
        AutoModelForCausalLM.from_pretrained(path)
    logging.enable_progress_bar()
    assert capfd.readouterr().err == ""

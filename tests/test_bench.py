"""The measurement's accounting and refusals; no test depends on how long anything takes."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from actsparse import kernels
from actsparse.cli import doctor, main
from actsparse.measure.bench import packed, peer, rows, run, shapes
from actsparse.measure.reading import weights_read
from actsparse.methods import make
from actsparse.models.sites import ModelError
from actsparse.runtime.swap import restore, sparsify, state_of

OPT = {"ffn_dim": 256, "word_embed_proj_dim": 48, "num_key_value_heads": 6}
LLAMA_CPP = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def small(**options) -> LlamaConfig:
    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**shape | options)


@pytest.fixture(scope="module")
def model():
    return shapes.random_model(small(), "bfloat16")


@pytest.fixture(scope="module")
def plans(model):
    def quiet(done: int, total: int) -> None:
        pass

    return run.calibrate_on_random_tokens(model, make("chess"), [0.3, 0.7], tokens=512, progress=quiet)


def test_named_shapes() -> None:
    one = shapes.config_of("llama-1b")
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(one).parameters())
    assert 1.09e9 < parameters < 1.11e9
    assert shapes.config_of("llama-3-8b").vocab_size == 128256
    with pytest.raises(ModelError, match="shape 'llama-9b' is unknown: expected one of llama-1b, llama-3-8b"):
        shapes.config_of("llama-9b")


def test_random_weights_are_random_and_the_rotary_tables_real(model) -> None:
    first, second = (layer.mlp.up_proj.weight.detach().float() for layer in model.model.layers)
    assert float(first.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.03
    assert torch.equal(model.model.norm.weight, torch.ones(128, dtype=torch.bfloat16))
    assert float(model.model.rotary_emb.inv_freq[0]) == 1.0


def test_a_model_that_does_not_fit_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(shapes, "available_bytes", lambda: 12_000_000_000)
    assert main(["bench", "--shape", "llama-3-8b"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ("actsparse: llama-3-8b in bfloat16 needs 18.2 GB of memory, 12.0 GB is available\n")
    assert captured.out == ""


def test_a_shape_that_does_not_fit_is_made_packed(monkeypatch, capsys) -> None:
    shape = small().to_dict()
    kept = {name: shape[name] for name in shapes.SHAPES["llama-1b"]}
    monkeypatch.setitem(shapes.SHAPES, "tiny", kept)
    monkeypatch.setattr(shapes, "fits_with_codes", lambda config, dtype, bits_stored: False)
    options = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1", "--calibration-tokens", "64"]
    arguments = ["bench", "--shape", "tiny", "--method", "graded", "--bits-read", "3.0,4.0", *options]
    assert main([*arguments, "--no-llama-cpp", "--json"]) == 0
    captured = capsys.readouterr()
    assert "tiny in bfloat16 and packed does not fit the memory: made packed only" in captured.err
    rows = {row["name"]: row for row in json.loads(captured.out.splitlines()[-1])["results"]}
    assert list(rows) == ["hf-eager", "packed", "graded-3.0", "graded-4.0"]
    assert {row["weights"] for row in rows.values()} == {"6 bits"}
    assert rows["graded-3.0"]["bits_read"] == pytest.approx(3.0, abs=0.3)
    assert rows["graded-4.0"]["bits_read"] == pytest.approx(4.0, abs=0.3)
    read = [rows[name]["weights_read_bytes"] for name in ("graded-3.0", "graded-4.0", "packed")]
    assert read[0] < read[1] < read[2]


def test_packed_weights_are_of_the_usual_size_and_refused_where_they_do_not_fit(monkeypatch) -> None:
    made = packed.random_packed(small(), 6, name="tiny")
    columns = kernels.unpack_columns(made.model.layers[1].mlp.down_proj.packed, 0, 256, torch.float32)
    assert float(columns.std()) == pytest.approx(0.02, rel=0.1)
    assert float(made.model.rotary_emb.inv_freq[0]) == 1.0
    monkeypatch.setattr(packed, "available_bytes", lambda: 4_000_000_000)
    with pytest.raises(ModelError, match=r"llama-3-8b in 6 bits needs 9.\d GB of memory, 4.0 GB is available"):
        packed.random_packed(shapes.config_of("llama-3-8b"), 6, name="llama-3-8b")


def test_available_memory_is_plausible() -> None:
    available = shapes.available_bytes()
    assert available is None or 1 << 20 < available < 1 << 50


def test_rows_count_what_was_read(model, plans) -> None:
    settings = run.Settings(prompt_tokens=8, new_tokens=4, repeats=2, llama_cpp=False)
    report = run.measure(model, plans, settings, say=lambda line: None)
    assert state_of(model) is None
    document = report.document()
    rows = {(row["name"], row["sparsity"]): row for row in document["results"]}
    assert list(rows) == [("hf-eager", None), ("dense", None), ("chess", 0.3), ("chess", 0.7)]
    dense = weights_read(model).bytes
    assert rows["hf-eager", None]["weights_read_bytes"] == dense
    assert rows["dense", None]["weights_read_bytes"] == dense
    assert rows["chess", 0.7]["weights_read_bytes"] < rows["chess", 0.3]["weights_read_bytes"] < dense
    assert rows["chess", 0.7]["ffn_sparsity"] == pytest.approx(0.7, abs=0.1)
    for row in document["results"]:
        assert row["decode_spread"][0] <= row["decode_tok_s"] <= row["decode_spread"][1]
        assert row["achieved_gb_s"] == pytest.approx(row["decode_tok_s"] * row["weights_read_bytes"] / 1e9)
        assert row["ceiling_tok_s"] == pytest.approx(document["read_gb_s"] * 1e9 / row["weights_read_bytes"])
        native = row["path"] == "native"
        assert (0 < row["overhead_share"] < 1) if native else row["overhead_share"] is None
    assert len(report.read_gb_s) == 1 + 2 * 4


def test_neurons_chosen_per_prompt_are_decoded_natively() -> None:
    # Six layers, because the first of them stay dense.
    model = shapes.random_model(small(num_hidden_layers=6), "bfloat16")
    method = make("coreinfer", mode="stability")
    plans = run.calibrate_on_random_tokens(model, method, [0.6], tokens=512, progress=lambda done, total: None)
    settings = run.Settings(prompt_tokens=8, new_tokens=3, repeats=1, llama_cpp=False)
    _, dense, sparse = run.measure(model, plans, settings, say=lambda line: None).rows
    assert sparse.error is not None
    assert sparse.weights_read_bytes < dense.weights_read_bytes
    assert sparse.ffn_sparsity == pytest.approx(0.6 * 5 / 6, abs=0.05)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("cohere", {"intermediate_size": 256}, "family cohere has no native decode step"),
        ("opt", OPT | {"do_layer_norm_before": False}, "its norms stand after the sums"),
    ],
)
def test_models_without_a_native_step_are_timed_through_their_modules(
    family: str, changes: dict[str, Any], reason: str, tiny
) -> None:
    model = tiny(family, torch.bfloat16, **changes)
    quiet = {"progress": lambda done, total: None}
    plans = run.calibrate_on_random_tokens(model, make("chess"), [0.5], tokens=512, **quiet)
    said: list[str] = []
    report = run.measure(model, plans, run.Settings(8, 3, 2), say=said.append)
    eager, sparse = report.rows
    assert said[0] == f"{reason}: decoding goes through transformers' modules"
    assert (eager.path, sparse.path) == ("transformers", "transformers")
    assert set(report.skipped) == {"dense", "llama.cpp"}
    assert eager.weights_read_bytes == weights_read(model).bytes > sparse.weights_read_bytes
    assert sparse.ffn_sparsity == pytest.approx(0.5, abs=0.15)
    assert len(sparse.decode_tok_s) == 2
    assert report.document()["results"][1]["overhead_share"] is None
    assert state_of(model) is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {"intermediate_size": 256}), ("phi3", {"intermediate_size": 256}), ("opt", OPT)],
)
def test_families_with_a_native_step_are_checked_against_their_modules(
    family: str, changes: dict[str, Any], tiny
) -> None:
    model = tiny(family, torch.bfloat16, **changes)
    method = make("chess")
    plans = run.calibrate_on_random_tokens(model, method, [0.5], tokens=512, progress=lambda done, total: None)
    settings = run.Settings(8, 3, 1, llama_cpp=False)
    _, dense, sparse = run.measure(model, plans, settings, say=lambda line: None).rows
    assert dense.error is not None
    assert sparse.error is not None
    assert sparse.weights_read_bytes < dense.weights_read_bytes
    assert state_of(model) is None


def test_wrong_logits_are_not_timed(model, plans, monkeypatch) -> None:
    settings = run.Settings(prompt_tokens=4, new_tokens=2, repeats=1, llama_cpp=False)
    step = run.Decoder.step
    monkeypatch.setattr(run.Decoder, "step", lambda self, token: step(self, token).roll(1))
    with pytest.raises(ModelError, match=r"native decode step of dense differs .* of logits, .* not timed"):
        run.measure(model, plans, settings, say=lambda line: None)


def test_relative_errors_are_never_nan() -> None:
    zero, one, nan = torch.zeros(3), torch.ones(3), torch.tensor([1, float("nan"), 1])
    assert rows.relative_error(zero, zero) == 0
    assert rows.relative_error(1.5 * one.bfloat16(), one) == pytest.approx(0.5)
    for got, want in ((one, zero), (nan, one), (one, nan), (nan, zero)):
        assert rows.relative_error(got, want) == float("inf")


@pytest.mark.parametrize("sparse", [False, True])
def test_a_wrong_layer_is_noticed(model, plans, sparse) -> None:
    settings = run.Settings(prompt_tokens=4, new_tokens=2, repeats=1)
    if sparse:
        sparsify(model, plans[1])
    native = run._Native(model, torch.arange(4), settings)
    allowed = run.tolerance(torch.bfloat16, 1, sparse=sparse)
    assert native.check(model) < allowed
    layer = native.decoder.native.layer[1]
    layer.ffn.up, layer.ffn.gate = layer.ffn.gate, layer.ffn.up
    assert native.check(model) > allowed
    restore(model)


def test_the_context_is_a_limit(model) -> None:
    settings = run.Settings(prompt_tokens=250, new_tokens=7)
    with pytest.raises(
        ModelError, match=r"250 \+ 7 tokens were asked for, expected at most the model's context of 256"
    ):
        run.measure(model, [], settings, say=lambda line: None)


@pytest.mark.parametrize("name", peer.FORMATS)
@pytest.mark.skipif(not LLAMA_CPP, reason="needs llama-cpp-python and gguf")
def test_llama_cpp_takes_the_file(tmp_path, name) -> None:
    config = small(head_dim=32)
    path = tmp_path / "random.gguf"
    peer.write(path, config, name)
    timing = peer.measure(path, threads=1, prompt_tokens=4, new_tokens=2)
    assert timing.decode_tok_s > 0
    assert timing.prefill_tok_s > 0


def test_peer_bytes_follow_the_format(model) -> None:
    config = small()
    assert peer.weights_bytes(config, "F16") == weights_read(model).bytes
    assert peer.weights_bytes(config, "Q8_0") == peer.weights_bytes(config, "F16") * 17 // 32


def test_peer_says_why_not(monkeypatch, tmp_path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no gguf")
    with pytest.raises(peer.PeerError, match=r"llama\.cpp failed: "):
        peer.measure(broken, threads=1, prompt_tokens=2, new_tokens=1)
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    assert "llama-cpp-python is not installed" in str(peer.obstacle(small(), tmp_path))


def test_verb_bench(model, tmp_path, capsys) -> None:
    model.save_pretrained(tmp_path)
    arguments = [str(tmp_path), "--sparsity", "0.5", "--calibration-tokens", "128", "--no-llama-cpp"]
    assert main(["bench", *arguments, "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert {"machine", "read_gb_s", "results"} <= set(document)
    assert [row["name"] for row in document["results"]] == ["hf-eager", "dense", "chess"]
    assert "physical ceiling" in out.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "llama-2b"], "shape 'llama-2b' is unknown"),
        (["--shape", "llama-1b", "--plan", "p"], "plan p cannot fit the random weights of --shape"),
        (["/nowhere/model"], "does not exist"),
        (["--shape", "llama-1b", "--method", "nope"], "method 'nope' is unknown"),
    ],
)
def test_verb_bench_refuses(arguments, message, capsys) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_verb_doctor(capsys, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "read_bandwidth", lambda: (10.0, 9.0, 11.0))
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["GPU"].endswith("none that torch can use")
    assert facts["read bandwidth"].startswith("10.0 GB/s (9.0 to 11.0)")
    monkeypatch.setattr(kernels.cpu, "missing", "the library is not there")
    assert "reference path" in doctor.examine()["native kernels"]

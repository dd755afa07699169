"""What only a GPU can show: long runs, calibration and the measurement on it, against the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from actsparse.calibration.collect import Calibration
from actsparse.cli import doctor
from actsparse.kernels.cuda import compiler
from actsparse.measure.bench import packed, run
from actsparse.methods import make
from actsparse.methods.base import Targets
from actsparse.models.text import Windows
from actsparse.plan import Plan
from actsparse.runtime.decode import Decoder
from actsparse.runtime.swap import prompts_of, sparsify

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(bool(compiler.missing()), reason=compiler.missing() or "a GPU is there"),
]


def test_doctor_names_the_gpu_and_its_kernels() -> None:
    found = doctor.gpus()
    assert torch.cuda.get_device_name(0) in found
    assert re.search(r"CUDA \d+\.\d+, driver for \d+\.\d+: kernels cuda-sm_\d+", found)


def test_ten_thousand_steps_do_not_drift(tiny: Callable[..., Any]) -> None:
    model = tiny(dtype=torch.bfloat16, intermediate_size=136, max_position_embeddings=16384).cuda()
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4096, (10064,), generator=generator)
    decoder, kept = Decoder(model, len(tokens)), {}
    decoder.prefill(tokens[:64].cuda())
    for index, token in enumerate(tokens[64:].tolist()):
        logits = decoder.step(token)
        if index in (0, 100, 1000, 5000, 9999):
            kept[index] = logits.clone()
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=tokens[None].cuda(), use_cache=False).last_hidden_state[0]
        for index, got in kept.items():
            want = model.lm_head(hidden[64 + index]).float()
            assert float((got - want).norm() / want.norm()) <= run.tolerance(torch.bfloat16, 2, sparse=False), index


@pytest.mark.parametrize("method", ["chess", "teal", "wina", "svdp"])
def test_plans_of_cpu_and_gpu_agree(method: str, tiny: Callable[..., Any]) -> None:
    options = {"rank": 16} if method == "svdp" else {}
    plans: list[Plan] = []
    for device in ("cpu", "cuda"):
        model = tiny(dtype=torch.bfloat16, hidden_act="relu" if method == "svdp" else "silu").to(device)
        tokens = torch.randint(4096, (16, 256), generator=torch.Generator().manual_seed(3))
        made = make(method, **options)
        work = Calibration(model, Windows(tokens, "random tokens", ("",) * len(tokens)), [made])
        plans.append(work.solve(made, work.collect()[method], Targets(0.5)))
    one, other = plans
    assert one.rules.keys() == other.rules.keys()
    for site, share in one.achieved.items():
        assert other.achieved[site] == pytest.approx(share, abs=0.005)
    for name, rule in one.rules.items():
        if "predictor" not in name:  # singular vectors may turn
            torch.testing.assert_close(other.rules[name], rule, rtol=0.02, atol=1e-6)


def test_the_measurement_on_a_gpu(tiny: Callable[..., Any]) -> None:
    model = tiny(dtype=torch.bfloat16, intermediate_size=128).cuda()
    quiet = {"progress": lambda done, total: None}
    plans = run.calibrate_on_random_tokens(model, make("chess"), [0.5], tokens=512, **quiet)
    report = run.measure(model, plans, run.Settings(8, 4, 2), say=lambda line: None)
    rows = {row.name: row for row in report.rows}
    assert {"hf-eager", "dense", "chess", "cublas-products"} <= set(rows)
    assert rows["chess"].weights_read_bytes < rows["dense"].weights_read_bytes
    assert rows["dense"].path == rows["chess"].path == "native"
    assert rows["chess"].error is not None
    assert rows["chess"].memory_bytes < 1.5 * rows["dense"].memory_bytes
    assert report.document()["results"][0]["decode_tok_s"] > 0


def test_the_measurement_of_packed_weights_on_a_gpu(tiny: Callable[..., Any]) -> None:
    config = tiny(dtype=torch.bfloat16, intermediate_size=128).config
    model = packed.random_packed(config, 6, name="tiny")
    plans = packed.plans_on_random_tokens(model, [3.0], tokens=256)
    report = run.measure(model.cuda(), plans, run.Settings(16, 4, 2), say=lambda line: None)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["hf-eager", "packed", "graded-3.0"]
    assert rows["packed"].path == rows["graded-3.0"].path == "native"
    assert rows["graded-3.0"].weights_read_bytes < 0.6 * rows["packed"].weights_read_bytes
    assert rows["packed"].error is not None
    assert rows["packed"].error < 0.01
    assert "cublas-products" in report.skipped


@pytest.mark.parametrize("mode", ["auto", "stability", "blend"])
def test_neurons_of_a_text_are_chosen_on_the_gpu(mode: str, tiny: Callable[..., Any]) -> None:
    model = tiny("llama", torch.bfloat16, intermediate_size=136, max_position_embeddings=512)
    method = make("coreinfer", mode=mode, clusters=2)
    plan = run.calibrate_on_random_tokens(model, method, [0.5], tokens=2048, progress=lambda done, total: None)[0]
    sparsify(model.to("cuda"), plan)
    decoder, fresh = Decoder(model, 400), Decoder(model, 400)
    text = torch.randint(4096, (330,), generator=torch.Generator().manual_seed(3))
    decoder.prefill(text[:300])
    prompts = prompts_of(model)
    assert prompts is not None
    session = decoder._session
    assert session is not None
    # The same sums choose the same neurons on a CPU.
    rule, first = prompts.rule, len(prompts.rule.marks(prompts.rule.half(300))) if prompts.rule.halves else None
    sums = {layer: tally.sums(first) for layer, tally in session.tallies[0].items()}
    on_cpu = rule.choose({layer: each.cpu() for layer, each in sums.items()})
    assert on_cpu.facts["mode"] == session.choices[0].facts["mode"]
    for layer, neurons in on_cpu.neurons.items():
        assert torch.equal(neurons, session.choices[0].neurons[layer].cpu())
    # A second turn after decoded tokens, and all of it as one text.
    token = 7
    for _ in range(3):
        decoder.step(token)
    got = decoder.prefill(text[300:])
    whole = torch.cat([text[:300], torch.full((3,), token), text[300:]])
    want = fresh.prefill(whole)
    assert float((got - want).norm() / want.norm()) < run.tolerance(torch.bfloat16, 2, sparse=False)
    assert float((decoder.step(5) - fresh.step(5)).norm() / want.norm()) < 0.1

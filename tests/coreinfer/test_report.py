"""The report on stability and similarity of the chosen neurons."""

from __future__ import annotations

import json

import pytest
import torch

from actsparse.measure.neuron_report import neuron_report, write
from actsparse.methods.base import MethodError

from .cases import LAYERS, N, Words, texts, values_of


def test_report_of_stability_and_similarity(model, tmp_path):
    file = tmp_path / "text.jsonl"
    rows = [{"text": t, "domain": "ab"[i % 2]} for i, t in enumerate(texts(6, 40))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = neuron_report(model, Words(), str(file), alpha=0.1, beta=0.5, tokens=None, window=32)
    assert report.positions == [4, 8, 16, 32]
    assert report.texts == [3, 3]
    values = torch.cat([values_of(model, torch.tensor([Words()(row["text"])["input_ids"][:32]])) for row in rows], 1)
    core = values.abs() >= values.abs().sort(-1, descending=True).values[..., [round(0.1 * N) - 1]]

    def members(begin, end):
        level = values.abs().sort(-1, descending=True).values[..., [round(0.1 * N) - 1]]
        score = core[:, :, begin:end].double().sum(2) + 1e-6 * (values.abs() / level)[:, :, begin:end].double().sum(2)
        return torch.zeros_like(score).scatter_(-1, score.topk(N // 2).indices, 1.0)

    whole = (members(0, 8) * members(0, 32)).sum(-1).mean(1) / (N // 2)
    following = (members(0, 8) * members(8, 16)).sum(-1).mean(1) / (N // 2)
    for layer in range(LAYERS):
        assert report.whole[layer][1] == pytest.approx(float(whole[layer]), abs=0.01)
        assert report.following[layer][1] == pytest.approx(float(following[layer]), abs=0.01)
        assert report.whole[layer][-1] == 1
    sets = members(0, 32)
    pairs = [(0, 2), (0, 4), (2, 4)]
    want = sum(float((sets[:, i] * sets[:, j]).sum()) for i, j in pairs) / (3 * LAYERS * (N // 2))
    assert report.similarity[0][0] == pytest.approx(want, abs=0.01)
    written = {path.name for path in write(report, tmp_path / "out")}
    assert {"neurons.json"} <= written <= {"neurons.json", "stability.png", "similarity.png"}
    with pytest.raises(MethodError, match="beta is 2, expected 0 < beta <= 1"):
        neuron_report(model, Words(), str(file), beta=2)

"""Frequencies per cluster, the modes that use them, settings and plans that are refused."""

from __future__ import annotations

import json

import pytest
import torch

from actsparse import Plan, calibrate, sparsify
from actsparse.methods.base import MethodError
from actsparse.methods.coreinfer import ENOUGH, LEAD, PRIOR_TOKENS, CoreRule, cluster, elbow
from actsparse.methods.statistics import Batch
from actsparse.models.caches import cache_of
from actsparse.models.text import TextError
from actsparse.plan import PlanError
from actsparse.runtime.swap import state_of

from .cases import N, Words, session_of, stability, texts, values_of


def test_calibration_stores_frequencies_per_cluster(model, tmp_path):
    documents = texts()
    path, file = tmp_path / "plan", tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": t, "domain": "ab"[i % 2]}) + "\n" for i, t in enumerate(documents)))
    plan = calibrate(
        model, Words(), str(file), method="coreinfer", mode="similarity", clusters="domains", alpha=0.1,
        sparsity=0.5, window=32, tokens=None, output=path,
    )  # fmt: skip
    tokens = torch.tensor([Words()(text)["input_ids"][:32] for text in documents])
    values = values_of(model, tokens)
    level = values.abs().sort(-1, descending=True).values[..., [round(0.1 * N) - 1]]
    frequency = (values.abs() >= level).float().mean(2)  # [layers, W, N]
    assert plan.settings["windows_per_cluster"] == [12, 12]
    want = torch.stack([frequency[1:, kind::2].mean(1) for kind in (0, 1)], 1)
    torch.testing.assert_close(plan.rules["prompt.frequency"], want)
    sparsify(model, path)
    for kind in (0, 1):
        prompt = torch.tensor([Words()(texts(seed=5)[kind])["input_ids"][:12]])
        own = values_of(model, prompt)[1, 0].abs()
        own = (own >= own.sort(1, descending=True).values[:, [round(0.1 * N) - 1]]).float().mean(0)
        nearest = int((want[0] - own).norm(dim=1).argmin())
        choice = session_of(model, cache_of(model(prompt, use_cache=True))).choices[0]
        assert choice.facts["cluster"] == "ab"[nearest]
        for layer in (1, 2):
            score, neurons = want[layer - 1, nearest].clone(), choice.neurons[layer].long()
            lowest = score[neurons].min()
            score[neurons] = -1
            assert lowest >= score.max() - 1e-6


@pytest.mark.parametrize(("tokens", "mode"), [(12, "similarity"), (400, "stability")])
def test_auto_and_blend_follow_the_stated_criterion(tokens: int, mode: str):
    torch.manual_seed(0)
    settings = {"layers": [0, 0], "counts": [8], "alpha": 0.1, "ranking": "magnitude", "feature_layer": 0,
                "clusters": ["a", "b"], "sparse": False}  # fmt: skip
    frequency = torch.rand(1, 2, 40)
    half = tokens // 2
    values = torch.randn(tokens, 40) + torch.linspace(0, 1, 40)
    rules = {mode: CoreRule({**settings, "mode": mode}, {"prompt.frequency": frequency}) for mode in ("auto", "blend")}
    scores = {0: torch.stack([rules["auto"].score(values[:half]), rules["auto"].score(values[half:])])}
    core = (values.abs() >= values.abs().sort(1, descending=True).values[:, 3:4]).float()
    force = values.abs() / values.abs().sort(1, descending=True).values[:, 3:4]
    halves = [core[:half].sum(0), core[half:].sum(0)]
    nearest = int(torch.cdist(halves[0][None] / half, frequency[0])[0].argmin())
    own = (halves[0] + force[:half].sum(0) / 1e3).topk(8).indices
    other = frequency[0, nearest].topk(8).indices
    choice = rules["auto"].choose(scores)
    assert choice.facts["own"] == pytest.approx(float(halves[1][own].sum() / halves[1].topk(8).values.sum()))
    lead = (halves[1][own].sum() - halves[1][other].sum()) / halves[1].topk(8).values.sum()
    assert choice.facts["mode"] == ("stability" if lead > LEAD * (half**-0.5 - ENOUGH**-0.5) else "similarity")
    assert choice.facts["mode"] == mode
    whole = int(torch.cdist(core.mean(0)[None], frequency[0])[0].argmin())
    force = force.sum(0)
    want = core.sum(0) + force / (1 + force.max()) + PRIOR_TOKENS * frequency[0, whole]
    assert rules["blend"].choose({0: scores[0].sum(0, keepdim=True)}).neurons[0].tolist() == sorted(
        want.topk(8).indices.tolist()
    )
    # A single token cannot be split: its cluster decides.
    one = rules["auto"].score(values[:1])
    assert rules["auto"].choose({0: torch.stack([torch.zeros_like(one), one])}).facts["mode"] == "similarity"


def test_clusters():
    points = torch.cat([torch.randn(20, 4) * 0.1 + 5 * k for k in range(3)])
    labels, names = cluster(points, ["x"] * 60, "silhouette")
    assert len(names) == 3
    assert all(len(set(labels[20 * k : 20 * k + 20].tolist())) == 1 for k in range(3))
    assert len(cluster(points, ["x"] * 60, "elbow")[1]) == 3
    assert cluster(points[:2], ["b", "a"], "domains")[0].tolist() == [1, 0]
    assert elbow([100, 20, 10, 5, 1]) == 1
    with pytest.raises(MethodError, match="no domain labels"):
        cluster(points, [""] * 60, "domains")
    with pytest.raises(MethodError, match="clusters is 9, expected at most the text's 4 windows"):
        cluster(points[:4], [""] * 4, 9)


def test_statistics_resume(model):
    from actsparse.methods.coreinfer import CoreCounts

    values = torch.randn(4, 6, 16)
    whole, part, rest = (CoreCounts(0.2, "magnitude", sparse=False) for _ in range(3))
    whole.update({"value": values}, Batch(0, ("a", "b", "a", "c")))
    part.update({"value": values[:2]}, Batch(0, ("a", "b")))
    rest.load_state(part.state())
    rest.update({"value": values[2:]}, Batch(2, ("a", "c")))
    assert torch.equal(rest.frequency, whole.frequency)
    assert rest.domains == ("a", "b", "a", "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha is 0, expected 0 < alpha <= 1"),
        ({"mode": "x"}, "mode is 'x', expected one of"),
        ({"ranking": "positive"}, "ranking positive is for ReLU models"),
        ({"layers": "2-1"}, "layers is '2-1', expected 0 <= first <= last"),
        ({"layers": "1-9"}, "layers is 1-9, the model's last layer is 2"),
        ({"clusters": "many"}, "clusters is 'many', expected"),
    ],
)
def test_settings_are_refused_in_one_line(model, options, message):
    with pytest.raises(MethodError, match=message):
        calibrate(model, None, None, method="coreinfer", **{"mode": "stability", **options})


def test_bad_plans_are_refused(model):
    with pytest.raises(TextError, match="no text given"):
        calibrate(model, None, None, method="coreinfer")
    with pytest.raises(PlanError, match="scope is 'all', expected decode"):
        calibrate(model, None, None, method="griffin", scope="all")
    plan = stability(model)
    for change, message in (
        ({"layers": [0, 9]}, r"prompt.layers is \[0, 9\]"),
        ({"counts": [1]}, "prompt.counts is"),
        ({"counts": [0, 5]}, "prompt.counts is"),
        ({"rule": "x"}, "prompt rule 'x' is unknown"),
        ({"mode": "similarity"}, "feature_layer|prompt.frequency"),
        ({"alpha": "x"}, "'alpha' is 'x'"),
    ):
        bad = Plan(**{**vars(plan), "prompt": {**plan.prompt, **change}})
        with pytest.raises(PlanError, match=message):
            sparsify(model, bad)
        assert state_of(model) is None

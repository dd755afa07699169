"""The two claims behind sentence-level core neurons, tested on a model: are the sets stable, and do similar texts share them?

For every text and layer the core neurons (:mod:`actsparse.methods.coreinfer`) of its first t tokens are compared with those
of all its tokens, of the t tokens that follow (what decoding would want), and of other texts.  The measure is the overlap
of two sets of equal size: shared neurons over the size, so that sets chosen at random share a fraction beta.

Shape letters: W texts, T tokens, N neurons, P positions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from actsparse.kernels.reference import core_of
from actsparse.methods.base import MethodError
from actsparse.methods.coreinfer import core_level, strengths
from actsparse.models import sites, text
from actsparse.plan import PlanError
from actsparse.runtime.swap import restore

FIRST_POSITION = 4


class Progress(Protocol):
    """Told after every text how many tokens are done, of how many."""

    def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class NeuronReport:
    """Overlaps, means over the texts.

    Attributes:
        alpha: fraction of a token's neurons that count as its core.
        beta: fraction of the neurons in a set: the overlap of sets chosen at random.
        positions: numbers of tokens t, doubling up to the window.
        whole: per layer and t, first t tokens against the whole text.
        following: per layer and t, first t tokens against the t tokens that follow (the last t has none).
        domains: the texts' labels.
        similarity: per pair of domains, whole texts against each other, mean over layers and pairs of different texts;
            None where a domain has one text only.
        texts: how many texts per domain.
        window: tokens of each text.
    """

    alpha: float
    beta: float
    positions: list[int]
    whole: list[list[float]]
    following: list[list[float]]
    domains: list[str]
    similarity: list[list[float | None]]
    texts: list[int]
    window: int


def neuron_report(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    alpha: float = 0.02,
    beta: float = 0.4,
    tokens: int | None = 32768,
    window: int = 512,
    progress: Progress | None = None,
) -> NeuronReport:
    """Measure a dense model (a sparsified one is restored) on the first ``window`` tokens of each of ``texts``.

    Raises:
        MethodError, TextError, ModelError: with one line that names what was wrong.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 < value <= 1:
            raise MethodError(f"{name} is {value}, expected 0 < {name} <= 1")
    if window < 2 * FIRST_POSITION:
        raise MethodError(f"window is {window}, expected at least {2 * FIRST_POSITION} tokens")
    restore(model)
    windows = text.load_windows(texts, tokenizer, tokens=tokens, window=window, packing="documents")
    window = int(windows.tokens.shape[1])
    positions = [FIRST_POSITION]
    while positions[-1] * 2 <= window:
        positions.append(positions[-1] * 2)
    positions = sorted({*positions, window})
    layers = sites.layers_of(model)
    sparse = sites.activation_of(model) in ("relu", "relu2")
    neurons = model.config.intermediate_size
    count = max(1, round(beta * neurons))
    whole = torch.zeros(len(layers), len(positions), dtype=torch.float64)
    following = torch.zeros(len(layers), len(positions) - 1, dtype=torch.float64)
    members: list[torch.Tensor] = []
    seen: dict[int, torch.Tensor] = {}
    handles = [layer.tap("value", partial(seen.__setitem__, layer.index)) for layer in layers]
    try:
        for number, row in enumerate(windows.tokens):
            with torch.inference_mode():
                model.get_decoder()(input_ids=row[None].to(model.device), use_cache=False)
            sets = torch.zeros(len(layers), neurons, dtype=torch.bool)
            for layer in range(len(layers)):
                strength = strengths(seen[layer][0], "magnitude").cpu()
                level = core_level(seen[layer][0], alpha, "magnitude", sparse=sparse).cpu()
                # Sums over the text so far: sets of any stretch are differences of two of them.
                core = core_of(strength, level).double()
                tie = strength / level.clamp(min=torch.finfo(torch.float32).tiny)
                score = torch.cat([torch.zeros(1, neurons), (core + 1e-6 * tie.clamp(max=1e3)).cumsum(0)])
                sets[layer] = _members(score[window], count)
                for at, position in enumerate(positions):
                    first = _members(score[position], count)
                    whole[layer, at] += float((first & sets[layer]).sum()) / count
                    if 2 * position <= window:
                        after = _members(score[2 * position] - score[position], count)
                        following[layer, at] += float((first & after).sum()) / count
            members.append(sets)
            if progress:
                progress((number + 1) * window, windows.count)
    finally:
        for handle in handles:
            handle.remove()
    texts_seen = len(members)
    domains = sorted(set(windows.domains))
    halves = sum(1 for position in positions if 2 * position <= window)
    return NeuronReport(
        alpha=alpha,
        beta=count / neurons,
        positions=positions,
        whole=(whole / texts_seen).tolist(),
        following=(following / texts_seen)[:, :halves].tolist(),
        domains=domains,
        similarity=_similarity(torch.stack(members), [domains.index(d) for d in windows.domains], len(domains), count),
        texts=[windows.domains.count(domain) for domain in domains],
        window=window,
    )


def _members(score: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.sort(score, descending=True, stable=True).indices
    return torch.zeros(len(score), dtype=torch.bool).index_fill_(0, order[:count], True)


def _similarity(members: torch.Tensor, labels: list[int], domains: int, count: int) -> list[list[float | None]]:
    """Mean overlap between the texts of every two domains, from sets [W, layers, N]."""
    flat = members.float().flatten(1)
    overlap = (flat @ flat.t()) / (count * members.shape[1])
    label = torch.tensor(labels)
    different = ~torch.eye(len(label), dtype=torch.bool)
    table: list[list[float | None]] = []
    for one in range(domains):
        row: list[float | None] = []
        for other in range(domains):
            pairs = (label == one)[:, None] & (label == other)[None] & different
            row.append(float(overlap[pairs].mean()) if bool(pairs.any()) else None)
        table.append(row)
    return table


def write(report: NeuronReport, directory: str | os.PathLike[str]) -> list[Path]:
    """Write ``neurons.json`` and, where matplotlib is installed, the two plots; returns what was written."""
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "neurons.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror}") from None
    written = [path / "neurons.json"]
    try:
        import matplotlib
    except ImportError:
        return written
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    panels = ((report.whole, "of the whole text's set"), (report.following, "of the next t tokens' set"))
    for axis, (rows, title) in zip(axes, panels, strict=True):
        for layer, row in enumerate(rows):
            axis.plot(report.positions[: len(row)], row, marker=".", label=f"layer {layer}")
        axis.axhline(report.beta, color="grey", linestyle=":", label="random sets")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("t, tokens")
        axis.set_title(f"first t tokens' set: share {title}")
    axes[0].set_ylabel(f"overlap (beta {report.beta:.2f})")
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path / "stability.png", dpi=120)
    plt.close(figure)
    figure, axis = plt.subplots(figsize=(1.2 * len(report.domains) + 3, 1.0 * len(report.domains) + 2))
    values = torch.tensor([[float("nan") if cell is None else cell for cell in row] for row in report.similarity])
    image = axis.imshow(values.numpy(), vmin=report.beta, vmax=1)
    names = [name or "(none)" for name in report.domains]
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    for one, cells in enumerate(report.similarity):
        for other, cell in enumerate(cells):
            axis.text(other, one, "" if cell is None else f"{cell:.2f}", ha="center", va="center", color="white")
    axis.set_title("overlap of texts' sets between domains")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path / "similarity.png", dpi=120)
    plt.close(figure)
    return [*written, path / "stability.png", path / "similarity.png"]

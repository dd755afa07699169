"""A comparison as Markdown: every cell, then the methods at equal weights read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actsparse.measure.results import Results


def markdown(results: Results) -> str:
    """The comparison as Markdown: every cell, then perplexity at equal weights read."""
    about = results.about
    tasks = [score["task"] for score in results.cells[0]["tasks"] if score["metric"] == "acc"]
    header = [
        "method",
        "sparsity",
        "weights read",
        "of the FFN",
        "perplexity",
        "increase (paired)",
        "KL to dense",
        "same top token",
    ]
    header += [f"{task} acc" for task in tasks]
    header += ["tokens/s", "against dense"] if results.speed else []
    lines = [
        f"`{about['model']}` ({about['parameters'] / 1e6:.1f} M parameters, {about['dtype']}), "
        f"{about['scored_tokens']:,} evaluation tokens, calibrated on {about['calibration']['tokens']:,} tokens, "
        f"scope `{about['scope']}`. Increases are over the dense model on the same tokens, with their standard error.",
        "",
        *_table(header, [_row(results, cell, tasks) for cell in results.cells]),
    ]
    levels, rows = at_equal_reading(results)
    if rows:
        lines += ["", "Increase of perplexity at equal weights read (linear between the cells above):", ""]
        lines += _table(["method", *(f"{level:.0%} read" for level in levels)], rows)
    notes = []
    if any(cell["evaluation_only"] for cell in results.cells):
        notes.append("`oracle` is a bound, not a method: it is told for free which products are small.")
    if results.speed:
        speed = results.speed
        notes.append(
            f"tokens/s: median of {speed['repeats']} interleaved rounds of {speed['new_tokens']} tokens, "
            f"{speed['threads']} threads, native decode step; transformers' eager loop on the same model: "
            f"{speed['hf']['decode_tok_s']:.1f}."
        )
    if about["task_note"] and tasks:
        notes.append(about["task_note"] + ".")
    return "\n".join(lines + [line for note in notes for line in ("", note)]) + "\n"


def at_equal_reading(results: Results) -> tuple[list[float], list[list[str]]]:
    """Levels of weights read, and per method the relative increase there with its standard error."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for cell in results.cells:
        if cell["method"] != "dense":
            point = (cell["weights_read"], cell["relative_increase"], cell["relative_increase_stderr"])
            curves.setdefault(cell["method"], [(1.0, 0.0, 0.0)]).append(point)
    # Levels between the lowest that at least two methods reach and the dense model.
    floors = sorted(min(point[0] for point in curve) for curve in curves.values())
    if len(floors) < 2:
        return [], []
    levels = [level / 20 for level in range(19, 0, -1) if level / 20 >= floors[1]]
    levels = levels[:: max(1, math.ceil(len(levels) / 6))]
    rows = []
    for method, curve in curves.items():
        row = [method]
        for level in levels:
            found = _interpolate(sorted(curve), level)
            row.append("-" if found is None else f"{found[0]:+.2%} ± {found[1]:.2%}")
        rows.append(row)
    return levels, rows


def _interpolate(curve: Sequence[tuple[float, float, float]], level: float) -> tuple[float, float] | None:
    for (x0, y0, e0), (x1, y1, e1) in itertools.pairwise(curve):
        if x0 <= level <= x1 and x1 > x0:
            part = (level - x0) / (x1 - x0)
            return y0 + part * (y1 - y0), e0 + part * (e1 - e0)
    return None


def _row(results: Results, cell: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    dense = cell["method"] == "dense"
    own = "" if cell["scope"] == results.about["scope"] else f" (scope {cell['scope']})"
    row = [
        cell["method"] + own,
        "-" if dense else f"{cell['sparsity']:g}",
        f"{cell['weights_read']:.1%}",
        f"{cell['ffn_weights_read']:.1%}",
        f"{cell['ppl']:.4f} ± {cell['ppl_stderr']:.4f}",
        "-" if dense else f"{cell['relative_increase']:+.2%} ± {cell['relative_increase_stderr']:.2%}",
        "-" if dense else f"{cell['divergence']:.4f} ± {cell['divergence_stderr']:.4f}",
        "-" if dense else f"{cell['agreement']:.2%} ± {cell['agreement_stderr']:.2%}",
    ]
    accuracy = {score["task"]: score for score in cell["tasks"] if score["metric"] == "acc"}
    row += [_accuracy(accuracy.get(task)) for task in tasks]
    if results.speed:
        timing = results.speed["cells"].get(cell["cell"])
        if timing is None:
            row += ["-", "-"]
        else:
            low, high = timing["decode_spread"]
            ratio = timing["decode_tok_s"] / results.speed["cells"]["dense"]["decode_tok_s"]
            row += [f"{timing['decode_tok_s']:.1f} ({low:.1f} to {high:.1f})", f"{ratio:.2f}x"]
    return row


def _accuracy(score: Mapping[str, Any] | None) -> str:
    return "-" if score is None else f"{score['value']:.4f} ± {score['stderr'] or 0:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join([" :-- ", *[" --: "] * (len(header) - 1)]) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"

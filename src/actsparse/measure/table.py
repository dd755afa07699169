"""A comparison as Markdown: every cell, then the methods at equal bits read and at equal quality."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actsparse.measure.grid import GPTQ
from actsparse.measure.results import Results

_BITS = (12, 10, 8, 6, 5, 4, 3.5, 3, 2.5, 2)
_INCREASES = (0.01, 0.02, 0.05, 0.1)
# What stands for no increase, or a decrease, where its logarithm is taken.
_NOTHING = 1e-4


def markdown(results: Results) -> str:
    """The comparison as Markdown: every cell, then perplexity at equal bits read, then bits at equal perplexity."""
    about, best = results.about, front(results)
    tasks = [score["task"] for score in results.cells[0]["tasks"] if score["metric"] == "acc"]
    header = [
        "method",
        "level",
        "bits read",
        "MB a token",
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
        *_table(header, [_row(results, cell, tasks, best=cell["cell"] in best) for cell in results.cells]),
    ]
    levels, rows = at_equal_reading(results)
    if rows:
        lines += ["", "Increase of perplexity at equal bits read (linear between the cells above):", ""]
        lines += _table(["method", *(f"{level:g} bits" for level in levels)], rows)
    levels, rows = at_equal_quality(results)
    if rows:
        lines += ["", "Bits read at equal increase of perplexity (its logarithm linear between the cells above):", ""]
        lines += _table(["method", *(f"{level:+.0%}" for level in levels)], rows)
    notes = [
        "Bits read are per weight of the decoder layers' matrices, scales included; **bold**: no other row reads less "
        "and costs less."
    ]
    if any(cell["method"] in GPTQ for cell in results.cells):
        notes.append(
            "`gptq` is scored on weights rounded in rows with error feedback; there is no kernel for them here."
        )
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


def front(results: Results) -> set[str]:
    """Names of the cells that no other beats in bits read and in increase of perplexity at once; bounds aside."""
    real = [cell for cell in results.cells if not cell["evaluation_only"]]
    return {
        cell["cell"]
        for cell in real
        if not any(
            other["bits_read"] <= cell["bits_read"]
            and other["relative_increase"] <= cell["relative_increase"]
            and other["cell"] != cell["cell"]
            for other in real
        )
    }


def curves(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """Cells by method, most bits read first.

    A method that skips begins where it skips nothing: at the dense model, or at every plane of the weights that it is put on.
    """
    cells = {cell["cell"]: cell for cell in results.cells}
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in results.cells:
        if cell["method"] != "dense":
            found.setdefault(cell["method"], []).append(cell)
    for own in found.values():
        own.sort(key=lambda cell: -cell["bits_read"])
        start = cells.get(own[0]["weights"])
        if start is not None and start["method"] != own[0]["method"]:
            own.insert(0, start)
    return found


def at_equal_reading(results: Results) -> tuple[list[float], list[list[str]]]:
    """Bits read per weight, and per method the relative increase there with its standard error."""
    found = curves(results)
    # Levels between the lowest that at least two methods reach and the dense model.
    floors = sorted(own[-1]["bits_read"] for own in found.values())
    if len(floors) < 2:
        return [], []
    levels = [level for level in _BITS if level >= floors[1]]
    rows = []
    for method, own in found.items():
        points = [(one["bits_read"], one["relative_increase"], one["relative_increase_stderr"]) for one in own]
        row = [method]
        for level in levels:
            at = _interpolate(sorted(points), level)
            row.append("-" if at is None else f"{at[0]:+.2%} ± {at[1]:.2%}")
        rows.append(row)
    return levels, [row for row in rows if set(row[1:]) != {"-"}]


def at_equal_quality(results: Results) -> tuple[list[float], list[list[str]]]:
    """Relative increases of perplexity, and per method the bits read per weight that it takes to stay at each."""
    rows = []
    for method, own in curves(results).items():
        row = [method]
        for level in _INCREASES:
            bits = _bits_at(own, level)
            row.append("-" if bits is None else f"{bits:.2f}")
        rows.append(row)
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    return (list(_INCREASES), rows) if len(rows) > 1 else ([], [])


def _bits_at(own: Sequence[Mapping[str, Any]], level: float) -> float | None:
    for more, fewer in itertools.pairwise(own):
        low, high = (math.log(max(cell["relative_increase"], _NOTHING)) for cell in (more, fewer))
        if low <= math.log(level) <= high and high > low:
            part = (math.log(level) - low) / (high - low)
            return float(more["bits_read"] + part * (fewer["bits_read"] - more["bits_read"]))
    return None


def _interpolate(curve: Sequence[tuple[float, float, float]], level: float) -> tuple[float, float] | None:
    for (x0, y0, e0), (x1, y1, e1) in itertools.pairwise(curve):
        if x0 <= level <= x1 and x1 > x0:
            part = (level - x0) / (x1 - x0)
            return y0 + part * (y1 - y0), e0 + part * (e1 - e0)
    return None


def _row(results: Results, cell: Mapping[str, Any], tasks: Sequence[str], *, best: bool) -> list[str]:
    dense = cell["method"] == "dense"
    own = "" if cell["scope"] == results.about["scope"] else f" (scope {cell['scope']})"
    name = f"**{cell['method']}**" if best else cell["method"]
    row = [
        name + own,
        "-" if dense else cell["level"],
        f"{cell['bits_read']:.2f}",
        f"{cell['weights_read_bytes'] / 1e6:,.2f}",
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

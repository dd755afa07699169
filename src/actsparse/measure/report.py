"""What a comparison looks like: plots, a Markdown table, and one HTML page that needs nothing but itself.

The page carries its plots as data; it loads no script, font or style from anywhere.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actsparse.measure.grid import GRADED, variant_of
from actsparse.measure.results import Results
from actsparse.measure.table import at_equal_quality, at_equal_reading, curves, front, markdown
from actsparse.plan import PlanError, atomic_path

# Title and caption of each plot, by the name of its file.
PLOTS = {
    "quality": (
        "Quality against bits read",
        "Increase of perplexity over the dense model on the same tokens; linear below 5 %, logarithmic above. Bits are per "
        "weight of the decoder layers' matrices, scales included. Colours are methods, line styles the weights that they are "
        "put on. Bars are one standard error. Down and right is better.",
    ),
    "speed": (
        "Speed against weights read",
        "Decoded tokens per second. Bars span the slowest and the fastest round. Up is better.",
    ),
    "sparsity": (
        "Sparsity per layer",
        "Percent skipped while scoring, per projection (ffn: neurons), at each method's middle level. What is not shown is "
        "read in full.",
    ),
}
# Okabe and Ito's colours, which stay apart for colour-blind readers; the marker tells methods apart in print.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F3C8D",
    "#5A5A5A",
    "#A6761D",
    "#1B9E77",
)
# Marker and line of thresholds on packed weights, by bits.
_WEIGHTS = {8: ("s", "--"), 6: ("^", "-."), 4: ("v", (0, (1, 1)))}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_SITE_ORDER = ("q", "k", "v", "o", "gate", "up", "down", "ffn")


def check_plotting() -> None:
    """PlanError when matplotlib or jinja2 is missing: found out before the work, not after."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlanError(f"a comparison is drawn with {error.name}: pip install 'actsparse[plot]'") from None


def write(directory: Path, results: Results) -> Path:
    """Write ``table.md``, the plots and ``report.html`` into ``directory``; returns the page's path."""
    check_plotting()
    with atomic_path(directory / "table.md") as temporary:
        Path(temporary).write_text(markdown(results), encoding="utf-8")
    plots = {"quality": _quality(results), "speed": _speed(results), "sparsity": _sparsity(results)}
    pictures = []
    for name, figure in plots.items():
        path = directory / f"{name}.svg"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        _save(figure, path)
        title, caption = PLOTS[name]
        pictures.append({"title": title, "caption": caption, "data": base64.b64encode(path.read_bytes()).decode()})
    page = directory / "report.html"
    with atomic_path(page) as temporary:
        Path(temporary).write_text(_page(results, pictures), encoding="utf-8")
    return page


def _page(results: Results, pictures: Sequence[Mapping[str, str]]) -> str:
    import jinja2

    environment = jinja2.Environment(
        # Beside this file: an editable install keeps only the compiled library in the package's installed folder.
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    levels, equal = at_equal_reading(results)
    increases, alike = at_equal_quality(results)
    return environment.get_template("report.html.jinja").render(
        about=results.about,
        cells=results.cells,
        speed=results.speed,
        tasks=[score["task"] for score in results.cells[0]["tasks"] if score["metric"] == "acc"],
        levels=levels,
        equal=equal,
        increases=increases,
        alike=alike,
        front=front(results),
        pictures=pictures,
        accuracy=lambda cell: {score["task"]: score for score in cell["tasks"] if score["metric"] == "acc"},
    )


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """How each method is drawn: its colour is that of the method on any weights, marker and line say which."""
    bases = list(dict.fromkeys(cell["method"].partition("@")[0] for cell in results.cells if cell["method"] != "dense"))
    found = {}
    for cell in results.cells:
        base, at, _ = cell["method"].partition("@")
        if base not in bases:
            continue
        marker, line = _WEIGHTS[variant_of(cell["method"]).weights] if at else (_MARKERS[bases.index(base) % 10], "-")
        bound = cell["evaluation_only"]
        found[cell["method"]] = {
            "color": "#000000" if bound else _COLOURS[bases.index(base) % len(_COLOURS)],
            "marker": marker,
            "linestyle": ":" if bound else line,
            "linewidth": 2.5 if base == GRADED else 1.3,
        }
    return found


def _figure(width: float, height: float) -> Any:
    # Without pyplot: no window system, and no state that would outlive the call.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _quality(results: Results) -> Any:
    figure = _figure(8, 5)
    axes = figure.subplots()
    styles = _styles(results)
    for name, cells in curves(results).items():
        x = [cell["bits_read"] for cell in cells]
        y = [100 * cell["relative_increase"] for cell in cells]
        error = [100 * (cell["relative_increase_stderr"] or 0) for cell in cells]
        label = f"{name} (bound)" if cells[-1]["evaluation_only"] else name
        label += "" if cells[-1]["scope"] == results.about["scope"] else f" (scope {cells[-1]['scope']})"
        axes.errorbar(x, y, yerr=error, label=label, capsize=3, markersize=5, **styles[name])
    axes.axhline(0, color="#999999", linewidth=0.8)
    # Small increases are what one can live with, large ones must still fit: linear near 0, logarithmic beyond.
    axes.set_yscale("symlog", linthresh=5)
    axes.set_yticks([0, 1, 2, 3, 4, 5, 10, 20, 50, 100, 200, 500])
    axes.set_yticklabels([f"{tick} %" for tick in axes.get_yticks()])
    axes.yaxis.minorticks_off()
    worst = max(100 * cell["relative_increase"] for cell in results.cells)
    axes.set_ylim(-1, max(1.5, worst * 1.3))
    axes.set_xscale("log")
    least = min(cell["bits_read"] for cell in results.cells)
    ticks = [tick for tick in (32, 24, 16, 12, 10, 8, 6, 5, 4, 3, 2.5, 2, 1) if tick >= least * 0.9]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.set_xlim(max(cell["bits_read"] for cell in results.cells) * 1.05, least * 0.95)
    axes.set_xlabel("bits read per weight")
    axes.set_ylabel("increase of perplexity over dense")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, ncols=2)
    return figure


def _speed(results: Results) -> Any:
    if not results.speed:
        return None
    timings = results.speed["cells"]
    figure = _figure(8, 5)
    axes = figure.subplots()
    dense = timings["dense"]
    styles = _styles(results)
    for name, cells in curves(results).items():
        timed = [(100 * cell["weights_read"], timings[cell["cell"]]) for cell in cells if cell["cell"] in timings]
        if len(timed) > 1:
            _spread(axes, timed, label=name, **styles[name])
    _spread(axes, [(100.0, dense)], label="dense, native", color="#000000", marker="o", linestyle="")
    hf = results.speed["hf"]
    _spread(axes, [(100.0, hf)], label="dense, transformers", color="#888888", marker="o", linestyle="")
    axes.set_ylim(bottom=0)
    axes.invert_xaxis()
    axes.set_xlabel("weights read per token, % of the dense model's bytes")
    axes.set_ylabel("decoded tokens per second")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return figure


def _spread(axes: Any, points: Sequence[tuple[float, Mapping[str, Any]]], **style: Any) -> None:
    speeds = [timing["decode_tok_s"] for _, timing in points]
    below = [timing["decode_tok_s"] - timing["decode_spread"][0] for _, timing in points]
    above = [timing["decode_spread"][1] - timing["decode_tok_s"] for _, timing in points]
    x = [place for place, _ in points]
    axes.errorbar(x, speeds, yerr=[below, above], capsize=3, markersize=5, **style)


def _sparsity(results: Results) -> Any:
    """One heat map per method, at the middle one of its levels."""
    # Thresholds are the same on whatever weights.
    shown = {
        name: [cell for cell in cells if cell["sparsity_by_site"]]
        for name, cells in curves(results).items()
        if "@" not in name
    }
    shown = {name: cells for name, cells in shown.items() if cells}
    if not shown:
        return None
    layers = results.about["layers"]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(3 * columns, rows * (1.1 + 0.22 * min(layers, 40)))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    image = None
    for panel, (name, cells) in zip(panels, shown.items(), strict=False):
        cell = cells[len(cells) // 2]
        found = cell["sparsity_by_site"]
        present = {site.rpartition(".")[2] for site in found}
        sites = [site for site in _SITE_ORDER if site in present]
        grid = [[100 * found.get(f"layers.{layer}.{site}", math.nan) for site in sites] for layer in range(layers)]
        image = panel.imshow(grid, vmin=0, vmax=100, aspect="auto", cmap="viridis")
        panel.set_title(f"{name} {cell['level']}", fontsize=9)
        panel.set_xticks(range(len(sites)), sites, fontsize=8)
        panel.set_yticks(range(0, layers, max(1, layers // 8)))
        panel.set_ylabel("layer", fontsize=8)
        if layers <= 12:
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    if not math.isnan(value):
                        colour = "black" if value > 60 else "white"
                        panel.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    figure.colorbar(image, ax=list(panels), label="% skipped", shrink=0.8)
    return figure


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    # A fixed salt and no date: the same results make the same file.
    with matplotlib.rc_context({"svg.hashsalt": "actsparse"}), atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})

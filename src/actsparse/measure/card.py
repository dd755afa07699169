"""The model card (``README.md``) of a sparse model's directory: what it is, how to open it, and what was measured of it.

Numbers come from a measurement of that very model or are not there: a card without one says that nothing was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actsparse.measure.evaluate import Comparison
from actsparse.models import directory
from actsparse.plan import Plan, atomic_path, short

# Taken over from the dense model's own card.
_INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Measured:
    """A measurement of perplexity, and what it was measured on.

    Attributes:
        comparison: dense and sparse on the same tokens.
        text: the file or dataset.
        machine: processor, cores, threads, instruction set and torch, by name.
        command: what was called.
    """

    comparison: Comparison
    text: str
    machine: dict[str, Any]
    command: str


def write(home: Path, plan: Plan, source: str, measured: Measured | None = None) -> None:
    """Write the card of the directory ``home`` that ``plan`` stands in.

    Args:
        home: a directory of this package.
        plan: its plan.
        source: the dense model, a directory or a hub id.
        measured: what was measured of it, if anything was.
    """
    from huggingface_hub import ModelCardData

    packed = directory.is_packed(str(home))
    local = Path(source).exists()
    data = ModelCardData(
        base_model=None if local else source,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["actsparse", "activation-sparsity", plan.method],
        model_name=home.name,
        eval_results=None if measured is None else _results(measured),
        base_model_relation=None if local else "quantized" if packed else "finetune",
        **(_inherited(Path(source)) if local else {}),
    )
    name = plan.method if packed else f"{plan.method} {plan.sparsity:g}"
    what = "weights packed as nested low-bit codes" if packed else "the dense checkpoint and a plan"
    lines = [
        "---", data.to_yaml().strip(), "---", "",
        f"# {home.name}", "",
        f"{source}, decoded with actsparse reading only the weights that each token needs: {what}, method {name}, "
        f"scope {plan.scope}.",
        "", *_use(home.name, packed), *_numbers(packed, measured), *_made(plan),
    ]  # fmt: skip
    with atomic_path(home / "README.md") as temporary:
        Path(temporary).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _use(name: str, packed: bool) -> list[str]:
    without = (
        "Without actsparse these weights cannot be read."
        if packed
        else "Without actsparse, it opens as the dense model."
    )
    return [
        "## Use", "",
        "```python",
        "import actsparse  # or: trust_remote_code=True below",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```", "",
        f"or `actsparse generate {name} --prompt ...`. {without}", "",
    ]  # fmt: skip


def _numbers(packed: bool, measured: Measured | None) -> list[str]:
    if measured is None:
        return ["## Measured", "", "Nothing was measured of this model.", ""]
    found = measured.comparison
    read, dense, sparse = found.weights_read, found.dense, found.sparse
    rows = [
        ("perplexity, dense", f"{dense.ppl:.4f} ± {dense.stderr:.4f}"),
        ("perplexity, sparse", f"{sparse.ppl:.4f} ± {sparse.stderr:.4f}"),
        ("increase, paired", f"{sparse.ppl / dense.ppl - 1:+.2%} ± {found.delta_stderr / dense.ppl:.2%}"),
    ]
    if found.divergence is not None and found.agreement is not None:
        rows.append(("KL divergence to dense, nats", f"{found.divergence.value:.4f} ± {found.divergence.stderr:.4f}"))
        rows.append(("same most likely token", f"{found.agreement.value:.2%} ± {found.agreement.stderr:.2%}"))
    rows.append(("bits read per weight of the layers", f"{read.bits_read:.2f} of {read.bits_stored:.2f} stored"))
    if not packed:
        rows.append(("weights read per token", f"{read.fraction:.1%}"))
    rows.append(("read per token, output head included", f"{read.bytes / 1e6:,.1f} MB"))
    units = {"cores": "{} cores", "threads": "{} threads", "torch": "torch {}"}
    known = {name: value for name, value in measured.machine.items() if value is not None}
    machine = ", ".join(units.get(name, "{}").format(value) for name, value in known.items())
    return [
        "## Measured", "",
        f"On {found.tokens:,} tokens of {measured.text}, scope {found.scope}; ± is one standard error.", "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
        f"Machine: {machine}. Command:", "",
        "```sh", measured.command, "```", "",
    ]  # fmt: skip


def _made(plan: Plan) -> list[str]:
    text = plan.text
    lines = ["## Made", "", f"With actsparse {plan.version or 'of an unknown version'}."]
    if text.get("tokens"):
        lines[-1] += f" Thresholds are from {text['tokens']:,} tokens of {text.get('source')}."
    settings = ", ".join(f"{name} {short(value)}" for name, value in sorted(plan.settings.items()))
    return [*lines, *(["", f"Settings: {settings}."] if settings else [])]


def _results(measured: Measured) -> list[Any]:
    from huggingface_hub import EvalResult

    found, name = measured.comparison, measured.text
    values = {"perplexity": found.sparse.ppl, "bits_read": found.weights_read.bits_read}
    if found.divergence is not None:
        values["kl_divergence"] = found.divergence.value
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name.split(":")[0],
            dataset_name=name,
            metric_type=kind,
            metric_value=round(value, 4),
        )
        for kind, value in values.items()
    ]


def _inherited(source: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    card = source / "README.md"
    if not card.is_file():
        return {}
    try:
        known = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's file: whatever is wrong with it, this card does without
        return {}
    return {name: known[name] for name in _INHERITED if name in known}

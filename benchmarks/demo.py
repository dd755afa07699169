"""What `make demo` shows, in some minutes: pack, calibrate, compare texts, quality and bits read, then speed.

Runs the command line on the embedded model, exactly as a user would, then bench at the 1.1 B shape, and closes with one table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = "reference/swiglu"
CALIBRATION = "reference/text/calibration.jsonl"
EVALUATION = "reference/text/evaluation.jsonl"
SPARSITIES = (0.3, 0.5, 0.7)
PROMPT = "The function returns a list of all the"


def run(*arguments: str) -> str:
    """Run ``actsparse`` with ``arguments``, show it as typed and what it prints; returns its standard output."""
    print(f"\n$ actsparse {' '.join(a if ' ' not in a else repr(a) for a in arguments)}", flush=True)
    command = [sys.executable, "-c", "import sys; from actsparse.cli import main; sys.exit(main())", *arguments]
    output = ""
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            if not line.startswith("{"):
                print(line, end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    return output


def last_document(output: str) -> dict[str, Any]:
    """The JSON document on the last line."""
    document: dict[str, Any] = json.loads(output.splitlines()[-1])
    return document


def main() -> None:
    """Run the demonstration."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        packed = str(Path(folder) / "packed")
        run("pack", MODEL, "-o", packed, "--text", CALIBRATION)
        graded = last_document(
            run("ppl", packed, "--against", MODEL, "--text", EVALUATION, "--tokens", "20480", "--json")
        )
        run("generate", packed, "--prompt", PROMPT, "--max-new-tokens", "48")
        plans = Path(folder) / "chess.safetensors"
        targets = ",".join(f"{s:g}" for s in SPARSITIES)
        run("calibrate", MODEL, "--method", "chess", "--sparsity", targets, "--text", CALIBRATION, "-o", str(plans))
        plan_of = {s: str(plans.with_name(f"chess-{s:g}.safetensors")) for s in SPARSITIES}
        run("generate", MODEL, "--plan", plan_of[0.5], "--prompt", PROMPT, "--max-new-tokens", "48", "--compare")
        quality = {
            s: last_document(
                run("ppl", MODEL, "--plan", plan_of[s], "--text", EVALUATION, "--tokens", "20480", "--json")
            )
            for s in SPARSITIES
        }
    options = ["--sparsity", targets, "--repeats", "3", "--no-llama-cpp", "--json"]
    speed = last_document(run("bench", "--shape", "llama-1b", "--method", "chess", *options))
    show(graded, quality, speed)
    print(f"\nThe demonstration took {time.monotonic() - started:.0f} s.")


def show(graded: dict[str, Any], quality: dict[float, dict[str, Any]], speed: dict[str, Any]) -> None:
    """The closing table: quality on the reference model beside speed at the 1.1 B shape.

    Graded weights' speed at that shape takes minutes of rounding first: ``actsparse bench --method graded`` measures it.
    """
    from actsparse.cli.terminal import print_table

    rows = speed["results"]
    eager = next(row for row in rows if row["name"] == "hf-eager")
    dense_ppl = quality[SPARSITIES[0]]["dense"]["ppl"]

    def fastness(row: dict[str, Any]) -> list[str]:
        low, high = row["decode_spread"]
        ratio = row["decode_tok_s"] / eager["decode_tok_s"]
        return [f"{row['decode_tok_s']:.1f} ({low:.1f}-{high:.1f})", f"{ratio:.2f} x"]

    ours = next(row for row in rows if row["name"] == "dense")
    table = [
        ["dense, Hugging Face eager", f"{dense_ppl:.3f}", "", "16.0", *fastness(eager)],
        ["dense, actsparse", f"{dense_ppl:.3f}", "", "16.0", *fastness(ours)],
        [
            "graded",
            f"{graded['sparse']['ppl']:.3f}",
            f"{graded['increase']:+.1%} +- {graded['delta_stderr'] / graded['dense']['ppl']:.1%}",
            f"{graded['sparse']['bits_read']:.1f}",
            "(bench --method graded)",
            "",
        ],
    ]
    for sparsity, result in quality.items():
        row = next(row for row in rows if row["name"] == "chess" and row["sparsity"] == sparsity)
        increase = result["sparse"]["ppl"] - dense_ppl
        table.append(
            [
                f"CHESS {sparsity:g}",
                f"{result['sparse']['ppl']:.3f}",
                f"{increase / dense_ppl:+.1%} +- {result['delta_stderr'] / dense_ppl:.1%}",
                f"{result['sparse']['bits_read']:.1f}",
                *fastness(row),
            ]
        )
    print()
    print_table(
        "quality: reference/swiglu (13 M, trained)      speed: 1.1 B shape (random weights, bfloat16)",
        ["", "perplexity", "increase", "bits read a weight", "decode tokens/s", "of eager"],
        table,
    )
    print(f"This machine reads {speed['read_gb_s']:.1f} GB/s: no path can decode faster than its weights are read.")


if __name__ == "__main__":
    main()

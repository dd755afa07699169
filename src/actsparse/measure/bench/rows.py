"""How much is measured, and what came out: the settings of a run, a row per contender, the report."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from actsparse.plan import Plan


@dataclass(frozen=True)
class Settings:
    """How much to measure: tokens in the prompt, decode steps after it, rounds, and whether llama.cpp takes part."""

    prompt_tokens: int = 32
    new_tokens: int = 32
    repeats: int = 5
    llama_cpp: bool = True


@dataclass
class Row:
    """One contender.

    Attributes:
        name: ``hf-eager``, ``dense``, the method's name (``graded-`` and the bits read), or ``llama.cpp-`` and a format; on a
            GPU also ``hf-compiled`` and products alone, as ``cublas-products``.
        path: ``transformers``, ``native`` (the decode step), ``llama.cpp`` or whose products they are.
        weights: type of the weights.
        sparsity: target of the plan, None for a dense contender.
        decode_tok_s: one value per round.
        prefill_tok_s: one value per round; empty for products alone.
        weights_read_bytes: per decoded token; counted by the kernels on native paths, else the size of the matrices.
        ffn_sparsity: fraction of neurons that the native path skipped.
        overhead: fraction of a token, per round, that is not spent in its matrix products.
        bits_read: per weight of the decoder layers' matrices, scales included, on the calibration prompt; of packed weights.
        memory_bytes: most that was allocated on the GPU, model and prompt included; None on a CPU and for products alone.
        error: worst relative error of a site against the model's own modules, where that was checked.
    """

    name: str
    path: str
    weights: str
    sparsity: float | None = None
    decode_tok_s: list[float] = field(default_factory=list)
    prefill_tok_s: list[float] = field(default_factory=list)
    weights_read_bytes: float = 0.0
    ffn_sparsity: float | None = None
    overhead: list[float] = field(default_factory=list)
    bits_read: float | None = None
    memory_bytes: int | None = None
    error: float | None = None

    def document(self, read_gb_s: float) -> dict[str, Any]:
        """The row of the JSON document."""
        decode = statistics.median(self.decode_tok_s)
        prefill = self.prefill_tok_s
        ceiling = read_gb_s * 1e9 / self.weights_read_bytes
        return {
            "name": self.name,
            "path": self.path,
            "weights": self.weights,
            "sparsity": self.sparsity,
            "decode_tok_s": decode,
            "decode_spread": [min(self.decode_tok_s), max(self.decode_tok_s)],
            "prefill_tok_s": statistics.median(prefill) if prefill else None,
            "prefill_spread": [min(prefill), max(prefill)] if prefill else None,
            "weights_read_bytes": self.weights_read_bytes,
            "achieved_gb_s": decode * self.weights_read_bytes / 1e9,
            "ceiling_tok_s": ceiling,
            "share_of_ceiling": decode / ceiling,
            "ffn_sparsity": self.ffn_sparsity,
            "overhead_share": statistics.median(self.overhead) if self.overhead else None,
            "bits_read": self.bits_read,
            "memory_bytes": self.memory_bytes,
            "site_error": self.error,
        }


def relative_error(got: Tensor, want: Tensor) -> float:
    """Distance in the norm of ``want``, in float32; 0 where both are zero, infinite for values that are not numbers."""
    distance, norm = float((got.float() - want.float()).norm()), float(want.float().norm())
    if distance == 0:
        return 0.0
    # Not a quotient with NaN in it: no comparison with a tolerance would notice.
    return distance / norm if norm > 0 and distance < math.inf else math.inf


def row_of(plan: Plan, path: str, dense: str) -> Row:
    """The row of a plan, for a model whose dense weights are of type ``dense``."""
    if plan.method != "graded":
        return Row(plan.method, path, dense, plan.sparsity)
    bits = plan.settings["bits_read"]
    return Row(f"graded-{bits:.1f}", path, f"{plan.settings['bits_stored']} bits", plan.sparsity)


@dataclass
class Report:
    """All rows, the read bandwidth (GB/s) each time it was taken, and why something was left out."""

    rows: list[Row]
    read_gb_s: list[float]
    skipped: dict[str, str]

    def document(self) -> dict[str, Any]:
        """``read_gb_s`` and ``results`` of the JSON document."""
        median = statistics.median(self.read_gb_s)
        return {
            "read_gb_s": median,
            "read_spread_gb_s": [min(self.read_gb_s), max(self.read_gb_s)],
            "results": [row.document(median) for row in self.rows],
            "skipped": self.skipped,
        }

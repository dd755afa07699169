"""What a comparison is made of: variants of methods, the weights they run on, and the grid of cells over them.

A variant's name may end in ``@4``, ``@6`` or ``@8``: its thresholds on weights packed in so many bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actsparse.calibration.collect import check_sparsity
from actsparse.calibration.pack import PLAIN
from actsparse.calibration.presets import stored_for
from actsparse.kernels.planes import STORED
from actsparse.methods import METHODS, Method, MethodError, make
from actsparse.methods.feedback import ROW_GROUP
from actsparse.methods.graded import check_bits
from actsparse.models.text import TextError
from actsparse.plan import SCOPES, PlanError

# Weights as they come.
DENSE = 16
GRADED = "graded"
# Plain quantisation with row groups: inputs that share a scale, by variant, and the bits of a code that it is scored at.
GPTQ = {"gptq": ROW_GROUP, "gptq-g32": 32, "gptq-g128": 128}
GPTQ_BITS = (3, 4, 5, 6, 8)
# Variants that are what they read of weights of their own: their plans lie with these.
OWN_WEIGHTS = (PLAIN, *GPTQ, GRADED)


@dataclass(frozen=True)
class Variant:
    """A row of the grid: a method with its settings, the allocation of its sparsity, and the bits its weights are stored in."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    allocation: str = "uniform"
    weights: int = DENSE


# Names for what papers compare but what is one method here; every method's own name is a variant too.
VARIANTS = {
    "chess-ffn": Variant("chess", {"attention": False}),
    "chess-rms": Variant("chess", {"statistic": "rms"}),
    "chess-greedy": Variant("chess", allocation="greedy"),
    "teal-greedy": Variant("teal", allocation="greedy"),
    "wina-greedy": Variant("wina", allocation="greedy"),
    # Quantisation and nothing else: every plane of our format, and what GPTQ makes of rows.
    PLAIN: Variant("dense"),
    **dict.fromkeys(GPTQ, Variant("dense")),
}


def variant_of(name: str) -> Variant:
    """The variant ``name``; MethodError, listing what is known, for any other."""
    method, at, bits = name.partition("@")
    if method in VARIANTS:
        found = VARIANTS[method]
    elif method in METHODS:
        found = Variant(method)
    else:
        raise MethodError(f"method {method!r} is unknown: expected one of {', '.join([*METHODS, *VARIANTS])}")
    if not at:
        return found
    if bits not in map(str, STORED) or not METHODS[found.method].packable:
        able = ", ".join(name for name, method in METHODS.items() if method.packable)
        raise MethodError(f"variant {name!r} is unknown: expected one of {able} with @4, @6 or @8")
    return replace(found, weights=int(bits))


@dataclass(frozen=True)
class Grid:
    """What to compare, and on what.

    Attributes:
        methods: names of variants; ``dense`` is always there.
        sparsities: targets for each.
        weights: the bits of weights that thresholds are put on: 16 (as they come), 8, 6 and 4.
        bits_read: the levels of ``graded``.
        text: calibration text.
        evaluation_text: what is scored; None holds back the end of ``text``.
        tokens: calibration tokens.
        evaluation_tokens: scored tokens.
        window: calibration window, None for 1024 or the model's context.
        evaluation_window: length of an evaluation window.
        scope: which tokens are sparsified and scored.
        tasks: tasks of lm-evaluation-harness to run in every cell, perhaps none.
        tasks_folder: where more task files are.
        limit: documents per task.
    """

    methods: Sequence[str]
    sparsities: Sequence[float]
    text: str
    evaluation_text: str | None = None
    weights: Sequence[int] = (DENSE,)
    bits_read: Sequence[float] = (3.0,)
    tokens: int = 65536
    evaluation_tokens: int = 20480
    window: int | None = None
    evaluation_window: int = 512
    scope: str = "all"
    tasks: Sequence[str] = ()
    tasks_folder: str | None = None
    limit: int | None = None

    def check(self) -> None:
        """Refuse what can be refused before a model is read."""
        check_sparsity(list(self.sparsities))
        for bits in self.weights:
            if bits not in (DENSE, *STORED):
                raise MethodError(f"weights of {bits} bits were asked for, expected 16, 8, 6 or 4")
        for read in self.bits_read:
            check_bits(read, stored_for(read))
        if self.scope not in SCOPES:
            raise PlanError(f"scope {self.scope!r} is unknown: expected one of {', '.join(SCOPES)}")
        for name in self.methods:
            variant = variant_of(name)
            method = make(variant.method, **variant.settings)
            if variant.allocation != "uniform" and not method.sites:
                raise MethodError(f"method {name} has no sites to allocate over")
            if (method.packing, method.window) != (Method.packing, Method.window) and self.evaluation_text is None:
                raise TextError(f"method {name} cuts the text in its own way: expected --evaluation-text with it")

    def scope_of(self, name: str) -> str:
        """The scope a variant is scored under: the grid's, unless its method knows only others."""
        scopes = METHODS[variant_of(name).method].scopes
        return self.scope if self.scope in scopes else scopes[0]

    def cells(self) -> list[tuple[str, float]]:
        """(variant, level) of every cell, the dense one first: a sparsity, or bits for what is not skipped but read less."""
        packed = sorted((bits for bits in set(self.weights) if bits != DENSE), reverse=True)
        found: list[tuple[str, float]] = [("dense", 0.0)]
        for name in dict.fromkeys(self.methods):
            if name == "dense":
                continue
            if name in OWN_WEIGHTS:
                own = {PLAIN: packed or sorted(STORED, reverse=True), GRADED: self.bits_read}
                levels = own.get(name, GPTQ_BITS)
                found += [(name, float(level)) for level in levels]
                continue
            able = METHODS[variant_of(name).method].packable and "@" not in name
            names = [name] * (DENSE in self.weights or not able) + [f"{name}@{bits}" for bits in packed if able]
            found += [(each, float(sparsity)) for each in names for sparsity in self.sparsities]
        return found


def weights_of(variant: str, level: float) -> str:
    """What a cell's weights are stored as: ``dense``, ``plain-4``, ``gptq-3``, ``graded-3``."""
    if variant in OWN_WEIGHTS:
        return f"{variant}-{level:g}"
    bits = variant_of(variant).weights
    return "dense" if bits == DENSE else f"{PLAIN}-{bits}"


def cell_name(variant: str, sparsity: float) -> str:
    """The name of a cell's files."""
    return variant if variant == "dense" else f"{variant}-{sparsity:g}"

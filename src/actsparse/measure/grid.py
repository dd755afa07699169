"""What a comparison is made of: variants of methods, and the grid of cells over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actsparse.calibration.collect import check_sparsity
from actsparse.methods import METHODS, Method, MethodError, make
from actsparse.models.text import TextError
from actsparse.plan import SCOPES, PlanError


@dataclass(frozen=True)
class Variant:
    """A row of the grid: a method with its settings and the allocation of its sparsity."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    allocation: str = "uniform"


# Names for what papers compare but what is one method here; every method's own name is a variant too.
VARIANTS = {
    "chess-ffn": Variant("chess", {"attention": False}),
    "chess-rms": Variant("chess", {"statistic": "rms"}),
    "chess-greedy": Variant("chess", allocation="greedy"),
    "teal-greedy": Variant("teal", allocation="greedy"),
    "wina-greedy": Variant("wina", allocation="greedy"),
}


def variant_of(name: str) -> Variant:
    """The variant ``name``; MethodError, listing what is known, for any other."""
    if name in VARIANTS:
        return VARIANTS[name]
    if name not in METHODS:
        raise MethodError(f"method {name!r} is unknown: expected one of {', '.join([*METHODS, *VARIANTS])}")
    return Variant(name)


@dataclass(frozen=True)
class Grid:
    """What to compare, and on what.

    Attributes:
        methods: names of variants; ``dense`` is always there.
        sparsities: targets for each.
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
        """(variant, sparsity) of every cell, the dense one first."""
        rest = [(name, float(s)) for name in dict.fromkeys(self.methods) if name != "dense" for s in self.sparsities]
        return [("dense", 0.0), *rest]


def cell_name(variant: str, sparsity: float) -> str:
    """The name of a cell's files."""
    return variant if variant == "dense" else f"{variant}-{sparsity:g}"

"""The methods by name: add one in a file of its own and name it here."""

from __future__ import annotations

import inspect
from typing import Any

from actsparse.methods.base import Method, MethodError
from actsparse.methods.cats import Cats
from actsparse.methods.chess import Chess
from actsparse.methods.coreinfer import CoreInfer, CoreRule
from actsparse.methods.dense import Dense
from actsparse.methods.graded import Graded
from actsparse.methods.griffin import Griffin, GriffinRule
from actsparse.methods.oracle import Oracle
from actsparse.methods.prompt import PromptRule
from actsparse.methods.prompt import setting as prompt_setting
from actsparse.methods.relu import Relu
from actsparse.methods.svdp import Svdp
from actsparse.methods.teal import Teal
from actsparse.methods.wina import Wina
from actsparse.plan import Plan, PlanError

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Chess, Cats, Teal, Wina, Oracle, Dense, Svdp, Relu, CoreInfer, Griffin, Graded)
}

PROMPT_RULES: dict[str, type[PromptRule]] = {"coreinfer": CoreRule, "griffin": GriffinRule}


def prompt_rule(plan: Plan) -> PromptRule:
    """The rule of a plan that chooses neurons per prompt; PlanError for one that is unknown or malformed."""
    plan.validate()
    name = prompt_setting(plan.prompt, "rule", str)
    if name not in PROMPT_RULES:
        raise PlanError(f"plan's prompt rule {name!r} is unknown: expected one of {', '.join(PROMPT_RULES)}")
    tensors = {name: tensor for name, tensor in plan.rules.items() if name.startswith("prompt.")}
    return PROMPT_RULES[name](plan.prompt, tensors)


def make(name: str, **settings: Any) -> Method:
    """The method ``name`` with its settings; MethodError, naming what is known, for an unknown name or setting."""
    if name not in METHODS:
        raise MethodError(f"method {name!r} is unknown: expected one of {', '.join(METHODS)}")
    taken = inspect.signature(METHODS[name]).parameters
    for setting in settings:
        if setting not in taken:
            expected = ", ".join(taken) or "none"
            raise MethodError(f"method {name} does not take the setting {setting!r}: expected {expected}")
    return METHODS[name](**settings)

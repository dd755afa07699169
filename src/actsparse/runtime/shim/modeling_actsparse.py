"""Opens the model of a directory written by actsparse, for `trust_remote_code=True`.

With actsparse installed it is the sparse model.  Without it a dense checkpoint opens as what it is, the dense model, with a
warning; packed weights cannot be read without it.
"""

import warnings
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_actsparse import INSTALLED


class ActsparseForCausalLM:
    """What `AutoModelForCausalLM` finds in `auto_map`: the model of its own family."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing to record: it is never saved from."""

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, config: Any = None, **options: Any) -> Any:
        """As `AutoModelForCausalLM.from_pretrained` without remote code."""
        if config is None:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if not INSTALLED:
            _without_actsparse(name, config)
        return AutoModelForCausalLM.from_pretrained(
            name, *args, config=config, **{**options, "trust_remote_code": False}
        )

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        return AutoModelForCausalLM.from_config(config, **{**options, "trust_remote_code": False})


def _without_actsparse(name: str, config: Any) -> None:
    about = config.quantization_config
    if about.get("bits_stored") is not None:
        raise ImportError(f"{name} holds packed weights, which only actsparse reads: pip install actsparse")
    warnings.warn(
        f"actsparse is not installed: {name} opens as the dense model, without its plan (pip install actsparse)",
        stacklevel=3,
    )
    # What is left is an ordinary model, also when it is saved again.
    del config.quantization_config, config.auto_map

"""Opens the configuration of a directory written by actsparse, for `trust_remote_code=True`.

The directory holds an ordinary configuration.  Importing actsparse, where it is installed, is all that transformers needs.
"""

from typing import Any

from transformers import AutoConfig

try:
    import actsparse  # noqa: F401

    INSTALLED = True
except ImportError:
    INSTALLED = False


class ActsparseConfiguration:
    """What `AutoConfig` finds in `auto_map`: the configuration of the model's own family."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to record: it is never saved from."""

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> Any:
        """As `AutoConfig.from_pretrained` without remote code."""
        return AutoConfig.from_pretrained(name, **{**options, "trust_remote_code": False})

"""vLLM plug-in: serve a model under an actsparse plan.

``register`` is an entry point of the group ``vllm.general_plugins``; vLLM calls it in every process.  It adds the quantisation
method ``actsparse``, chosen by the model's ``quantization_config``::

    vllm serve MODEL --hf-overrides '{"quantization_config": {"quant_method": "actsparse", "plan": "chess.safetensors"}}'
"""

from __future__ import annotations

OLDEST, BEFORE = (0, 32), (0, 33)


class VersionError(RuntimeError):
    """A vLLM that this plug-in was not tested with."""


def check_version(version: str) -> None:
    """VersionError, naming both, for a vLLM outside the tested range."""
    parts = version.split("+")[0].split(".")
    found = tuple(int(part) for part in parts[:2] if part.isdigit())
    if len(found) != 2 or not OLDEST <= found < BEFORE:
        expected = f">= {'.'.join(map(str, OLDEST))}, < {'.'.join(map(str, BEFORE))}"
        raise VersionError(f"actsparse-vllm: vLLM is {version}, expected {expected}")


def register() -> None:
    """Make vLLM know the method ``actsparse``; more calls change nothing."""
    import logging

    import vllm

    try:
        check_version(vllm.__version__)
    except VersionError as error:
        # Other models' engines must still start: only what asks for this method cannot.
        logging.getLogger("vllm.actsparse").error("%s: the method is not registered", error)
        return
    # Importing registers; a module is imported once.
    from actsparse_vllm import config, models

    models.register()
    config.announce()

"""Deprecations that transformers logs, as errors. Those that it warns of are caught by the filters in pyproject.toml."""

from __future__ import annotations

import logging
import re

import pytest

DEPRECATION = re.compile(r"deprecat|will be removed|will be dropped|no longer supported", re.IGNORECASE)


class RaiseDeprecations(logging.Handler):
    """Raises what is logged about a deprecation where it is logged, so that the traceback shows our call."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if DEPRECATION.search(message):
            raise DeprecationWarning(message)


def pytest_configure(config: pytest.Config) -> None:
    """Listen to transformers."""
    handler = RaiseDeprecations(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    config.add_cleanup(lambda: logger.removeHandler(handler))

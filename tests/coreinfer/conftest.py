"""The small model that most tests begin with."""

from __future__ import annotations

import pytest

from .cases import make


@pytest.fixture
def model():
    return make()

"""What the tests themselves promise about transformers: its deprecations are errors, and what touches it is marked."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg

from tests.touching import TESTS, reaches_transformers

PACKAGE = TESTS.parent / "src" / "actsparse"


def test_a_logged_deprecation_is_an_error_every_time() -> None:
    logger = logging.get_logger("transformers.somewhere")
    for _ in range(2):
        with pytest.raises(DeprecationWarning, match="use `dtype` instead"):
            logger.warning_once("`torch_dtype` is deprecated, use `dtype` instead")
    logger.warning("generation was cut after 20 tokens")


def test_a_deprecated_keyword_is_an_error() -> None:
    @deprecate_kwarg("old", version="99.0.0", new_name="new")
    def forward(new: int = 0) -> int:
        return new

    with pytest.raises(FutureWarning, match="`old` is deprecated"):
        forward(old=1)


def test_a_deprecation_is_an_error_whoever_it_is_attributed_to() -> None:
    with pytest.raises(FutureWarning, match="in favour"):
        warnings.warn_explicit("deprecated in favour of cache", FutureWarning, "module.py", 1, module="torch.nn")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import json", False),
        ("import transformers", True),
        ("def test():\n    from transformers.cache_utils import DynamicCache", True),
        ("from actsparse.kernels import reference", False),
        ("from actsparse import kernels", False),
        ("from actsparse import sparsify", True),
        ("import actsparse", True),
        ("from actsparse.models import opening", True),
        ("from tests.conftest import tiny_model", True),
        ("import pytest\npytest.importorskip('transformers')", True),
        ("import subprocess", True),
        ("import importlib\nimportlib.import_module('trans' + 'formers')", True),
    ],
)
def test_reaching_transformers_is_read_off_the_imports(source: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "test_new.py").write_text(source, encoding="utf-8")
    assert reaches_transformers(tmp_path / "test_new.py") is expected


def test_relative_imports_are_followed() -> None:
    assert reaches_transformers(PACKAGE / "measure" / "bench" / "run.py")
    assert not reaches_transformers(PACKAGE / "methods" / "chess.py")


def test_a_test_that_asks_for_a_model_is_marked(request: pytest.FixtureRequest) -> None:
    """Some test file reaches transformers by a fixture only, and its tests are marked all the same."""
    items = [item for item in request.session.items if "tiny" in item.fixturenames or "tokenizer" in item.fixturenames]
    assert [item.nodeid for item in items if not item.get_closest_marker("transformers")] == []

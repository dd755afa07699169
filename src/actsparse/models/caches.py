"""Key/value caches of transformers, found by their type: the keyword that they travel under has changed before.

transformers 5.24 renamed ``past_key_values`` to ``cache``.  Nothing here or above relies on either name.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers.cache_utils import Cache, StaticCache

from actsparse.models.sites import ModelError


def cache_in(values: Iterable[Any]) -> Cache | None:
    """The one cache among ``values`` and inside their tuples, lists and mappings; None where there is none.

    Raises:
        ModelError: there are several.
    """
    found: dict[int, Cache] = {}
    _collect(values, found)
    if len(found) > 1:
        raise ModelError(f"a forward pass got {len(found)} key/value caches, expected one")
    return next(iter(found.values()), None)


def _collect(values: Iterable[Any], found: dict[int, Cache]) -> None:
    for value in values:
        if isinstance(value, Cache):
            found[id(value)] = value
        elif isinstance(value, Mapping):
            _collect(value.values(), found)
        elif isinstance(value, (tuple, list)):
            _collect(value, found)


def cache_of(output: Any) -> Cache:
    """The cache that a model's output carries; ModelError when it carries none."""
    cache = cache_in([output])
    if cache is None:
        raise ModelError(f"the model's output ({type(output).__name__}) carries no key/value cache, expected one")
    return cache


def cache_argument(forward: Callable[..., Any], cache: Cache) -> dict[str, Cache]:
    """``cache`` under the keyword by which ``forward`` takes one: the parameter annotated as a :class:`Cache`.

    Raises:
        ModelError: no parameter, or several, are annotated so.
    """
    names = [name for name, one in inspect.signature(forward).parameters.items() if _takes_cache(one.annotation)]
    if len(names) != 1:
        raise ModelError(
            f"{getattr(forward, '__qualname__', forward)} has {len(names)} parameters annotated as a key/value cache, "
            "expected one"
        )
    return {names[0]: cache}


def _takes_cache(annotation: Any) -> bool:
    if isinstance(annotation, str):  # postponed evaluation
        return "Cache" in annotation
    kinds = (annotation, *typing.get_args(annotation))
    return any(isinstance(kind, type) and issubclass(kind, Cache) for kind in kinds)


def cut(cache: Cache, position: int) -> None:
    """Let ``cache`` forget everything from ``position`` on; ModelError when it cannot be taken back."""
    length = int(cache.get_seq_length())
    try:
        if position == 0 and isinstance(cache, StaticCache):
            # Other kinds keep zeros of the old length in some releases.
            cache.reset()
        elif position < length:
            cache.crop(position - length)
        left = int(cache.get_seq_length())
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).split(". ")[0]
        raise ModelError(
            f"the key/value cache ({type(cache).__name__}) cannot be taken back from token {length} to {position}: "
            f"start from an empty one ({reason})"
        ) from None
    if left != position:
        raise ModelError(f"the key/value cache ({type(cache).__name__}) holds {left} tokens after a cut to {position}")

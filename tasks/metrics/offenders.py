"""Errors that name the first few offenders and count all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable

from adalink.errors import DataError

__all__ = ["refuse", "refuse_repeated"]

_SHOWN = 5


def refuse(offenders: Collection[Hashable], what: str, expected: str) -> None:
    """Raises DataError where there are offenders: "3 images have no caption (first: 7, 9, 12); expected ...".

    what      follows the count, such as "images have no caption"
    expected  what was expected, or what to do
    """
    if offenders:
        first = ", ".join(repr(name) for name in list(offenders)[:_SHOWN])
        raise DataError(f"{len(offenders)} {what} (first: {first}{', ...' if len(offenders) > _SHOWN else ''}); {expected}")


def refuse_repeated(names: Iterable[Hashable], what: str) -> None:
    """Raises DataError where a name stands more than once; what follows the count, such as "image ids stand more than once in x.json"."""
    refuse([name for name, count in Counter(names).items() if count > 1], what, "expected each once")

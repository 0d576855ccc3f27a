"""A value that holds for the calls of one thread (or task), and that a compiled model can read."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

__all__ = ["Bound"]

T = TypeVar("T")
_VALUES: ContextVar[Mapping[int, Any]] = ContextVar("adalink_bound", default={})  # noqa: B039  # never changed, only replaced; one variable for all, so that models can be copied


class Bound(Generic[T]):
    """None, until it is set, in each thread for itself: two that serve different adapters of one model do not meet.

    Dynamo cannot trace a ContextVar: compiled code reads and writes an attribute, which all threads share. So bind a compiled model in one thread.
    """

    def __init__(self) -> None:
        self._value: T | None = None
        self._by_compiled = False  # set by compiled code, and to be read by code that is not (after a graph break)

    def get(self) -> T | None:
        """What was set last in this thread."""
        if torch.compiler.is_compiling():
            return self._value
        found: T | None = _VALUES.get().get(id(self))
        return self._value if found is None and self._by_compiled else found

    def set(self, value: T | None) -> None:
        """From now on this value, in this thread."""
        if torch.compiler.is_compiling():
            self._value, self._by_compiled = value, value is not None
            return
        self._value, self._by_compiled = value, False
        others = {key: held for key, held in _VALUES.get().items() if key != id(self)}
        _VALUES.set(others if value is None else {**others, id(self): value})

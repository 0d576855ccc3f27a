"""What every settings dataclass checks of its fields."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from adalink.errors import ConfigError

__all__ = ["check_tuples", "names_of"]

_tuples: dict[type, tuple[str, ...]] = {}  # by dataclass: its fields that are tuples


def check_tuples(settings: Any, owner: str) -> None:
    """In a frozen dataclass's __post_init__: make its lists tuples where its fields are.

    Raises ConfigError for anything else there, such as a text, which would be read letter by letter. owner: what messages call it.
    """
    kind = type(settings)
    if kind not in _tuples:
        hints = typing.get_type_hints(kind)
        _tuples[kind] = tuple(each.name for each in dataclasses.fields(kind) if typing.get_origin(hints[each.name]) is tuple)
    for name in _tuples[kind]:
        value = getattr(settings, name)
        if isinstance(value, list):
            object.__setattr__(settings, name, tuple(value))
        elif not isinstance(value, tuple):
            what = f"the text {value!r}" if isinstance(value, str) else repr(value)
            raise ConfigError(f"{owner} {name} is {what}, expected a tuple: give ({value!r},) for one")


def names_of(setting: str, value: Sequence[str]) -> tuple[str, ...]:
    """The names that a setting holds. Raises ConfigError for a text in place of a tuple, which would be read letter by letter."""
    if isinstance(value, str):
        raise ConfigError(f"{setting} is the text {value!r}, expected a tuple of names: give ({value!r},)")
    return tuple(value)

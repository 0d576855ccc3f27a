"""The errors a caller may catch, and what every settings dataclass checks of its fields."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

__all__ = ["check_tuples", "names_of"]


# ----------------------------------------
# The errors a caller may catch.
#
#     AdalinkError
#     |- ConfigError       a wrong argument, key or combination of settings
#     |- DataError         a file, column or sample that cannot be read or does not fit
#     |  `- BudgetError    more bad samples than the budget allows
#     |- AttachError       a port, layer or linear that the frozen model does not have, or a model that cannot be edited
#     |- CheckpointError   an adapter file that is damaged, or made for another base
#     |- ScoreError        a score is on the wrong side of a limit that was asked for; the command line exits with 3
#     `- TerminatedError   the process was asked to end (SIGTERM, Ctrl-C), and has saved what it did; the command line exits with 143 or 130
#
# Every message is one sentence that says what is wrong, what was found, what was expected and what to do. The command line prints
# it and exits with code 2, or the one named above; nothing else is printed for these.


class AdalinkError(Exception):
    """Anything the caller can mend. exit_code: of a command that ends so."""

    exit_code = 2


class ConfigError(AdalinkError):
    """A wrong argument, key or combination of settings."""


class DataError(AdalinkError):
    """A file, column or sample that cannot be read or does not fit."""


class BudgetError(DataError):
    """More bad samples than the budget allows."""


class AttachError(AdalinkError):
    """A port, layer or linear that the frozen model does not have, or a model that cannot be edited."""


class CheckpointError(AdalinkError):
    """An adapter file that is damaged, or made for another base."""


class ScoreError(AdalinkError):
    """What was measured is on the wrong side of a limit that was asked for: nothing is broken, and nothing should be shipped."""

    exit_code = 3


class TerminatedError(AdalinkError):
    """The process was asked to end (SIGTERM, Ctrl-C), and has saved what it did. exit_code: of a command that ends so, 128 and the signal's number."""

    def __init__(self, message: str, exit_code: int = 143) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


# ----------------------------------------
# What every settings dataclass checks of its fields.


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

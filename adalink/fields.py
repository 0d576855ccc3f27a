"""What every settings dataclass checks of its fields."""

from __future__ import annotations

from collections.abc import Sequence

from adalink.errors import ConfigError

__all__ = ["names_of"]


def names_of(setting: str, value: Sequence[str]) -> tuple[str, ...]:
    """The names that a setting holds. Raises ConfigError for a text in place of a tuple, which would be read letter by letter."""
    if isinstance(value, str):
        raise ConfigError(f"{setting} is the text {value!r}, expected a tuple of names: give ({value!r},)")
    return tuple(value)

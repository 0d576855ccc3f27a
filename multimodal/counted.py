"""Numbers of things in sentences: `1 image`, `2,400 images`."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: (1, "image") -> "1 image"; (2400, "image") -> "2,400 images". plural: where it is more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"

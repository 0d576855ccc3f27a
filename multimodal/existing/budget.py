"""How many tokens an image may cost a model that sees already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adalink.errors import ConfigError

__all__ = ["ImageTokens"]


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """Bounds of the tokens that hold an image's vectors. An image with more of them is scaled down, one with fewer is scaled up."""

    min: int | None = None  # how many at least; none: as the processor has it
    max: int | None = None  # how many at most; none: as the processor has it

    def __post_init__(self) -> None:
        """Raise ConfigError for bounds that no image can keep."""
        for name, value in (("min", self.min), ("max", self.max)):
            if value is not None and value < 1:
                raise ConfigError(f"image_tokens.{name} is {value}: give 1 or more")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ConfigError(f"image_tokens.min is {self.min} and image_tokens.max is {self.max}: give a min that is not above max")

    def __bool__(self) -> bool:
        return self.min is not None or self.max is not None

    def __str__(self) -> str:
        if not self:
            return "as many tokens as its processor makes"
        return " and ".join(f"{words} {value}" for words, value in (("at least", self.min), ("at most", self.max)) if value is not None) + " tokens"

    def keeps(self, count: int) -> bool:
        """Whether so many tokens are within both bounds."""
        return (self.min or 0) <= count and (self.max is None or count <= self.max)

    def aim(self, count: int) -> tuple[int, int]:
        """How few and how many tokens an image of so many should have: these, where they are within the bounds; else some near the bound."""
        if self.keeps(count):
            return count, count
        if self.max is not None and count > self.max:
            return max(self.min or 0, -(-self.max * 3 // 4)), self.max
        least = self.min or 0
        return least, least * 4 // 3 + 1 if self.max is None else min(least * 4 // 3 + 1, self.max)

    def distance(self, count: int, low: int, high: int) -> tuple[bool, bool, int]:
        """What is least for the best of several counts: one within the bounds, then one that is not above them, then the nearest to an aim."""
        return not self.keeps(count), self.max is not None and count > self.max, max(low - count, count - high, 0)

    def saved(self) -> dict[str, dict[str, int]]:
        """What an adapter's folder says of them; nothing where there are none."""
        return {"image_tokens": {name: value for name, value in vars(self).items() if value is not None}} if self else {}

    @staticmethod
    def of(task: Mapping[str, Any]) -> ImageTokens:
        """The reverse. Raises ConfigError for bounds that no image can keep."""
        return ImageTokens(**task.get("image_tokens", {}))

"""What was skipped, and why: counted by reason, named up to a few keys, and stopped at a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from adalink.errors import BudgetError, ConfigError

__all__ = ["BadSample", "BadSamples", "counted"]


# ----------------------------------------
# Numbers of things in sentences: `1 image`, `2,400 images`.


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: (1, "image") -> "1 image"; (2400, "image") -> "2,400 images". plural: where it is more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


MOST_KEYS = 5  # per reason; enough to look at, and a message still fits on a line or two


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """One sample that cannot be used.

    key      the key that the sample has, or would have had
    reason   short and stable, such as "truncated": reports count by it
    detail   one sentence for a person
    file     the name of the image's file, where it has one of its own
    """

    key: str
    reason: str
    detail: str = ""
    file: str = ""

    def to_row(self) -> list[str]:
        """For a JSON file: key, reason, detail, and the file's name where there is one."""
        return [self.key, self.reason, self.detail, *([self.file] if self.file else [])]

    @classmethod
    def from_row(cls, row: Iterable[str]) -> BadSample:
        """The reverse. Raises ValueError where the row has another length."""
        key, reason, detail, *file = row
        if len(file) > 1:
            raise ValueError(f"a skipped sample has {3 + len(file)} entries, expected 3 or 4")
        return cls(key=key, reason=reason, detail=detail, file="".join(file))

    def __str__(self) -> str:
        """The key, and the file's name where the key is not made of it. A key from a tar file may hold line feeds and terminal codes."""
        named = f"{self.key} {self.file}" if self.file and Path(self.file).stem != Path(self.key).name else self.key
        return named if named.isprintable() else repr(named)


class BadSamples:
    """Counts bad samples by reason and keeps the first keys of each; `check` raises once there are more than the budget.

    budget   how many bad samples a run may skip; 0 stops at the first.
    """

    def __init__(self, *, budget: int, found: Iterable[BadSample] = ()) -> None:
        if budget < 0:
            raise ConfigError(f"the budget for bad samples is {budget}; give 0 (stop at the first one) or more")
        self._budget = budget
        self._counts: dict[str, int] = {}
        self._first: dict[str, list[BadSample]] = {}
        for bad in found:
            self.add(bad)

    def add(self, bad: BadSample) -> None:
        """Counts one; raises nothing, so that a whole batch can be counted before the run is stopped."""
        self._counts[bad.reason] = self._counts.get(bad.reason, 0) + 1
        first = self._first.setdefault(bad.reason, [])
        if len(first) < MOST_KEYS:
            first.append(bad)

    def check(self) -> None:
        """Raises BudgetError, which names each reason, its count and its first keys, when more than the budget were added."""
        total = sum(self._counts.values())
        if total > self._budget:
            advice = "mend or remove them, or allow more bad samples"
            allowed = f"at most {self._budget} {'is' if self._budget == 1 else 'are'} allowed"
            raise BudgetError(f"{counted(total, 'bad sample')}, and {allowed}: {self.summary()}; {advice}")

    @property
    def counts(self) -> Mapping[str, int]:
        """How many of each reason, in the order in which the reasons first came."""
        return dict(self._counts)

    @property
    def first(self) -> Mapping[str, tuple[BadSample, ...]]:
        """The first few of each reason."""
        return {reason: tuple(bad) for reason, bad in self._first.items()}

    def __repr__(self) -> str:
        return f"BadSamples({self})"

    def __str__(self) -> str:
        return self.summary() or "none"

    def summary(self) -> str:
        """For a log line: `2 truncated (12 a.jpg, 40 b.jpg), 1 missing file (7)`; empty where nothing was added."""
        parts = []
        for reason, count in self._counts.items():
            keys = [str(bad) for bad in self._first[reason]] + (["..."] if count > MOST_KEYS else [])
            parts.append(f"{count} {reason} ({', '.join(keys)})")
        return ", ".join(parts)

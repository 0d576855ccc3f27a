"""Regular expressions as parts of one nondeterministic automaton.

The plain kind only: letters, escapes, classes `[...]`, groups `(...)`, `|`, `*`, `+`, `?`, `{m}` and `{m,n}`. Letters match in either case,
classes hold exactly what they name: `us` matches "US", `[u][s]` does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Automaton", "Letters", "parse"]

_ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "v": "\v", "f": "\f"}
_FOLDED = {"i": "\u0130\u0131", "k": "\u212a", "s": "\u017f"}  # letters whose other case is i, k or s
_BOUNDS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


@dataclass(frozen=True)
class Letters:
    """A class of letters: those in `given`, or with `negated` all others."""

    given: frozenset[str]
    negated: bool = False

    def __contains__(self, letter: str) -> bool:
        return (letter in self.given) != self.negated


@dataclass
class Automaton:
    """States are numbers. `step[s]`: what s reads and where that leads; `jump[s]`: states reached from s without reading."""

    step: list[tuple[Letters, int] | None] = field(default_factory=list)
    jump: list[list[int]] = field(default_factory=list)

    def state(self) -> int:
        """A new state."""
        self.step.append(None)
        self.jump.append([])
        return len(self.step) - 1


# A parsed pattern: given a state to start from, adds itself and returns the state where it ends.
Part = Callable[[Automaton, int], int]


def parse(pattern: str) -> Part:
    """The pattern, ready to be added to an automaton any number of times."""
    reader = _Reader(pattern)
    part = reader.choice()
    assert reader.at == len(pattern), f"unbalanced pattern at {reader.at}: {pattern}"
    return part


class _Reader:
    """Recursive descent over the text of one pattern."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def choice(self) -> Part:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _any_of(branches)

    def _sequence(self) -> Part:
        parts: list[Part] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            part = self._atom()
            while bounds := self._bounds():
                part = _repeat(part, *bounds)
            parts.append(part)
        return _in_turn(parts)

    def _atom(self) -> Part:
        if self._take("("):
            part = self.choice()
            assert self._take(")"), self.text
            return part
        if self._take("["):
            return _read(self._class())
        return _read(Letters(_cases(self._letter())))

    def _bounds(self) -> tuple[int, int | None] | None:
        found = re.compile(r"[*+?]|\{(\d+)(,?)(\d*)\}").match(self.text, self.at)
        if not found:
            return None
        self.at = found.end()
        least, comma, most = found.groups()
        if least is None:
            return _BOUNDS[found.group()]
        return int(least), int(most) if most else None if comma else int(least)

    def _class(self) -> Letters:
        negated = self._take("^")
        given: set[str] = set()
        while not self._take("]"):
            first = self._letter()
            last = self._letter() if self._take("-") else first
            for code in range(ord(first), ord(last) + 1):
                given.add(chr(code))
        return Letters(frozenset(given), negated)

    def _letter(self) -> str:
        letter = self.text[self.at]
        self.at += 1
        if letter != "\\":
            return letter
        self.at += 1
        escaped = self.text[self.at - 1]
        return _ESCAPES.get(escaped, escaped)

    def _take(self, text: str) -> bool:
        found = self.text.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found


def _cases(letter: str) -> frozenset[str]:
    return frozenset({letter, letter.lower(), letter.upper(), *_FOLDED.get(letter.lower(), "")})


def _read(letters: Letters) -> Part:
    def add(automaton: Automaton, start: int) -> int:
        begin, end = automaton.state(), automaton.state()
        automaton.jump[start].append(begin)
        automaton.step[begin] = (letters, end)
        return end

    return add


def _in_turn(parts: Sequence[Part]) -> Part:
    def add(automaton: Automaton, start: int) -> int:
        for part in parts:
            start = part(automaton, start)
        return start

    return add


def _any_of(branches: Sequence[Part]) -> Part:
    def add(automaton: Automaton, start: int) -> int:
        end = automaton.state()
        for branch in branches:
            begin = automaton.state()
            automaton.jump[start].append(begin)
            automaton.jump[branch(automaton, begin)].append(end)
        return end

    return add


def _repeat(part: Part, least: int, most: int | None) -> Part:
    def add(automaton: Automaton, start: int) -> int:
        for _ in range(least):
            start = part(automaton, start)
        if most is None:
            # A state of its own, so that nothing but the repetition comes back to it.
            again = automaton.state()
            automaton.jump[start].append(again)
            automaton.jump[part(automaton, again)].append(again)
            return again
        end = automaton.state()
        automaton.jump[start].append(end)
        for _ in range(most - least):
            start = part(automaton, start)
            automaton.jump[start].append(end)
        return end

    return add

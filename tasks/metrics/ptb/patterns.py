"""Regular expressions as parts of one nondeterministic automaton.

The plain kind only: letters, escapes, classes `[...]`, groups `(...)`, `|`, `*`, `+`, `?`, `{m}` and `{m,n}`. Letters match in either case,
classes hold exactly what they name: `us` matches "US", `[u][s]` does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Automaton", "Letters", "Scanner", "parse"]


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


# ----------------------------------------
# A scanner that finds, of many patterns, the one that matches furthest: what lexer generators do and `re` does not.


class _State:
    """A state of the deterministic automaton: a set of states of the other one, and where each letter met so far leads."""

    __slots__ = ("accepts", "is_last", "members", "moves")

    def __init__(self, members: frozenset[int], accepts: int, is_last: bool) -> None:
        self.members = members
        self.accepts = accepts  # the first pattern that ends here; -1 if none does
        self.is_last = is_last  # True where no letter leads on
        self.moves: dict[str, _State | None] = {}


class Scanner:
    """All patterns in one automaton, whose states are made when a text first needs them: a large rule set costs what is used of it.

    The longest match wins; of equally long ones the pattern that stands first.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._automaton = Automaton()
        start = self._automaton.state()
        # Every pattern ends in a state of its own, because equal ones must not share what they accept.
        self._ends = {parse(pattern)(self._automaton, self._fork(start)): index for index, pattern in enumerate(patterns)}
        self._states: dict[frozenset[int], _State] = {}
        self.start = self._state([start])

    def scan(self, text: str, begin: int) -> tuple[int, int, int]:
        """The longest match that starts at `begin`: (pattern, end, reach).

        pattern  index of the pattern; -1 where none matches
        end      where the match ends
        reach    where the letters end that had to be read to know this; len(text) + 1 if more text could have made the match longer
        """
        state: _State | None = self.start
        pattern, end, at, length = -1, begin, begin, len(text)
        while state is not None and not state.is_last:
            if at == length:
                return pattern, end, length + 1
            letter = text[at]
            at += 1
            state = state.moves[letter] if letter in state.moves else self.move(state, letter)
            if state is not None and state.accepts >= 0:
                pattern, end = state.accepts, at
        return pattern, end, at

    def ends(self, text: str, begin: int, end: int) -> list[int]:
        """All places up to `end` where a match that starts at `begin` may end, ascending."""
        found: list[int] = []
        state = self.start
        at = begin
        while at < end and (following := self.move(state, text[at])) is not None:
            state = following
            at += 1
            if state.accepts >= 0:
                found.append(at)
        return found

    def move(self, state: _State, letter: str) -> _State | None:
        """Where a letter leads from a state; None where no pattern goes on."""
        if letter not in state.moves:
            steps = (self._automaton.step[member] for member in state.members)
            targets = [step[1] for step in steps if step is not None and letter in step[0]]
            state.moves[letter] = self._state(targets) if targets else None
        return state.moves[letter]

    def _fork(self, state: int) -> int:
        fresh = self._automaton.state()
        self._automaton.jump[state].append(fresh)
        return fresh

    def _state(self, members: Iterable[int]) -> _State:
        reached = set(members)
        waiting = list(reached)
        while waiting:
            fresh = [member for member in self._automaton.jump[waiting.pop()] if member not in reached]
            reached.update(fresh)
            waiting.extend(fresh)
        key = frozenset(reached)
        if key not in self._states:
            accepts = min((self._ends[member] for member in key if member in self._ends), default=-1)
            is_last = all(self._automaton.step[member] is None for member in key)
            self._states[key] = _State(key, accepts, is_last)
        return self._states[key]

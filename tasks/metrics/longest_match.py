"""A scanner that finds, of many patterns, the one that matches furthest: what lexer generators do and `re` does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tasks.metrics.patterns import Automaton, parse

__all__ = ["Scanner"]


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

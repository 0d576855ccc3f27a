r"""Conversations as a data set: LLaVA's, ShareGPT's and OpenAI's layouts and those of the usual trainers. Each answer is a question's.

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    {"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]}
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:..."}}, {"type": "text", "text": "What?"}]}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, NamedTuple

from adalink.errors import ConfigError, DataError
from multimodal.sample import counted
from tasks.data.columns import Asked, ImageValue, Parts, image_values, listed_names, python_list
from tasks.data.reader import Given, Reader
from tasks.data.rows import Row, open_rows
from tasks.data.table import TableSource

__all__ = ["READER", "Conversations", "conversations_of"]

MARK = "<image>"
_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TURNS = ("messages", "conversations", "conversation")
_HALVES = ("prompt", "completion")  # each a list of turns, or one text
_PAIRS = (("instruction", "output"), ("query", "response"), _HALVES)
_IMAGES = ("images", "image", "image_path", "img_path", "file_name")
_SYSTEM = ("system", "system_prompt")


class _Wrong(DataError):
    """A conversation that cannot be used; `reason` counts it."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class _Turn(NamedTuple):
    """A turn without its images; places: how many letters come before each; given: images that stand in the turn itself, None for one of the row's."""

    role: str
    text: str
    places: tuple[int, ...] = ()
    given: tuple[ImageValue | None, ...] = ()


@dataclass(frozen=True)
class Conversations:
    """Rows that are conversations.

    columns   the column of the turns; of two, each a list of turns, or a question's and its answer's texts
    image     the column of the images; None: the usual name that a row has
    system    likewise of the system message
    """

    columns: tuple[str, ...]
    image: str | None = None
    system: str | None = None
    has_texts: ClassVar[bool] = True

    @property
    def sentence(self) -> str:
        """`conversations: messages`."""
        named = {"conversations": " and ".join(self.columns), "image": self.image, "system": self.system}
        return ", ".join(f"{role}: {column}" for role, column in named.items() if column)

    def parts(self, row: Row, place: Callable[[], str]) -> Parts:
        """What a row holds; of one that cannot be used the problem alone."""
        try:
            return self._parts(row, place)
        except DataError as error:
            return Parts(images=(), problems=((getattr(error, "reason", "damaged conversation"), str(error)),), is_text_only=True)

    def _parts(self, row: Row, place: Callable[[], str]) -> Parts:
        beside = image_values(_first(row, (self.image,) if self.image else _IMAGES), place)
        turns, images = _placed(_in_turn(self._turns(row, place), place), beside, place)
        asked = tuple(_asked(turns))
        n_empty = sum(turn.role == "assistant" and not turn.text.strip() for turn in turns)
        problems = (("empty answer", f"{place()}: an answer of the assistant is empty"),) if n_empty else ()
        is_caption = len(asked) == 1 and asked[0].answers and images
        return Parts(
            images=images,
            captions=(asked[0].answers[0].strip(),) if is_caption else (),
            questions=asked,
            problems=problems,
            is_text_only=not images,
        )

    def _turns(self, row: Row, place: Callable[[], str]) -> list[_Turn]:
        """The turns as they stand, the system message first."""
        values = [row.get(column) for column in self.columns]
        if all(value is None for value in values):
            raise _Wrong("no conversation", f"{place()} has no conversation in {self.columns[0]!r}; it has {listed_names(list(row))}")
        is_pair = len(values) == 2 and isinstance(values[0], str) and not values[0].lstrip().startswith("[{")
        listed = list(_pair(row, self.columns, place)) if is_pair else [turn for value in values for turn in _listed(value, place)]
        turns = [_turn(one, number, place) for number, one in enumerate(listed)]
        system = _first(row, (self.system,) if self.system else _SYSTEM)
        if isinstance(system, str) and system.strip() and not any(turn.role == "system" for turn in turns):
            turns.insert(0, _Turn("system", system))
        return turns


# ----------------------------------------
# From values of a row to turns.


def _first(row: Row, names: Sequence[str]) -> object:
    """The first of these fields that is not empty."""
    return next((row[name] for name in names if row.get(name)), None)


def _listed(value: object, place: Callable[[], str]) -> Sequence[object]:
    """A list of turns, also as JSON in a text, or as Python prints it."""
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError as error:
            if (found := python_list(value)) is None:
                raise _Wrong(
                    "damaged conversation", f"{place()}: the conversation is a text that is not JSON ({error}); expected a list of turns"
                ) from None
        value = found
    if not isinstance(value, (list, tuple)) or not value:
        raise _Wrong("damaged conversation", f"{place()}: the conversation is {value!r:.40}; expected a list of turns")
    return value


def _pair(row: Row, columns: Sequence[str], place: Callable[[], str]) -> Iterator[Mapping[str, object]]:
    """A question and its answer in two columns, with `input` and `history`, which is a list of questions with their answers."""
    history = row.get("history") or []
    for pair in _listed(history, place) if history else ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise _Wrong("damaged conversation", f"{place()}: the history holds {pair!r:.40}; expected a question with its answer")
        yield from ({"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True))
    yield {"role": "user", "content": "\n".join(str(row[name]) for name in (columns[0], "input") if row.get(name))}
    yield {"role": "assistant", "content": row.get(columns[1])}


def _turn(value: object, number: int, place: Callable[[], str]) -> _Turn:
    """A turn, its images as parts where it has parts."""
    if not isinstance(value, Mapping):
        raise _Wrong("damaged conversation", f"{place()}: turn {number} is {value!r:.40}; expected an object with a role and a content")
    speaker = value["from"] if "from" in value else value.get("role")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    role = role or _ROLES.get(str(speaker).lower())
    if role is None:
        raise _Wrong("unknown role", f"{place()}: turn {number} has the role {speaker!r:.40}; expected one of {', '.join(_ROLES)}")
    content = value["value"] if "value" in value else value.get("content")
    if isinstance(content, str) or content is None:
        return _Turn(role, content or "")
    if not isinstance(content, (list, tuple)):
        raise _Wrong("damaged conversation", f"{place()}: turn {number} holds {content!r:.40}; expected a text or a list of parts")
    text, places, given = "", [], []
    for part in content:
        found = _part(part, number, place)
        if isinstance(found, str):
            text += found
        else:
            places.append(len(text))
            given.append(found[0] if found else None)
    return _Turn(role, text, tuple(places), tuple(given))


def _part(part: object, number: int, place: Callable[[], str]) -> str | tuple[ImageValue, ...]:
    """The text of a part, or its image; nothing for one of the row's images."""
    if isinstance(part, str):
        return part
    fields = part if isinstance(part, Mapping) else {}
    kind = fields.get("type") or next((name for name in ("text", "image", "image_url") if fields.get(name)), None)
    if kind == "text" and isinstance(fields.get("text"), str):
        return str(fields["text"])
    if kind not in ("image", "image_url"):
        raise _Wrong("damaged conversation", f"{place()}: turn {number} has the part {part!r:.60}; expected type text with a text, image or image_url")
    value = next((fields[name] for name in ("image", "image_url", "url", "path") if fields.get(name)), None)
    return image_values(value["url"] if isinstance(value, Mapping) and value.get("url") else value, place)


# ----------------------------------------
# Where the images stand, and whose turn it is.


def _unmarked(turn: _Turn) -> _Turn:
    """A turn with each `<image>` of its text as a place; the white space between one at an edge and the text is no text."""
    pieces = turn.text.split(MARK)
    last, first = len(pieces) - 1, 0
    while first < last and not pieces[first].strip():
        pieces[first] = ""
        first += 1
    pieces[first] = pieces[first].lstrip() if first else pieces[first]
    end = last
    while end > 0 and not pieces[end].strip():
        pieces[end] = ""
        end -= 1
    pieces[end] = pieces[end].rstrip() if end < last else pieces[end]
    places = tuple(accumulate(map(len, pieces[:-1])))
    return _Turn(turn.role, "".join(pieces), places, (None,) * len(places))


def _placed(turns: Sequence[_Turn], beside: Sequence[ImageValue], place: Callable[[], str]) -> tuple[list[_Turn], tuple[ImageValue, ...]]:
    """The turns with the places of their images, and these in order.

    Where no part is an image, each `<image>` in a text of the user's is one; where there is none either, the images stand before the user's
    first text.
    """
    if wrong := next((turn.role for turn in turns if turn.places and turn.role != "user"), None):
        raise _Wrong("image count", f"{place()}: a turn of the {wrong}'s holds an image; expected images in the user's turns")
    has_parts = any(turn.places for turn in turns)
    placed = [turn if has_parts or turn.role != "user" or MARK not in turn.text else _unmarked(turn) for turn in turns]
    given = [one for turn in placed for one in turn.given]
    if not given and beside:
        first = next(number for number, turn in enumerate(placed) if turn.role == "user")
        placed[first] = placed[first]._replace(places=(0,) * len(beside), given=(None,) * len(beside))
        given = [None] * len(beside)
    if any(turn.role == "user" and not turn.text.strip() and not turn.places for turn in placed):
        raise _Wrong("empty turn", f"{place()}: a turn of the user's is empty; expected a text or an image")
    n_open = sum(one is None for one in given)
    if n_open != len(beside):
        raise _Wrong(
            "image count",
            f"{place()} has {counted(n_open, 'place')} for images ({MARK} in the user's texts, or parts) and {counted(len(beside), 'image')}; "
            "expected one for each",
        )
    others = iter(beside)
    return placed, tuple(next(others) if one is None else one for one in given)


def _in_turn(turns: Sequence[_Turn], place: Callable[[], str]) -> list[_Turn]:
    """A system message or none, then the user and the assistant by turns; an assistant's turn before the user's first is left out."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    rest = list(turns[len(system) :])
    while rest and rest[0].role == "assistant":
        rest.pop(0)
    for number, turn in enumerate(rest):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            at = len(turns) - len(rest) + number
            before = f"comes after another of the {turn.role}'s" if number and rest[number - 1].role == turn.role else f"is the {turn.role}'s"
            raise _Wrong("order of turns", f"{place()}: turn {at} {before}; expected one of the {expected}'s, since user and assistant take turns")
    if not rest:
        raise _Wrong("order of turns", f"{place()} has no turn of the user's; expected a question and its answer")
    return [turn for turn in system if turn.text.strip()] + rest


def _asked(turns: Sequence[_Turn]) -> Iterator[Asked]:
    """Each turn of the user's as a question, after the turns before it."""
    spoken = tuple((turn.role, turn.text) for turn in turns)
    places: tuple[tuple[int, int], ...] = ()
    for at, turn in enumerate(turns):
        if turn.role == "user":
            places += tuple((at, letters) for letters in turn.places)
            answer = turns[at + 1].text if at + 1 < len(turns) else ""
            yield Asked(turn.text, (answer,) if answer.strip() else (), turns=spoken[:at], places=places)


# ----------------------------------------
# Conversations as data sets.


def conversations_of(row: Row, given: Mapping[str, str] | None = None) -> Conversations | None:
    """How the rows of a file are conversations, by its first row; None where they are none.

    given: role (conversations, image, system) -> column, where they are not called as usual. Raises ConfigError for another role.
    """
    roles = {{"messages": "conversations", "images": "image"}.get(role, role): column for role, column in (given or {}).items()}
    if wrong := next((role for role in roles if role not in ("conversations", "image", "system")), None):
        raise ConfigError(f"columns has the role {wrong!r}: expected some of conversations, image, system")
    columns = _columns(row, roles.get("conversations"))
    return None if columns is None else Conversations(columns, roles.get("image"), roles.get("system"))


def _columns(row: Row, named: str | None) -> tuple[str, ...] | None:
    if named is not None:
        return (named,) if named in row else None
    if found := next((name for name in _TURNS if _is_turns(row.get(name))), None):
        return (found,)
    for question, answer in _PAIRS:
        is_halves = (question, answer) == _HALVES and _is_turns(row.get(question)) and _is_turns(row.get(answer))
        if is_halves or (isinstance(row.get(question), str) and isinstance(row.get(answer), str)):
            return question, answer
    return None


def _is_turns(value: object) -> bool:
    """Whether a value is a list of objects, also as JSON in a text."""
    if isinstance(value, str):
        return value.lstrip().startswith("[{")
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def _open(given: Given) -> TableSource:
    rows = open_rows(given.path)
    reading = conversations_of(rows[0], given.columns)
    if reading is None:
        known = listed_names(rows.columns)
        raise DataError(f"{given.path.name} has no column of conversations; it has {known}; name it, as in columns: {{conversations: {rows.columns[0]}}}")
    return TableSource(rows, reading, images=given.folder)


_ABOUT = "conversations, as LLaVA, ShareGPT and OpenAI write them"

READER = Reader("conversations", _ABOUT, lambda found: conversations_of(found.row) is not None, _open, reads=("columns",))

"""What a row of a table holds: which columns are the image, the texts and the ids, guessed from their usual names or given."""

from __future__ import annotations

import ast
import base64
import binascii
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Protocol
from urllib.parse import unquote_to_bytes

from adalink.errors import ConfigError, DataError
from multimodal.sample import Question
from tasks.data.files import answer_marks
from tasks.data.rows import Row, RowFile

__all__ = ["Asked", "Columns", "Parts", "Reading", "choose_columns", "id_of", "listed_names", "python_list"]

ImageValue = str | bytes
"""An image as a row has it: the name of a file, or its bytes."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of a row, with its answers; `turns` are those before it, as (role, text)."""

    text: str
    answers: tuple[str, ...] = ()
    question_type: str = ""
    answer_type: str = ""
    marks: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    places: tuple[tuple[int, int], ...] | None = None

    def numbered(self, question_id: int) -> Question:
        """The question with its id in the data set."""
        return Question(
            question_id=question_id, text=self.text, answers=self.answers, question_type=self.question_type, answer_type=self.answer_type,
            marks=self.marks, turns=self.turns, places=self.places,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parts:
    """What one row holds.

    image_id      what the row calls its image; None where it has no name for it
    question_id   likewise for its question
    problems      (reason, detail) of texts that cannot be used
    is_text_only  its texts are about no image, and need none
    """

    images: tuple[ImageValue, ...]
    captions: tuple[str, ...] = ()
    questions: tuple[Asked, ...] = ()
    image_id: int | str | None = None
    question_id: int | str | None = None
    problems: tuple[tuple[str, str], ...] = ()
    is_text_only: bool = False


class Reading(Protocol):
    """How the rows of a file are read. Pickles cheaply."""

    @property
    def sentence(self) -> str:
        """What was understood, for the log: `image: file, caption: text`."""

    @property
    def has_texts(self) -> bool:
        """Whether rows are to hold texts; a row without is then a bad one."""

    def parts(self, row: Row, place: Callable[[], str]) -> Parts:
        """What a row holds; place: where it stands. Raises DataError."""


# ----------------------------------------
# Which column is what.

# Role -> its usual names, in lower case: the plain ones, and others that are taken where no plain one is there.
_USUAL: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "image": (
        ("image", "images", "file_name", "filename"),
        ("img", "image_path", "img_path", "image_file", "filepath", "file", "path", "jpg"),
    ),
    "caption": (("caption", "captions", "text"), ("sentence", "sentences", "description", "raw", "txt")),
    "question": (("question",), ("query",)),
    "answers": (("answers", "answer"), ("label", "multiple_choice_answer")),
    "image_id": (("image_id",), ("imageid", "cocoid", "imgid")),
    "question_id": (("question_id",), ("questionid", "qid")),
    "question_type": (("question_type",), ()),
    "answer_type": (("answer_type",), ()),
}
_FIRST_WINS = (
    "answers",
)  # roles whose plain names may stand beside each other: VQAv2's tables have `answers` of ten people and one `answer`
_SPELLINGS = {"images": "image", "captions": "caption", "text": "caption", "answer": "answers"}  # of roles, in `columns`


def choose_columns(rows: RowFile, given: Mapping[str, str]) -> Columns:
    """The columns of a table by their roles: those given, and the usual names for other roles.

    Raises ConfigError where a given column is not there or a role is none; DataError where the file has no image, or two columns may be one role.
    """
    names = rows.columns
    chosen: dict[str, str] = {}
    for spelled, column in given.items():
        role = _SPELLINGS.get(spelled, spelled)
        if role not in _USUAL:
            raise ConfigError(f"columns has the role {spelled!r}: expected some of {', '.join(_USUAL)}")
        if column not in names:
            raise ConfigError(f"{rows.path.name} has no column {column!r}{_nearest(column, names)}; it has {listed_names(names)}")
        chosen[role] = column
    free = [name for name in names if name not in chosen.values()]
    for role in _USUAL:
        if role not in chosen and (guessed := _guessed(role, free, rows)):
            chosen[role] = guessed
    if "image" not in chosen:
        raise DataError(
            f"{rows.path.name} has no column that is known to hold images; it has {listed_names(names)}; name it, as in columns: {{image: {names[0]}}}"
        )
    return Columns(roles={role: chosen[role] for role in _USUAL if role in chosen})


def _guessed(role: str, names: Sequence[str], rows: RowFile) -> str | None:
    for usual in _USUAL[role]:
        found = [name for wanted in usual for name in names if name.lower() == wanted]
        if len(found) > 1 and role not in _FIRST_WINS:
            raise DataError(
                f"{rows.path.name} has the columns {found[0]!r} and {found[1]!r}, and either may be the {role}: choose, as in columns: {{{role}: {found[0]}}}"
            )
        if found:
            return found[0]
    return None


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def listed_names(names: Sequence[str], most: int = 12) -> str:
    """Names in quotes, the first so many of them."""
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "") or "none"


@dataclass(frozen=True)
class Columns:
    """Rows with a column for each role: one image or several, captions, or a question with its answers.

    roles   role -> column
    """

    roles: Mapping[str, str]
    has_texts: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "has_texts", "caption" in self.roles or "question" in self.roles)

    @property
    def sentence(self) -> str:
        """`image: file, caption: text`."""
        return ", ".join(f"{role}: {column}" for role, column in self.roles.items())

    def parts(self, row: Row, place: Callable[[], str]) -> Parts:
        """What a row holds. Raises DataError for a value of a kind that its role cannot have."""
        problems: list[tuple[str, str]] = []
        captions = self._captions(row, place, problems)
        asked = self._asked(row, place, problems)
        return Parts(
            images=image_values(self._value(row, "image"), place),
            captions=captions,
            questions=asked,
            image_id=id_of(self._value(row, "image_id")),
            question_id=id_of(self._value(row, "question_id")),
            problems=tuple(problems),
        )

    def _value(self, row: Row, role: str) -> object:
        column = self.roles.get(role)
        return None if column is None else row.get(column)

    def _captions(self, row: Row, place: Callable[[], str], problems: list[tuple[str, str]]) -> tuple[str, ...]:
        if "caption" not in self.roles:
            return ()
        found = [caption.strip() for caption in texts_of(self._value(row, "caption"), place, "caption")]
        if not all(found):
            problems.append(("empty caption", f"{place()}: the caption in {self.roles['caption']!r} is empty"))
        return tuple(filter(None, found))

    def _asked(self, row: Row, place: Callable[[], str], problems: list[tuple[str, str]]) -> tuple[Asked, ...]:
        if "question" not in self.roles:
            return ()
        value = self._value(row, "question")
        text = "" if value is None else _text(value, place, "question").strip()
        if not text:
            if not ("caption" in self.roles and value in (None, "")):  # a row with a caption alone
                problems.append(("empty question", f"{place()}: the question in {self.roles['question']!r} is empty"))
            return ()
        given = self._value(row, "answers")
        kind, answer_kind = (sys.intern(str(self._value(row, role) or "")) for role in ("question_type", "answer_type"))
        answers = tuple(sys.intern(answer) for answer in texts_of(given, place, "answer"))
        return (Asked(text, answers, question_type=kind, answer_type=answer_kind, marks=_marks(given)),)


# ----------------------------------------
# Values of rows.


def image_values(value: object, place: Callable[[], str]) -> tuple[ImageValue, ...]:
    """The images of a row: a name, bytes, an object with bytes and path, or a list of these. Raises DataError."""
    if value is None or value == "":
        return ()
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value)
    if isinstance(value, (list, tuple)):
        return tuple(image for one in value for image in image_values(one, place))
    if isinstance(value, Mapping):
        inside = value.get("bytes") or value.get("path")
        if inside is None and not {"bytes", "path"} & value.keys():
            raise DataError(f"{place()}: the image is an object with {listed_names(list(map(str, value)))}; expected bytes or path in it")
        return image_values(inside, place)
    if isinstance(value, str):
        return (_image_of(value, place),)
    if isinstance(value, bytes):
        return (value,)
    raise DataError(f"{place()}: the image is {value!r:.40} ({type(value).__name__}); expected the name of a file, or its bytes")


def _image_of(text: str, place: Callable[[], str]) -> ImageValue:
    """The name of a file, also of file://, or the bytes of a data: URI. Raises DataError for an address, and for a URI that holds no bytes."""
    kind, _, rest = text.partition(":")
    if kind == "data":
        head, _, data = rest.partition(",")
        try:
            return base64.b64decode(data, validate=True) if head.endswith(";base64") else unquote_to_bytes(data)
        except binascii.Error as error:
            raise DataError(f"{place()}: the image is a data: URI whose base64 is damaged ({error}); is it whole?") from None
    if kind in ("http", "https", "s3", "gs"):
        raise DataError(f"{place()} names the image by an address, {text[:60]}; download it, and give the name of its file")
    return text.removeprefix("file://")


def texts_of(value: object, place: Callable[[], str], what: str) -> list[str]:
    """Texts of a field: one, or a list of them, also as JSON or as Python's list in a text; of objects, what they have under `what`. Raises DataError."""
    if value is None:
        return []
    if type(value) is list and all(map(_is_plain, value)):
        return list(value)  # most of them: without a call for each
    if isinstance(value, str) and value.lstrip()[:2] in ('["', "['", "[{", "[]"):
        value = _json(text := value.strip())
        if value is text and text.endswith("]"):
            raise DataError(f"{place()}: the {what} is {text:.40} in one text, and no list that can be read; write lists as JSON, or one text a row")
    if isinstance(value, Mapping):
        value = value.get(what, value.get(f"{what}s", value.get("raw", value.get("text"))))
        return texts_of(value, place, what)
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in texts_of(one, place, what)]
    return [_text(value, place, what)]


def _is_plain(value: object) -> bool:
    """Whether a value is a text as it stands: no JSON, and no half of a surrogate pair."""
    return type(value) is str and not value.lstrip().startswith("[") and (value.isascii() or _HALF.search(value) is None)


def _marks(value: object) -> tuple[str, ...]:
    """As `answer_marks`, of answers that are objects."""
    found = _json(value) if isinstance(value, str) and value.lstrip().startswith("[{") else value
    return (
        tuple(map(sys.intern, answer_marks(found)))
        if isinstance(found, list) and all(isinstance(one, dict) for one in found) and found
        else ()
    )


def _json(text: str) -> object:
    """A list that stands in a text as JSON, or as Python prints it, which pandas writes into a CSV file; the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        found = python_list(text)
        return text if found is None else found


def python_list(text: str) -> list[object] | None:
    """The list that Python prints as this text; None where it prints none so. An array of numpy is none: `['a' 'b']` would be one text."""
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list) and repr(found) == text.strip() else None


def _text(value: object, place: Callable[[], str], what: str) -> str:
    if isinstance(value, str):
        if not value.isascii() and _HALF.search(value):
            raise DataError(f"{place()}: the {what} holds half of a surrogate pair; expected Unicode text")
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{place()}: the {what} is {value!r:.40} ({type(value).__name__}); expected a text")


def id_of(value: object) -> int | str | None:
    """A whole number, also as a text and as the 7.0 that tables with gaps have; else the text, also of one that 64 bits do not hold."""
    if value is None or value == "" or isinstance(value, bool):
        return None
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return int(whole[1]) if whole and int(whole[1]) < 2**63 else text


_HALF = re.compile("[\ud800-\udfff]")
_WHOLE = re.compile(r"(0|[1-9][0-9]{0,18})(?:\.0)?", re.ASCII)

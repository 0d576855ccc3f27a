"""What is asked of a model about images: a question, or the turns of a conversation; and how a template words a user's turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from adalink.errors import ConfigError
from multimodal.data.images.decode import ImageOrFile
from multimodal.template import Template, Text

__all__ = ["Prompt", "Prompts", "Turn", "asked_of", "asked_turns", "text_of", "user_turn", "worded"]

Turn = Mapping[str, Any]
"""A message of a conversation, as chat templates take it: role, and content, which is a text or parts of type text and image."""

Prompt = str | Sequence[Turn]
"""A question, or a conversation whose last turn is the user's."""

Prompts = Prompt | Sequence[Prompt | tuple[str, str]]
"""One, or one for each row; of a model without an encoder also two texts that are read together."""

ROLES = ("system", "user", "assistant")
IMAGE_PART = {"type": "image"}


# ----------------------------------------
# What a caller gives: images and prompts beside each other, or conversations that hold their images.


def asked_of(
    images: ImageOrFile | Sequence[ImageOrFile | Sequence[ImageOrFile]] | None, prompts: Prompts
) -> list[tuple[tuple[ImageOrFile, ...], Prompt]]:
    """For each row its images, in their order, and its prompt, whose image parts then hold none.

    images   one, which goes with every prompt; one entry for each row, an image or several; or None, where conversations hold theirs
    prompts  one, which goes with every entry of `images`, or one for each row

    Raises ConfigError for lists of unequal length, and for a conversation that is none or has another number of places for images.
    """
    is_one = isinstance(prompts, str) or _is_conversation(prompts)
    asked: list[Any] = [prompts] if is_one else list(prompts)
    if images is None or _is_image(images):
        given: list[Any] = [() if images is None else (images,)] * len(asked)
    else:
        given = [(entry,) if _is_image(entry) else tuple(entry) for entry in images]  # type: ignore[union-attr,arg-type]
        asked = asked * len(given) if is_one else asked
    if len(given) != len(asked):
        raise ConfigError(f"{len(given)} images and {len(asked)} prompts were given: give one prompt for each image")
    return [(beside, one) if isinstance(one, str) or _is_pair(one) else _filled(one, beside) for beside, one in zip(given, asked, strict=True)]


def _is_pair(prompt: object) -> bool:
    return isinstance(prompt, tuple) and len(prompt) == 2 and all(isinstance(one, str) for one in prompt)


def _is_image(value: object) -> bool:
    return isinstance(value, (str, bytes, Path, Image.Image))


def _is_conversation(value: object) -> bool:
    return not isinstance(value, str) and isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


def _filled(turns: Sequence[Turn], beside: Sequence[ImageOrFile]) -> tuple[tuple[ImageOrFile, ...], list[Turn]]:
    """The images of a conversation, those given beside it in the parts that hold none; and its turns without them."""
    check_turns(turns)
    parts = [part for turn in turns if not isinstance(turn["content"], str) for part in turn["content"] if part["type"] == "image"]
    n_open = sum(part.get("image") is None for part in parts)
    if n_open != len(beside):
        raise ConfigError(
            f"{len(beside)} images were given beside a conversation with {n_open} open places for images: give one image for each part "
            '{"type": "image"}, or put it into the part, {"type": "image", "image": ...}'
        )
    others = iter(beside)
    images = tuple(next(others) if part.get("image") is None else part["image"] for part in parts)
    return images, [{**turn, "content": [IMAGE_PART if part["type"] == "image" else part for part in parts_of(turn)]} for turn in turns]


def check_turns(turns: Sequence[Turn]) -> None:
    """Raise ConfigError for what is no conversation, or ends with another turn than the user's."""
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES or "content" not in turn:
            raise ConfigError(f"turn {number} of the conversation is {turn!r:.60}: expected a role ({', '.join(ROLES)}) and a content")
        for part in parts_of(turn):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise ConfigError(f"turn {number} of the conversation has the part {part!r:.60}: expected type text with a text, or type image")
    if not turns or turns[-1]["role"] != "user":
        last = f"is the {turns[-1]['role']}'s" if turns else "is missing"
        raise ConfigError(f"the last turn of the conversation {last}, expected the user's: end it with what is asked")


# ----------------------------------------
# Turns in the words of a template.


def user_turn(question: str, n_images: int) -> Turn:
    """A user's turn: images, then a question."""
    return {"role": "user", "content": _with_images(question, [0] * n_images)}


def asked_turns(text: Text, n_images: int) -> list[Turn]:
    """The turns of a text up to its question, each image in its place. Raises ConfigError for a role that an earlier turn cannot have."""
    for number, (role, _) in enumerate(text.turns):
        if role not in ROLES or (role == "system" and number):
            raise ConfigError(f"the earlier turn {number} of a text has the role {role!r}: expected user or assistant, or system for the first")
    spoken = (*text.turns, ("user", text.question))
    first = [role for role, _ in spoken].index("user")
    places = ((first, 0),) * n_images if text.places is None else text.places
    return [
        {"role": role, "content": _with_images(words, [at for turn, at in places if turn == number])} for number, (role, words) in enumerate(spoken)
    ]  # fmt: skip


def _with_images(words: str, places: Sequence[int]) -> list[Mapping[str, Any]]:
    """The parts of a turn; places: how many letters come before each of its images."""
    parts: list[Mapping[str, Any]] = []
    for start, end in pairwise([0, *places, len(words)]):
        parts += [*([_text(words[start:end])] if words[start:end] else []), IMAGE_PART]
    return parts[:-1]  # the text's end is no image


def parts_of(turn: Turn) -> Sequence[Mapping[str, Any]]:
    """The content of a turn as parts."""
    content = turn["content"]
    return [_text(content)] if isinstance(content, str) else content


def text_of(turn: Turn) -> str:
    """The texts of a turn, joined by spaces."""
    return " ".join(part["text"] for part in parts_of(turn) if part["type"] == "text")


def worded(turn: Turn, template: Template) -> Turn:
    """A user's turn in the template's words; turns of others as they are.

    Its images go where the template has <image> and its texts where it has {question}, unless text stands between two images, or before the
    first where the template has no words of its own: then all parts stay in their order, where the question goes.
    """
    if turn["role"] != "user":
        return turn
    parts = list(parts_of(turn))
    images = [part for part in parts if part["type"] == "image"]
    text = text_of(turn)
    runs = [kind for kind, _ in groupby(part["type"] for part in parts)]
    mixes = runs.count("image") > 1 or (runs[:2] == ["text", "image"] and _has_no_words(template))
    found: list[Mapping[str, Any]] = []
    for piece in re.split(r"(<image>|\{question\})", template.prompt):
        if piece == "<image>":
            found += [] if mixes else images
        elif piece == "{question}":
            found += parts if mixes else [_text(text)]
        else:
            found.append(_text(piece.replace("<bos>", "").replace("<eos>", "")))
    return {**turn, "content": _joined(found)}


def _has_no_words(template: Template) -> bool:
    return re.sub(r"<bos>|<eos>", "", template.prompt) == "<image>{question}"


def _joined(parts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The parts with texts that follow each other in one, and without empty ones."""
    joined: list[Mapping[str, Any]] = []
    for kind, group in groupby(parts, key=lambda part: part["type"]):
        if kind != "text":
            joined += group
        elif text := "".join(part["text"] for part in group):
            joined.append(_text(text))
    return joined


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}

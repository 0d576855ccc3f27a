"""How a task words its prompt and its answer, with the places of the image and of special tokens marked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adalink.errors import ConfigError

__all__ = ["OWN_ROW", "Filled", "Template", "Text", "TextTemplate", "saved_template"]

MARKERS = ("<image>", "<bos>", "<eos>")
FIELD = re.compile(r"\{(\w*)\}")
_SPLIT = re.compile("(" + "|".join(MARKERS) + ")")


@dataclass(frozen=True)
class Text:
    """One thing to learn or to ask about an image: a question (empty in captioning) and its target; None when it is asked.

    scores   where an answer is chosen by a head: (number of an answer, what it would score, above 0 to 1); answers not named score nothing
    turns    the earlier turns of the conversation, for a model that sees already: (role, text), role is user or assistant, or system for the first
    places   for each image that is read, where it stands: (number of its turn, the question's being the last; how many letters of that come before
             it). None: every image of the sample, before the text of the user's first turn
    weight   of its loss in the batch's mean, above 0; 1 for a text of people
    task     which of several tasks it is of, such as its question type; empty where none is named
    pair     the second of two texts that are read together; else empty
    """

    question: str
    target: str | None
    scores: tuple[tuple[int, float], ...] | None = None
    turns: tuple[tuple[str, str], ...] = ()
    places: tuple[tuple[int, int], ...] | None = None
    weight: float = 1.0
    task: str = ""
    pair: str = ""


class Filled(str):
    """A piece of a prompt or target between markers: the template's own wording, with what people wrote between.

    wording  what stands before, between and after the places that were filled; one piece where there is none
    fills    what was filled in, place by place
    """

    wording: tuple[str, ...]
    fills: tuple[str, ...]

    @classmethod
    def of(cls, template: str, fills: Mapping[str, str]) -> Filled:
        """The template's piece with the fill of each `{field}` in its place."""
        pieces = FIELD.split(template)  # words, field, words, ...
        given = [fills[field] for field in pieces[1::2]]
        piece = cls("".join(words + fill for words, fill in zip(pieces[::2], [*given, ""], strict=True)))
        piece.wording, piece.fills = tuple(pieces[::2]), tuple(given)
        return piece


@dataclass(frozen=True, kw_only=True)
class Template:
    """The words around a question and an answer.

    <image> is where the image's slots go, <bos> and <eos> are the language model's own tokens (left out where it has none);
    {question} and {text} are filled in. A question that contains a marker, or a special token of the language model in the model's own
    spelling, stays text; the template's own words may hold such a spelling (`<|user|>`), and it is that token there.

    `"<image><bos>question: {question} answer:"` and `" {text}<eos>"` make, of "is it red?" and "yes",
    [the image], <bos>, "question: is it red? answer:", and then " yes", <eos>.
    """

    prompt: str
    target: str = "{text}<eos>"
    system: str = ""  # the system message, for an existing model whose chat template has a place for one
    raw: bool = False  # an existing model reads the prompt as it stands, without its chat template

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.prompt.count("<image>") != 1:
            raise ConfigError(f"the prompt template {self.prompt!r} has {self.prompt.count('<image>')} places for the image: write <image> once")
        if "{text}" not in self.target or "<image>" in self.target:
            raise ConfigError(f"the target template {self.target!r} must hold {{text}}, and not <image>: for instance '{{text}}<eos>'")

        for part, template, field in (("prompt", self.prompt, "question"), ("target", self.target, "text")):
            if unknown := sorted(set(FIELD.findall(template)) - {field}):
                raise ConfigError(f"the {part} template {template!r} has a place {{{unknown[0]}}} that nothing fills: it may have {{{field}}}")

    def saved(self) -> dict[str, str | bool | int]:
        """What configs of adapters and checkpoints hold: prompt and target, and what else is not as it is by default."""
        return {"prompt": self.prompt, "target": self.target, **({"system": self.system} if self.system else {}), **({"raw": True} if self.raw else {})}

    def prompt_parts(self, question: str) -> list[str]:
        """The prompt in order: markers, and `Filled` pieces of text."""
        return self._parts(self.prompt, {"question": question})

    def target_parts(self, text: str) -> list[str]:
        """The target in order: markers, and `Filled` pieces of text."""
        return self._parts(self.target, {"text": text})

    @staticmethod
    def _parts(template: str, fills: Mapping[str, str]) -> list[str]:
        return [part if part in MARKERS else Filled.of(part, fills) for part in _SPLIT.split(template) if part]


OWN_ROW = "{text}{pair}"


@dataclass(frozen=True, kw_only=True)
class TextTemplate(Template):
    """The words around one text or two, and around the answer, for a model without an encoder.

    `{text}` and `{pair}` of the prompt are filled in; it has no <image>. The prompt `{text}{pair}` alone is the row that the model's tokenizer makes of
    one text or of two, with its own special tokens and token types.
    """

    prompt: str = OWN_ROW
    target: str = "{text}"
    pad_to: int = 0  # rows are padded to so many tokens, each by itself; 0: to the longest of their batch
    max_tokens: int = 128  # longer prompts are cut: the end of the longest text first, and never the template's words

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if "<image>" in self.prompt + self.target:
            raise ConfigError(f"the prompt template {self.prompt!r} has a place for an image, and no encoder would fill it: leave <image> out, or give encoder")
        if "{text}" not in self.prompt or "{text}" not in self.target:
            raise ConfigError(f"the templates {self.prompt!r} and {self.target!r} must both hold {{text}}: the text that is read, and the label")
        if self.max_tokens < 8:
            raise ConfigError(f"max_tokens is {self.max_tokens}: give 8 or more")
        for part, template, known in (("prompt", self.prompt, ("text", "pair")), ("target", self.target, ("text",))):
            if unknown := sorted(set(FIELD.findall(template)) - {*known}):
                raise ConfigError(f"the {part} template {template!r} has a place {{{unknown[0]}}} that nothing fills: it may have {{{'} and {'.join(known)}}}")

    def saved(self) -> dict[str, str | bool | int]:
        """Prompt, target, the most tokens, and the fewest where there is such a number."""
        return {"prompt": self.prompt, "target": self.target, "max_tokens": self.max_tokens, **({"pad_to": self.pad_to} if self.pad_to else {})}

    def prompt_parts(self, question: str, pair: str = "") -> list[str]:
        """The prompt in order: markers, and `Filled` pieces of text."""
        return self._parts(self.prompt, {"text": question, "pair": pair})

def saved_template(task: Mapping[str, Any]) -> Template | None:
    """The words that a saved adapter's config holds; None where it holds none."""
    if not {"prompt", "target"} <= set(task):
        return None
    if "<image>" not in task["prompt"]:
        return TextTemplate(**{name: task[name] for name in ("prompt", "target", "max_tokens", "pad_to") if name in task})
    return Template(**{name: task[name] for name in ("prompt", "target", "system", "raw") if name in task})

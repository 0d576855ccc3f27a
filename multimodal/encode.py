"""Texts to rows of ids, domains and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adalink import ANSWER, IMAGE, TEXT, Slots
from adalink.errors import ConfigError, DataError
from adalink.host_config import setting
from multimodal.language import Language
from multimodal.template import Filled, Template, Text
from multimodal.text_tokens import TextTokens

__all__ = ["Row", "RowEncoder", "TextTooLong"]


class TextTooLong(DataError):
    """A text with more tokens than the language model has positions; counted as a bad sample, never cut off in silence."""


@dataclass(frozen=True)
class Row:
    """One text with its slots, before padding.

    ids, domain  [T]        what the stack reads; the encoder's side in an encoder-decoder model
    source       [M]        positions whose hidden state predicts a target
    target       [M]        what they should predict
    decoder_ids  [U]        what the decoder reads; empty in a decoder-only model, where sources are positions in ids
    segment      [T]        which of several packed texts a token belongs to, 0 for what they share; empty where nothing is packed
    position     [T]        each token's position in its own text; empty where that is its index
    picture      [T]        which picture of its batch a token is about; empty where the row is about one
    beginning    how many of its first tokens may be read in a call of their own: all rows about its picture have the same
    score        [M]        where a head chooses the answer: what each target, the number of an answer, would score; there are no sources then
    """

    ids: tuple[int, ...]
    domain: tuple[int, ...]
    source: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    decoder_ids: tuple[int, ...] = ()
    segment: tuple[int, ...] = ()
    position: tuple[int, ...] = ()
    picture: tuple[int, ...] = ()
    beginning: int = 0
    score: tuple[float, ...] | None = None


class RowEncoder:
    """Makes rows with one template, one tokenizer, and the slots that one adapter reserves.

    n_answers: how many a head chooses among; 0 where the answer is written.
    Pickles with the tokenizer but without any weights: worker processes get a copy.
    """

    def __init__(self, template: Template, language: Language, slots: Sequence[Slots], n_answers: int = 0) -> None:
        self.template = template
        self.tokenizer = language.tokenizer
        self._tokens = TextTokens(language.tokenizer)
        config: Any = language.model.config
        self.max_positions = language.max_positions
        self.max_written = language.max_written if config.is_encoder_decoder else None
        self.n_answers = n_answers
        self.decoder_start: int | None = _decoder_start(config) if config.is_encoder_decoder else None
        self.special = {"<bos>": self.tokenizer.bos_token_id, "<eos>": self.tokenizer.eos_token_id}
        self.placeholder: int = self.tokenizer.pad_token_id
        self.image_slots = sum(slot.count for slot in slots if slot.domain == IMAGE)
        self.leading = [slot.domain for slot in slots if slot.domain != IMAGE for _ in range(slot.count)]

    def prompt(self, question: str) -> Row:
        """The row that a text is generated from. Raises ConfigError where it has no token, TextTooLong where it has too many."""
        ids, domain = [self.placeholder] * len(self.leading), list(self.leading)
        for part in self.template.prompt_parts(question):
            if part == "<image>" and not isinstance(part, Filled):
                ids += [self.placeholder] * self.image_slots
                domain += [IMAGE] * self.image_slots
            else:
                pieces = self._ids(part)
                ids += pieces
                domain += [TEXT] * len(pieces)
        if not ids:
            raise ConfigError(f"the prompt template {self.template.prompt!r} gives no token at all with this model: add a word or a bridge")
        self._check(len(ids), question, self.max_positions)
        return Row(tuple(ids), tuple(domain))

    def row(self, text: Text) -> Row:
        """The row that a text is learnt from; a text without a target is a prompt. Raises ConfigError where a head chooses and nothing is scored."""
        prompt = self.prompt(text.question)
        if self.n_answers:
            if text.scores is None:
                raise ConfigError("a head chooses this model's answers, and the text says only what to write: give it scores (tasks.answer_vocabulary)")
            return replace(prompt, target=tuple(number for number, _ in text.scores), score=tuple(score for _, score in text.scores))
        if text.target is None:
            return prompt
        target = tuple(piece for part in self.template.target_parts(text.target) for piece in self._ids(part))
        if self.decoder_start is not None:
            self._check(len(target), text.target, self.max_written)
            return Row(prompt.ids, prompt.domain, tuple(range(len(target))), target, (self.decoder_start, *target[:-1]))
        # The last token of the target is only ever predicted, so it is not read.
        self._check(len(prompt.ids) + len(target), text.question + text.target, self.max_positions)
        first = len(prompt.ids) - 1
        ids, domain = prompt.ids + target[:-1], prompt.domain + (ANSWER,) * (len(target) - 1)
        return Row(ids, domain, tuple(range(first, first + len(target))), target)

    def _ids(self, part: str) -> list[int]:
        if isinstance(part, Filled):
            return self._tokens.ids(part.wording, part.fill)
        special = self.special[part]
        return [] if special is None else [special]

    def _check(self, length: int, text: str, limit: int | None) -> None:
        if limit is not None and length > limit:
            raise TextTooLong(f"a text needs {length} tokens with its picture, and the language model has {limit} positions: shorten it ({text[:60]!r}...)")


def _decoder_start(config: object) -> int:
    start = setting(config, "decoder_start_token_id", side="written")
    if start is None:
        raise ConfigError("this encoder-decoder model names no decoder_start_token_id in its config: add it there")
    return int(start)

"""Texts to rows of ids, domains and targets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

from tokenizers import PreTokenizedString

from adalink import ANSWER, IMAGE, TEXT, Method, Slots
from adalink.anatomy import setting
from adalink.edit import SLOT_PLACES, SlotPlace
from adalink.errors import ConfigError, DataError
from adalink.methods.prompts.prompt import worded
from multimodal.language import Language
from multimodal.template import Filled, Template, Text

__all__ = ["Row", "RowEncoder", "TextTokens", "TextTooLong", "in_ids", "slots_at"]


# ----------------------------------------
# Texts to ids where only the template may write special tokens: what people wrote stays letters.
#
# A tokenizer reads the spelling of a special token (`</s>`, `<image>`, `<|endoftext|>`) as that token wherever it stands. A question could
# end its own prompt so, and a caption could teach an end in its middle.
#
#     tokens = TextTokens(tokenizer)
#     tokens.ids(("question: ", " answer:"), "is it red?")     # exactly tokenizer("question: is it red? answer:")
#     tokens.ids(("<|user|>", "<|end|>"), "a<|end|>b")         # the template's two tokens, and between them the letters of a<|end|>b


# An added token that is not called special but looks like one: an image's placeholder, a role, a tool call. Added tokens without brackets
# (runs of spaces, line feeds, words) are text.
_BRACKETED = re.compile(r"\s*(<.+>|\[.+\]|\{.+\}|【.+】)\s*", re.DOTALL)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how some vocabularies spell a byte

RECENT_TEXTS = 2**14  # whose ids stay in memory: epochs and images ask for the same texts, and a tokenizer takes 0.1 ms for one

Span = tuple[int, int, int]
"""Start and end of a special token in a text, and its id."""


class TextTokens:
    """The ids of filled templates, by one tokenizer of transformers, fast or slow. Pickles as its tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        # A role's token need not be an added one; a pad token without brackets (CLIP's "!") is then a word.
        roles = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        self._spelled = {id: str(spelling) for id, spelling in roles if _BRACKETED.fullmatch(str(spelling))}
        self._spelled |= {id: str(token.content) for id, token in added.items() if _is_special(token)}
        self._by_spelling = {spelling: id for id, spelling in self._spelled.items()}
        self._ids = lru_cache(maxsize=RECENT_TEXTS)(self._tokenized)

    def __reduce__(self) -> tuple[type[TextTokens], tuple[Any]]:
        return TextTokens, (self._tokenizer,)

    def ids(self, wording: Sequence[str], fill: str) -> list[int]:
        """The ids of the wording's pieces with `fill` between them, without the tokens that a tokenizer puts around a text.

        A special token that is spelled in the wording is that token; one that is spelled in `fill`, or with its help, is letters. A text
        without such a spelling has the ids that the tokenizer gives it.
        """
        return list(self._ids(tuple(wording), fill))

    def _tokenized(self, wording: tuple[str, ...], fill: str) -> list[int]:
        text = fill.join(wording)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._spelled.keys().isdisjoint(ids) or not fill or len(wording) < 2:
            return ids
        starts = [sum(map(len, wording[:n])) + n * len(fill) for n in range(len(wording))]
        filled = [(end, end + len(fill)) for end in (start + len(piece) for start, piece in zip(starts, wording[:-1], strict=False))]
        if not any(_overlap(_core(text, start, end), filled) for start, end, _ in self._found(text)):
            return ids
        keep = [(at + start, at + end, id) for at, piece in zip(starts, wording, strict=True) for start, end, id in self._found(piece)]
        return self._literal(text, keep)

    def whole(self, text: str) -> list[int]:
        """The ids of a text of people with the special tokens that the tokenizer puts around one."""
        whole: list[int] = self._tokenizer(text)["input_ids"]
        bare: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        before = next(n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare)
        return whole[:before] + self.ids(("", ""), text) + whole[before + len(bare) :]

    def _found(self, text: str) -> list[Span]:
        """The special tokens that the tokenizer sees in a text; letters that it does not know are none, though they have such an id."""
        if not self._tokenizer.is_fast:
            return [(match.start(), match.end(), self._by_spelling[match[0]]) for match in self._spellings.finditer(text)]
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        unknown = self._tokenizer.unk_token_id
        spelled = self._spelled.get(unknown, "").strip().lower()
        return [(start, end, id) for id, (start, end) in places if id in self._spelled and (id != unknown or text[start:end].strip().lower() == spelled)]

    @cached_property
    def _spellings(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self._by_spelling, key=len, reverse=True))))

    def _literal(self, text: str, keep: Sequence[Span]) -> list[int]:
        """The ids of a text in which only the spans of `keep` are special tokens."""
        return self._literal_fast(text, keep) if self._tokenizer.is_fast else self._literal_slow(text, keep)

    def _literal_fast(self, text: str, keep: Sequence[Span]) -> list[int]:
        """The tokenizer's own steps without the one that looks for added tokens: normalise, cut into words, look each up."""
        backend = self._tokenizer.backend_tokenizer
        cuts = sorted({0, len(text), *(place for start, end, _ in keep for place in (start, end))})
        pieces = PreTokenizedString(text)
        pieces.split(lambda _, whole: [whole[a:b] for a, b in pairwise(cuts)])
        if backend.normalizer is not None:
            pieces.normalize(backend.normalizer.normalize)
        if backend.pre_tokenizer is not None:
            backend.pre_tokenizer.pre_tokenize(pieces)
        ids: list[int] = []
        left = list(keep)
        for piece, (start, _), _ in pieces.get_splits(offset_referential="original", offset_type="char"):
            while left and left[0][0] <= start:
                ids.append(left.pop(0)[2])
            if not any(a <= start < b for a, b, _ in keep):
                ids += self._letters(backend.model, piece)
        return ids + [id for _, _, id in left]

    def _letters(self, model: Any, piece: str) -> list[int]:
        """The ids of a word; where its vocabulary holds a special token's spelling, that is cut after its first letter."""
        found = model.tokenize(piece)
        for token in found:
            spelled = self._spelled.get(token.id, "")
            if len(spelled) > 1 and (at := piece.find(spelled)) >= 0:
                return self._letters(model, piece[: at + 1]) + self._letters(model, piece[at + 1 :])
        return [token.id for token in found]

    def _literal_slow(self, text: str, keep: Sequence[Span]) -> list[int]:
        tokenizer = self._tokenizer
        ids: list[int] = []
        at = 0
        for start, end, id in [*keep, (len(text), len(text), None)]:
            for token in tokenizer.tokenize(text[at:start], split_special_tokens=True):
                spelled = len(token) > 1 and token in self._by_spelling
                parts = [part for half in (token[:1], token[1:]) for part in tokenizer.tokenize(half, split_special_tokens=True)] if spelled else [token]
                ids += tokenizer.convert_tokens_to_ids(parts)
            ids += [] if id is None else [id]
            at = end
        return ids


def _is_special(token: Any) -> bool:
    spelling = str(token.content)
    if _BYTE.fullmatch(spelling):
        return False
    return bool(token.special) or _BRACKETED.fullmatch(spelling) is not None


def _overlap(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


def _core(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the spaces that a token may take with it."""
    inside = text[start:end]
    return start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())


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
    token_image  [T]        which image of its batch a token is about; empty where the row is about one
    shared_prefix  how many of its first tokens may be read in a call of their own: all rows about its image have the same
    vector       [T]        which vector of its sample's images a token takes, -1 for none; empty where a bridge brings the images
    kind         [T]        the processor's token types; empty likewise
    block        [T]        tokens of one block read each other, later ones too; -1 for those of none; empty where no token reads a later one
    rope         [T]        each token's positions in time, height and width; empty where the model counts tokens
    weight       [M]        of each target in the loss; empty where all are 1
    score        [M]        where a head chooses the answer: what each target, the number of an answer, would score; there are no sources then
    task         as in Text
    """

    ids: tuple[int, ...]
    domain: tuple[int, ...]
    source: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    decoder_ids: tuple[int, ...] = ()
    segment: tuple[int, ...] = ()
    position: tuple[int, ...] = ()
    token_image: tuple[int, ...] = ()
    shared_prefix: int = 0
    score: tuple[float, ...] | None = None
    vector: tuple[int, ...] = ()
    kind: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    rope: tuple[tuple[int, int, int], ...] = ()
    weight: tuple[float, ...] = ()
    task: str = ""

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each target, ones where none are given."""
        return self.weight or (1.0,) * len(self.target)


class RowEncoder:
    """Makes rows with one template, one tokenizer, and the slots that one adapter reserves.

    n_answers: how many a head chooses among; 0 where the answer is written.
    Pickles with the tokenizer but without any weights: worker processes get a copy.
    """

    reads_images = False  # how many tokens an image has does not depend on the image

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
        self.slots = slots_at(slots)

    reads_turns = False  # nor does it read a conversation

    def prompt(self, question: Any, images: object = None) -> Row:
        """The row that a text is generated from. Raises ConfigError where it has no token or is no text, TextTooLong where it has too many."""
        if not isinstance(question, str):
            raise ConfigError(f"a composed model reads one question, and a conversation of {len(question)} turns was given: give the question as a text")
        ids: list[int] = []
        domain: list[int] = []

        def add(pieces: Sequence[int], kinds: Sequence[int]) -> None:
            ids.extend(pieces or [self.placeholder] * len(kinds))
            domain.extend(kinds)

        add((), self.slots["start"])
        for part in self.template.prompt_parts(question):
            if part == "<image>" and not isinstance(part, Filled):
                add((), [IMAGE] * self.image_slots + self.slots["before_text"])
            else:
                pieces = self._ids(part)
                add(pieces, [TEXT] * len(pieces))
        add((), self.slots["after_text"])
        if not ids:
            raise ConfigError(f"the prompt template {self.template.prompt!r} gives no token at all with this model: add a word or a bridge")
        self._check(len(ids), question, self.max_positions)
        return Row(tuple(ids), tuple(domain))

    def row(self, text: Text, images: object = None) -> Row:
        """The training row of a text; a text without a target is a prompt. Raises ConfigError where a head chooses and nothing is scored.

        Also for a text with earlier turns.
        """
        if text.turns:
            raise ConfigError(f"a composed model reads one question, and a text with {len(text.turns)} earlier turns was given: leave them out")
        prompt = self.prompt(text.question)
        if text.target is None and text.scores is None:
            return prompt
        if self.n_answers:
            if text.scores is None:
                raise ConfigError("a head chooses this model's answers, and the text says only what to write: give it scores (tasks.vqa)")
            return replace(prompt, target=tuple(number for number, _ in text.scores), score=tuple(score for _, score in text.scores))
        assert text.target is not None
        target = tuple(piece for part in self.template.target_parts(text.target) for piece in self._ids(part))
        if self.decoder_start is not None:
            self._check(len(target), text.target, self.max_written)
            return Row(prompt.ids, prompt.domain, tuple(range(len(target))), target, (self.decoder_start, *target[:-1]))
        # The last token of the target is only ever predicted, so it is not read.
        self._check(len(prompt.ids) + len(target), text.question + text.target, self.max_positions)
        first = len(prompt.ids) - 1
        ids, domain = prompt.ids + target[:-1], prompt.domain + (ANSWER,) * (len(target) - 1)
        return Row(ids, domain, tuple(range(first, first + len(target))), target)

    def answer_pieces(self, answer: str) -> list[int]:
        """The tokens of an answer as the target words it, without those that begin or end it."""
        return [id for part in self.template.target_parts(answer) if isinstance(part, Filled) for id in self._ids(part)]

    def _ids(self, part: str) -> list[int]:
        if isinstance(part, Filled):
            return self._tokens.ids(part.wording, part.fill)
        special = self.special[part]
        return [] if special is None else [special]

    def _check(self, length: int, text: str, limit: int | None) -> None:
        if limit is not None and length > limit:
            raise TextTooLong(f"a text needs {length} tokens with its image, and the language model has {limit} positions: shorten it ({text[:60]!r}...)")


def in_ids(methods: Mapping[str, Method] | Method, tokenizer: Any) -> Mapping[str, Method] | Method:
    """The methods with the ids of the words that they start from. Raises ConfigError for words that do not fit."""
    tokens = TextTokens(tokenizer)

    def ids_of(text: str) -> list[int]:
        return tokens.ids((text,), "")

    return {name: worded(method, ids_of) for name, method in methods.items()} if isinstance(methods, Mapping) else worded(methods, ids_of)


def slots_at(slots: Sequence[Slots]) -> dict[SlotPlace, list[int]]:
    """Place in a row -> the domain of each slot there, but for those of images."""
    return {place: [slot.domain for slot in slots if slot.place == place and slot.domain != IMAGE for _ in range(slot.count)] for place in SLOT_PLACES}


def _decoder_start(config: object) -> int:
    start = setting(config, "decoder_start_token_id", side="written")
    if start is None:
        raise ConfigError("this encoder-decoder model names no decoder_start_token_id in its config: add it there")
    return int(start)

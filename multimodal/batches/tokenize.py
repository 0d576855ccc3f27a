"""Texts to rows of ids, domains and targets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

from tokenizers import PreTokenizedString

from adalink import ANSWER, IMAGE, PAD, TEXT, Method, Slots
from adalink.anatomy import setting
from adalink.edit import SLOT_PLACES, SlotPlace
from adalink.errors import ConfigError, DataError
from adalink.methods.prompts.prompt import worded
from multimodal.language import Language, is_encoder_only
from multimodal.template import OWN_ROW, Filled, Template, Text, TextTemplate

__all__ = ["Row", "RowEncoder", "TextRowEncoder", "TextTokens", "TextTooLong", "in_ids", "longest_first", "slots_at"]


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

    def ids(self, wording: Sequence[str], fill: str | Sequence[str]) -> list[int]:
        """The ids of the wording's pieces with `fill` between them, without the tokens that a tokenizer puts around a text.

        A special token that is spelled in the wording is that token; one that is spelled in `fill`, or with its help, is letters. A text
        without such a spelling has the ids that the tokenizer gives it. fill: one for each place, or the same for all
        """
        return list(self._ids(tuple(wording), (fill,) * (len(wording) - 1) if isinstance(fill, str) else tuple(fill)))

    def cut(self, text: str, n: int) -> str:
        """A text up to the end of its n-th token."""
        if self._tokenizer.is_fast:
            places = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            return text[: places[n - 1][1]] if n else ""
        return str(self._tokenizer.decode(self.ids(("", ""), text)[:n]))

    def _tokenized(self, wording: tuple[str, ...], fills: tuple[str, ...]) -> list[int]:
        text = "".join(piece + fill for piece, fill in zip(wording, (*fills, ""), strict=True))
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._spelled.keys().isdisjoint(ids) or not any(fills):
            return ids
        starts = [sum(map(len, (*wording[:n], *fills[:n]))) for n in range(len(wording))]
        filled = [(start + len(piece), start + len(piece) + len(fill)) for start, piece, fill in zip(starts, wording, fills, strict=False)]
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
        prompt = self.asked(text)
        if text.target is None and text.scores is None:
            return prompt
        if self.n_answers:
            if text.scores is None:
                raise ConfigError("a head chooses this model's answers, and the text says only what to write: give it scores (tasks.vqa)")
            return replace(prompt, target=tuple(number for number, _ in text.scores), score=tuple(score for _, score in text.scores))
        assert text.target is not None
        return self.answered(prompt, text.target)

    def asked(self, text: Text) -> Row:
        """The row of a text's question alone."""
        return self.prompt(text.question)

    def target_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a target in its template."""
        return tuple(piece for part in self.template.target_parts(text) for piece in self._ids(part))

    def answered(self, prompt: Row, text: str) -> Row:
        """A prompt's row with a target after it, which is learned or scored. Raises TextTooLong."""
        target = self.target_ids(text)
        if self.decoder_start is not None:
            self._check(len(target), text, self.max_written)
            return Row(prompt.ids, prompt.domain, tuple(range(len(target))), target, (self.decoder_start, *target[:-1]))
        # The last token of the target is only ever predicted, so it is not read.
        self._check(len(prompt.ids) + len(target), text, self.max_positions)
        first = len(prompt.ids) - 1
        ids, domain = prompt.ids + target[:-1], prompt.domain + (ANSWER,) * (len(target) - 1)
        return Row(ids, domain, tuple(range(first, first + len(target))), target)

    def answer_pieces(self, answer: str) -> list[int]:
        """The tokens of an answer as the target words it, without those that begin or end it."""
        return [id for part in self.template.target_parts(answer) if isinstance(part, Filled) for id in self._ids(part)]

    def _ids(self, part: str) -> list[int]:
        if isinstance(part, Filled):
            return self._tokens.ids(part.wording, part.fills)
        special = self.special[part]
        return [] if special is None else [special]

    def _check(self, length: int, text: str, limit: int | None) -> None:
        if limit is not None and length > limit:
            raise TextTooLong(f"a text needs {length} tokens with its image, and the language model has {limit} positions: shorten it ({text[:60]!r}...)")


def in_ids(methods: Mapping[str, Method] | Method, tokenizer: Any) -> Mapping[str, Method] | Method:
    """The methods with the ids of the words that they start from. Raises ConfigError for words that do not fit."""

    def ids_of(text: str) -> list[int]:
        return TextTokens(tokenizer).ids((text,), "")

    return {name: worded(method, ids_of) for name, method in methods.items()} if isinstance(methods, Mapping) else worded(methods, ids_of)


def slots_at(slots: Sequence[Slots]) -> dict[SlotPlace, list[int]]:
    """Place in a row -> the domain of each slot there, but for those of images."""
    return {place: [slot.domain for slot in slots if slot.place == place and slot.domain != IMAGE for _ in range(slot.count)] for place in SLOT_PLACES}


class TextRowEncoder(RowEncoder):
    """The same for a model without an encoder: one text, or two that are read together, cut to the template's `max_tokens`.

    The prompt `{text}{pair}` gives the ids and, in a model that reads both ways, the token types of `tokenizer(text, pair, truncation="longest_first",
    max_length=max_tokens)`; but special tokens that people spelled stay letters.
    """

    template: TextTemplate

    def __init__(self, template: TextTemplate, language: Language, slots: Sequence[Slots], n_answers: int = 0) -> None:
        super().__init__(template, language, slots, n_answers)
        positions = self.max_positions or template.max_tokens + sum(map(len, self.slots.values()))
        self.limit = min(template.max_tokens, positions - sum(map(len, self.slots.values())))
        self._has_types = is_encoder_only(language.model.config)

    def prompt(self, question: Any, images: object = None) -> Row:
        """The row of a text, or of a pair (text, second text). Raises ConfigError for anything else."""
        pair = (question, "") if isinstance(question, str) else tuple(question)
        if len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            raise ConfigError(f"a model without an encoder reads a text or a pair of texts, and {question!r:.60} was given: give (text, second text)")
        return self.asked(Text(pair[0], None, pair=pair[1]))

    def asked(self, text: Text) -> Row:
        """The row of a text and its pair, cut where it is too long."""
        if self.template.prompt == OWN_ROW:
            ids, kind = self._own_row(text)
        else:
            ids, kind = self._worded(*self._shortened(text)), []
        before, after = self.slots["start"] + self.slots["before_text"], self.slots["after_text"]
        pads = [PAD] * max(0, self.template.pad_to - len(before) - len(ids) - len(after))
        behind = [self.placeholder] * len(after + pads)
        row = Row(tuple([self.placeholder] * len(before) + ids + behind), (*before, *[TEXT] * len(ids), *after, *pads))
        return replace(row, kind=(0,) * len(before) + tuple(kind) + (0,) * len(behind)) if any(kind) else row

    def excess(self, text: Text) -> int:
        """How many tokens a text and its pair have beyond the limit; 0 where nothing is cut."""
        if self.template.prompt == OWN_ROW:
            around, _ = self._around(bool(text.pair))
            return max(0, sum(map(len, self._both(text))) + sum(len(ids) for ids, _ in around) - self.limit)
        return max(0, len(self._worded(text.question, text.pair)) - self.limit)

    def _both(self, text: Text) -> list[list[int]]:
        return [self._tokens.ids(("", ""), one) for one in ((text.question, text.pair) if text.pair else (text.question,))]

    def _own_row(self, text: Text) -> tuple[list[int], list[int]]:
        """Ids and token types."""
        around, types = self._around(bool(text.pair))
        both = self._both(text)
        room = longest_first([len(ids) for ids in both], self.limit - sum(len(ids) for ids, _ in around))
        ids, kind = list(around[0][0]), list(around[0][1])
        for own, type_of, n, after in zip(both, types, room, around[1:], strict=True):
            ids += [*own[:n], *after[0]]
            kind += [type_of] * n + after[1]
        return ids, kind

    def _around(self, is_pair: bool) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
        """The special tokens before, between and after the texts of a row as the tokenizer makes it, each with their types; and the types of the texts."""
        if is_pair not in self._found:
            given = self.tokenizer("a", "b") if is_pair else self.tokenizer("a")
            ids, kind = list(given["input_ids"]), list(given.get("token_type_ids") or ()) if self._has_types else []
            kind = kind or [0] * len(ids)
            parts: list[tuple[list[int], list[int]]] = []
            types, at = [], 0
            for own in (self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in ("a", "b")[: 1 + is_pair]):
                start = next(place for place in range(at, len(ids)) if ids[place : place + len(own)] == own)
                parts.append((ids[at:start], kind[at:start]))
                types.append(kind[start])
                at = start + len(own)
            self._found[is_pair] = [*parts, (ids[at:], kind[at:])], types
        return self._found[is_pair]

    @cached_property
    def _found(self) -> dict[bool, tuple[list[tuple[list[int], list[int]]], list[int]]]:
        return {}

    def _worded(self, text: str, pair: str) -> list[int]:
        return [piece for part in self.template.prompt_parts(text, pair) for piece in self._ids(part)]

    def _shortened(self, text: Text) -> tuple[str, str]:
        """Both texts, cut until the template with them has no more tokens than the limit. Raises TextTooLong where its own words have more."""
        both = (text.question, text.pair)
        while (excess := len(self._worded(*both)) - self.limit) > 0:
            lengths = [len(self._tokens.ids(("", ""), one)) for one in both]
            if not sum(lengths):
                raise TextTooLong(f"the prompt template {self.template.prompt!r} has more tokens than the {self.limit} that a row may have: shorten it")
            room = longest_first(lengths, max(sum(lengths) - excess, 0))
            both = tuple(one if n == length else self._tokens.cut(one, n) for one, n, length in zip(both, room, lengths, strict=True))  # type: ignore[assignment]
        return both


def longest_first(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens of one text or two remain where all have room for so many, as the library `tokenizers` cuts with "longest_first".

    [100, 20], 60 -> [40, 20]; [100, 90], 61 -> [31, 30]
    """
    if sum(lengths) <= room:
        return list(lengths)
    if len(lengths) == 1:
        return [max(room, 0)]
    short, long = sorted(lengths)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return [long, short] if lengths[0] > lengths[1] else [short, long]


def _decoder_start(config: object) -> int:
    start = setting(config, "decoder_start_token_id", side="written")
    if start is None:
        raise ConfigError("this encoder-decoder model names no decoder_start_token_id in its config: add it there")
    return int(start)

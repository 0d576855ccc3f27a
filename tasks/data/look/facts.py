"""What a data set holds, counted: sizes, lengths, duplicates, answers, and its oddest samples with the reasons."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from multimodal.sample import BadSample, BadSamples, counted
from tasks.data.look.scan import ImageFile, Seen
from tasks.vqa import most_common

__all__ = ["ODD", "CountTokens", "Facts", "Oddity", "Part", "listed", "oddities", "the_oddest"]

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""The tokens of each text."""

TOP, ODDEST, _NAMED = 20, 10, 6
_PROSE = ("", "the first", "the commonest", "why")
MOST_WIDTH = 60  # letters of a text in a table


@dataclass(frozen=True, kw_only=True)
class Part:
    """One table of what was found, for a terminal and for a page.

    rows    the first with the names of the columns; the first cell of a row is its name
    notes   sentences below it
    """

    name: str
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def is_prose(self, column: int) -> bool:
        """Whether a column holds words, and no numbers."""
        return column == 0 or self.rows[0][column] in _PROSE


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found in a data set.

    sentence   how its path was understood
    total      samples of the data set, of which `seen` may be a part
    problems   what the data set itself names and cannot give
    val        digest of an image -> its key in the other data set; None where none was given
    count      None where no language model is given
    """

    sentence: str
    total: int
    seen: Sequence[Seen]
    problems: Sequence[BadSample] = ()
    val: Mapping[str, str] | None = None
    count: CountTokens | None = None
    counted_by: str = ""
    left_out: int = field(default=0)

    @cached_property
    def parts(self) -> list[Part]:
        """Every table in its order; those with nothing in them are left out."""
        found = [self._counts, self._bad, self._sizes, self._lengths, self._duplicates, self._shared, *self._answers, self._odd]
        return [part for part in found if part.rows or part.notes]

    # ----------------------------------------
    # What others ask too.

    @cached_property
    def bad(self) -> list[BadSample]:
        """Samples that cannot be used: those that the data set names, and those that the look found."""
        return list(dict.fromkeys([*self.problems, *(one.bad for one in self.seen if one.bad is not None)]))

    @cached_property
    def images(self) -> list[ImageFile]:
        """Every image whose header can be read."""
        return [image for one in self.seen for image in one.images]

    @cached_property
    def same(self) -> Mapping[str, list[Seen]]:
        """Digest -> the samples whose image has these bytes, where they are several."""
        found: dict[str, list[Seen]] = defaultdict(list)
        for one in self.seen:
            for digest in dict.fromkeys(image.digest for image in one.images):
                found[digest].append(one)
        return {digest: samples for digest, samples in found.items() if len(samples) > 1}

    @cached_property
    def shared(self) -> Mapping[int, str]:
        """Number of a sample -> the key of a sample of the other data set that has the same image."""
        known = self.val or {}
        return {one.number: known[image.digest] for one in self.seen for image in one.images if image.digest in known}

    @cached_property
    def texts(self) -> Mapping[str, list[str]]:
        """Kind of text -> all of them; an answer as often as people gave it."""
        questions = [question for one in self.seen for question in one.questions]
        found = {
            "caption": [caption for one in self.seen for caption in one.captions],
            "question": [question.text for question in questions],
            "answer": [answer for question in questions for answer in question.answers],
        }
        return {kind: texts for kind, texts in found.items() if texts}

    @cached_property
    def answers(self) -> Counter[str]:
        """The answers that most people gave, each counted once a question."""
        return Counter(most_common(question) for one in self.seen for question in one.questions if question.answers)

    @cached_property
    def odd(self) -> list[Oddity]:
        """Every odd sample, the oddest first."""
        return oddities(self.seen, self.answers)

    @cached_property
    def is_part(self) -> bool:
        """Whether only some samples were looked at."""
        return len(self.seen) < self.total

    # ----------------------------------------
    # Tables.

    @property
    def _counts(self) -> Part:
        has_several = any(len(one.images) > 1 or (not one.images and one.bad is None) for one in self.seen)
        what = "sample" if has_several else "image"
        rows = [(f"{what}s", f"{self.total:,}", "")]
        if has_several:
            rows.append(("images", f"{len(self.images):,}", _each([len(one.images) for one in self.seen], "sample")))
        if "caption" in self.texts:
            rows.append(("captions", f"{len(self.texts['caption']):,}", _each([len(one.captions) for one in self.seen], what)))
        if "question" in self.texts:
            asked = [question for one in self.seen for question in one.questions]
            rows.append(("questions", f"{len(asked):,}", _each([len(one.questions) for one in self.seen], what)))
            rows.append(("answers", f"{len(self.texts.get('answer', ())):,}", _each([len(question.answers) for question in asked], "question")))
        notes = []
        if self.is_part:
            notes.append(f"{len(self.seen):,} of {self.total:,} samples were looked at, evenly spread; all counts below are theirs.")
        if self.left_out:
            notes.append(f"limit leaves out {counted(self.left_out, 'image')}.")
        return Part(name="Counts", rows=(("what", "count", ""), *rows), notes=tuple(notes))

    @property
    def _bad(self) -> Part:
        found = BadSamples(budget=len(self.bad), found=self.bad)
        if not self.bad:
            return Part(name="Problems", notes=("No problem was found in texts and image headers. `adalink data check` decodes every image.",))
        rows = [(reason, f"{n:,}", "; ".join(bad.detail or str(bad) for bad in found.first[reason][:2])) for reason, n in found.counts.items()]
        return Part(name="Problems", rows=(("reason", "samples", "the first"), *rows))

    @property
    def _sizes(self) -> Part:
        if not self.images:
            return Part(name="Images")
        columns = {
            "width": ([image.width for image in self.images], "pixels"),
            "height": ([image.height for image in self.images], "pixels"),
            "bytes": ([image.size for image in self.images], ""),
        }
        rows = [(f"{name}{f', {unit}' if unit else ''}", *_range(values, _bytes if name == "bytes" else _whole)) for name, (values, unit) in columns.items()]
        kinds = Counter(image.kind for image in self.images).most_common()
        notes = [f"Kinds: {', '.join(f'{n:,} {kind}' for kind, n in kinds)}. All images together: {_bytes(sum(image.size for image in self.images))}."]
        sizes, first = Counter((image.width, image.height) for image in self.images), ""
        (width, height), n = sizes.most_common(1)[0]
        first = f"the commonest is {width} x {height} ({_share(n, len(self.images))})"
        notes.append(f"{counted(len(sizes), 'size')}; {first}. Sizes are those in the files, before EXIF orientation.")
        if others := [image for image in self.images if image.ending]:
            notes.append(f"{counted(len(others), 'image')} of another kind than the file's ending, such as a {others[0].kind} that ends in {others[0].ending}.")
        return Part(name="Images", rows=(("size", "smallest", "median", "mean", "95 %", "largest"), *rows), notes=tuple(notes))

    @property
    def _lengths(self) -> Part:
        rows = []
        for kind, texts in self.texts.items():
            rows.append((f"{kind}s, characters", *_range([len(text) for text in texts], _whole)))
            if self.count is not None:
                rows.append((f"{kind}s, tokens", *_range(list(self.count(texts)), _whole)))
        notes = (f"Tokens are those of {self.counted_by}, without special tokens.",) if self.count is not None and rows else ()
        return Part(name="Text lengths", rows=(("length", "shortest", "median", "mean", "95 %", "longest"), *rows) if rows else (), notes=notes)

    @property
    def _duplicates(self) -> Part:
        again = sum(len(samples) - 1 for samples in self.same.values())
        notes = ["No image is there twice, byte for byte."]
        if again:
            notes = [f"{again:,} of {len(self.seen):,} samples have an image whose bytes an earlier one has too."]
        for samples in list(self.same.values())[:3]:
            notes.append(f"Equal bytes: {listed([one.key for one in samples])}.")
        rows = []
        for kind, per_image in self._texts_of_images.items():
            n_texts = sum(map(len, per_image))
            counts = Counter(text for texts in per_image for text in texts)
            images = Counter(text for texts in per_image for text in set(texts))
            text, n = images.most_common(1)[0]
            commonest = f"{_cut(text)!r} at {n:,} ({_share(n, len(self.seen))} of the images)" if n > 1 else "none is at two images"
            rows.append((f"{kind}s", f"{n_texts:,}", f"{n_texts - len(counts):,}", commonest))
        return Part(name="Duplicates", rows=(("texts", "count", "repeat an earlier one", "the commonest"), *rows) if rows else (), notes=tuple(notes))

    @property
    def _texts_of_images(self) -> Mapping[str, list[Sequence[str]]]:
        found: dict[str, list[Sequence[str]]] = {
            "caption": [one.captions for one in self.seen],
            "question": [[question.text for question in one.questions] for one in self.seen],
        }
        return {kind: texts for kind, texts in found.items() if any(texts)}

    @property
    def _shared(self) -> Part:
        if self.val is None:
            return Part(name="Shared with val")
        if not self.shared:
            return Part(name="Shared with val", notes=("No image of this set is in val, byte for byte.",))
        keys = {one.number: one.key for one in self.seen}
        pairs = listed([f"{keys[number]} = {other}" for number, other in self.shared.items()])
        note = f"{counted(len(self.shared), 'sample')} of this set with an image that is in val too (this = val): {pairs}."
        return Part(name="Shared with val", notes=(note,))

    @property
    def _answers(self) -> Iterable[Part]:
        questions = [question for one in self.seen for question in one.questions]
        if not questions:
            return
        total = sum(self.answers.values())
        rows = [(_cut(answer), f"{n:,}", _share(n, total)) for answer, n in self.answers.most_common(TOP)]
        once = sum(n == 1 for n in self.answers.values())
        notes = [f"{counted(len(self.answers), 'different answer')} to {counted(total, 'question')}; {once:,} of them seen once."]
        notes.append("Of several people's answers the commonest counts.")
        if none := len(questions) - total:
            notes.append(f"{counted(none, 'question')} without an answer.")
        yield Part(name="Answers", rows=(("answer", "questions", "share"), *rows) if rows else (), notes=tuple(notes))
        for name, kinds in (("Answer types", [one.answer_type for one in questions]), ("Question types", [one.question_type for one in questions])):
            found = Counter(filter(None, kinds)).most_common(TOP // 2)
            yield Part(name=name, rows=(("type", "questions", "share"), *((kind, f"{n:,}", _share(n, len(questions))) for kind, n in found)) if found else ())

    @property
    def _odd(self) -> Part:
        keys = {one.number: one for one in self.seen}
        rows = [(keys[one.number].key, f"{one.score:.1f}", "; ".join(one.reasons)) for one in the_oddest(self.odd)]
        return Part(name="The oddest samples", rows=(("sample", "score", "why"), *rows) if rows else (), notes=(_SCORE,))


# ----------------------------------------
# The score. A size, a shape and a length are compared by doublings: twice as long is as far from the middle as half as long.


ODD, _NOTED = 3.0, 1.0  # spreads from the middle
# Doublings: where all images are of one size, one of 2.8 times the pixels is odd; where most samples have no word of their own, one with four.
_LEAST_SPREAD, _LEAST_OF_WORDS = 0.5, 0.75
_MARKED, _RARE = 4.0, 3.0  # scores of what is odd by itself
_FEW = 0.05  # of all samples; where more have an answer seen once, that is nothing odd
_SAME_REASON = 3  # of the ten oddest
_SCORE = (
    "The score is the largest distance from the median, in spreads, of the pixels, width / height, the longest and the shortest text, and the number of "
    "words that no other sample has; 3 is odd. Distances are in doublings; a spread is 1.4826 x their median, at least 0.5, of words 0.75. Markup, web "
    f"addresses and damaged letters in a text score {_MARKED:g}, an answer seen once {_RARE:g} where at most one sample in twenty has one. Of the ten at most "
    f"{_SAME_REASON} have one first reason, while others are odd too."
)
_WORD = re.compile(r"\w+")
_SIGNS = (
    (re.compile(r"</?[a-z][^<>]*>|&(?:amp|lt|gt|quot|nbsp|#\d+);", re.IGNORECASE), "markup in a text"),
    (re.compile(r"\b(?:https?://|www\.)\S+", re.IGNORECASE), "a web address in a text"),
    (re.compile("\ufffd|Ã[\x80-\xbf]|â€"), "damaged letters in a text"),
    (re.compile(r"[\x00-\x08\x0b-\x1f\x7f]"), "a control character in a text"),
)


@dataclass(frozen=True, kw_only=True)
class Oddity:
    """A sample's score, and its reasons, the strongest first; the others are those of at least 3.

    kind   of the strongest
    """

    number: int
    score: float
    reasons: tuple[str, ...]
    kind: str


def the_oddest(odd: Sequence[Oddity], most: int = ODDEST) -> list[Oddity]:
    """The first so many; of those that are odd, at most three with one first reason while there are others."""
    n_of_kind: Counter[str] = Counter()
    ranked = []
    for one in odd:
        n_of_kind[one.kind] += 1
        ranked.append((one.score < ODD, n_of_kind[one.kind] > _SAME_REASON, -one.score))
    first = sorted(range(len(odd)), key=ranked.__getitem__)[:most]
    return [odd[place] for place in sorted(first)]


def oddities(seen: Sequence[Seen], answers: Mapping[str, int]) -> list[Oddity]:
    """Every sample with a score of at least 1, the oddest first. answers: how many questions have each."""
    usable = [one for one in seen if one.bad is None and one.images]
    if not usable:
        return []
    found: list[list[tuple[float, str, str]]] = [[] for _ in usable]
    for measure in (_of_pixels, _of_shape, _of_long_texts, _of_short_texts, _of_words):
        for reasons, reason in zip(found, measure(usable), strict=True):
            reasons.append(reason)
    for reasons, one, rare in zip(found, usable, _of_answers(usable, answers), strict=True):
        reasons += [*_signs(one), *rare]
        reasons.sort(key=lambda reason: -reason[0])
        reasons[1:] = [reason for reason in reasons[1:] if reason[0] >= ODD]
    odd = [
        Oddity(number=one.number, score=reasons[0][0], reasons=tuple(text for _, _, text in reasons), kind=reasons[0][1])
        for one, reasons in zip(usable, found, strict=True) if reasons[0][0] >= _NOTED
    ]  # fmt: skip
    return sorted(odd, key=lambda one: -one.score)


Reason = tuple[float, str, str]  # score, kind, sentence


def _spreads(values: Sequence[float], least: float = _LEAST_SPREAD) -> np.ndarray:
    """float64 [values]: how many spreads each lies from the median."""
    array = np.asarray(values, dtype=np.float64)
    away = array - np.median(array)
    result: np.ndarray = away / max(1.4826 * float(np.median(np.abs(away))), least)
    return result


def _of_pixels(seen: Sequence[Seen]) -> list[Reason]:
    images = [one.images[0] for one in seen]
    usual = math.sqrt(np.median([image.width * image.height for image in images]))
    scores = _spreads([math.log2(max(1, image.width * image.height)) for image in images])
    return [
        (abs(score), word, f"{word}: {image.width} x {image.height} pixels (usual: about {usual:.0f} x {usual:.0f})")
        for image, score in zip(images, scores.tolist(), strict=True) for word in ["large image" if score > 0 else "small image"]
    ]  # fmt: skip


def _of_shape(seen: Sequence[Seen]) -> list[Reason]:
    images = [one.images[0] for one in seen]
    shapes = [math.log2(max(1, image.width) / max(1, image.height)) for image in images]
    return [
        (abs(score), "shape", f"{'wide' if score > 0 else 'tall'} image: {image.width} x {image.height} pixels")
        for image, score in zip(images, _spreads(shapes).tolist(), strict=True)
    ]


def _prose(one: Seen) -> list[str]:
    """Captions and questions: answers are short by nature."""
    return [*one.captions, *(question.text for question in one.questions)]


def _all_texts(one: Seen) -> list[str]:
    return [*_prose(one), *(answer for question in one.questions for answer in question.answers)]


def _of_long_texts(seen: Sequence[Seen]) -> list[Reason]:
    lengths = [max(map(len, _all_texts(one)), default=0) for one in seen]
    usual = float(np.median(lengths))
    scores = _spreads([math.log2(1 + length) for length in lengths])
    return [
        (score, "long text", f"long text: {length:,} characters (usual longest: {usual:,.0f})")
        for length, score in zip(lengths, scores.tolist(), strict=True)
    ]


def _of_short_texts(seen: Sequence[Seen]) -> list[Reason]:
    shortest = [min(_prose(one), key=len, default="") for one in seen]
    usual = float(np.median([len(text) for text in shortest]))
    scores = _spreads([math.log2(1 + len(text)) for text in shortest])
    return [
        (-score, "short text", f"short text: {_cut(text)!r}, {counted(len(text), 'character')} (usual shortest: {usual:,.0f})")
        for text, score in zip(shortest, scores.tolist(), strict=True)
    ]


def _of_words(seen: Sequence[Seen]) -> list[Reason]:
    words = [dict.fromkeys(word for text in _prose(one) for word in _WORD.findall(text.lower())) for one in seen]
    counts = Counter(word for one in words for word in one)
    own = [[word for word in one if counts[word] == 1] for one in words]
    scores = _spreads([math.log2(1 + len(rare)) for rare in own], _LEAST_OF_WORDS)
    return [
        (score, "rare words", f"{counted(len(rare), 'word')} that no other sample has: {', '.join(rare[:5])}{', ...' if len(rare) > 5 else ''}")
        for rare, score in zip(own, scores.tolist(), strict=True)
    ]


def _of_answers(seen: Sequence[Seen], answers: Mapping[str, int]) -> list[list[Reason]]:
    """An answer seen once, where few samples have one."""
    once = [[answer for asked in one.questions if asked.answers and answers[answer := most_common(asked)] == 1] for one in seen]
    score = _RARE if sum(map(bool, once)) <= _FEW * len(seen) else 0.0
    return [[(score, "rare answer", f"an answer seen once: {_cut(found[0])!r}")] if found else [] for found in once]


def _signs(one: Seen) -> Iterator[Reason]:
    for pattern, name in _SIGNS:
        if match := next(filter(None, map(pattern.search, _all_texts(one))), None):
            yield _MARKED, name, f"{name}: {_cut(match[0])!r}"


# ----------------------------------------
# Numbers and texts in tables.


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}".removesuffix(".0")


def _bytes(value: float) -> str:
    """`1.5 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"


def _range(values: Sequence[float], write: Callable[[float], str]) -> tuple[str, ...]:
    """Smallest, median, mean, 95th percentile, largest."""
    array = np.asarray(values, dtype=np.float64)
    return tuple(write(float(value)) for value in (array.min(), np.median(array), array.mean(), np.percentile(array, 95), array.max()))


def _each(counts: Sequence[int], what: str) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,} for each {what}" if low == high else f"{low:,} to {high:,} for each {what}, {sum(counts) / len(counts):.1f} in the mean"


def _share(n: int, total: int) -> str:
    return f"{100 * n / total:.1f} %" if total else "–"


def listed(names: Sequence[str], total: int | None = None) -> str:
    """`a, b and 7 more`: the first six. total: how many there are, where the names are not all."""
    rest = (len(names) if total is None else total) - len(names[:_NAMED])
    return ", ".join(names[:_NAMED]) + (f" and {rest:,} more" if rest else "")


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_WIDTH else line[: MOST_WIDTH - 3] + "..."

"""Caption words as the Penn Treebank tokenizer of the official caption evaluation makes them, without Java."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain

from tasks.metrics.ptb.patterns import Scanner
from tasks.metrics.ptb.rules import LINE_BREAK, RULES
from tasks.metrics.ptb.words import lower, stand_in

__all__ = ["tokenize_captions"]

# Left out by pycocoevalcap 1.2 (ptbtokenizer.py) after the lexer. The words are lower case by then, so its names of brackets never match.
_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_MOST_CHUNKS = 1 << 18
_MOST_WAITING = 200  # letters; an open tag may want all that follows, and asking again at each space would take quadratic time

_ASTRAL = re.compile("[\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONE_SURROGATE = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")


def tokenize_captions(captions: Iterable[str]) -> list[list[str]]:
    """The words of each caption, in lower case and without punctuation: [["a", "dog", "'s", "bed"]] for ["A dog's bed."].

    Equal to pycocoevalcap 1.2, which writes all captions of one side (references or hypotheses) into one file, one per line, and reads it
    as one text. After a few endings the next line matters ("Plan A." before "The dogs", "fig." before "7 dogs"), or that there is none
    ("so you're"), so `captions` are all those of a side, in the order of the images.

    A line break other than a newline ends the caption, as it does officially, where the rest would moreover be taken for the next caption.
    A word may hold an unbreakable space ("2 1/2").
    """
    lines = [_in_halves(caption.replace("\n", " ")) for caption in captions]
    text, letters = "\n".join(lines), "\n".join(map(stand_in, lines))
    words: list[list[str]] = []
    begin = at = 0  # of the line; of the next word, which is further on where one reaches over the end of its line
    reached: list[str] = []  # the parts of such a word on this line and those after it
    for line in lines:
        end = begin + len(line)
        found, n_read = ([], 0) if reached or end == len(text) else _from_chunks(line)
        if n_read <= len(line):
            tokens = [reached.pop(0)] if reached else []
            if not reached:
                more, at, _ = _lexer().tokens(text, letters, max(at, begin + n_read), end)
                tokens += more
            if tokens and not reached:
                tokens[-1], *reached = tokens[-1].split("\n")
            found += _finish(tokens)
        words.append(found)
        begin = end + 1
    return words


def _from_chunks(line: str) -> tuple[list[str], int]:
    """The words of a line that another one follows, as far as they depend on neither that one nor on very many letters; how far that is.

    All of the line and its end: len(line) + 1.
    """
    chunks = f"{line}\n".split(" ")
    found = [_CHUNKS[chunk] for chunk in chunks]
    if None not in found:
        return list(chain.from_iterable(found)), len(line) + 1  # type: ignore[arg-type]
    words: list[str] = []
    waiting, n_read = "", 0
    for chunk in chunks:
        piece = f"{waiting} {chunk}" if waiting else chunk
        if (known := _CHUNKS[piece]) is not None:
            words += known
            waiting, n_read = "", n_read + len(piece) + 1
        elif len(piece) <= _MOST_WAITING:
            waiting = piece
        else:
            break
    return words, min(n_read, len(line) + 1)


class _Lexer:
    """The rules, ready to scan."""

    def __init__(self) -> None:
        self.scanner = Scanner([f"({rule.pattern})({rule.ahead})" for rule in RULES])
        self.ahead = {index: (Scanner([rule.pattern]), Scanner([rule.ahead])) for index, rule in enumerate(RULES) if rule.ahead}
        self.line_break = [rule.pattern for rule in RULES].index(LINE_BREAK)

    def tokens(self, text: str, letters: str, at: int, until: int) -> tuple[list[str], int, int]:
        """The words that begin from `at` to `until` on one line, as the lexer writes them; where the next begins; how much of the text was read.

        letters   the text in stand-ins
        """
        words: list[str] = []
        furthest = at
        while at < until:
            index, end, reach = self.scanner.scan(letters, at)
            furthest = max(furthest, reach)
            if index == self.line_break:
                break
            if index in self.ahead:
                end = self._split(letters, at, end, index)
            words.append(RULES[index].written(text[at:end]))
            at = end - RULES[index].reread
        return [word for word in words if word], at, furthest

    def _split(self, letters: str, begin: int, end: int, index: int) -> int:
        """Where the word ends and what must follow begins: as far right as both fit."""
        word, ahead = self.ahead[index]
        places = reversed(word.ends(letters, begin, end))
        return next(place for place in places if end in ahead.ends(letters, place, end))


@cache
def _lexer() -> _Lexer:
    return _Lexer()


class _Chunks(dict[str, "list[str] | None"]):
    """Words of what stands between two spaces, found once: captions repeat their words, and few of these depend on their neighbours.

    A chunk that ends in a newline is the last of its caption. None for those that depend on what follows: the caller asks again with the
    next chunk joined.
    """

    def __missing__(self, chunk: str) -> list[str] | None:
        if len(self) >= _MOST_CHUNKS:
            self.clear()
        self[chunk] = _words_of(chunk)
        return self[chunk]


def _words_of(chunk: str) -> list[str] | None:
    is_last = chunk.endswith("\n")
    text = chunk if is_last else chunk + " "
    tokens, _, reach = _lexer().tokens(text, stand_in(text), 0, len(text) - 1)
    if reach > len(text):  # a word wants more text
        return None
    # A line break ends the caption, and a last space is taken off at the end of a caption alone.
    if not is_last and (_has_line_break(text) or any(token != token.rstrip() for token in tokens)):
        return None
    return _finish(tokens)


_CHUNKS = _Chunks()


def _has_line_break(text: str) -> bool:
    return any(letter in "\r\v\f\u2028\u2029" for letter in text)


def _finish(tokens: Sequence[str]) -> list[str]:
    """Lower case, and cut at spaces once more, because that is how the official code reads the lexer's output."""
    line = " ".join(lower(_whole(token)) for token in tokens).rstrip()
    return [word for word in line.split(" ") if word not in _PUNCTUATION] if line else []


def _in_halves(text: str) -> str:
    """Letters beyond the basic plane as pairs of surrogates, which is how the official lexer sees them."""
    return text if text.isascii() else _ASTRAL.sub(lambda found: _pair(found.group()), text)


def _pair(letter: str) -> str:
    offset = ord(letter) - 0x10000
    return chr(0xD800 + (offset >> 10)) + chr(0xDC00 + (offset & 0x3FF))


def _whole(token: str) -> str:
    """The token with pairs of surrogates joined again; half a pair is written as a question mark."""
    if token.isascii() or not _SURROGATE.search(token):
        return token
    return _LONE_SURROGATE.sub("?", token).encode("utf-16-le", "surrogatepass").decode("utf-16-le")

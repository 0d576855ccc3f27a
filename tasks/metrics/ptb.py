"""Caption words as the Penn Treebank tokenizer of the official caption evaluation makes them, without Java."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from tasks.metrics.longest_match import Scanner
from tasks.metrics.ptb_letters import stand_in
from tasks.metrics.ptb_rules import LINE_BREAK, RULES
from tasks.metrics.ptb_written import lower

__all__ = ["tokenize", "tokenize_last"]

# Left out by pycocoevalcap 1.2 (ptbtokenizer.py) after the lexer. The words are lower case by then, so its names of brackets never match.
_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
# Officially all captions are one file, one per line, and in a few odd endings the next line matters ("... fig." before "7 dogs").
# Here every caption has the same next line, so that no figure depends on the order of images.
_NEXT_LINE = "\nx"
_BLANKS = "\t\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u3000"
_MOST_CHUNKS = 1 << 18

_ASTRAL = re.compile("[\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONE_SURROGATE = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")


def tokenize(caption: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation: ["a", "dog", "'s", "bed"] for "A dog's bed.".

    Equal to pycocoevalcap 1.2 for a caption that another one follows. A line break other than a newline ends the caption, as it does
    officially, where the rest would moreover be taken for the next caption. A word may hold an unbreakable space ("2 1/2").
    """
    text = _in_halves(caption.replace("\n", " "))
    *chunks, last = text.split(" ")
    try:
        return [word for chunk in chunks for word in _CHUNKS[chunk]] + _CHUNKS[last + _NEXT_LINE]
    except _OpenEndedError:
        return _finish(_lexer().tokens(text + _NEXT_LINE, len(text))[0])


def tokenize_last(caption: str) -> list[str]:
    """The words of the last caption of a file, which rules that want another letter treat differently: "you", "re" for "you're"."""
    text = _in_halves(caption.replace("\n", " "))
    return _finish(_lexer().tokens(text, len(text))[0])


class _OpenEndedError(Exception):
    """What stands between two spaces cannot be cut into words without what follows."""


class _Lexer:
    """The rules, ready to scan."""

    def __init__(self) -> None:
        self.scanner = Scanner([f"({rule.pattern})({rule.ahead})" for rule in RULES])
        self.ahead = {index: (Scanner([rule.pattern]), Scanner([rule.ahead])) for index, rule in enumerate(RULES) if rule.ahead}
        self.line_break = [rule.pattern for rule in RULES].index(LINE_BREAK)

    def tokens(self, text: str, until: int) -> tuple[list[str], int]:
        """The words of the first line that begin before `until`, as the lexer writes them, and how much of the text was read for them."""
        letters = stand_in(text)
        words: list[str] = []
        at = furthest = 0
        while at < until:
            index, end, reach = self.scanner.scan(letters, at)
            furthest = max(furthest, reach)
            if index == self.line_break:
                break
            if index in self.ahead:
                end = self._split(letters, at, end, index)
            words.append(RULES[index].written(text[at:end]))
            at = end
        return [word for word in words if word], furthest

    def _split(self, letters: str, begin: int, end: int, index: int) -> int:
        """Where the word ends and what must follow begins: as far right as both fit."""
        word, ahead = self.ahead[index]
        places = reversed(word.ends(letters, begin, end))
        return next(place for place in places if end in ahead.ends(letters, place, end))


@cache
def _lexer() -> _Lexer:
    return _Lexer()


class _Chunks(dict[str, list[str]]):
    """Words of what stands between two spaces, found once: captions repeat their words, and few of these depend on their neighbours.

    Raises _OpenEndedError for those that do.
    """

    def __missing__(self, chunk: str) -> list[str]:
        # A run of blanks is one thing, so a chunk that goes on with another blank belongs to what stands before it.
        if chunk[:1] in _BLANKS and chunk != "":
            raise _OpenEndedError
        if len(self) >= _MOST_CHUNKS:
            self.clear()
        is_last = chunk.endswith(_NEXT_LINE)
        text = chunk if is_last else chunk + " "
        tokens, reach = _lexer().tokens(text, len(text) - len(_NEXT_LINE) if is_last else len(chunk))
        if not is_last and (reach > len(text) or _has_line_break(text) or any(token != token.rstrip() for token in tokens)):
            raise _OpenEndedError
        self[chunk] = _finish(tokens)
        return self[chunk]


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

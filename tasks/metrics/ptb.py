"""Caption words as the Penn Treebank tokenizer of the official caption evaluation makes them, without Java."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import chain

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
_MOST_CHUNKS = 1 << 18
_MOST_WAITING = 200  # letters; an open tag may want all that follows, and asking again at each space would take quadratic time

_ASTRAL = re.compile("[\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONE_SURROGATE = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")


def tokenize(caption: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation: ["a", "dog", "'s", "bed"] for "A dog's bed.".

    Equal to pycocoevalcap 1.2 for a caption that another one follows. A line break other than a newline ends the caption, as it does
    officially, where the rest would moreover be taken for the next caption. A word may hold an unbreakable space ("2 1/2").
    """
    text = _in_halves(caption.replace("\n", " ")) + _NEXT_LINE
    found = [_CHUNKS[chunk] for chunk in text.split(" ")]
    return _joined(text) if None in found else list(chain.from_iterable(found))  # type: ignore[arg-type]


def _joined(text: str) -> list[str]:
    """The words where some chunk cannot be cut without those after it."""
    words: list[str] = []
    waiting = ""
    left = len(text)
    for chunk in text.split(" "):
        left -= len(chunk) + 1
        piece = f"{waiting} {chunk}" if waiting else chunk
        if (found := _CHUNKS[piece]) is not None:
            words += found
            waiting = ""
        elif len(piece) <= _MOST_WAITING:
            waiting = piece
        else:
            return words + _last_words(text[len(text) - left - len(piece) - 1 :])
    return words


def tokenize_last(caption: str) -> list[str]:
    """The words of the last caption of a file, which rules that want another letter treat differently: "you", "re" for "you're"."""
    text = _in_halves(caption.replace("\n", " "))
    return _finish(_lexer().tokens(text, len(text))[0])


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


class _Chunks(dict[str, "list[str] | None"]):
    """Words of what stands between two spaces, found once: captions repeat their words, and few of these depend on their neighbours.

    None for those that do: the caller asks again with the next chunk joined. What ends a caption never is None.
    """

    def __missing__(self, chunk: str) -> list[str] | None:
        if len(self) >= _MOST_CHUNKS:
            self.clear()
        self[chunk] = _last_words(chunk) if chunk.endswith(_NEXT_LINE) else _inner_words(chunk)
        return self[chunk]


def _last_words(chunk: str) -> list[str]:
    return _finish(_lexer().tokens(chunk, len(chunk) - len(_NEXT_LINE))[0])


def _inner_words(chunk: str) -> list[str] | None:
    text = chunk + " "
    tokens, reach = _lexer().tokens(text, len(chunk))
    # The last token must not want more text, nor end in a space that only the end of a caption would take off.
    if reach > len(text) or _has_line_break(text) or any(token != token.rstrip() for token in tokens):
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

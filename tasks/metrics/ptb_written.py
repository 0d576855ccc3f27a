"""What the Penn Treebank lexer writes for a word it found: the text itself, or its plain form."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

__all__ = [
    "always",
    "ampersands",
    "bracketed",
    "dialled",
    "hyphens",
    "in_ascii",
    "in_dollars",
    "in_fractions",
    "joined",
    "lower",
    "same",
    "undotted_initial",
    "unhyphenated",
]

_FRACTIONS = str.maketrans({"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"})
_CURRENCIES = str.maketrans({"\u00a2": "cents", "\u00a3": "#", "\u0080": "$", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$"})
_BRACKETS = str.maketrans({"(": "-LRB-", ")": "-RRB-"})
_QUOTES = str.maketrans(
    dict.fromkeys("\u0091\u2018\u201b\u2039", "`")
    | dict.fromkeys("\u0092\u2019\u203a", "'")
    | dict.fromkeys("\u0093\u201c\u00ab", "``")
    | dict.fromkeys("\u0094\u201d\u00bb\"", "''")
)
_APOSTROPHE = re.compile("&apos;")
_QUOTATION_MARK = re.compile("&quot;")
_AMPERSAND = re.compile("&amp;", re.IGNORECASE)


# Java's text library cuts words so: letters, digits, marks and what is not seen, with a joint between two letters. Scripts written without spaces are apart.
_JAVA_WORD = re.compile("(?:[LDM]|(?<=[LM])J(?=L))+")
_JOINTS = "'._-\u00ad\u2010\u2011"
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def lower(word: str) -> str:
    """The word in lower case as Java writes it: a capital sigma is final after a letter with case and before none, in its part of the word.

    Python asks for a neighbour instead: a sigma after "a3" is final here and not there.
    """
    if "\u03a3" not in word:
        return word.lower()
    letters = list(word)
    for found in _JAVA_WORD.finditer("".join(map(_kind, word))):
        with_case = [at for at in range(*found.span()) if word[at].lower() != word[at].upper()]
        if len(with_case) > 1 and word[with_case[-1]] == "\u03a3":
            letters[with_case[-1]] = "\u03c2"
    return "".join(letters).replace("\u03a3", "\u03c3").lower()


def _kind(letter: str) -> str:
    if letter in _JOINTS:
        return "J"
    category = unicodedata.category(letter)
    if category in ("Nd", "No"):
        return "D"
    if category in ("Mn", "Me", "Cf"):
        return "M"
    return "L" if category[0] == "L" and not _UNSPACED.match(letter) else "X"


def same(text: str) -> str:
    """The text as it is."""
    return text


def always(word: str) -> Callable[[str], str]:
    """One word whatever the text; "" for nothing."""
    return lambda _: word


def hyphens(text: str) -> str:
    """Three or four hyphens are a dash; other rows stay."""
    return "--" if 3 <= len(text) <= 4 else text


def unhyphenated(text: str) -> str:
    """Without soft hyphens; a word of nothing else is one hyphen."""
    return text.replace("\u00ad", "") or "-"


def in_ascii(text: str) -> str:
    """Quotation marks and apostrophes as in plain TeX; only `&apos;` and `&quot;` in lower case are known."""
    return _QUOTATION_MARK.sub("''", _APOSTROPHE.sub("'", text)).translate(_QUOTES)


def in_fractions(text: str) -> str:
    """A fraction of one letter with its digits: the five commonest, others stay."""
    return text.translate(_FRACTIONS)


def in_dollars(text: str) -> str:
    """Cents, the pound (as #) and the dollar for the euro and unnamed currencies; others stay."""
    return text.translate(_CURRENCIES)


def joined(text: str) -> str:
    """Spaces made unbreakable, so that the text stays one word."""
    return text.replace(" ", "\u00a0")


def bracketed(text: str) -> str:
    """Round brackets by name."""
    return text.translate(_BRACKETS)


def dialled(text: str) -> str:
    """A telephone number: round brackets by name, one word."""
    return bracketed(joined(text))


def ampersands(text: str) -> str:
    """The entity `&amp;` as the letter it stands for."""
    return _AMPERSAND.sub("&", text)


def undotted_initial(text: str) -> str:
    """An initial loses its dot, "A." becoming "A"; longer acronyms keep theirs."""
    return text[:1] if len(text) == 2 else text

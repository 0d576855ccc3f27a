"""Letters and words of the Penn Treebank lexer: which letters it treats alike, and what it writes for a word it found."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

__all__ = [
    "DIGIT", "LETTER", "MARK", "SYMBOL", "UNKNOWN", "always", "ampersands", "bracketed", "dialled", "hyphens", "in_ascii",
    "in_dollars", "in_fractions", "joined", "lower", "same", "stand_in", "undotted_initial", "unhyphenated",
]  # fmt: skip


# ----------------------------------------
# What the Penn Treebank lexer writes for a word it found: the text itself, or its plain form.


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


# ----------------------------------------
# Which letters the Penn Treebank lexer treats alike.
#
# Its rules name a few hundred letters and otherwise speak of kinds: letters, digits, symbols, spaces. A text is scanned with one letter
# standing for each kind, so the automaton needs no table of 65,536 letters.


LETTER, MARK, DIGIT, SYMBOL, UNKNOWN = "\u00e9", "\u0301", "\u0660", "\u2122", "\x01"


def _members(ranges: str) -> frozenset[int]:
    pairs = (item.partition("-") for item in ranges.split())
    return frozenset(code for first, _, last in pairs for code in range(int(first, 16), int(last or first, 16) + 1))


# Letters and digits of the basic plane that came after Unicode 6.3, which the lexer was made with: it does not know them.
_NEWER = _members("""
    037F 0528-052F 0560 0588 05EF 0860-086A 0870-0887 0889-088F 08A1 08AD-08C9 0978 0980 09FC 0AF9 0C34 0C5A 0C5C-0C5D 0C80 0CDC-0CDD
    0D04 0D54-0D56 0D5F 0DE6-0DEF 0E86 0E89 0E8C 0E8E-0E93 0E98 0EA0 0EA8-0EA9 0EAC 13F5 13F8-13FD 16F1-16F8 170D 171F 1878 191D-191E
    19B0-19C0 19C8-19C9 1B4C 1C80-1C8A 1C90-1CBA 1CBD-1CBF 1CF2-1CF3 1CFA 2C2F 2C5F 312E-312F 31BB-31BF 4DB6-4DBF 9FCD-9FFF A698-A69D
    A78F A794-A79F A7AB-A7DC A7F1-A7F7 A8FD-A8FE A9E0-A9E4 A9E6-A9FE AA7E-AA7F AB30-AB5A AB5C-AB69 AB70-ABBF
""")
_ALSO_LETTERS = _members("1885-1886")
# Marks and modifiers: part of a word, but not of the words with an apostrophe or a hyphen in them.
_MARKS = _members("""
    02C2-02C5 02D2-02DF 02E5-02EB 02ED 02EF-036F 0375 0378-0379 0384-0385 03F6 0483-0487 055A-055F 0591-05BD 05BF 05C1-05C2 05C4-05C5
    05C7 0615-061A 064B-065E 0670 06D6-06E4 06E7-06ED 06FD-06FE 070F 0711 0730-074C 07A6-07B0 07EB-07F3 0900-0903 093C 093E-094E
    0951-0955 0962-0963 0981-0983 09BC 09BE-09C4 09C7-09C8 09CB-09CD 09D7 09E2-09E3 0A01-0A03 0A3C 0A3E-0A4F 0A81-0A83 0ABC 0ABE-0ACF
    0B82 0BBE-0BC2 0BC6-0BC8 0BCA-0BCD 0C01-0C03 0C3E-0C56 0D3E-0D44 0D46-0D48 0E31 0E34-0E3A 0E47-0E4E 0EB1 0EB4-0EBC 0EC8-0ECD
""")
_SYMBOLS = _members("""
    00A1 00A6-00A9 00AC 00AE-00B1 00B4 00B6-00B8 00BF 00D7 00F7 037E 0387 0589 05BE 05C0 05C3 05C6 05F3-05F4 0600-0603 0606-060A 060C
    0614 061B 061E-061F 066A 066D 06D4 0700-070D 07F6-07F8 0964-0965 0E4F 1FBD 2016-2017 2020-2023 2030-2038 203B 203E-2042 207C-207E
    208C-208E 2100-2101 2103-2106 2108-2109 2114 2116-2118 211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 214A-214D 214F 2190-2BFF
    3002 3012 30FB FF01-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65
""")
# Letters that the rules name, beside ASCII; each stands for itself.
_NAMED = frozenset(
    "\x80\x85\x91\x92\x93\x94\x96\x97\u00a0\u00ab\u00ad\u00bb\u0130\u0131\u017f\u058a\u060b\u066b\u066c\u0e3f\u2010\u2011\u200b\u200e"
    "\u200f\u2026\u2028\u2029\u2039\u203a\u2044\u20a0\u20a4\u20ac\u212a\u3000\u3001\ufeff\uffe0\uffe1\uffe5\uffe6"
) | frozenset(map(chr, _members("0000-007F 00A2-00A5 00B2-00B3 00B9 00BC-00BE 2000-200A 2013-2015 2018-201F 2070 2074-207B 2080-208B 2153-215E")))


def _letter_kind(code: int) -> str:
    letter = chr(code)
    if letter in _NAMED:
        return letter
    category = unicodedata.category(letter)
    if code in _MARKS:
        return MARK
    if code in _SYMBOLS:
        return SYMBOL
    if code in _NEWER or code > 0xFFFF:
        return UNKNOWN
    if category[0] == "L" or code in _ALSO_LETTERS:
        return LETTER
    return DIGIT if category == "Nd" else UNKNOWN


class _Kinds(dict[int, str]):
    """A table for str.translate that grows with the letters met."""

    def __missing__(self, code: int) -> str:
        self[code] = _letter_kind(code)
        return self[code]


_KINDS = _Kinds()


def stand_in(text: str) -> str:
    """The text with each letter replaced by the one that stands for its kind; of the same length, and ASCII unchanged."""
    return text if text.isascii() else text.translate(_KINDS)

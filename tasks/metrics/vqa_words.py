"""The answer normalisation of the official VQA evaluation, quirks included.

Source of every table and every order of steps: GT-Vision-Lab/VQA at a013f004, PythonEvaluationTools/vqaEvaluation/vqaEval.py.
"""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["clean", "normalize"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ODD = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!.]")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The official pattern means to spare the dot after a digit too, but its look-behind is misspelt, so only the dot BEFORE one is spared.
_DOT = re.compile(r"\.(?!\d)")
# The official code passes re.UNICODE where `sub` takes the count, and the flag's value is 32: later dots stay.
_MOST_DOTS = int(re.UNICODE)

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_DIGITS)}
_ARTICLES = frozenset({"a", "an", "the"})

# Written without one of their apostrophes, these get it back. Words that the official table holds with a capital I never match,
# because it is looked up in lower case; hence no "i'm" here.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
    how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


_MENDED = {broken: word for word in _CONTRACTIONS.split() for broken in _without_one_apostrophe(word)}
_MENDED["somebody'd"] = "somebodyd"  # the official table has this pair the wrong way round


def clean(answer: str) -> str:
    """The answer on one line: the only thing done to it where all human answers are equal."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 18)  # answers repeat: VQAv2 val has 2.1 million human answers and 100 thousand different ones
def normalize(answer: str) -> str:
    """The cleaned answer without punctuation and articles, numbers as digits: "The two dogs!" -> "2 dogs"."""
    words = [_NUMBERS.get(word, word) for word in _strip_punctuation(answer).lower().split()]
    return " ".join([_MENDED.get(word, word) for word in words if word not in _ARTICLES])


def _strip_punctuation(answer: str) -> str:
    """A mark that touches a space somewhere is deleted everywhere, any other becomes a space; after "1,000" all marks are deleted."""
    if not _ODD.search(answer):
        return answer
    delete_all = _DIGIT_COMMA_DIGIT.search(answer) is not None
    table = {
        ord(mark): None if delete_all or f"{mark} " in answer or f" {mark}" in answer else " " for mark in _PUNCTUATION if mark in answer
    }
    return _DOT.sub("", answer.translate(table), count=_MOST_DOTS)

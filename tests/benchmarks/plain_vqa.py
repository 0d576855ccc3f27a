"""The official VQA accuracy written plainly, step by step as its published rules say and with no care for speed.

What the fast scorer is measured against and compared with. Rules: GT-Vision-Lab/VQA at a013f004, vqaEval.py; the table of contractions is
that of `tasks.metrics.vqa`, which the recorded cases of the official evaluator prove.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tasks.metrics.vqa import _MENDED as CONTRACTIONS

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
           "nine": "9", "ten": "10"}  # fmt: skip
ARTICLES = ["a", "an", "the"]
LONE_DOT = re.compile(r"(?!<=\d)(\.)(?!\d)")
COMMA_IN_NUMBER = re.compile(r"(\d)(\,)(\d)")


def one_line(answer: str) -> str:
    answer = answer.replace("\n", " ")
    answer = answer.replace("\t", " ")
    return answer.strip()


def without_marks(answer: str) -> str:
    found = answer
    for mark in MARKS:
        if (mark + " " in answer or " " + mark in answer) or re.search(COMMA_IN_NUMBER, answer) is not None:
            found = found.replace(mark, "")
        else:
            found = found.replace(mark, " ")
    return LONE_DOT.sub("", found, int(re.UNICODE))  # the flag stands where the count does


def in_plain_words(answer: str) -> str:
    words = []
    for word in answer.lower().split():
        digit = NUMBERS.setdefault(word, word)
        if digit not in ARTICLES:
            words.append(digit)
    for at, word in enumerate(words):
        if word in CONTRACTIONS:
            words[at] = CONTRACTIONS[word]
    return " ".join(words)


def accuracy(prediction: str, records: Sequence[Mapping[str, object]]) -> float:
    """Of one prediction against its ten records, 0..1; a record is {"answer": ..., "answer_id": ...}."""
    people = [dict(record) for record in records]
    for record in people:
        record["answer"] = one_line(str(record["answer"]))
    stated = one_line(prediction)
    if len({str(record["answer"]) for record in people}) > 1:
        for record in people:
            record["answer"] = in_plain_words(without_marks(str(record["answer"])))
        stated = in_plain_words(without_marks(stated))
    shares = []
    for record in people:
        others = [other for other in people if other != record]
        matching = [other for other in others if other["answer"] == stated]
        shares.append(min(1, float(len(matching)) / 3))
    return float(sum(shares)) / len(shares)


def evaluate(predictions: Mapping[int, str], rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Overall, per question type and per answer type, in percent; rows as in VQAv2's annotations."""
    each: list[float] = []
    by_type: dict[str, list[float]] = {}
    by_answer: dict[str, list[float]] = {}
    for row in rows:
        found = accuracy(predictions[row["question_id"]], row["answers"])  # type: ignore[index, arg-type]
        each.append(found)
        by_type.setdefault(str(row["question_type"]), []).append(found)
        by_answer.setdefault(str(row["answer_type"]), []).append(found)
    percent = {name: 100 * sum(values) / len(values) for name, values in by_type.items()}
    answers = {name: 100 * sum(values) / len(values) for name, values in by_answer.items()}
    return {"overall": 100 * sum(each) / len(each), "question types": percent, "answer types": answers}

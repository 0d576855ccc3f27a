"""Ten answers to a question, as ten people give them: mostly one answer, at times a synonym, a near count or a slip."""

from __future__ import annotations

from random import Random

from tasks.scenes.words import ALIKE, NUMBERS

__all__ = ["ten_answers"]

N_PEOPLE = 10
ALL_AGREE = 0.6  # share of the questions that ten people answer alike
DISSENT = (1, 1, 1, 2, 2, 3)  # how many of the ten say otherwise, where they do not agree


def ten_answers(truth: str, rng: Random) -> tuple[str, ...]:
    """Ten answers, at least seven of them the true one."""
    n = 0 if rng.random() < ALL_AGREE else rng.choice(DISSENT)
    answers = [_otherwise(truth, rng) for _ in range(n)] + [truth] * (N_PEOPLE - n)
    rng.shuffle(answers)
    return tuple(answers)


def _otherwise(truth: str, rng: Random) -> str:
    """What a person says who does not give the usual answer."""
    if truth.isdigit():
        count = int(truth)
        return rng.choice((str(count + 1), str(max(count - 1, 0)), NUMBERS[count]))
    if truth in ("yes", "no") and rng.random() < 0.6:
        return "no" if truth == "yes" else "yes"
    return rng.choice(ALIKE[truth])

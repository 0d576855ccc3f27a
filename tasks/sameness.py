"""A sentence about texts that say too little: many empty, or one text said of many pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from multimodal.generate import GenerationSettings

__all__ = ["told_sameness"]

MOST_EMPTY, MOST_ALIKE = 0.1, 1 / 3  # shares of all texts; what is more is told
ANSWER_WORDS = 3  # a text of so few words may be the right answer to many questions
FEWEST = 20  # texts; among fewer, a third alike means nothing


def told_sameness(texts: Collection[str], settings: GenerationSettings) -> str:
    """What is wrong with the texts of an evaluation as a whole, and what to try; empty where nothing is."""
    if len(texts) < FEWEST:
        return ""
    counts = Counter(texts)
    n_empty = counts.pop("", 0)
    if n_empty > MOST_EMPTY * len(texts):
        return f"{n_empty} of {len(texts)} texts are empty: {_advice(settings)}"
    text, n_alike = max(((text, n) for text, n in counts.items() if len(text.split()) > ANSWER_WORDS), key=lambda pair: pair[1], default=("", 0))
    if n_alike > MOST_ALIKE * len(texts):
        return f"{n_alike} of {len(texts)} texts are the same, {text!r}: {_advice(settings)}"
    return ""


def _advice(settings: GenerationSettings) -> str:
    if settings.num_beams == 1:
        return "the adapter tells the pictures hardly apart, so train it longer or give it more weights"
    return (
        f"{settings.num_beams} beams find what the frozen model thinks most probable, and a weak adapter does not outweigh that, "
        "so compare with generation.num_beams 1"
    )

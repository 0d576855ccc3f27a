"""Reports for the tests: one that has every part, one that has none, and texts that try to leave their place."""

from __future__ import annotations

import io
import math

from PIL import Image

from tasks.report.page import AnswerCard, CaptionCard, Curve, MetricRow, Report, Trained

HOSTILE = [
    "<script>document.title = 'pwned'</script>",
    "<img src=x onerror=\"document.title = 'pwned'\">",
    "\"' onmouseover='document.title=1' x=\"",
    "</style></script></title><b>&amp; {{ 7 * 7 }} {% raw %}",
    "🐶👩‍👩‍👧 a dog",
    "كلب يركض \u202e على الشاطئ",
    "Donaudampfschifffahrt" * 40,
]
EMPTY = Report(title="Empty", summary="", scorer="", rows=[], trained=[], frozen_parameters=0, curves=[], cards=[])


def jpeg(width: int = 640, height: int = 480) -> bytes:
    stream = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).save(stream, "JPEG")
    return stream.getvalue()


def full(texts: list[str]) -> Report:
    """A report that has every part, each text of which is one of `texts`."""
    cards: list[CaptionCard | AnswerCard] = []
    for i, text in enumerate(texts):
        cards.append(CaptionCard(key=text, image=jpeg(), generated=text, references=[text, "a dog"], score=0.1 * i))
        answers = [text] * 7 + ["dog"] * 3
        cards.append(AnswerCard(key=text, image=None, question=text, generated=text, answers=answers, score=(0.0, 0.6, 1.0)[i % 3]))
    text = " ".join(texts)
    return Report(
        title=text, summary=text, scorer=text, config=text, cards=cards, frozen_parameters=9_000_000,
        rows=[MetricRow(name=text, values={text: 25.1, "BLEU-4": None}), MetricRow(name="control", values={text: 3.4, "loss": math.nan})],
        trained=[Trained(name=text, parameters=1_000_000)], bad_samples={text: texts * 20},
        curves=[Curve(name=text, points=[(i, 1 / (i + 1)) for i in range(500)], unit=text), Curve(name="none", points=[])],
    )  # fmt: skip

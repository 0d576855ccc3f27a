from __future__ import annotations

import base64
import io
import math

from PIL import Image
from report_sample import jpeg

from tasks.report.page import answer_outcome, caption_verdicts, columns, metric_cells, thumbnail


def test_pictures_become_small_jpegs_and_unreadable_ones_say_why() -> None:
    small = thumbnail(jpeg(640, 480))
    assert (small.width, small.height) == (224, 168)
    stored = Image.open(io.BytesIO(base64.b64decode(small.url.removeprefix("data:image/jpeg;base64,"))))
    assert (stored.format, stored.size) == ("JPEG", (224, 168))
    assert thumbnail(Image.new("RGB", (64, 48))).width == 64
    clear = thumbnail(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    assert Image.open(io.BytesIO(base64.b64decode(clear.url.split(",")[1]))).getpixel((4, 4)) == (255, 255, 255)
    for mode in ("1", "L", "P", "CMYK", "I;16", "F", "LA"):
        assert thumbnail(Image.new(mode, (3000, 2))).width == 224
    assert thumbnail(jpeg()[:300]).reason == "the image cannot be read: truncated"
    assert thumbnail(b"nothing").reason == "the image cannot be read: not an image"
    assert thumbnail(None).reason == "no image was saved"
    closed = Image.open(io.BytesIO(jpeg()))
    closed.close()
    assert thumbnail(closed).reason.startswith("the image cannot be read: ")


def test_a_verdict_is_told_by_sign_and_word() -> None:
    assert [(v.sign, v.word, v.metric) for v in map(answer_outcome, (1.0, 0.9, 0.0, None))] == [
        ("✓", "right", "100 %"), ("◐", "partly right", "90 %"), ("✗", "wrong", "0 %"), ("–", "not scored", "")]  # fmt: skip
    assert [v.word for v in caption_verdicts([0.1, None, 2.0, 0.5])] == ["lower", "not scored", "higher", "middle"]
    assert [v.word for v in caption_verdicts([0.0, 0.0, 0.0, 0.0, 1.0])] == ["lower"] * 4 + ["higher"]
    assert [v.word for v in caption_verdicts([0.5, 0.5])] == ["middle"] * 2


def test_a_column_of_the_metric_table_is_written_alike() -> None:
    rows = [{"CIDEr-D": 25.126, "a": 0.5}, {"CIDEr-D": 3.4, "b": math.inf, "c": 1e-7}, {"a": None, "b": math.nan, "c": -1.0}]
    assert columns(rows) == ["CIDEr-D", "a", "b", "c"]
    texts = [[cell.text for cell in row] for row in metric_cells(rows)]
    assert texts == [["25.13", "0.500", "–", "–"], ["3.40", "–", "∞", "0.000"], ["–", "–", "not a number", "-1.000"]]
    assert [cell.text for (cell,) in metric_cells([{"Bleu_4": 9.68e-18}, {"Bleu_4": 0.0}])] == ["0.00", "0.00"]  # of no word in common
    assert [row[0].bar for row in metric_cells(rows)] == [100.0, 13.5, None]
    assert [row[3].bar for row in metric_cells(rows)] == [None, None, None]  # a bar from a negative length says nothing

"""Texts of clips: COCO's layout with `video` or `audio`, and eP-ALM's lists."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_clips import frame_folder, grey_frames

from adalink.errors import ConfigError, DataError
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from multimodal.sample import Sample
from tasks.data.sources import DataConfig
from tasks.metrics.vqa import VQA_SCORERS
from tasks.vqa import Vqa


@pytest.fixture
def media(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.wav", "c.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    frame_folder(tmp_path / "frames", grey_frames([50] * 3))
    return tmp_path


def written(folder: Path, document: Any) -> Path:
    path = folder / "texts.json"
    path.write_text(json.dumps(document))
    return path


def opened(media: Path, document: Any, **options: Any) -> tuple[list[Sample], list[str]]:
    found = DataConfig(path=written(media, document), media=media, **options).open()
    return [found.source[i] for i in range(len(found.source))], [f"{bad.key} {bad.reason}" for bad in found.problems]


def test_cocos_layout_has_videos_and_sounds(media: Path) -> None:
    document = {
        "images": [{"id": 1, "video": "a.mp4"}, {"id": 2, "audio": "b.wav"}, {"id": 3, "video": "frames"}, {"id": 4, "video": "none.mp4"}],
        "annotations": [{"id": i, "image_id": i, "caption": f"caption {i}"} for i in (1, 2, 3, 4)],
    }
    samples, problems = opened(media, document)
    assert [(one.kind, one.media, one.captions) for one in samples] == [
        ("video", media / "a.mp4", ("caption 1",)), ("audio", media / "b.wav", ("caption 2",)), ("video", media / "frames", ("caption 3",)),
    ]  # fmt: skip
    assert problems == ["4 missing file"]
    assert DataConfig(media=media, annotations=media / "texts.json").open().source[0].kind == "video"


def test_the_authors_captions_are_one_or_several(media: Path) -> None:
    rows = [
        {"video": "a", "caption": "a man sings"}, {"audio": "b.wav", "caption": ["a bell", " rings "]}, {"video": "a", "caption": "he dances"},
        {"video": "frames", "caption": ""}, {"video": "gone", "caption": "x"},
    ]  # fmt: skip
    samples, problems = opened(media, rows)
    assert [(one.key, one.image_id, one.kind, one.captions) for one in samples] == [
        ("a", 0, "video", ("a man sings", "he dances")), ("b.wav", 1, "audio", ("a bell", "rings")),
    ]  # fmt: skip
    assert problems == ["frames no text", "gone missing file"]


def test_one_answer_of_weight_1_scores_as_an_exact_match_beside_the_vqa_rule(media: Path) -> None:
    rows = [
        {"video": "a.mp4", "question_id": 7, "sent": "who sings ?", "label": {"man": 1.0}}, {"video": "c.mp4", "question_id": 8, "sent": "how many ?", "label": {}},
        {"video": "a.mp4", "question_id": 9, "sent": "what ?", "label": {"song": 0.6, "opera": 0.4}},
    ]  # fmt: skip
    samples, _ = opened(media, rows)
    first, split = samples[0].questions
    assert (first.text, first.answers, split.answers) == ("who sings ?", ("man",), ("song",) * 6 + ("opera",) * 4)
    assert samples[1].questions[0].answers == ()
    for answer, exact in (("the Man.", 100.0), ("woman", 0.0)):  # equal after the normalisation, as the release scores it
        score = Vqa().score({7: answer}, [replace(samples[0], questions=(first,))])
        assert score.metrics == {"exact match": exact, "accuracy": 0.0}
        assert score.scorer.startswith("exact match with one of the answers, all normalised")
        assert list(score.other_scorers.values()) == [VQA_SCORERS["official"]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"video": "a.mp4", "question_id": 7, "sent": "who?", "label": {"man": 0}}], "'label' is .*; expected answers with weights above 0"),
        ([{"video": "a.mp4", "question_id": "x", "sent": "who?"}], "'question_id' is 'x' .*expected a whole number"),
        ([{"video": "a.mp4", "caption": 5}], "'caption' is 5 .*expected a text"),
        ([{"video": "../a.mp4", "caption": "x"}], "expected a file name inside the images folder"),
        ([{"video": "gone", "caption": "x"}], "gives no sample; 1 sample cannot be used, the first because .*gone is missing"),
    ],
)
def test_lists_that_cannot_be_read_are_refused(rows: Any, words: str, media: Path) -> None:
    with pytest.raises(DataError, match=words):
        opened(media, rows)


def test_a_data_set_has_one_folder(media: Path) -> None:
    with pytest.raises(ConfigError, match=r"and media .*: a data set has one folder, so leave one out"):
        DataConfig(media=media, images=media, annotations=media / "a.json")


def test_shards_hold_clips_byte_for_byte(media: Path) -> None:
    video, wave, flac = bytes(4) + b"ftypisom" + bytes(30), b"RIFF" + bytes(4) + b"WAVE" + bytes(30), b"fLaC" + bytes(30)
    (media / "a.mp4").write_bytes(video)
    samples = [
        Sample(key="a", image_id=1, media=media / "a.mp4", kind="video", captions=("x",)), Sample(key="b", image_id=2, media=wave, kind="audio", captions=("y",)),
        Sample(key="c", image_id=3, media=flac, kind="audio", captions=("z",)), Sample(key="d", image_id=4, media=b"OggS", kind="audio", captions=("z",)),
        Sample(key="e", image_id=5, media=wave, kind="video", captions=("z",)), Sample(key="f", image_id=6, media=media / "frames", kind="video", captions=("z",)),
    ]  # fmt: skip
    written_set = write_shards(samples, media / "shards", budget=3)
    source = ShardSource(media / "shards")
    assert [(one.key, one.kind, one.media) for one in (source[i] for i in range(len(source)))] == [("a", "video", video), ("b", "audio", wave), ("c", "audio", flac)]
    details = {bad.key: bad.detail for bad in written_set.skipped}
    assert details["d"] == "the audio of sample 'd' begins with b'OggS', and shards hold wav or flac: convert it"
    assert details["e"].endswith("and shards hold mp4: convert it")
    assert "is not a regular file" in details["f"]

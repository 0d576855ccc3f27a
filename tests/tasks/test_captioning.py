from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from adalink.errors import ConfigError, DataError
from multimodal.sample import Sample
from multimodal.template import Text
from tasks.captioning import Captioning, plain
from tasks.task import Asked

DOG = Sample(key="dog", image_id=7, image=b"", captions=("A dog runs .", "a brown dog", "the dog"))
CAT = Sample(key="cat", image_id=9, image=b"", captions=("a cat sits", "a black cat"))


def test_every_caption_is_learnt_as_it_stands() -> None:
    assert Captioning().texts(DOG, random.Random(0)) == [Text("", caption) for caption in DOG.captions]


def test_a_few_captions_are_drawn_each_time_and_none_twice() -> None:
    task = Captioning(captions_per_image=2)
    drawn = [task.texts(DOG, random.Random(seed)) for seed in range(20)]
    assert all(len(set(texts)) == 2 for texts in drawn)
    assert {text.target for texts in drawn for text in texts} == set(DOG.captions)
    assert task.texts(DOG, random.Random(3)) == task.texts(DOG, random.Random(3))
    assert len(task.texts(CAT, random.Random(0))) == 2


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("A dog runs .", "a dog runs."), ("Two  men , one hat", "two men, one hat."), ("what ?", "what?"), ("it 's", "it's."), ("done.", "done.")],
)
def test_the_plain_style(caption: str, expected: str) -> None:
    assert plain(caption) == expected


def test_captions_are_learnt_plain_where_that_is_asked() -> None:
    assert [text.target for text in Captioning(style="plain").texts(DOG, random.Random(0))] == ["a dog runs.", "a brown dog.", "the dog."]


def test_each_picture_is_asked_about_once() -> None:
    assert Captioning().asked(DOG) == [Asked(7, "")]


def test_scores_are_in_percent_and_over_the_predicted_pictures() -> None:
    score = Captioning().score({7: "a brown dog", 9: "a cat sits"}, [DOG, CAT])
    assert list(score.metrics) == ["CIDEr", "Bleu_4", "Bleu_3", "Bleu_2", "Bleu_1", "ROUGE_L"]
    assert score.metrics["Bleu_1"] == pytest.approx(100.0, abs=1e-4)
    assert set(score.items) == {7, 9}
    assert sum(score.items.values()) / 2 == pytest.approx(score.metrics["CIDEr"])
    assert score.scorer
    worse = Captioning().score({7: "a cat sits", 9: "a brown dog"}, [DOG, CAT])
    assert worse.metrics["CIDEr"] < score.metrics["CIDEr"]
    assert set(Captioning().score({9: "a cat"}, [DOG, CAT]).items) == {9}


def test_nothing_to_score_is_one_sentence() -> None:
    with pytest.raises(DataError, match="nothing was predicted for this data set"):
        Captioning().score({1: "a"}, [DOG])
    bare = Sample(key="x", image_id=3, image=b"")
    with pytest.raises(DataError, match="1 of 2 images have no caption to score against, such as image 3: give their captions"):
        Captioning().score({7: "a", 3: "b"}, [DOG, bare])


def test_the_official_result_file(tmp_path: Path) -> None:
    Captioning().write_results(tmp_path / "results.json", {7: "a dog", 9: "a cat"})
    assert json.loads((tmp_path / "results.json").read_text()) == [{"image_id": 7, "caption": "a dog"}, {"image_id": 9, "caption": "a cat"}]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"captions_per_image is -1: give 0 \(all\) or more"):
        Captioning(captions_per_image=-1)
    with pytest.raises(ConfigError, match="the captions' style is 'loud': give raw or plain"):
        Captioning(style="loud")  # type: ignore[arg-type]

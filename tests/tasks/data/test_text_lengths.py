"""Data sets in memory measure each sample's texts; images are not touched."""

from __future__ import annotations

from pathlib import Path

from multimodal.sample import Sample, lengths_of
from tasks.data.files import FileSource
from tasks.data.sources import Chosen
from tasks.scenes.dataset import Scenes


def characters(sample: Sample) -> int:
    return sum(map(len, sample.captions)) + sum(len(question.text) for question in sample.questions)


def test_of_files_each_sample_is_measured(tmp_path: Path) -> None:
    samples = [Sample(key=str(i), image_id=i, image=tmp_path / "nowhere.jpg", captions=("a" * i, "b")) for i in range(5)]
    source = FileSource(samples, (), read_from=tmp_path)
    assert lengths_of(source, characters).tolist() == [1, 2, 3, 4, 5]
    assert lengths_of(Chosen(source, [3, 0]), characters).tolist() == [4, 1]


def test_of_scenes_the_texts_are_made_without_the_pictures() -> None:
    scenes = Scenes(split="val", size=6)
    seen = []

    def measure(sample: Sample) -> int:
        seen.append(sample)
        return characters(sample)

    assert lengths_of(scenes, measure).tolist() == [characters(scenes[i]) for i in range(6)]
    assert [(one.key, one.image_id, one.image) for one in seen] == [(scenes[i].key, scenes[i].image_id, b"") for i in range(6)]
    assert len({characters(one) for one in seen}) > 1

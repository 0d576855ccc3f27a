"""Samples written as parquet come back as they were, here and in `datasets`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from adalink.errors import BudgetError, ConfigError
from multimodal.sample import Question, Sample
from tasks.commands.shards import shards_from
from tasks.data.arrow.write import write_parquet
from tasks.data.sources import DataConfig
from tasks.scenes.dataset import Scenes


def samples() -> list[Sample]:
    """Scenes with their texts; one with two images, a conversation, marks, and texts of all kinds."""
    scenes = Scenes(split="train", size=6)
    found = [scenes[i] for i in range(6)]
    question = Question(
        question_id=2**40, text="grün?\n", answers=("", "緑", " two "), marks=("a", "b", "c"), turns=(("system", "short"), ("user", "zuvor"))
    )
    found[3] = replace(found[3], key="a/b.c", further=(found[0].image, found[1].image), captions=(" spaces ", "\r\nlines\n"), questions=(question,))
    return found


@pytest.mark.parametrize("name", ["folder", "file.parquet"])
def test_a_round_trip_keeps_every_byte(name: str, tmp_path: Path) -> None:
    before = samples()
    written = write_parquet(before, tmp_path / name, samples_per_file=4)
    assert (written.samples, len(written.files)) == (6, 1 if "." in name else 2)
    source = DataConfig(path=tmp_path / name).open().source
    assert [source[i] for i in range(len(source))] == before
    again = write_parquet(source, tmp_path / "again.parquet")
    assert pq.read_table(again.files[0]).equals(pq.read_table(tmp_path / name))


def test_datasets_shows_the_images(tmp_path: Path) -> None:
    import datasets

    write_parquet(samples(), tmp_path / "folder")
    loaded = datasets.load_dataset(str(tmp_path / "folder"), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded[0]["image"].size == (96, 96)
    assert [image.size for image in loaded[3]["further"]] == [(96, 96)] * 2
    assert loaded[3]["questions"][0]["answers"] == ["", "緑", " two "]


def test_rows_that_cannot_be_used_are_left_out_of_shards_and_counted(tmp_path: Path) -> None:
    image = {"bytes": samples()[0].image, "path": None}
    pq.write_table(pa.table({"image": [image, None, image], "caption": ["a", "b", ""]}), tmp_path / "t.parquet")
    manifest = shards_from(DataConfig(path=tmp_path / "t.parquet"), out=tmp_path / "shards", bad_samples=2)
    assert [bad.to_row()[:2] for bad in manifest.skipped] == [["t:1", "no image"], ["t:2", "empty caption"]]
    assert [sample.captions for sample in [DataConfig(path=tmp_path / "shards").open().source[0]]] == [("a",)]
    with pytest.raises(BudgetError, match=r"1 no image \(t:1\)"):
        shards_from(DataConfig(path=tmp_path / "t.parquet"), out=tmp_path / "few")


def test_images_that_cannot_be_used_are_counted_and_named(tmp_path: Path) -> None:
    bad = [replace(samples()[0], image=tmp_path / "none.png"), *samples()[1:]]
    with pytest.raises(BudgetError, match=r"1 missing file \(.* none.png\)"):
        write_parquet(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written = write_parquet(bad, tmp_path / "out", budget=1)
    assert (written.samples, written.skipped[0].file) == (5, "none.png")
    with pytest.raises(ConfigError, match="out is there already"):
        write_parquet(bad, tmp_path / "out")

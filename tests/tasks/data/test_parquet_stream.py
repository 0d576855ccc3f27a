"""Training streams from parquet: the order of seed, epoch and position, exact and elastic resume, any number of workers, bad rows counted."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from loader_case import equal, keys, load
from PIL import Image
from pyarrow import parquet as pq

from multimodal.data.feature_cache.reader import _fingerprints_of_images
from multimodal.data.loader import Loaded
from tasks.data import parquet
from tasks.data.parquet import RowSource
from tasks.data.sources import DataConfig

N, STEPS = 7, 12  # images in two files, one without an image and one that is damaged; steps of two, so more than three epochs


def write(folder: Path, first: str = "red") -> Path:
    images: list[dict[str, object] | None] = []
    for colour in (first, "green", "blue", "white", "black", "gray", "pink"):
        out = io.BytesIO()
        Image.new("RGB", (40, 40), colour).save(out, "PNG")
        images.append({"bytes": out.getvalue(), "path": None})
    images[2], images[5] = None, {"bytes": b"no image", "path": None}
    folder.mkdir()
    for k, rows in enumerate((range(4), range(4, N))):
        table = pa.table({"image": [images[row] for row in rows], "caption": [f"text {row}" for row in rows]})
        pq.write_table(table, folder / f"train-{k:05d}-of-00002.parquet", row_group_size=2)
    return folder


@pytest.fixture(params=["row groups", "unpacked"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RowSource:
    if request.param == "unpacked":
        monkeypatch.setattr(parquet, "HELD", 0)
    found = DataConfig(path=write(tmp_path / "data"), cache=tmp_path / "cache").open()
    assert ("unpacked" in found.sentence) == (request.param == "unpacked")
    assert isinstance(found.source, RowSource)
    return found.source


def bad(loaded: Sequence[Loaded]) -> list[tuple[str, str]]:
    return [(one.key, one.reason) for step in loaded for one in step.bad]


def test_workers_change_nothing_and_bad_rows_are_counted_by_file_and_row(source: RowSource) -> None:
    unbroken = load(source, range(STEPS))
    for workers in (1, 2):
        found = load(source, range(STEPS), workers=workers)
        assert equal(found, unbroken)
        assert bad(found) == bad(unbroken)
    assert set(bad(unbroken)) == {("train-00000-of-00002:2", "no image"), ("train-00001-of-00002:1", "not an image")}
    assert len(keys(unbroken)) + len(bad(unbroken)) == 2 * STEPS
    first = keys(unbroken[:4])
    assert len(set(first[:5])) == 5  # an epoch has each whole image once


@pytest.mark.parametrize("step", [1, 6])
def test_a_stream_goes_on_at_any_step_with_any_number_of_ranks(step: int, source: RowSource) -> None:
    unbroken = load(source, range(STEPS))
    assert equal([*load(source, range(step), workers=1), *load(source, range(step, STEPS))], unbroken)
    ranks = [load(source, range(step, STEPS), batch_size=1, rank=rank, world=2) for rank in range(2)]
    assert [key for pair in zip(*ranks, strict=True) for key in keys(pair)] == keys(unbroken[step:])


def test_the_fingerprint_is_of_what_the_files_hold_and_not_of_their_place(source: RowSource, tmp_path: Path) -> None:
    same = DataConfig(path=write(tmp_path / "moved"), cache=tmp_path / "cache").open().source
    other = DataConfig(path=write(tmp_path / "other", "orange"), cache=tmp_path / "cache").open().source
    assert isinstance(same, RowSource)
    assert isinstance(other, RowSource)
    assert source.fingerprint == same.fingerprint != other.fingerprint
    assert _fingerprints_of_images(source) == _fingerprints_of_images(same) != _fingerprints_of_images(other)

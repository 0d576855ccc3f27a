"""The same images and captions, read from every format, train the same adapter bit for bit."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_run import Files
from torch import Tensor
from train_case import trained, weights

from tasks.captioning import Captioning
from tasks.commands.shards import shards_from, shards_to
from tasks.data.sources import DataConfig


class Made:
    """The images of `Files` with their captions in other formats."""

    def __init__(self, folder: Path) -> None:
        self.files = Files(folder)
        self.images = folder / "pictures"
        self.rows = [(f"{row['image_id']}.png", row["caption"]) for row in self.files.captions["annotations"]]
        self.folder = folder

    def coco(self) -> DataConfig:
        return DataConfig(path=self.folder / "captions.json", images=self.images)

    def csv(self) -> DataConfig:
        with (self.folder / "t.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file", "caption"), *self.rows])
        return DataConfig(path=self.folder / "t.csv", images=self.images)

    def jsonl(self) -> DataConfig:
        self._lines(self.folder / "t.jsonl", "image")
        return DataConfig(path=self.folder / "t.jsonl", images=self.images)

    def imagefolder(self) -> DataConfig:
        self._lines(self.images / "metadata.jsonl", "file_name")
        return DataConfig(path=self.images, format="imagefolder")

    def caption_folder(self) -> DataConfig:
        for name in dict.fromkeys(name for name, _ in self.rows):
            (self.images / name).with_suffix(".txt").write_text("\n".join(text for one, text in self.rows if one == name))
        return DataConfig(path=self.images, format="caption_folder")

    def shards(self) -> DataConfig:
        shards_from(self.coco(), out=self.folder / "shards", samples_per_shard=4)
        return DataConfig(path=self.folder / "shards")

    def llava(self) -> DataConfig:
        turns = [{"image": name, "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]} for name, text in self.rows]
        (self.folder / "llava.json").write_text(json.dumps(turns))
        return DataConfig(path=self.folder / "llava.json", images=self.images)

    def messages(self) -> DataConfig:
        asked = {"role": "user", "content": "<image>"}
        rows = [{"images": [name], "messages": [asked, {"role": "assistant", "content": text}]} for name, text in self.rows]
        (self.folder / "messages.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return DataConfig(path=self.folder / "messages.jsonl", images=self.images)

    def parquet(self) -> DataConfig:
        shards_to(self.coco(), out=self.folder / "t.parquet")
        return DataConfig(path=self.folder / "t.parquet")

    def _lines(self, path: Path, column: str) -> None:
        path.write_text("".join(json.dumps({column: name, "text": text}) + "\n" for name, text in self.rows))


FORMATS: dict[str, Callable[[Made], DataConfig]] = {
    name: made for name, made in vars(Made).items() if not name.startswith("_") and name != "coco"
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("formats"))


def adapter(config: DataConfig, folder: Path, **fields: int) -> dict[str, Tensor]:
    """The weights after four steps."""
    model, _ = trained(folder, config.open().source, Captioning(captions_per_image=2).texts, **fields)
    return weights(model)


@pytest.fixture(scope="module")
def of_coco(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return adapter(made.coco(), tmp_path_factory.mktemp("coco"))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains_the_same_adapter(name: str, made: Made, of_coco: dict[str, Tensor], tmp_path: Path) -> None:
    found = adapter(FORMATS[name](made), tmp_path)
    assert found.keys() == of_coco.keys()
    assert all(torch.equal(value, of_coco[key]) for key, value in found.items())


def test_another_order_of_rows_trains_another_adapter(made: Made, of_coco: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"image": name, "text": text}) + "\n" for name, text in reversed(made.rows)))
    found = adapter(DataConfig(path=tmp_path / "t.jsonl", images=made.images), tmp_path / "run")
    assert not all(torch.equal(value, of_coco[key]) for key, value in found.items())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, made: Made, of_coco: dict[str, Tensor], tmp_path: Path) -> None:
    found = adapter(made.jsonl(), tmp_path, workers=workers)
    assert all(torch.equal(value, of_coco[key]) for key, value in found.items())

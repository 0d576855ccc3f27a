"""A run that reads shards learns what a run that reads the data set itself learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal.data.shards.writer import write_shards
from tasks.cli import main
from tasks.commands.demo import RECIPES
from tasks.scenes.dataset import Scenes


@pytest.mark.parametrize("task", ["captioning", "vqa"])
def test_training_from_shards_equals_training_from_the_data_set_bit_for_bit(task: str, tmp_path: Path) -> None:
    write_shards(Scenes(split="train", size=12), tmp_path / "tars", samples_per_shard=5)
    adapters = []
    for name, data in (("direct", ["--data.train.scenes", "train/12"]), ("shards", ["--data.train.shards", str(tmp_path / "tars"), "--data.train.scenes", "null"])):
        out = tmp_path / name
        few = ["--train.steps", "3", "--train.batch_size", "4", "--train.measure_every", "0", "--data.val.scenes", "val/4"]
        assert main(["train", "--config", str(RECIPES[task]), "--out", str(out), *data, *few]) == 0
        adapters.append(load_file(out / "adapter" / "adapter_model.safetensors"))
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(value, adapters[1][key]) for key, value in adapters[0].items())

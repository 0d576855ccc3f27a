"""Trainings that begin with a saved adapter, leave methods of it as they are, and stay near earlier adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_run import adalink, refused, train
from safetensors.torch import load_file, save_file
from shared import fixtures, fixtures_root
from torch import Tensor, nn

from adalink.checkpoint.folder import CONFIG_FILE, WEIGHTS_FILE, read_config
from adalink.lifecycle.flat import read_flat
from multimodal.training.prepare import Pull

ONE_IMAGE = ("--data.val.scenes", "val/1")
LINEARISED = ("--methods.adalink", "{rank: 4, modalities: [image, text], frozen_down: true}")
FILES = sorted(path.stem for path in (fixtures_root() / "mos").glob("*.json")) or ["absent"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter folder of a small captioning run."""
    out = tmp_path_factory.mktemp("runs") / "first"
    assert train("captioning", out, *ONE_IMAGE).code == 0
    return out / "adapter"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def trained(out: Path, *arguments: object, task: str = "vqa") -> Path:
    done = train(task, out, *ONE_IMAGE, *arguments)
    assert done.code == 0, done
    return out / "adapter"


@pytest.mark.parametrize("name", FILES)
def test_a_pull_is_that_of_the_authors(name: str) -> None:
    folder = fixtures("mos")
    facts, tensors = json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")
    for task in range(1, facts["n_tasks"]):
        mean = torch.stack([tensors[f"task{other}.saved"] for other in range(task)]).mean(0)
        for step in range(facts["n_steps"]):
            pull = Pull.__new__(Pull)
            weight = nn.Parameter(tensors[f"task{task}.step{step}.before"].clone())
            pull.share, pull._pairs = facts["alpha"], [(weight, mean)]
            pull()
            torch.testing.assert_close(weight.detach(), tensors[f"task{task}.step{step}.after"], rtol=0, atol=1e-12)
            assert not torch.equal(weight.detach(), tensors[f"task{task}.step{step}.before"])
    for step in range(facts["n_steps"]):  # the first task is not pulled
        assert torch.equal(tensors[f"task0.step{step}.before"], tensors[f"task0.step{step}.after"])


def test_a_training_begins_with_a_saved_adapter_and_has_its_start(first: Path, tmp_path: Path) -> None:
    begun = trained(tmp_path / "begun", "--start", first, "--train.learning_rate", 1e-30)
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(begun).items())  # this rate moves nothing
    assert read_config(begun).start == read_config(first).start
    new = trained(tmp_path / "new", "--train.learning_rate", 1e-30)
    assert not all(torch.equal(value, weights(first)[name]) for name, value in weights(new).items())  # the control
    assert read_config(new).start == read_config(first).start  # of one seed and one config, whatever the task


def test_a_frozen_method_keeps_its_bytes_and_no_optimizer_holds_it(first: Path, tmp_path: Path) -> None:
    done = train("vqa", tmp_path / "out", *ONE_IMAGE, "--train.frozen", f"{{bridge: {first}}}")
    assert done.code == 0, done
    was, now = weights(first), weights(tmp_path / "out" / "adapter")
    assert all(torch.equal(value, was[name]) for name, value in now.items() if name.startswith("bridge."))
    assert not any(torch.equal(value, was[name]) for name, value in now.items() if name.startswith("adalink."))
    assert "(adalink 8,192, bridge 0)" in done.out
    state = load_file(max((tmp_path / "out" / "checkpoints").iterdir()) / "state.safetensors")
    assert not any("bridge" in name for name in state)
    assert read_config(tmp_path / "out" / "adapter").start is None  # no seed gives it
    assert adalink("merge", first, tmp_path / "out" / "adapter", "--out", tmp_path / "sum", "--weights", 1, 1).code == 0  # the bridge is shared: any weights
    assert all(torch.equal(value, was[name]) for name, value in weights(tmp_path / "sum").items() if name.startswith("bridge."))


def test_a_fixed_down_projection_is_the_same_after_training_and_for_every_seed(tmp_path: Path) -> None:
    folders = [trained(tmp_path / str(seed), *LINEARISED, "--train.seed", seed, task="captioning") for seed in (0, 1)]
    one, two = map(weights, folders)
    assert all(torch.equal(value, two[name]) == (".down." in name) for name, value in one.items() if name.startswith("adalink."))
    assert (one["adalink.text.up.weight"] != 0).any()
    card = (folders[0] / "README.md").read_text()
    assert f"| adalink | AdaLink | {2 * 4 * one['adalink.text.up.weight'].shape[0]:,} |" in card


def test_a_pull_of_nothing_is_an_ordinary_training_and_one_goes_towards_the_mean(first: Path, tmp_path: Path) -> None:
    plain = weights(trained(tmp_path / "plain"))
    nothing = trained(tmp_path / "nothing", "--train.pull_towards", f"[{first}]", "--train.pull", 0)
    assert all(torch.equal(value, plain[name]) for name, value in weights(nothing).items())
    near = weights(trained(tmp_path / "near", "--train.pull_towards", f"[{first}, {first}]", "--train.pull", 0.5))
    was = weights(first)
    assert sum(float((near[name] - was[name]).norm()) for name in was) < 0.5 * sum(float((plain[name] - was[name]).norm()) for name in was)
    code = adalink("evaluate", "--adapter", tmp_path / "near" / "adapter", "--data.val.scenes", "val/2", "--generation.max_new_tokens", 2, "--out", tmp_path / "evaluated").code
    assert code == 0
    assert all(torch.equal(value, near[name]) for name, value in weights(tmp_path / "near" / "adapter").items())  # evaluation pulls nothing


@pytest.mark.slow
def test_a_stopped_run_with_a_pull_ends_where_the_whole_one_ends(first: Path, tmp_path: Path) -> None:
    pulled = ("--train.pull_towards", f"[{first}]", "--train.checkpoint_every", 1, "--train.keep", 9)
    whole = trained(tmp_path / "whole", *pulled, "--train.steps", 4)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for folder in sorted((tmp_path / "part" / "checkpoints").iterdir())[2:]:
        shutil.rmtree(folder)
    resumed = trained(tmp_path / "part", *pulled, "--train.steps", 4, "--resume")
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    other = tmp_path / "other"
    shutil.copytree(first, other)
    moved = {name: value + 1 for name, value in weights(first).items()}
    save_file(moved, other / WEIGHTS_FILE)
    with pytest.warns(UserWarning, match="was the file changed"):
        done = train("vqa", tmp_path / "part", *pulled, "--train.steps", 4, "--resume", "--train.pull_towards", f"[{other}]")
    assert "pull_towards was" in refused(done)


def refuse(tmp_path: Path, *arguments: object) -> str:
    sentence = refused(train("vqa", tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()
    return sentence


def test_what_cannot_begin_so_is_refused(first: Path, tmp_path: Path) -> None:
    rank = ("--methods.adalink", "{rank: 2, modalities: [image, text]}")
    assert "adalink.rank is 2 in the config and 16 in" in refuse(tmp_path, "--start", first, *rank)
    assert "adalink.image.down.weight is [2, 128] in the adapter that is trained and [16, 128] in" in refuse(tmp_path, "--train.pull_towards", f"[{first}]", *rank)
    assert "the method lora is to be frozen, and the config has adalink, bridge" in refuse(tmp_path, "--train.frozen", f"{{lora: {first}}}")
    both = f"{{bridge: {first}, adalink: {first}}}"
    assert "nothing else is trained" in refuse(tmp_path, "--train.frozen", both)
    assert "train.pull is 1.0" in refuse(tmp_path, "--train.pull", 1)
    assert "is no adapter folder" in refuse(tmp_path, "--start", tmp_path)
    assert "leave start out" in refuse(tmp_path, "--start", first, "--train.teachers", f"{{old: {first}, new: {first}}}")
    other = tmp_path / "other"
    shutil.copytree(first, other)
    config = json.loads((other / CONFIG_FILE).read_text())
    config["base"]["language_model"] = {"name": "another", "fingerprint": "0" * 16}
    (other / CONFIG_FILE).write_text(json.dumps(config))
    for arguments in (("--start", other), ("--train.frozen", f"{{bridge: {other}}}"), ("--train.pull_towards", f"[{other}]")):
        assert "was trained on the language model another (0000000000000000)" in refuse(tmp_path, *arguments)
    assert read_flat(first).digest == read_config(first).weights

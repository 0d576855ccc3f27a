"""What an earlier version wrote is read by this one: adapter folders, a stopped run, cached features, shards and config files."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures.make_before import BEFORE, CONFIGS, EXPECTED, STOPPED_AT, composed_losses, described, digest, logits, text_model
from safetensors.torch import load_file
from torch import nn

from adalink import AdaptedModel
from multimodal.data.feature_cache.reader import FeatureCache
from multimodal.training.state import load_state
from tasks.captioning import Captioning
from tasks.cli import main
from tasks.data.sources import DataConfig
from tasks.runs.compose import load_adapted

EXPECT: Any = json.loads(EXPECTED.read_text())
CHECKPOINT = BEFORE / "run" / "checkpoints" / f"step_{STOPPED_AT:08d}"
REAL_CONFIGS = ("captioning", "vqa")
IN_FULL = ("--train.precision", "no")  # bfloat16 on a CPU is not what these tests are about


def command(*arguments: object) -> tuple[int | str | None, str]:
    """The exit code, and everything that was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code: int | str | None = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def bits_are_those_of(file: Path, module: nn.Module) -> None:
    stored, loaded = load_file(file), dict(module.named_parameters())
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], parameter) for name, parameter in loaded.items())


@pytest.mark.parametrize("name", EXPECT["text"])
def test_an_adapter_of_a_text_model_has_its_weights_and_gives_its_logits(name: str, tmp_path: Path) -> None:
    folder, expected = BEFORE / "adapters" / name, EXPECT["text"][name]
    model = AdaptedModel.from_pretrained(text_model(expected["family"]), folder).eval()
    bits_are_those_of(folder / "adapter_model.safetensors", model.active_adapter())
    torch.testing.assert_close(torch.tensor(logits(model)), torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert logits(model) != expected["logits"]
    model.save_pretrained(tmp_path)
    again, stored = load_file(tmp_path / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], stored[key]) for key in stored)


def test_an_adapter_of_a_composed_model_has_its_weights_and_its_losses() -> None:
    folder = BEFORE / "adapters" / "captioning"
    model, task = load_adapted(folder, encoder=None, language_model=None)
    bits_are_those_of(folder / "adapter_model.safetensors", model.adapted.active_adapter())
    assert task["generation"] == {"max_new_tokens": 4, "num_beams": 2, "length_penalty": 0.5}
    torch.testing.assert_close(torch.tensor(composed_losses(model, Captioning())), torch.tensor(EXPECT["composed"]["captioning"]["losses"]), rtol=1e-4, atol=1e-5)


def test_an_adapter_with_an_answer_head_and_an_adapted_encoder_gives_its_answers(tmp_path: Path) -> None:
    folder = BEFORE / "adapters" / "vqa"
    model, _ = load_adapted(folder, encoder=None, language_model=None)
    bits_are_those_of(folder / "adapter_model.safetensors", model.adapted.active_adapter())
    assert model.tower.adapter is not None
    bits_are_those_of(folder / "vision" / "adapter_model.safetensors", model.tower.adapter)
    assert model.head is not None
    bits_are_those_of(folder / "answer_head.safetensors", model.head)
    code, printed = command("evaluate", "--adapter", folder, "--data.val.scenes", "val/2", "--out", tmp_path / "out")
    assert code == 0, printed
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == EXPECT["composed"]["vqa"]["results"]


def test_a_checkpoint_gives_back_weights_optimizer_and_random_numbers() -> None:
    stored = load_file(CHECKPOINT / "state.safetensors")
    parameters = {name.removeprefix("weight."): nn.Parameter(torch.zeros_like(value)) for name, value in stored.items() if name.startswith("weight.")}
    optimizer = torch.optim.AdamW(parameters.values())
    content = load_state(CHECKPOINT, parameters, optimizer)
    assert content["step"] == STOPPED_AT
    assert torch.equal(torch.get_rng_state(), stored["rng.cpu"])
    for name, parameter in parameters.items():
        assert torch.equal(parameter, stored[f"weight.{name}"])
        assert optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, stored[f"optimizer.{name}.{key}"])


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(BEFORE / "run", out)
    code, printed = command("train", "--config", out / "config.yaml", "--out", out, "--resume")
    assert code == 0, printed
    return out, printed


def test_a_stopped_run_goes_on_with_the_settings_that_it_had(resumed: tuple[Path, str]) -> None:
    assert f"resumed after step {STOPPED_AT} of {EXPECT['run']['step']}" in resumed[1]
    assert "settings that are not those of" not in resumed[1]
    assert "an earlier version wrote" not in resumed[1]


def test_a_stopped_run_ends_where_the_whole_run_ended(resumed: tuple[Path, str]) -> None:
    run, expected = resumed[0], EXPECT["run"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [list(line) for line in expected["lines"]]
    for line, wanted in zip(lines, expected["lines"], strict=True):
        assert line == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    last = max((run / "checkpoints").iterdir())
    state = json.loads((last / "state.json").read_text())
    assert {name: state[name] for name in ("step", "data", "learnt")} == {name: expected[name] for name in ("step", "data", "learnt")}
    tensors, wanted_tensors, stopped = load_file(last / "state.safetensors"), load_file(BEFORE / "run" / "end.safetensors"), load_file(CHECKPOINT / "state.safetensors")
    assert tensors.keys() == wanted_tensors.keys()
    weights = [name for name in wanted_tensors if name.startswith(("weight.", "best."))]
    for name in weights:
        torch.testing.assert_close(tensors[name], wanted_tensors[name], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert any((stopped[name] - wanted_tensors[name]).abs().max() > 1e-3 for name in weights)  # the control: the steps after the stop count


def test_cached_features_are_those_that_were_written_and_are_read_by_a_run(tmp_path: Path) -> None:
    for split, digests in EXPECT["features"].items():
        cache = FeatureCache.open(BEFORE / "features" / split)
        assert [digest(cache[i]) for i in range(len(cache))] == digests  # type: ignore[arg-type]
    shutil.copytree(BEFORE / "features", tmp_path / "features")
    code, printed = command(
        "train", "--config", CONFIGS / "captioning.yaml", "--out", tmp_path / "run", "--features", tmp_path / "features", "--data.train.limit", 3,
        "--data.val.limit", 1, "--train.steps", 1, "--train.measure_every", 0, "--train.keep_best", "false", "--train.patience", 0, "--features_dtype", "float16", *IN_FULL,
    )  # fmt: skip
    assert code == 0, printed
    assert "encoding" not in printed


def test_shards_and_their_manifest_are_read(tmp_path: Path) -> None:
    opened = DataConfig(shards=BEFORE / "shards").open()
    assert [described(opened.source[i]) for i in range(len(opened.source))] == EXPECT["shards"]
    assert not opened.problems
    code, printed = command("shards", "check", "--shards", BEFORE / "shards")
    assert code == 0, printed


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_a_config_file_runs(name: str, tmp_path: Path) -> None:
    few = ("--train.steps", 1) if name == "vqa" else ("--data.train.limit", 4, "--train.epochs", 1)
    code, printed = command("train", "--config", CONFIGS / f"{name}.yaml", "--out", tmp_path / "run", *few, *IN_FULL)
    assert code == 0, printed


@pytest.mark.parametrize("name", [*REAL_CONFIGS, "every_setting"])
def test_every_setting_of_a_config_file_arrives_whatever_it_is_called_now(name: str, tmp_path: Path) -> None:
    code, printed = command("train", "--config", CONFIGS / f"{name}.yaml", "--print_config")
    assert code == 0, printed
    found = list(leaves(yaml.safe_load(printed)))
    for value in leaves(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())):
        assert value in found
        found.remove(value)  # each as often as it was given


def leaves(tree: object) -> Iterator[object]:
    """Every value in nested mappings and lists."""
    if isinstance(tree, (dict, list)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(item)
    elif tree is not None:
        yield float(tree) if isinstance(tree, int) and not isinstance(tree, bool) else tree

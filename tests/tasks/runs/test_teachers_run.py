"""`adalink train` with teachers: it starts from the new version's adapter, follows both, and is compared with the old one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_run import FIXED, RECIPES, SMALL, adalink, refused
from safetensors.torch import load_file


def run(out: Path, *more: object) -> Any:
    return adalink("train", "--config", RECIPES["vqa"], *FIXED, *SMALL, "--out", out, *more)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The adapters of two runs with other seeds."""
    folder = tmp_path_factory.mktemp("versions")
    for seed, name in enumerate(("old", "new")):
        assert run(folder / name, "--train.seed", seed).code == 0
    return {name: str(folder / name / "adapter") for name in ("old", "new")}


def test_a_run_with_teachers_starts_from_the_new_version_and_its_folder_is_an_ordinary_one(versions: dict[str, str], tmp_path: Path) -> None:
    given = ("--train.teachers", json.dumps(versions), "--train.learning_rate", "1e-9", "--train.log_every", "1")
    done = run(tmp_path / "run", *given)
    assert done.code == 0, done
    start, end = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (versions["new"], tmp_path / "run" / "adapter"))
    assert max(float((end[name] - start[name]).abs().max()) for name in start) < 1e-6  # at this rate it stays where it began
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["train"]["teachers"]["old"] == versions["old"]
    losses = [line["loss"] for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert 0 < losses[0] < 5
    assert adalink("compare", Path(versions["old"]).parent, tmp_path / "run", "--resamples", "10").code == 0
    other = {**versions, "old": versions["new"]}
    sentence = refused(run(tmp_path / "run", "--train.teachers", json.dumps(other), "--resume", "--train.steps", "3"))
    assert "cannot be continued exactly: teachers was" in sentence


@pytest.mark.slow
def test_a_config_without_methods_has_those_of_the_new_version(versions: dict[str, str], tmp_path: Path) -> None:
    document = yaml.safe_load((Path(versions["new"]).parent / "config.yaml").read_text())
    document |= {"methods": {}, "out": str(tmp_path / "run")}
    document["train"] |= {"teachers": versions, "steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    done = adalink("train", "--config", tmp_path / "config.yaml")
    assert done.code == 0, done
    assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").keys() == load_file(Path(versions["new"]) / "adapter_model.safetensors").keys()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--methods.adalink", "{rank: 8, modalities: [image, text]}"), "the config's are others: give `methods: {}`, or the config of that run"),
        (("--task", "captioning"), "which was trained for vqa, and the config's task is captioning"),
        (("--vqa.answers", "4"), "train.teachers aligns words about the same features: leave vqa.answers"),
        (("--vqa.template.prompt", "<image><bos>q: {question} a:"), "give the template of that run"),
        (("--train.teachers.new", "absent"), "absent"),
        (("--start", "runs/other/adapter"), "a training with teachers begins with the new one's weights: leave start out"),
        (("--train.compile", "default"), "three read each text; leave one out"),
    ],
)
def test_what_does_not_fit_the_teachers_is_one_sentence(versions: dict[str, str], more: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    assert sentence in refused(run(tmp_path / "run", "--train.teachers", json.dumps(versions), *more))
    assert not (tmp_path / "run").exists()

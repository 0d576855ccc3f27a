"""`adalink features`, and runs that read, fill or refuse what it wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_run import FIXED, RECIPES, Done, Files, adalink, refused, train
from existing_families import MADE
from made_shards import flip

from multimodal.data.feature_cache.reader import FeatureCache
from tasks.runs.config import RunConfig

SMALL = ("--data.train.scenes", "train/8", "--data.val.scenes", "val/4", "--train.batch_size", "3", "--train.steps", "4", "--generation.max_new_tokens", "3")
EPALM = ("--methods.bridge", "null", "--methods.adalink", "null", "--methods.epalm", "{layers: [1, 2], n_taps: 2, connector: shared}")


def features(folder: Path | None, *overrides: object, small: tuple[str, ...] = SMALL) -> Done:
    given = () if folder is None else ("--features", folder)
    return adalink("features", "--config", RECIPES["captioning"], *FIXED, *small, *given, *overrides)


def learn(out: Path, *overrides: object) -> Done:
    return train("captioning", out, *overrides, small=SMALL)


def weights(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "features"
    assert features(folder).code == 0
    return folder


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps features in memory, rounded likewise."""
    out = tmp_path_factory.mktemp("in_memory") / "run"
    assert learn(out).code == 0
    return out


def test_it_tells_what_it_takes_before_it_writes_and_checks_what_is_there(tmp_path: Path) -> None:
    done = features(tmp_path / "features")
    assert done.code == 0
    lines = done.err.splitlines()
    assert f"{tmp_path}/features/train: 0.07 MiB: 8 images of 9,216 bytes, 36 patches of width 128 in float16; " in lines[0]
    assert lines[0].endswith("iB are free")
    assert f"{tmp_path}/features/train: 8 images have features" in lines
    assert f"{tmp_path}/features/val: 4 images have features" in lines
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*") if path.name != ".lock"}
    assert features(tmp_path / "features").code == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*") if path.name != ".lock"}


def test_a_run_reads_them_says_so_and_learns_what_features_in_memory_teach(written: Path, in_memory: Path, tmp_path: Path) -> None:
    done = learn(tmp_path / "run", "--features", written, "--train.workers", "1")
    assert done.code == 0
    assert f"features: 8 images are read from {written}/train, 36 patches of width 128 in float16 of scenes:encoder; 0 have none" in done.err
    assert f"features: 4 images are read from {written}/val" in done.err
    assert weights(tmp_path / "run") == weights(in_memory)
    assert (tmp_path / "run" / "results.json").read_bytes() == (in_memory / "results.json").read_bytes()
    again = adalink("evaluate", "--adapter", tmp_path / "run" / "adapter", "--config", tmp_path / "run" / "config.yaml")
    assert again.code == 0
    assert f"features: 4 images are read from {written}/val" in again.err  # the config of the run names the folder
    wrong = adalink("evaluate", "--adapter", tmp_path / "run" / "adapter", "--config", tmp_path / "run" / "config.yaml", "--features", tmp_path / "nowhere")
    assert refused(wrong) == f"{tmp_path}/nowhere holds no features, neither in train nor in val: write them with `adalink features`, or give features: null"


def test_the_first_epoch_fills_them(in_memory: Path, tmp_path: Path) -> None:
    done = learn(tmp_path / "run", "--features", tmp_path / "features", "--train.features", "fill")
    assert done.code == 0
    assert f"features: the first epoch fills {tmp_path}/features/train with 0.07 MiB: 8 images of 9,216 bytes" in done.err
    assert weights(tmp_path / "run") == weights(in_memory)
    for split, n in (("train", 8), ("val", 4)):
        assert len(FeatureCache.open(tmp_path / "features" / split)) == n
    assert "features: 8 images are read from" in learn(tmp_path / "again", "--features", tmp_path / "features", "--train.features", "fill").err


def test_a_run_that_ends_early_says_that_they_are_not_finished_and_the_command_goes_on(tmp_path: Path) -> None:
    done = learn(tmp_path / "run", "--features", tmp_path / "features", "--train.features", "fill", "--train.steps", "1")
    assert f"features: {tmp_path}/features/train is not finished, 5 of 8 images are missing; another run or `adalink features` goes on" in done.err
    stated = refused(learn(tmp_path / "next", "--features", tmp_path / "features"))
    assert stated.startswith(f"the features in {tmp_path}/features/train are not finished: a writing was interrupted or still goes on; run `adalink features`")
    assert features(tmp_path / "features").code == 0
    assert len(FeatureCache.open(tmp_path / "features" / "train")) == 8


def test_what_a_method_does_not_read_is_not_written(tmp_path: Path, written: Path) -> None:
    done = features(tmp_path / "taps", *EPALM, "--features_dtype", "float32")
    assert "8 images of 1,024 bytes, 2 pooled vectors of width 128 in float32" in done.err
    assert "features: 8 images are read" in learn(tmp_path / "run", *EPALM, "--features", tmp_path / "taps").err
    stated = refused(learn(tmp_path / "other", *EPALM, "--features", written))
    assert "are 36 patches of width 128 in float16, and these methods read 2 pooled vectors of width 128 in float16: write them with `adalink features`" in stated
    assert "36 patches and 4 pooled vectors of width 128" in features(tmp_path / "all", "--contents", "all").err
    assert "features: 8 images are read" in learn(tmp_path / "third", *EPALM, "--features", tmp_path / "all").err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("--layer", "-2"), "train are of the encoder's layer -1, and here it is -2: give another folder, or none (features: null)"),
        (("--data.train.scenes", "train/9"), "train are of a data set of 8 images, and here it is 9: give another folder, or none (features: null)"),
        (("--data.val.scenes", "train/4"), "val are of the data set "),
    ],
    ids=["layer", "pictures", "data"],
)
def test_features_of_something_else_are_refused_naming_both(overrides: tuple[str, ...], expected: str, written: Path, tmp_path: Path) -> None:
    assert expected in refused(learn(tmp_path / "run", "--features", written, *overrides))
    assert not (tmp_path / "run").exists()


def test_a_wrong_folder_and_a_damaged_one_are_one_sentence(written: Path, tmp_path: Path) -> None:
    stated = refused(learn(tmp_path / "run", "--features", tmp_path / "nowhere"))
    assert stated == (
        f"there are no features in {tmp_path}/nowhere/train (No such file or directory): write them with `adalink features`, or train with train.features: fill"
    )
    folder = Path(shutil.copytree(written, tmp_path / "features"))
    flip(next((folder / "train").glob("*.safetensors")), -5)
    stated = refused(learn(tmp_path / "run", "--features", folder, "--train.workers", "1"))  # without workers: test_feature_fill.py
    assert stated.startswith("the features of image 7 in ")
    assert "are not what was written: the file was cut or changed; run `adalink features` again, which writes anew what is damaged" in stated
    assert features(folder).code == 0
    assert learn(tmp_path / "mended", "--features", folder).code == 0


def test_bad_pictures_are_counted_and_named(tmp_path: Path) -> None:
    files = Files(tmp_path / "files")
    files.image(2).write_bytes(b"none")
    data = (*files.as_data("train"), *files.as_data("val"))
    stated = refused(features(tmp_path / "few", *data, "--train.bad_samples", "0"))
    assert stated.startswith("1 bad sample, and at most 0 are allowed: 1 not an image (2)")
    done = features(tmp_path / "features", *data, "--train.bad_samples", "1")
    assert f"{tmp_path}/features/train: 5 images have features; skipped: 1 not an image (2)" in done.err


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    assert refused(features(None)) == "no folder is given to write the features to: give --features FOLDER"
    nothing = features(tmp_path / "features", "--data.train.scenes", "null", "--data.val.scenes", "null")
    assert refused(nothing) == "no data is given whose features could be written: give data.train, data.val or both"
    stated = refused(learn(tmp_path / "run", "--train.features", "fill"))
    assert "train.features is fill, and no folder is given to fill: give `features`, such as --features runs/features" in stated


def test_the_help_says_what_rounding_costs(capsys: pytest.CaptureFixture[str]) -> None:
    help_text = " ".join(adalink("features", "--help.all").out.split())
    for words in ("float16 moves gradients by up to 3e-4 of their size, bfloat16 by up to 2e-3", "--contents {needed,all}", "--features FEATURES"):
        assert words in help_text
    assert RunConfig.__dataclass_fields__["features_dtype"].default == "float16"


def test_features_of_a_model_that_sees_already_are_written_and_read(tmp_path: Path) -> None:
    """Also by an evaluation of the adapter, which has the bounds of the run."""
    model, processor = MADE["qwen2_vl"]()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    parts = ("--model", tmp_path / "model", "--image_tokens.max", "6")
    run = ("--task", "vqa", *parts, "--methods.adalink", "{rank: 2, modalities: [image]}", *SMALL, "--train.steps", "1", "--features", tmp_path / "features")
    done = adalink("features", *run)
    assert done.code == 0, done.err
    assert "train: 0.00 MiB: 8 images of about 384 bytes, image vectors of width 32 in float16 (6 of a test image); " in done.err
    done = adalink("train", *run, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert f"features: 8 images are read from {tmp_path}/features/train, image vectors of width 32 in float16 (6 of a test image) of {tmp_path}/model; " in done.err
    val = ("--data.val.scenes", "val/4", "--generation.max_new_tokens", "3", "--features", tmp_path / "features")
    again = adalink("evaluate", "--adapter", tmp_path / "run" / "adapter", *val)
    assert again.code == 0, again.err
    assert f"features: 4 images are read from {tmp_path}/features/val" in again.err
    other = adalink("train", *run, "--image_tokens.max", "5", "--out", tmp_path / "other")
    assert 'train are of a processor whose image_tokens is {"max": 6}, and here it is {"max": 5}: give another folder' in refused(other)

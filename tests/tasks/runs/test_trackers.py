"""TensorBoard's event file of a run, read back: curves, metrics, and images with what was said about them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from cli_run import refused, train
from PIL import Image

from multimodal.training.records import LoggedSamples, track
from tasks.captioning import Captioning
from tasks.runs.run import N_DISPLAYED, logged_samples
from tasks.scenes.dataset import Scenes


def events(folder: Path) -> Any:
    """What TensorBoard itself reads of a run folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs the extra `trackers`")
    (file,) = folder.rglob("events.out.tfevents.*")
    read = accumulator.EventAccumulator(str(file.parent))
    read.Reload()
    return read


def test_tensorboard_has_the_curves_and_sample_pictures_of_each_measurement(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    done = train("captioning", tmp_path / "run", "--train.trackers", "[tensorboard]", "--train.measure_every", "1", "--train.log_every", "1")
    assert done.code == 0, done.err
    read = events(tmp_path / "run")
    tags = read.Tags()
    assert {"loss", "rate", "CIDEr"} <= set(tags["scalars"])
    assert [event.step for event in read.Scalars("CIDEr")] == [1, 2]
    sample = Scenes(split="val", size=4)[0]
    assert f"samples/{sample.key}" in tags["images"]
    assert len(tags["images"]) == 4
    image = read.Images(f"samples/{sample.key}")
    assert [event.step for event in image] == [1, 2]
    assert isinstance(sample.image, bytes)
    assert Image.open(io.BytesIO(image[0].encoded_image_string)).tobytes() == Image.open(io.BytesIO(sample.image)).convert("RGB").tobytes()
    texts = read.Tensors(f"samples/{sample.key}/text_summary")
    assert all(event.tensor_proto.string_val[0].decode() for event in texts)


def test_a_run_without_trackers_writes_no_events(tmp_path: Path) -> None:
    assert train("captioning", tmp_path / "run", "--train.measure_every", "1").code == 0
    assert not list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_the_samples_shown_are_the_same_each_time_and_only_those_that_were_answered() -> None:
    source, task = Scenes(split="val", size=20), Captioning()
    texts = {source[i].image_id: f"text {i}" for i in range(20)}
    displayed = logged_samples(source, task, texts)
    assert [one.key for one in displayed] == [one.key for one in logged_samples(source, task, texts)]
    assert len(displayed) == N_DISPLAYED
    assert (displayed[0].text, displayed[1].text) == ("text 0", "text 3")
    del texts[source[3].image_id]
    assert "text 3" not in [one.text for one in logged_samples(source, task, texts)]


def test_only_the_main_process_shows() -> None:
    class Process:
        """An accelerator's part that counts: not the main process of several."""

        is_main_process, trackers, logged = False, [None], 0

        def log(self, metrics: dict[str, float], step: int) -> None:
            self.logged += 1  # accelerate's own trackers hold their tongue elsewhere

    process: Any = Process()
    track(process, 1, {"CIDEr": 1.0}, [LoggedSamples(key="a", image=Image.new("RGB", (1, 1)), text="")])
    assert process.logged == 1


def test_wandb_is_refused_where_it_is_not_installed(tmp_path: Path) -> None:
    assert "no such package is here: pip install 'adalink[trackers]'" in refused(train("captioning", tmp_path / "run", "--train.trackers", "[wandb]"))

"""A model trains on clips as on images: with cached features bit for bit, with frames that are drawn, on after a stop, with damaged clips counted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import excite, language, two_texts
from made_clips import frame_folder
from saved_clips import clip_tower, save_clips
from torch import Tensor
from train_case import Stop, stop_at

from adalink import EPALM, AdaLink, Bridge
from adalink.errors import BudgetError, ConfigError
from multimodal.data.feature_cache.encode import encode_all, pixel_table, write_features
from multimodal.data.feature_cache.format import all_contents
from multimodal.data.inputs import drawing, read_pixels
from multimodal.encoders.clips import ClipPreprocess
from multimodal.encoders.tower import load_tower
from multimodal.model import VisionLanguageModel
from multimodal.sample import Sample
from multimodal.template import Template
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

N = 6
METHODS = {
    "epalm": EPALM(layers=(1, 2), n_taps=2, connector="shared", mask="causal"),
    "bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"), bias=True),
}  # fmt: skip
SETTINGS: dict[str, Any] = {"steps": 6, "batch_size": 2, "log_every": 1, "checkpoint_every": 3, "warmup": 0.0, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Folders of nine frames of noise each."""
    folder, draw = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    found = []
    for i in range(N):
        frames = [draw.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(9)]
        found.append(Sample(key=f"clip{i}", image_id=i, media=frame_folder(folder / str(i), frames), kind="video"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clips("timesformer", tmp_path_factory.mktemp("encoder"))


def model_of(folder: Path) -> VisionLanguageModel:
    model = VisionLanguageModel(load_tower(folder), language("deep_opt"), Template(prompt="<image><bos>question: {question} answer:"))
    torch.manual_seed(5)
    excite(model.add_adapter("one", METHODS).double())
    return model


def trained(folder: Path, out: Path, source: Any, *, cached: Any = None, resume: bool = False, measure: Any = None, **fields: Any) -> dict[str, Tensor]:
    """The weights after a training."""
    out.mkdir(exist_ok=True, parents=True)
    model = model_of(folder)
    features = None if cached is None else cached(model)
    train(model, source, two_texts, TrainSettings(**{**SETTINGS, **fields}), out, patches=features, resume=resume, measure=measure)
    return {name: value.detach().clone() for name, value in model.adapted.active_adapter().named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_cached_features_of_clips_train_bit_for_bit_like_fresh_ones(clips: list[Sample], folder: Path, tmp_path: Path) -> None:
    fresh = trained(folder, tmp_path / "fresh", clips)
    in_memory = trained(folder, tmp_path / "memory", clips, cached=lambda model: encode_all(model, clips, dtype="float32"))
    on_disk = trained(folder, tmp_path / "disk", clips, cached=lambda model: write_features(model.tower, clips, tmp_path / "f", all_contents(model.tower, "float32")))
    assert same(fresh, in_memory)
    assert same(fresh, on_disk)


def test_a_run_with_drawn_frames_goes_on_bit_for_bit(clips: list[Sample], folder: Path, tmp_path: Path) -> None:
    whole = trained(folder, tmp_path / "whole", clips, draw_frames=True)
    with pytest.raises(Stop):
        trained(folder, tmp_path / "parts", clips, draw_frames=True, measure=stop_at(1), measure_every=4)
    assert same(trained(folder, tmp_path / "parts", clips, draw_frames=True, resume=True), whole)
    assert same(trained(folder, tmp_path / "workers", clips, draw_frames=True, workers=2), whole)
    assert not same(trained(folder, tmp_path / "middle", clips), whole)  # the control


def test_drawn_frames_are_a_function_of_seed_epoch_and_key(clips: list[Sample], tmp_path: Path) -> None:
    prepare = drawing(clip_tower("timesformer", tmp_path).preprocess)

    @cache
    def read(seed: int, epoch: int, key: str = "clip0") -> bytes:
        pixels: Tensor = read_pixels(replace(clips[0], key=key), prepare, (seed, epoch))
        return pixels.numpy().tobytes()

    assert read(3, 1) == read_pixels(clips[0], prepare, (3, 1)).numpy().tobytes()
    assert len({read(3, 1), read(3, 2), read(4, 1), read(3, 1, "other")}) == 4
    middle = read_pixels(clips[0], prepare).numpy().tobytes()  # as in evaluation
    assert middle == read_pixels(clips[0], replace(prepare, is_drawing=False), (3, 1)).numpy().tobytes()


def test_damaged_clips_are_counted_and_named_and_no_other_takes_their_place(clips: list[Sample], folder: Path, tmp_path: Path) -> None:
    bad = [replace(clips[1], media=tmp_path / "gone.mp4"), replace(clips[2], media=tmp_path)]
    source = [clips[0], *bad, *clips[3:]]
    with pytest.raises(BudgetError, match=r"^2 bad samples, and at most 1 is allowed: .*1 missing file \(clip1 gone\.mp4\)"):
        trained(folder, tmp_path / "out", source, bad_samples=1)
    table = encode_all(model_of(folder), source, dtype="float32")
    assert {number: one.reason for number, one in table.bad.items()} == {1: "missing file", 2: "no frames"}
    assert table.usable() == [0, 3, 4, 5]
    pixels = pixel_table(source, clip_tower("timesformer", tmp_path / "e").preprocess, label="")
    assert (pixels.shape, {number: one.reason for number, one in pixels.bad.items()}) == ((4, 3, 32, 32), {1: "missing file", 2: "no frames"})


def test_a_model_writes_about_a_clip_from_its_path(clips: list[Sample], folder: Path) -> None:
    model = model_of(folder)
    texts = model.generate([str(clips[0].media), Path(str(clips[1].media))], ["", ""], max_new_tokens=3)
    assert len(texts) == 2


def test_clips_of_another_kind_are_refused(clips: list[Sample], folder: Path, tmp_path: Path) -> None:
    prepare = load_tower(folder).preprocess
    assert isinstance(prepare, ClipPreprocess)
    sound = Sample(key="a", image_id=1, media=b"", kind="audio")
    with pytest.raises(ConfigError, match=r"^sample 'a' is of the kind audio, and the encoder takes video: give data of the kind video, or an encoder of audio$"):
        read_pixels(sound, prepare)
    with pytest.raises(ConfigError, match=r"is of the kind image, and the encoder takes video"):
        trained(folder, tmp_path / "a", [Sample(key=str(i), image_id=i, media=b"") for i in range(N)])
    with pytest.raises(ConfigError, match=r"is of the kind video, and the encoder takes image"):
        read_pixels(clips[0], lambda image: image)
    with pytest.raises(ConfigError, match=r"^train\.draw_frames draws frames of clips, and the encoder takes image: leave it out$"):
        drawing(lambda image: image)
    with pytest.raises(ConfigError, match=r"^train\.draw_frames gives each epoch other frames, and train\.features is memory: give encode, or leave it out$"):
        TrainSettings(draw_frames=True, features="memory")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vivit", "videomae", "vjepa2"])
def test_every_class_of_video_trains(name: str, clips: list[Sample], tmp_path: Path) -> None:
    folder = save_clips(name, tmp_path / "encoder")
    assert not same(trained(folder, tmp_path / "out", clips), trained(folder, tmp_path / "out2", clips, seed=1))

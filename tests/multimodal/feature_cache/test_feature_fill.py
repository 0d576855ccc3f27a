"""Features that the first epoch fills: what is trained is what features written before train, whatever interrupts it."""

from __future__ import annotations

import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import feature_jobs
import pytest
import torch
from accelerate import Accelerator
from composed import Drawn, compose, excite, two_texts
from ranks import Machine
from safetensors.torch import load_file
from torch import Tensor

from adalink import EPALM, AdaLink, Bridge, LoRA, Method, Prompt
from adalink.errors import ConfigError, DataError
from multimodal.batches.collate import collate
from multimodal.data.feature_cache.encode import opened_writer, write_features
from multimodal.data.feature_cache.format import Contents, StoredDtype, all_contents, needed_contents
from multimodal.data.feature_cache.reader import FeatureCache, matching_features
from multimodal.data.images.decode import decode_image
from multimodal.data.inputs import CachedFeatures
from multimodal.encoders.tower import load_tower
from multimodal.model import VisionLanguageModel
from multimodal.sample import BadSample, Sample
from multimodal.template import Text
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train
from tasks.captioning import Captioning
from tasks.runs.compose import compose as compose_parts
from tasks.scenes.dataset import Scenes
from tasks.scenes.parts import encoder_folder

N, BAD = 8, (2,)
SETTINGS: dict[str, Any] = {"steps": 6, "batch_size": 3, "log_every": 1, "checkpoint_every": 1, "warmup": 0.0, "learning_rate": 1e-2}
SEES: dict[str, dict[str, Method]] = {
    "patches": {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"))},
    "taps": {"epalm": EPALM(layers=(0, 2), n_taps=2, connector="shared"), "prompt": Prompt(length=2, init_std=0.1)},
    "both": {"bridge": Bridge(kind="linear"), "epalm": EPALM(layers=(1, 2), n_taps=1, connector="shared")},
}


def model_of(sees: str = "patches") -> VisionLanguageModel:
    model = compose("opt")
    torch.manual_seed(5)
    excite(model.add_adapter("one", SEES[sees]).double())
    return model


def needed(model: VisionLanguageModel, dtype: StoredDtype = "float16") -> Contents:
    return needed_contents(model.adapted.active_adapter(), all_contents(model.tower, dtype))


class Killed(Exception):
    pass


def weights(
    folder: Path, given: Path | CachedFeatures | None, *, sees: str = "patches", resume: bool = False, killed_at: int = 0, texts: Any = two_texts, **fields: Any
) -> dict[str, Tensor]:
    """Of the adapter after training that fills a folder, or reads what is kept, or encodes."""
    model, source, calls = model_of(sees), Drawn(N, BAD), iter(range(1, 100))

    def measure() -> dict[str, float]:
        if next(calls) == killed_at:
            raise Killed
        return {}

    how = "fill" if isinstance(given, Path) else "encode"
    settings = TrainSettings(**{**SETTINGS, "measure_every": int(killed_at > 0), "features": how, **fields})
    with opened_writer(model.tower, source, given, needed(model)) if isinstance(given, Path) else nullcontext(given) as patches:
        train(model, source, texts, settings, folder, resume=resume, patches=patches, measure=measure)
    return {name: value.detach().clone() for name, value in model.adapted.active_adapter().named_parameters()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def records(folder: Path, n: int = N, bad: tuple[int, ...] = BAD) -> dict[int, Tensor]:
    cache = FeatureCache.open(folder)
    assert tuple(cache.bad) == bad
    return {i: value for i in range(n) if isinstance(value := cache[i], Tensor)}


def same_records(first: Path, second: Path, n: int = N, bad: tuple[int, ...] = BAD) -> bool:
    one, other = records(first, n, bad), records(second, n, bad)
    return one.keys() == other.keys() and all(torch.equal(value, other[i]) for i, value in one.items())


@pytest.mark.parametrize(("sees", "workers"), [("patches", 0), ("patches", 1), ("taps", 0), ("both", 1)])
def test_filling_trains_what_features_written_before_train_bit_for_bit(sees: str, workers: int, tmp_path: Path) -> None:
    model = model_of(sees)
    before = write_features(model.tower, Drawn(N, BAD), tmp_path / "before", needed(model), budget=1)
    assert before.shape == {"patches": (36, 128), "taps": (2, 128), "both": (37, 128)}[sees]
    expected = weights(tmp_path / "read", before, sees=sees)
    assert equal(weights(tmp_path / "fill", tmp_path / "filled", sees=sees, workers=workers), expected)
    assert same_records(tmp_path / "before", tmp_path / "filled")
    assert not equal(weights(tmp_path / "other", before, sees=sees, seed=1), expected)  # the control


@pytest.mark.parametrize("sees", SEES)
def test_kept_features_train_what_encoding_each_time_trains(sees: str, tmp_path: Path) -> None:
    model = model_of(sees)
    encoded = weights(tmp_path / "encode", None, sees=sees)
    for dtype, tolerance in (("float32", 1e-6), ("float16", 0.02)):
        cache = write_features(model.tower, Drawn(N, BAD), tmp_path / dtype, needed(model, dtype), budget=1)  # type: ignore[arg-type]
        found = weights(tmp_path / f"kept_{dtype}", cache, sees=sees)
        assert all(torch.allclose(value, encoded[name], rtol=tolerance, atol=tolerance) for name, value in found.items())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The features that a run fills which nothing interrupts, and its weights."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder / "whole", weights(folder / "run", folder / "whole")


@pytest.mark.parametrize("killed_at", [1, pytest.param(2, marks=pytest.mark.slow), 3, 4])
def test_interrupted_and_resumed_filling_is_exact(killed_at: int, unbroken: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Three steps are an epoch, whose second is as its first. The third is the one that images of both epochs are in. The folder is there when the run goes on, or gone."""
    whole, expected = unbroken
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        weights(killed / "run", killed / "features", killed_at=killed_at)
    if killed_at <= 3:
        with pytest.raises(DataError, match="are not finished"):
            FeatureCache.open(killed / "features")
    shutil.copytree(killed / "run", tmp_path / "gone" / "run")
    for folder in (killed, tmp_path / "gone"):
        assert equal(weights(folder / "run", folder / "features", resume=True), expected)
        assert same_records(folder / "features", whole)


def test_a_run_that_ends_in_its_first_epoch_leaves_a_folder_that_is_not_finished(unbroken: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    weights(tmp_path / "short", tmp_path / "features", steps=2)
    with pytest.raises(DataError, match="are not finished"):
        FeatureCache.open(tmp_path / "features")
    weights(tmp_path / "another", tmp_path / "features", steps=3, seed=4)  # exactly an epoch, in another order
    assert same_records(tmp_path / "features", unbroken[0])


def test_a_picture_without_a_text_has_features_all_the_same(tmp_path: Path) -> None:
    def texts(sample: Sample, rng: random.Random) -> list[Text]:
        return [] if sample.key.endswith("5") else two_texts(sample, rng)

    weights(tmp_path / "run", tmp_path / "features", texts=texts)
    assert 5 in records(tmp_path / "features")


def test_bad_pictures_count_towards_the_budget_whether_read_or_filled(tmp_path: Path) -> None:
    for name in ("fill", "read"):
        weights(tmp_path / name, tmp_path / "features" if name == "fill" else FeatureCache.open(tmp_path / "features"))
        assert (tmp_path / name / "bad_samples.jsonl").read_text().count("not an image") == 1
    assert isinstance(FeatureCache.open(tmp_path / "features")[2], BadSample)


def test_a_damaged_record_ends_the_run_and_no_picture_is_left_out_for_it(tmp_path: Path) -> None:
    model = model_of()
    cache = write_features(model.tower, Drawn(N, BAD), tmp_path / "features", needed(model), budget=1)
    (path,) = (tmp_path / "features").glob("*.safetensors")
    with path.open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"the features of image 7 in .* are not what was written"):
            weights(tmp_path / f"run{workers}", cache, workers=workers)


def test_features_of_a_trained_encoder_are_neither_read_nor_filled(tmp_path: Path) -> None:
    model = model_of()
    write_features(model.tower, Drawn(3), tmp_path / "features", needed(model))
    adapted = VisionLanguageModel(load_tower(encoder_folder()), model.language, model.template)  # its own tower: an adapter changes it for good
    adapted.add_adapter("one", SEES["patches"])
    matching_features(tmp_path / "features", adapted.tower, Drawn(3), needed(adapted))  # the control
    adapted.add_vision_adapter({"lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=2)})
    for use in (
        lambda: matching_features(tmp_path / "features", adapted.tower, Drawn(3), needed(adapted)),
        lambda: write_features(adapted.tower, Drawn(3), tmp_path / "others", needed(adapted)),
    ):
        with pytest.raises(ConfigError, match="has trained weights, so its features change with every step and cannot be cached"):
            use()
    assert not (tmp_path / "others").exists()


def test_filling_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.features is fill, and no folder is given to fill: give patches, a FeatureWriter"):
        weights(tmp_path / "run", None, features="fill")


def test_an_encoder_that_is_split_over_processes_fills_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: True))
    with pytest.raises(ConfigError, match=r"FSDP2 splits the encoder over processes, so its features cannot be filled in while training: run `adalink features` first"):
        weights(tmp_path / "run", tmp_path / "features")


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float32", 0.0, 0.0), ("float16", 3e-5, 3e-4), ("bfloat16", 2e-4, 2e-3)], ids=lambda value: str(value)
)  # fmt: skip
def test_how_much_rounding_moves_gradients_on_the_embedded_parts(dtype: StoredDtype, least: float, most: float, tmp_path: Path) -> None:
    """What the help says: at most 3e-4 in float16, 2e-3 in bfloat16, nothing in float32; the norm of the whole gradient. Here 7e-5 and 5e-4."""
    assert least <= gradient_moved(dtype, tmp_path) <= most


def gradient_moved(dtype: StoredDtype, folder: Path) -> float:
    """On scenes: captions of 32 images, the embedded encoder and language model, AdaLink and a bridge with weights away from their start."""
    task, source = Captioning(), Scenes(split="train", size=32)
    model = compose_parts("scenes:encoder", "scenes:language", template=task.template)
    torch.manual_seed(0)
    excite_little(model.add_adapter("one", {"bridge": Bridge(kind="mlp"), "adalink": AdaLink(rank=16, modalities=("image", "text"))}))
    cache = write_features(model.tower, source, folder / "features", needed(model, dtype))
    rows = [model.row_encoder().row(text) for i in range(32) for text in task.texts(source[i], random.Random(i))[:1]]
    exact = model.encode(torch.stack([model.tower.preprocess(decode_image(source[i].image)) for i in range(32)]))[:, : model.tower.n_patches]
    gradients = []
    for patches in (exact, torch.stack([value for i in range(32) if isinstance(value := cache[i], Tensor)])):
        model.zero_grad()
        model(collate(rows, range(32), patches, kind="patches", side="right", pad_id=0)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.adapted.active_adapter().parameters() if parameter.grad is not None]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def excite_little(adapter: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


def state(folder: Path) -> dict[str, Tensor]:
    return {name: value for name, value in load_file(folder / "checkpoints" / "step_00000008" / "state.safetensors").items() if "weight" in name}


def test_two_processes_fill_one_folder_together_also_when_they_are_killed(machine: Machine, tmp_path: Path) -> None:
    """Thirteen images in steps of two times two: the fourth step ends the first epoch."""
    one = machine.start(1, feature_jobs.filled, tmp_path / "one", tmp_path / "alone", 4)
    two = machine.start(2, feature_jobs.filled, tmp_path / "two", tmp_path / "together")
    killed = machine.start(2, feature_jobs.filled, tmp_path / "killed", tmp_path / "resumed", 2, 3)
    killed.wait_until(lambda: (tmp_path / "killed" / "checkpoints" / "step_00000002").exists())
    killed.killed()
    with pytest.raises(DataError, match="are not finished"):
        FeatureCache.open(tmp_path / "resumed")
    for group in (one, two, machine.start(2, feature_jobs.filled, tmp_path / "killed", tmp_path / "resumed", 2, 0, True)):
        group.ended()
    assert {path.name[:3] for path in (tmp_path / "together").glob("*.safetensors")} == {"000", "001"}
    for name in ("together", "resumed"):
        assert same_records(tmp_path / "alone", tmp_path / name, feature_jobs.N, feature_jobs.BAD)
    alone, together, resumed = (state(tmp_path / name) for name in ("one", "two", "killed"))
    assert all(torch.allclose(value, together[name], rtol=1e-9, atol=1e-9) for name, value in alone.items())
    assert equal(together, resumed)

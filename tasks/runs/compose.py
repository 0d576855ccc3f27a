"""The model of a config or of a saved adapter, with the embedded parts known by name."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from adalink import AdaptedModel
from adalink.checkpoint.folder import AdapterConfig
from adalink.checkpoint.precision import UNCHANGED, BaseSettings
from adalink.errors import CheckpointError, ConfigError
from adalink.lifecycle.flat import Flat, start_of
from multimodal.data.feature_cache.encode import encode_all, opened_writer, pixel_table, write_features
from multimodal.data.feature_cache.format import AnyContents, all_contents, as_size, needed_contents
from multimodal.data.feature_cache.reader import UNFINISHED, is_finished, matching_features
from multimodal.data.feature_cache.writer import FeatureWriter
from multimodal.data.inputs import CachedFeatures
from multimodal.encoders.tower import NoTower, VisionTower, load_tower
from multimodal.existing.budget import ImageTokens
from multimodal.existing.load import load_existing
from multimodal.existing.tower import ModelTower
from multimodal.language import Language, LanguageUse, load_language
from multimodal.loading import on_device
from multimodal.loss.answer_head import use_for
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.sample import SampleSource, counted
from multimodal.template import Template, saved_template
from tasks.runs.config import Parts, RunConfig
from tasks.scenes.parts import part_folder

__all__ = [
    "adapters_on", "compose", "composed_tower", "existing_tower", "features_to_learn", "features_to_log", "found_part", "frozen_for", "frozen_model",
    "frozen_of", "is_of_task", "load_adapted", "located", "log", "read_saved", "saved_start", "size_of",
]  # fmt: skip


def compose(
    encoder: str | None, language_model: str, *, template: Template, layer: int = -1, use: LanguageUse = "write", base: BaseSettings = UNCHANGED,
    frames: int = 0,
) -> VisionLanguageModel:
    """The composed model, on this process's device; encoder: None where it reads texts alone.

    `scenes:encoder` and `scenes:language` are the parts that ship with the package.
    """
    tower = None if encoder is None else composed_tower(encoder, layer, base, frames)
    language = load_language(found_part(language_model), use=use, precision=base.language_model, placing=base.placing)
    return on_device(VisionLanguageModel(tower, dataclasses.replace(language, name=located(language_model)), template), process_state().device)


def frozen_model(parts: Parts, *, template: Template, layer: int = -1, use: LanguageUse = "write") -> VisionLanguageModel:
    """The model of these parts, composed or one that sees already, on this process's device. Raises as their loaders do."""
    if parts.model is None:
        assert parts.language_model is not None
        return compose(parts.encoder, parts.language_model, template=template, layer=layer, use=use, base=parts.base, frames=parts.frames)
    return VisionLanguageModel.from_parts(*_existing(parts.model, parts.base), template=template, image_tokens=parts.image_tokens)


def composed_tower(encoder: str, layer: int = -1, base: BaseSettings = UNCHANGED, frames: int = 0) -> VisionTower:
    """The encoder of a composed model, on this process's device. frames: of an encoder of video; 0: as its config says."""
    tower = load_tower(found_part(encoder), layer=layer, precision=base.encoder, frames=frames or None)
    tower.name = located(encoder)  # an adapter remembers its parts by the names that were given, not by where they were found
    return tower.to(process_state().device)


def existing_tower(name: str, image_tokens: ImageTokens, base: BaseSettings = UNCHANGED) -> ModelTower:
    """The tower and the connector of a model that sees already, on this process's device."""
    return ModelTower.of(*_existing(name, base), image_tokens)


def _existing(name: str, base: BaseSettings) -> tuple[Language, Any]:
    language, processor = load_existing(name, base=base)
    return dataclasses.replace(language, model=on_device(language.model, process_state().device), name=located(name)), processor


def is_of_task(config: AdapterConfig) -> bool:
    """Whether an adapter's config names a task and its words, as those that `adalink train` saves do."""
    return "language_model" in config.base and {"task", "prompt", "target", "layer"} <= set(config.task)


def found_part(name: str) -> str | Path:
    """The folder of an embedded part, other names as they are. Raises ConfigError for an embedded part that there is not."""
    prefix, _, part = name.partition(":")  # not by the entry point: a checkout that is not installed has none
    return part_folder(part) if prefix == "scenes" else name


def read_saved(folder: Path) -> AdapterConfig:
    """The config of an adapter that `adalink train` saved: it names both frozen parts and the task. Raises CheckpointError for another one."""
    config = AdaptedModel.read_config(folder)
    if not is_of_task(config):
        raise CheckpointError(f"the adapter in {folder} was not saved by `adalink train`: it names no frozen parts with a task")
    return config


def located(name: str) -> str:
    """The absolute path of what lies in a local folder, so that it is found from another one; a hub's name, an address or an embedded part as it is."""
    return str(Path(name).absolute()) if ":" not in name and Path(name).exists() else name


def load_adapted(
    folder: Path, *, encoder: str | None = None, language_model: str | None = None, model: str | None = None, allow_other_base: bool = False,
    image_tokens: ImageTokens | None = None, base: BaseSettings = UNCHANGED, frames: int = 0,
) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """The model of a saved adapter, and what its config says of its task.

    The frozen parts are those that the adapter names unless others are given; others than it was trained on are refused, or allowed by name.
    """
    config = read_saved(folder)
    given = Parts(model=model, encoder=encoder, language_model=language_model, image_tokens=image_tokens or ImageTokens(), base=base, frames=frames)
    loaded = frozen_for(config, given)
    loaded.load_adapter(folder, "default", allow_other_base=allow_other_base)
    return loaded, dict(config.task)


def adapters_on(
    folders: Mapping[str, Path], *, encoder: str | None = None, language_model: str | None = None, model: str | None = None, allow_other_base: bool = False
) -> VisionLanguageModel:
    """The frozen parts that the first adapter names, unless others are given, with all adapters on them under their names."""
    config = read_saved(next(iter(folders.values())))
    loaded = frozen_for(config, Parts(model=model, encoder=encoder, language_model=language_model))
    for name, folder in folders.items():
        loaded.load_adapter(folder, name, activate=False, allow_other_base=allow_other_base)
    return loaded


def frozen_of(folder: Path, *, encoder: str | None = None, language_model: str | None = None, model: str | None = None) -> AdaptedModel:
    """The frozen model of a saved adapter with nothing on it, on which its start is drawn again. Parts as in `load_adapted`."""
    config = AdaptedModel.read_config(folder)
    if is_of_task(config):
        return frozen_for(read_saved(folder), Parts(model=model, encoder=encoder, language_model=language_model)).adapted
    return AdaptedModel(load_language(found_part(model or language_model or config.base["language_model"].name)).model)


def frozen_for(config: AdapterConfig, given: Parts) -> VisionLanguageModel:
    """The frozen parts that a saved adapter's config names, or those that are given, as one model."""
    template = saved_template(config.task)
    assert template is not None
    return frozen_model(given.over(Parts.of(config.base, config.task)), template=template, layer=config.task["layer"], use=use_for(config.task))


def saved_start(folder: str | Path) -> Flat:
    """The weights that a saved adapter started from, drawn again on the frozen parts that it names.

    Those are composed from the start's seed, as runs of earlier versions drew adapters after that. torch's generator is then as it was.
    Raises CheckpointError where the parts that are found are others, or the start cannot be drawn again.
    """
    config = AdaptedModel.read_config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0 if config.start is None else config.start.seed)
        frozen = frozen_of(Path(folder))
        state = torch.get_rng_state()
    config.check_base(frozen.parts, str(folder))
    return start_of(folder, frozen, (state,))


# ----------------------------------------
# Features that a run keeps on disk: in FOLDER/train and FOLDER/val, read where they are there, filled where that is asked for.


@contextlib.contextmanager
def features_to_learn(model: VisionLanguageModel, source: SampleSource, config: RunConfig) -> Iterator[CachedFeatures | FeatureWriter | None]:
    """The cached features of the training images, or the folder to fill with them; None where the config keeps none.

    Raises ConfigError and DataError where the features are not there, or not those of this model and these images.
    """
    if config.features is None:
        if isinstance(model.tower, NoTower):
            yield encode_all(model, source)
            return
        is_cached = config.train.features == "memory"
        yield encode_all(model, source, workers=config.train.workers, label="encoding each image once", dtype=config.features_dtype) if is_cached else None
        return
    folder = config.features / "train"
    if is_finished(folder) or config.train.features != "fill":
        yield _matching(folder, model, source)
        return
    with opened_writer(_seeing(model), source, folder, _needed(model, config)) as writer:
        log(f"features: the first epoch fills {folder} with {size_of(writer.contents, len(source))}")
        yield writer
        if not is_finished(folder):
            n_missing = len(writer.missing())
            log(f"features: {folder} is not finished, {n_missing:,} of {len(source):,} images are missing; another run or `adalink features` goes on")


def features_to_log(model: VisionLanguageModel, source: SampleSource, config: RunConfig, label: str) -> CachedFeatures:
    """The features of the images that a run is evaluated on: cached ones, or encoded now; of an adapted encoder or connector the pixels.

    Raises as `features_to_learn`.
    """
    if model.changes_features:
        return pixel_table(source, model.tower.preprocess, label=label)
    if config.features is not None:
        folder, settings = config.features / "val", config.train
        if is_finished(folder) or (os.path.exists(folder / UNFINISHED) and settings.features != "fill"):
            return _matching(folder, model, source)
        if settings.features == "fill":
            log(f"features: filling {folder} with {size_of(_needed(model, config), len(source))}")
            return write_features(
                _seeing(model), source, folder, _needed(model, config), workers=settings.workers, budget=settings.bad_samples, label=label
            )  # fmt: skip
        if not is_finished(config.features / "train"):
            raise ConfigError(f"{config.features} holds no features, neither in train nor in val: write them with `adalink features`, or give features: null")
        log(f"features: there is no {folder}, so the images that are evaluated on are encoded")
    return encode_all(model, source, workers=config.train.workers, label=label, dtype=config.features_dtype)


def log(line: str) -> None:
    """A line in the log, once whatever the number of processes."""
    if process_state().is_main_process:
        print(line, file=sys.stderr)


def _matching(folder: Path, model: VisionLanguageModel, source: SampleSource) -> CachedFeatures:
    cache = matching_features(folder, _seeing(model), source, needed_contents(model.adapted.active_adapter(), all_contents(_seeing(model))))
    many = f"{counted(len(cache), 'image')} {'is' if len(cache) == 1 else 'are'}"
    log(f"features: {many} read from {folder}, {cache.contents} of {model.tower.name}; {len(cache.bad):,} have none")
    return cache


def _needed(model: VisionLanguageModel, config: RunConfig) -> AnyContents:
    return needed_contents(model.adapted.active_adapter(), all_contents(_seeing(model), config.features_dtype))


def _seeing(model: VisionLanguageModel) -> VisionTower | ModelTower:
    """The tower of a model whose features are cached: a config without an encoder names no folder of them."""
    assert not isinstance(model.tower, NoTower)
    return model.tower


def size_of(contents: AnyContents, n_images: int) -> str:
    """What a folder of features takes: `31.76 GiB: 113,287 images of 301,056 bytes, 196 patches of width 768 in float16`."""
    return f"{as_size(n_images * contents.n_bytes)}: {n_images:,} images of {contents.size}, {contents}"

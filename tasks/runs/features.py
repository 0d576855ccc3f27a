"""Features that a run keeps on disk: in FOLDER/train and FOLDER/val, read where they are there, filled where that is asked for."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from adalink.errors import ConfigError
from multimodal.bad_samples import counted
from multimodal.data.feature_cache.encode import opened_writer, write_features
from multimodal.data.feature_cache.format import Contents, all_contents, as_size, needed_contents
from multimodal.data.feature_cache.manifest import UNFINISHED, is_finished
from multimodal.data.feature_cache.memory import encode_all, pixel_table
from multimodal.data.feature_cache.reader import matching_features
from multimodal.data.feature_cache.writer import FeatureWriter
from multimodal.data.inputs import Kept
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.sample import SampleSource
from tasks.runs.config import RunConfig

__all__ = ["features_to_learn", "features_to_show", "say", "size_of"]


@contextlib.contextmanager
def features_to_learn(model: VisionLanguageModel, source: SampleSource, config: RunConfig) -> Iterator[Kept | FeatureWriter | None]:
    """The kept features of the training pictures, or the folder to fill with them; None where the config keeps none.

    Raises ConfigError and DataError where the features are not there, or not those of this model and these pictures.
    """
    if config.features is None:
        is_kept = config.train.features == "memory"
        yield encode_all(model, source, workers=config.train.workers, label="encoding each image once", dtype=config.features_dtype) if is_kept else None
        return
    folder = config.features / "train"
    if is_finished(folder) or config.train.features != "fill":
        yield _matching(folder, model, source)
        return
    with opened_writer(model.tower, source, folder, _needed(model, config)) as writer:
        say(f"features: the first epoch fills {folder} with {size_of(writer.contents, len(source))}")
        yield writer
        if not is_finished(folder):
            n_missing = len(writer.missing())
            say(f"features: {folder} is not finished, {n_missing:,} of {len(source):,} pictures are missing; another run or `adalink features` goes on")


def features_to_show(model: VisionLanguageModel, source: SampleSource, config: RunConfig, label: str) -> Kept:
    """The features of the pictures that a run is evaluated on: kept ones, or encoded now; of an adapted encoder its pixels.

    Raises as `features_to_learn`.
    """
    if model.tower.adapter is not None:
        return pixel_table(source, model.tower.preprocess, label=label)
    if config.features is not None:
        folder, settings = config.features / "val", config.train
        if is_finished(folder) or (os.path.exists(folder / UNFINISHED) and settings.features != "fill"):
            return _matching(folder, model, source)
        if settings.features == "fill":
            say(f"features: filling {folder} with {size_of(_needed(model, config), len(source))}")
            return write_features(
                model.tower, source, folder, _needed(model, config), workers=settings.workers, budget=settings.bad_samples, label=label
            )  # fmt: skip
        if not is_finished(config.features / "train"):
            raise ConfigError(f"{config.features} holds no features, neither in train nor in val: write them with `adalink features`, or give features: null")
        say(f"features: there is no {folder}, so the pictures that are evaluated on are encoded")
    return encode_all(model, source, workers=config.train.workers, label=label, dtype=config.features_dtype)


def say(line: str) -> None:
    """A line in the log, once whatever the number of processes."""
    if process_state().is_main_process:
        print(line, file=sys.stderr)


def _matching(folder: Path, model: VisionLanguageModel, source: SampleSource) -> Kept:
    cache = matching_features(folder, model.tower, source, needed_contents(model.adapted.active_adapter(), all_contents(model.tower)))
    many = f"{counted(len(cache), 'picture')} {'is' if len(cache) == 1 else 'are'}"
    say(f"features: {many} read from {folder}, {cache.contents} of {model.tower.name}; {len(cache.bad):,} have none")
    return cache


def _needed(model: VisionLanguageModel, config: RunConfig) -> Contents:
    return needed_contents(model.adapted.active_adapter(), all_contents(model.tower, config.features_dtype))


def size_of(contents: Contents, n_pictures: int) -> str:
    """What a folder of features takes: `31.76 GiB: 113,287 pictures of 301,056 bytes, 196 patches of width 768 in float16`."""
    return f"{as_size(n_pictures * contents.n_bytes)}: {n_pictures:,} pictures of {contents.n_bytes:,} bytes, {contents}"

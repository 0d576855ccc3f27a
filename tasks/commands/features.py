"""`adalink features`: write the encoder's features of a run's pictures once, for every run that reads the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from adalink.errors import ConfigError
from multimodal.bad_samples import BadSamples
from multimodal.data.feature_cache.encode import write_features
from multimodal.data.feature_cache.format import Contents, all_contents, as_size, needed_contents
from multimodal.encoders.tower import VisionTower
from tasks.commands import Command
from tasks.commands.settings import SPLITS, Draft, add_run, name_both_parts, only_named_data
from tasks.data.sources import Opened
from tasks.planning.meta import draw_adapter, draw_language, draw_tower
from tasks.runs.compose import composed_tower, found_part, say, size_of
from tasks.runs.config import chosen_methods

__all__ = ["FEATURES"]


def _add_features(parser: Any) -> None:
    add_run(parser, Draft)
    parser.add_argument(
        "--contents", type=Literal["needed", "all"], default="needed",
        help="needed: what the methods of the config read, patches or the few pooled vectors that eP-ALM taps; all: patches and every pooled vector",
    )  # fmt: skip


def _features(values: Any, plain: Any) -> None:
    """Write FOLDER/train and FOLDER/val, for each of the two data sets that is given. Goes on where it was interrupted; checks what is whole.

    Raises ConfigError where no folder or no data is given, and what `write_features` raises.
    """
    if values.features is None:
        raise ConfigError("no folder is given to write the features to: give --features FOLDER")
    name_both_parts(values)
    opened = {split: data.open() for split in SPLITS if (data := getattr(values.data, split)) is not None}
    if not opened:
        raise ConfigError("no data is given whose features could be written: give data.train, data.val or both")
    tower = composed_tower(values.encoder, values.layer)
    contents = _contents(values, tower)
    for split, data in opened.items():
        _write(tower, data, values.features / split, contents, values)


def _contents(values: Any, tower: VisionTower) -> Contents:
    """Known without the language model's weights."""
    everything = all_contents(tower, values.features_dtype)
    if values.contents == "all":
        return everything
    drawn = draw_tower(found_part(values.encoder), layer=values.layer), draw_language(found_part(values.language_model))
    return needed_contents(draw_adapter(*drawn, chosen_methods(values.methods)), everything)


def _write(tower: VisionTower, data: Opened, folder: Path, contents: Contents, values: Any) -> None:
    above = next(parent for parent in folder.resolve().parents if os.path.exists(parent))
    say(f"{folder}: {size_of(contents, len(data.source))}; {as_size(shutil.disk_usage(above).free)} are free")
    workers, budget = values.train.workers, values.train.bad_samples
    cache = write_features(tower, data.source, folder, contents, workers=workers, budget=budget, label=folder.name)
    bad = BadSamples(budget=len(cache), found=cache.bad.values())
    say(f"{folder}: {len(cache) - len(cache.bad):,} pictures have features" + (f"; skipped: {bad.summary()}" if cache.bad else ""))


FEATURES = Command(_add_features, _features, has_config=True, prepare=only_named_data)

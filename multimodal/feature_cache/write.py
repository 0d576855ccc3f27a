"""The features of a whole data set, written once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import gather_object
from tqdm import tqdm

from multimodal.bad_samples import BadSample, BadSamples
from multimodal.feature_cache.binding import bind
from multimodal.feature_cache.cache import FeatureCache
from multimodal.feature_cache.contents import Contents
from multimodal.feature_cache.encoding import GROUP, encoded_groups
from multimodal.feature_cache.writer import FeatureWriter
from multimodal.processes import process_state
from multimodal.sample import SampleSource
from multimodal.vision import VisionTower

__all__ = ["complete", "opened_writer", "write_features"]


@contextlib.contextmanager
def opened_writer(tower: VisionTower, source: SampleSource, folder: Path, contents: Contents) -> Iterator[FeatureWriter]:
    """A writer of these pictures' features, which lets go of the folder at the end. Raises as FeatureWriter does, and as `bind`."""
    writer = FeatureWriter(folder, bind(tower, source), contents)
    try:
        yield writer
    finally:
        writer.close()


def write_features(
    tower: VisionTower, source: SampleSource, folder: Path, contents: Contents, *, workers: int = 0, budget: int = 0, label: str = "encoding"
) -> FeatureCache:
    """Write the folder, or what is missing of it; each of several processes encodes its share. A whole folder is checked, every byte.

    The same pictures give the same features, whatever the number of workers, processes and interruptions.

    budget   how many pictures may be unusable before the writing stops

    Raises ConfigError and DataError as FeatureWriter does, BudgetError over the budget; what is written stays, and the folder is not finished.
    """
    with opened_writer(tower, source, folder, contents) as writer:
        return complete(writer, tower, source, workers=workers, budget=budget, label=label)


def complete(
    writer: FeatureWriter, tower: VisionTower, source: SampleSource, *, workers: int = 0, budget: int | None = None, label: str = "encoding"
) -> FeatureCache:
    """Encode the pictures that are missing, and finish the folder; all processes together. budget: None where bad pictures count elsewhere."""
    if writer.is_whole:
        return FeatureCache.open(writer.folder)
    state, missing = process_state(), writer.missing()
    groups = sorted({int(index) // GROUP for index in missing})[state.process_index :: state.num_processes]
    bad: dict[int, BadSample] = {}
    allowed = len(source) if budget is None else budget
    counted = BadSamples(budget=allowed)
    n_own = sum(min(GROUP, len(source) - GROUP * group) for group in groups)
    with tqdm(total=n_own, desc=label, unit="image", disable=None if state.is_main_process else True, dynamic_ncols=True) as bar:
        for pictures, features, found in encoded_groups(tower, source, groups, workers=workers):
            if features is not None:
                writer.add(pictures, writer.contents.of(features).cpu())
            bad.update(found)
            for sample in found.values():
                counted.add(sample)
            counted.check()
            bar.update(len(pictures) + len(found))
    all_bad = {index: sample for part in gather_object([bad]) for index, sample in part.items()}
    BadSamples(budget=allowed, found=all_bad.values()).check()
    return writer.finish(all_bad)

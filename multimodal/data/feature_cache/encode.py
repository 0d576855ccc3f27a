"""Images through a frozen encoder, each once: into memory, or into a folder before or while a run trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from adalink.errors import ConfigError, DataError
from multimodal.batches.collate import Batch, stacked
from multimodal.batches.prepared import ImageBatch, Prepared
from multimodal.data.feature_cache.format import AnyContents, Contents, StoredDtype, VectorContents, all_contents
from multimodal.data.feature_cache.reader import FeatureCache, bind
from multimodal.data.feature_cache.writer import FeatureWriter
from multimodal.data.images.decode import BadImage
from multimodal.data.inputs import NoFeatures, read_pixels
from multimodal.data.loader import Loaded, TrainLoader
from multimodal.data.workers import dead_workers_named, made_in_order
from multimodal.encoders.tower import NoTower, VisionTower
from multimodal.existing.tower import ModelTower
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.progress import progress
from multimodal.sample import BadSample, BadSamples, DamagedSample, SampleSource

__all__ = [
    "GROUP", "FillingLoader", "PatchTable", "PixelTable", "complete", "encode_all", "encoded_groups", "opened_writer",
    "pixel_table", "write_features",
]  # fmt: skip


# ----------------------------------------
# The features of a whole data set, written once.


# ----------------------------------------
# Images through a frozen encoder, each once, in groups that only the data set decides.


GROUP = 32  # images that are encoded together: always numbers 32 k to 32 k + 31, so that a device's rounding is the same each time

Encoded = tuple[list[int], Any, dict[int, BadSample]]
"""Images, their features as the tower gives them (None where there are none), and those of the group that cannot be used."""


def encoded_groups(tower: VisionTower | ModelTower, source: SampleSource, groups: Sequence[int], *, workers: int) -> Iterator[Encoded]:
    """The features of the images of each group, on the device of the encoder. Raises ConfigError where the encoder is adapted."""
    encode: Any = tower.encode
    of_groups = (range(GROUP * group, min(GROUP * (group + 1), len(source))) for group in groups)
    with dead_workers_named():  # while a group is encoded too
        for items in made_in_order(partial(_read, source, tower.preprocess), of_groups, workers=workers):
            good = {index: item for index, item in items if not isinstance(item, BadSample)}
            bad = {index: item for index, item in items if isinstance(item, BadSample)}
            yield list(good), encode(stacked(list(good.values()))) if good else None, bad


def _read(source: SampleSource, preprocess: Any, indices: range) -> list[tuple[int, Tensor | BadSample]]:
    return [(index, _read_one(source, preprocess, index)) for index in indices]


def _read_one(source: SampleSource, preprocess: Any, index: int) -> Tensor | BadSample:
    try:
        sample = source[index]
    except DamagedSample as error:
        return error.bad
    try:
        return read_pixels(sample, preprocess)
    except BadImage as error:
        return BadSample(key=sample.key, reason=error.reason, detail=str(error), file=sample.file)
    except DataError as error:  # the processor cannot take it
        return BadSample(key=sample.key, reason="unreadable", detail=str(error), file=sample.file)


@contextlib.contextmanager
def opened_writer(tower: VisionTower | ModelTower, source: SampleSource, folder: Path, contents: AnyContents) -> Iterator[FeatureWriter]:
    """A writer of these images' features, which lets go of the folder at the end. Raises as FeatureWriter does, and as `bind`."""
    writer = FeatureWriter(folder, bind(tower, source), contents)
    try:
        yield writer
    finally:
        writer.close()


def write_features(
    tower: VisionTower | ModelTower, source: SampleSource, folder: Path, contents: AnyContents, *, workers: int = 0, budget: int = 0, label: str = "encoding"
) -> FeatureCache:
    """Write the folder, or what is missing of it; each of several processes encodes its share. A whole folder is checked, every byte.

    The same images give the same features, whatever the number of workers, processes and interruptions.

    budget   how many images may be unusable before the writing stops

    Raises ConfigError and DataError as FeatureWriter does, BudgetError over the budget; what is written stays, and the folder is not finished.
    """
    with opened_writer(tower, source, folder, contents) as writer:
        return complete(writer, tower, source, workers=workers, budget=budget, label=label)


def complete(
    writer: FeatureWriter, tower: VisionTower | ModelTower, source: SampleSource, *, workers: int = 0, budget: int | None = None, label: str = "encoding"
) -> FeatureCache:
    """Encode the images that are missing, and finish the folder; all processes together. budget: None where bad images count elsewhere."""
    if writer.is_whole:
        return FeatureCache.open(writer.folder)
    state, missing = process_state(), writer.missing()
    groups = sorted({int(index) // GROUP for index in missing})[state.process_index :: state.num_processes]
    bad: dict[int, BadSample] = {}
    allowed = len(source) if budget is None else budget
    counted = BadSamples(budget=allowed)
    n_own = sum(min(GROUP, len(source) - GROUP * group) for group in groups)
    with tqdm(total=n_own, desc=label, unit="image", disable=None if state.is_main_process else True, dynamic_ncols=True) as bar:
        for images, features, found in encoded_groups(tower, source, groups, workers=workers):
            if features is not None:
                writer.add(images, writer.contents.of(features))
            bad.update(found)
            for sample in found.values():
                counted.add(sample)
            counted.check()
            bar.update(len(images) + len(found))
    all_bad = {index: sample for part in gather_object([bad]) for index, sample in part.items()}
    BadSamples(budget=allowed, found=all_bad.values()).check()
    return writer.finish(all_bad)


# ----------------------------------------
# Features that are written while the first epoch reads the images, and read from there on.


class FillingLoader:
    """A training stream that encodes each image as it comes and caches its features; from the second epoch on it reads the cache.

    A step trains on the cached values, rounded as they are cached: the first epoch does not differ from the others, nor from a run whose
    features were written before. Images that no step has read by then (after a resume without the folder; in a mixture, of a set that
    comes round seldom) are encoded before the second epoch begins. Where the run ends earlier the folder is not finished, and goes on in
    another run, or in `adalink features`.
    """

    def __init__(self, stream: TrainLoader, writer: FeatureWriter, tower: VisionTower | ModelTower, source: SampleSource, *, workers: int) -> None:
        self._stream, self._writer, self._tower, self._source, self._workers = stream, writer, tower, source, workers
        self.steps = 0

    def __iter__(self) -> Iterator[Loaded]:
        """The next `steps` steps."""
        first = 0 if self._writer.is_whole else min(self.steps, self._stream.steps_to(len(self._source)))
        self._stream.steps = first
        for loaded in self._stream:
            yield self._retained(loaded)
        if self._writer.is_whole or self._stream.steps_to(len(self._source)) == 0:
            self._stream.read_cached(complete(self._writer, self._tower, self._source, workers=self._workers, label="encoding what is left"))
            self._stream.steps = self.steps - first
            yield from self._stream

    @property
    def order_note(self) -> str:
        """As the stream's."""
        return self._stream.order_note

    def blank(self) -> Batch:
        """As the stream's."""
        return self._stream.blank()

    def state_dict(self) -> dict[str, Any]:
        """As the stream's: the features that were cached so far are in its folder."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As the stream's."""
        self._stream.load_state_dict(state)

    def _retained(self, loaded: Loaded) -> Loaded:
        batch, contents, tower = loaded.batch, self._writer.contents, self._tower
        given = None if batch is None else batch.prepared if isinstance(tower, ModelTower) else batch.pixels
        if batch is None or given is None:
            return loaded
        encode: Any = tower.encode
        records = contents.of(encode(given))
        self._writer.add(loaded.images, records)
        features: dict[str, Any] = {contents.kind: records} if isinstance(records, Tensor) else {"prepared": ImageBatch(samples=tuple(records))}
        return replace(loaded, batch=replace(batch, **{"pixels": None, **features}))


# ----------------------------------------
# Every image's features, cached in memory: a frozen encoder gives the same features in every epoch.


_SHARED_AT_ONCE = 1024  # images; their features pass through the memory of the device


class PatchTable:
    """Features by sample index: [N + L, Dv] in the dtype of the cache, as `Features.joined` has them, or the bad sample that has none.

    float16 moves gradients by about 3e-4 of their size.
    """

    def __init__(self, patches: Tensor, bad: dict[int, BadSample]) -> None:
        self.patches, self.bad = patches, bad
        self.kind: Literal["patches", "taps"] = "patches"

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def shape(self) -> tuple[int, int]:
        """N + L, Dv"""
        return self.patches.shape[1], self.patches.shape[2]

    def __getitem__(self, index: int) -> Tensor | BadSample:
        return self.bad[index] if index in self.bad else self.patches[index].float()

    def usable(self) -> list[int]:
        """The indices of the samples that have features."""
        return [index for index in range(len(self)) if index not in self.bad]

    def only(self, indices: Sequence[int]) -> PatchTable:
        """The table of these samples alone: index i is the i-th of them."""
        return PatchTable(self.patches[list(indices)], {i: self.bad[index] for i, index in enumerate(indices) if index in self.bad})


@dataclass(frozen=True)
class VectorTable:
    """The vectors of images by sample index, as an existing model takes them: each image has a number of its own."""

    images: Mapping[int, Prepared]
    bad: Mapping[int, BadSample]
    kind: Literal["patches"] = "patches"

    def __len__(self) -> int:
        return len(self.images) + len(self.bad)

    @property
    def shape(self) -> tuple[int, ...]:
        """1, W: of one vector."""
        return 1, next((image.vectors.shape[1] for image in self.images.values() if image.vectors is not None), 1)

    def __getitem__(self, index: int) -> Prepared | BadSample:
        if index in self.bad:
            return self.bad[index]
        image = self.images[index]
        assert image.vectors is not None
        return image.encoded(image.vectors.float())

    def usable(self) -> list[int]:
        """The indices of the samples that have vectors."""
        return sorted(self.images)

    def only(self, indices: Sequence[int]) -> VectorTable:
        """The table of these samples alone: index i is the i-th of them."""
        images = {i: self.images[index] for i, index in enumerate(indices) if index in self.images}
        return VectorTable(images, {i: self.bad[index] for i, index in enumerate(indices) if index in self.bad})


def _vectors_of_all(tower: ModelTower, source: SampleSource, *, workers: int, label: str, dtype: StoredDtype) -> VectorTable:
    state, contents = process_state(), all_contents(tower, dtype)
    assert isinstance(contents, VectorContents)
    images: dict[int, Prepared] = {}
    bad: dict[int, BadSample] = {}
    own = range(state.process_index, -(-len(source) // GROUP), state.num_processes)
    for indices, encoded, found in progress(encoded_groups(tower, source, own, workers=workers), label, len(own)):
        images |= {i: image.encoded(image.vectors.cpu()) for i, image in zip(indices, contents.of(encoded or ()), strict=True) if image.vectors is not None}
        bad |= found
    if state.num_processes > 1:
        gathered = gather_object([(images, bad)])
        images, bad = ({index: value for part in gathered for index, value in sorted(part[side].items())} for side in (0, 1))
    return VectorTable(images, dict(sorted(bad.items())))


def encode_all(
    model: VisionLanguageModel, source: SampleSource, *, workers: int = 0, label: str = "encoding", dtype: StoredDtype = "float16"
) -> PatchTable | VectorTable | NoFeatures:
    """The features of every image, each encoded once, with a progress bar. Memory: 2 (N + L) Dv bytes an image (128 KB for 7 x 7 x 1280).

    Each of several processes encodes its share, and all get the whole. Raises ConfigError where the active adapter trains what encodes images, DataError
    for a feature that the dtype cannot hold.
    """
    if model.tower.adapter is None and model.changes_features:
        raise ConfigError(
            "the active adapter has a connector of its own, so an image's features change with every step and cannot be cached: encode images as they come "
            "(train.features: encode)"
        )
    if isinstance(model.tower, NoTower):
        return NoFeatures(len(source))
    if isinstance(model.tower, ModelTower):
        return _vectors_of_all(model.tower, source, workers=workers, label=label, dtype=dtype)
    tower, state, contents = model.tower, process_state(), all_contents(model.tower, dtype)
    assert isinstance(contents, Contents)
    table = torch.zeros(len(source), *contents.shape, dtype=contents.torch_dtype)
    bad: dict[int, BadSample] = {}
    own = range(state.process_index, -(-len(source) // GROUP), state.num_processes)
    for images, features, found in progress(encoded_groups(tower, source, own, workers=workers), label, len(own)):
        if features is not None:
            table[images] = contents.of(features).cpu()
        bad.update(found)
    if state.num_processes > 1:
        bad = dict(sorted(((index, sample) for part in gather_object([bad]) for index, sample in part.items()), key=lambda pair: pair[0]))
        for chunk in table.split(_SHARED_AT_ONCE):  # what others encoded is zero here, so that a sum puts all together
            shared = chunk.to(state.device)
            torch.distributed.all_reduce(shared)
            chunk.copy_(shared)
    return PatchTable(table, bad)


# ----------------------------------------
# The images of a data set, decoded each time the model reads them: in the place of cached features where the encoder is trained.


@dataclass(frozen=True, kw_only=True)
class PixelTable:
    """Pixels by sample index, float32 [3, H, W] as an encoder takes them. A `multimodal.data.inputs.CachedFeatures`, though it caches nothing.

    indices   of the samples in the source
    bad       the samples without a usable image, by their place among the indices
    shape     of an image's pixels; of a model that sees already, whose images differ in it, ()
    """

    source: SampleSource
    preprocess: Any
    indices: Sequence[int]
    bad: Mapping[int, BadSample]
    shape: tuple[int, ...]
    kind: Literal["pixels"] = "pixels"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor | BadSample:
        return self.bad[index] if index in self.bad else read_pixels(self.source[self.indices[index]], self.preprocess)

    def usable(self) -> list[int]:
        """The indices of the samples with a usable image."""
        return [index for index in range(len(self)) if index not in self.bad]

    def only(self, indices: Sequence[int]) -> PixelTable:
        """The table of these samples alone: index i is the i-th of them."""
        bad = {i: self.bad[index] for i, index in enumerate(indices) if index in self.bad}
        return replace(self, indices=[self.indices[index] for index in indices], bad=bad)


def pixel_table(source: SampleSource, preprocess: Any, *, label: str) -> PixelTable:
    """Every image of a data set, each decoded once here, with a progress bar, to find those that cannot be read."""
    bad: dict[int, BadSample] = {}
    shape: tuple[int, ...] = ()
    for index in progress(range(len(source)), label):
        pixels = _read_one(source, preprocess, index)
        if isinstance(pixels, BadSample):
            bad[index] = pixels
        else:
            shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else ()
    return PixelTable(source=source, preprocess=preprocess, indices=range(len(source)), bad=bad, shape=shape)

"""Samples to batches, in worker processes, in an exact order."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adalink.errors import CheckpointError, DataError
from multimodal.batches.collate import Batch, collate, stacked
from multimodal.batches.packing import Arrange, Composed, arrangement_of, joined_rows, row_limit, separate_rows
from multimodal.batches.prepared import Prepared, joined
from multimodal.batches.tokenize import Row, RowEncoder, TextRowEncoder, TextTooLong
from multimodal.data.images.decode import BadImage
from multimodal.data.inputs import CachedFeatures, NoFeatures, blank, drawing, read_pixels
from multimodal.data.order import (
    BucketedOrder,
    Order,
    OrderChoice,
    fingerprint_of,
    innermost,
    order_note,
    order_of,
    reading_plan,
    sets_of,
    texts_fingerprint_of,
    windows_of,
)
from multimodal.data.shards.ahead import Ahead, check_room
from multimodal.data.shards.reader import ShardSource
from multimodal.data.workers import made_in_order
from multimodal.sample import BadSample, BadSamples, DamagedSample, Sample, SampleSource, lengths_of
from multimodal.template import Text

__all__ = ["Batches", "TrainingTask", "Loaded", "Texts", "TrainLoader", "new_batches", "train_loader"]


Texts = Callable[[Sample, random.Random], Sequence[Text]]
"""What a task learns from a sample; it may draw from the generator, which is a function of seed and position."""

Preprocess = Callable[[Image.Image], Any]  # to a tensor, or to what an existing model's processor makes of it


@dataclass(frozen=True)
class Loaded:
    """What one step reads: a batch (None where every sample of it was bad), its images by index, and the bad samples that it would have held.

    asked   the indices of all samples of the step, good and bad
    """

    batch: Batch | None
    bad: tuple[BadSample, ...]
    images: tuple[int, ...] = ()
    asked: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Item:
    key: str
    index: int
    image: Tensor | Prepared
    rows: tuple[Row, ...]


class _Positions:
    """Position in the stream -> rows with their image. `patches` holds features by sample index where they are cached in memory."""

    def __init__(
        self,
        source: SampleSource,
        order: Order,
        seed: int,
        texts: Texts,
        encoder: RowEncoder,
        arrange: Arrange,
        preprocess: Preprocess,
        patches: CachedFeatures | None,
    ) -> None:
        self.source, self.order, self.seed, self.texts, self.encoder = source, order, seed, texts, encoder
        self.arrange, self.preprocess, self.patches = arrange, preprocess, patches
        self._ahead: tuple[Ahead, ...] = ()

    def follow(self, rank: int, world: int, batch_size: int) -> None:
        """From now on shards on servers are fetched as this rank reads them. Raises ConfigError where their cache is too small for that."""
        sets = map(innermost, sets_of(self.source))
        plans = zip(sets, reading_plan(self.order, rank, world, batch_size), strict=True)
        found = [one.follow(plan) for one, plan in plans if isinstance(one, ShardSource)]
        self._ahead = tuple(ahead for ahead in found if ahead is not None)
        check_room(self._ahead)

    def __getitem__(self, position: int) -> _Item | BadSample:
        for ahead in self._ahead:
            ahead.at(position)
        index = self.order.sample(position)
        try:
            sample = self.source[index]
        except DamagedSample as error:
            return error.bad
        texts = self.texts_of(sample, self.seed * 1_000_003 + position)
        epoch = (self.seed, position // len(self.source))
        known = None if self.patches is None else self.patches[index] if self.encoder.reads_images else None
        if isinstance(known, BadSample):
            return known
        try:
            image = read_pixels(sample, self.preprocess, epoch) if known is None and self.encoder.reads_images else known
            rows = self.rows(texts, image) if texts else ()
            if not any(row.target or row.score is not None for row in rows):
                return BadSample(key=sample.key, reason="no text", detail=f"{sample.key} has no text to learn from", file=sample.file)
            if image is None and self.patches is None:
                image = read_pixels(sample, self.preprocess, epoch)
        except BadImage as error:
            return BadSample(key=sample.key, reason=error.reason, detail=str(error), file=sample.file)
        except TextTooLong as error:
            return BadSample(key=sample.key, reason="text too long", detail=str(error), file=sample.file)
        except DataError as error:
            return BadSample(key=sample.key, reason="unreadable", detail=str(error), file=sample.file)
        if image is None:
            assert self.patches is not None
            image = self.patches[index]  # damage in features that can be made again ends the run: no image is left out for it
        return image if isinstance(image, BadSample) else _Item(sample.key, index, image, rows)

    def texts_of(self, sample: Sample, seed: int) -> list[Text]:
        """The training texts of a sample, without empty ones: those would teach a model to write nothing."""
        return [text for text in self.texts(sample, random.Random(seed)) if text.scores is not None or (text.target or "").strip()]

    def rows(self, texts: Sequence[Text], image: Tensor | Prepared | None = None, n_images: int = 1) -> tuple[Row, ...]:
        """The rows of a sample, which in a composed model do not depend on its image; raises TextTooLong. n_images: black ones, where it is None."""
        is_blank = self.encoder.reads_images and image is None
        about = joined([self._blank] * n_images) if is_blank and isinstance(self._blank, Prepared) else image
        return tuple(self.arrange([_marked(self.encoder.row(text, about), text) for text in texts]))

    @cached_property
    def _blank(self) -> Tensor | Prepared:
        return blank(self.preprocess)

    def blank(self) -> Tensor | Prepared:
        """A black image, as images are given: its pixels, or features that are all zero."""
        if self.patches is None:
            return self._blank
        zeros = torch.zeros(self.patches.shape)
        return self._blank.encoded(zeros[:1].expand(self._blank.n_vectors, -1)) if self.encoder.reads_images and isinstance(self._blank, Prepared) else zeros

    def length(self, sample: Sample) -> int:
        """Tokens of a sample's longest row; the mean of some draws where texts are drawn, which is rough; 0 where it is a bad one."""
        draws = {tuple(self.texts_of(sample, number)) for number in range(2)}
        if len(draws) > 1:
            draws |= {tuple(self.texts_of(sample, number)) for number in range(2, 8)}
        try:
            made = [self.rows(texts, n_images=len(sample.images)) for texts in draws if texts]
            return sum(max(len(row.ids) + len(row.decoder_ids) for row in rows) for rows in made) // len(draws)
        except TextTooLong:
            return 0


def _marked(row: Row, text: Text) -> Row:
    """The row with its text's weight and task."""
    weight = () if text.weight == 1 else (text.weight,) * len(row.target)
    return replace(row, weight=weight, task=text.task) if weight or text.task else row


class _Steps:
    """The positions of each step of one rank, from a position on: rank r of W reads every step's r-th part of the global batch."""

    def __init__(self, first: int, steps: int, batch_size: int, rank: int, world: int, end: int | None) -> None:
        self.first, self.steps, self.batch_size, self.rank, self.world, self.end = first, steps, batch_size, rank, world, end

    def __iter__(self) -> Iterator[range]:
        for step in range(self.steps):
            start = self.first + (step * self.world + self.rank) * self.batch_size
            stop = start + self.batch_size
            yield range(start, stop if self.end is None else max(start, min(stop, self.end)))


class _Collate:
    """row_tokens: how long a row of several images may be; 0 where each image has rows of its own."""

    def __init__(self, kind: Literal["pixels", "patches", "taps"], pad_id: int, row_tokens: int = 0) -> None:
        self.kind, self.pad_id, self.row_tokens = kind, pad_id, row_tokens

    def __call__(self, items: list[_Item | BadSample]) -> Loaded:
        good = [item for item in items if isinstance(item, _Item)]
        bad = tuple(item for item in items if isinstance(item, BadSample))
        if not good:
            return Loaded(None, bad)
        rows = [row for item in good for row in item.rows]
        image = [i for i, item in enumerate(good) for _ in item.rows]
        if self.row_tokens:
            rows, image = joined_rows(rows, image, self.row_tokens)
        images = stacked([item.image for item in good])
        batch = collate(rows, image, images, kind=self.kind, side="right", pad_id=self.pad_id, keys=[item.key for item in good])
        return Loaded(batch, bad, tuple(item.index for item in good))


_SENTENCES = {
    "seed": "train.seed", "samples": "images in the data set", "weights": "the sets' weights", "data": "the data's fingerprint",
    "window": "train.window (0 where train.order is global)", "shards": "the check sum of the shards' sizes", "bucket_pool": "train.bucket_pool",
    "lengths": "the check sum of the texts' lengths",
}  # fmt: skip


_Ordered = Callable[[Mapping[str, Any]], Order]  # from a stream's state, empty for a new one: what was made for a size of step stays so


class TrainLoader:
    """`Loaded` for each step of one rank, in an order that only seed and data decide.

    `state_dict` says where the stream is: what was handed out counts, not what worker processes read ahead. A loader with another number
    of workers, ranks or images in a step goes on from there at the next sample.
    """

    def __init__(
        self, positions: _Positions, collate: _Collate, ordered: _Ordered, *, steps: int, batch_size: int, workers: int, rank: int, world: int
    ) -> None:
        self.steps = steps
        self._positions, self._collate, self._ordered = positions, collate, ordered
        self._batch_size, self._workers, self._rank, self._world = batch_size, workers, rank, world
        self._position = 0
        self.end: int | None = None  # the stream's, where it has one: its last steps are then smaller
        positions.follow(rank, world, batch_size)

    def __iter__(self) -> Iterator[Loaded]:
        """The next `steps` steps. Raises DataError where a worker process dies, or a shard is gone."""
        steps = _Steps(self._position, self.steps, self._batch_size, self._rank, self._world, self.end)
        for loaded in made_in_order(partial(_load, self._positions, self._collate), steps, workers=self._workers):
            after = self._position + self._batch_size * self._world
            self._position = after if self.end is None else min(after, self.end)
            yield loaded

    @property
    def position(self) -> int:
        """How many samples of the stream all ranks together were handed."""
        return self._position

    def blank(self) -> Batch:
        """One row about a black image: what a rank runs, and learns nothing from, where every sample of its part of a step is bad."""
        rows = self._positions.rows([Text("", "a", scores=())])
        batch = self._collate([_Item("", 0, self._positions.blank(), rows)]).batch
        assert batch is not None
        return batch

    @property
    def order_note(self) -> str:
        """How the samples are ordered, a line for a log."""
        return order_note(self._positions.order)

    def steps_to(self, position: int) -> int:
        """Steps until the images before this position of the stream are read."""
        return max(0, -(-(position - self._position) // (self._batch_size * self._world)))

    def read_cached(self, retained: CachedFeatures) -> None:
        """From here on, cached features take the place of images."""
        self._positions.patches, self._collate = retained, _Collate(retained.kind, self._collate.pad_id, self._collate.row_tokens)

    def state_dict(self) -> dict[str, Any]:
        """JSON: how many images all ranks together were handed, and what the order is a function of."""
        return {"position": self._position, **self._positions.order.state(), "data": texts_fingerprint_of(self._positions.source)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a loader was. Raises CheckpointError where this one has another order or other data."""
        self._positions.order = self._ordered(state)
        own = self.state_dict()
        for name, words in _SENTENCES.items():
            # Without windows or pools a state says nothing of them.
            found, given = (value[0] if isinstance(value, list) and len(value) == 1 else value for value in (state.get(name, 0), own.get(name, 0)))
            if name == "data" and found in ("", fingerprint_of(self._positions.source)):
                continue  # of a checkpoint from before texts were compared
            if found != given:
                hint = ": were captions, questions or answers edited since?" if name == "data" else ""
                raise CheckpointError(f"{words} was {found} and is {given}{hint}")
        self._position = int(state["position"])
        self._positions.follow(self._rank, self._world, self._batch_size)


def train_loader(
    source: SampleSource,
    texts: Texts,
    encoder: RowEncoder,
    arrange: Arrange,
    preprocess: Preprocess,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    patches: CachedFeatures | None = None,
    row_tokens: int = 0,
    bucket_pool: int = 0,
    order: OrderChoice = "auto",
    window: int = 16,
    nodes: int = 1,
) -> TrainLoader:
    """Reads `steps` steps from the stream's start, or from where `load_state_dict` puts it.

    batch_size   images per step and rank
    row_tokens   images of a step come one after the other in rows of up to so many tokens; 0: each has rows of its own
    bucket_pool  samples of like length share a batch, found among so many steps of all ranks (`multimodal.data.order`); 0: as they come
    order        `shards` reads windows of `window` shards for each of `nodes`; auto: for sets on servers, or what the state of the stream says

    Raises ConfigError where lengths, or an order, are asked for that the source cannot say.
    """
    windows, step = windows_of(source, order, window), batch_size * world

    def ordered(state: Mapping[str, Any]) -> Order:
        each = windows
        if order == "auto" and state:  # one from before there were windows says nothing of them
            each = tuple(window if any(state.get("window", ())[k : k + 1]) else 0 for k in range(len(windows)))
        parts = int(state.get("shard_parts", 1)) if state else 1 if bucket_pool else math.gcd(nodes, world)
        made = order_of(source, seed, each, parts=parts, step=int(state.get("shard_step", step)))
        batch = int(state.get("bucket_batch", step))
        return BucketedOrder(made, lengths, seed=seed, pool=bucket_pool, batch=batch) if bucket_pool else made

    positions = _Positions(source, order_of(source, seed), seed, texts, encoder, arrange, preprocess, patches)
    lengths = lengths_of(source, positions.length) if bucket_pool else np.empty(0, dtype=np.int64)
    positions.order = ordered({})
    kind = patches.kind if patches is not None else "pixels"
    collated = _Collate(kind, encoder.placeholder, row_tokens)
    return TrainLoader(positions, collated, ordered, steps=steps, batch_size=batch_size, workers=workers, rank=rank, world=world)


def _load(positions: _Positions, collate: _Collate, step: range) -> Loaded:
    return replace(collate([positions[position] for position in step]), asked=tuple(positions.order.sample(position) for position in step))


# ----------------------------------------
# The batches that a model learns from, in an exact order: what `train` reads, and any loop of one's own.
#
#     optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
#     for batch in model.batches(samples, task, batch_size=16, epochs=3):
#         model(batch).backward()
#         optimizer.step()
#         optimizer.zero_grad()


CHOSEN = "one row per question: its answer is chosen from the state of its row; loss: {} in {}"


class TrainingTask(Protocol):
    """A task, as far as training asks it: `tasks.captioning.Captioning` and `tasks.vqa.Vqa` are such."""

    def texts(self, sample: Sample, rng: random.Random) -> Sequence[Text]:
        """The training texts of a sample; may draw from the generator."""


class Batches:
    """Batches on the model's device. Each loop over it reads `epochs` passes more of the data, in an order that only seed and data decide.

    loader   what `train` reads: the same batches with the samples that were left out of each, and a state to go on from
    note     how texts share rows, a line for a log
    bad      the samples that were left out so far
    """

    def __init__(self, model: Composed, loader: TrainLoader, note: str, bad: BadSamples, n_samples: int) -> None:
        self.loader, self.note, self.bad = loader, note, bad
        self._model, self._n_samples = model, n_samples
        self._seen: set[tuple[str, str]] = set()

    def __iter__(self) -> Iterator[Batch]:
        """Raises BudgetError over the budget of bad samples. A batch without a good sample is left out."""
        self.loader.end = self.loader.position + self._n_samples
        for loaded in self.loader:
            for sample in loaded.bad:
                if (sample.key, sample.reason) not in self._seen:  # once, whatever the number of epochs that meet it
                    self._seen.add((sample.key, sample.reason))
                    self.bad.add(sample)
            self.bad.check()
            if loaded.batch is not None:
                yield loaded.batch.to(self._model.device)

    def __len__(self) -> int:
        return self.loader.steps  # fewer where a batch has no good sample


def new_batches(
    model: Composed,
    source: SampleSource,
    task: TrainingTask | Texts,
    *,
    epochs: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    workers: int = 0,
    features: CachedFeatures | None = None,
    row_tokens: int = 0,
    bucket_pool: int = 0,
    order: OrderChoice = "auto",
    window: int = 16,
    bad_samples: int = 10,
    rank: int = 0,
    world: int = 1,
    nodes: int = 1,
    weights: Literal["whole", "split"] = "whole",
    draw_frames: bool = False,
) -> Batches:
    """What the model's active adapter learns from. Settings are those of TrainSettings of the same names.

    task      or a function of a sample and a generator that gives its texts
    features  cached ones (`multimodal.data.feature_cache.encode.encode_all`); without, images are decoded, and encoded in the model's call
    rank      reads the rank-th part of `world` parts of each step
    nodes     machines that these ranks are on, as many on each: with an order by shards each machine reads its own
    weights   split over processes (FSDP2) or whole

    Raises ConfigError where no adapter is active, or lengths are asked for that the source cannot say.
    """
    texts: Texts = task if callable(task) else task.texts
    head: Any = model.head
    arrange, note = (separate_rows, CHOSEN.format(*head.loss_name)) if head is not None else arrangement_of(model, weights)
    encoder = model.row_encoder()
    features = NoFeatures(len(source)) if features is None and isinstance(encoder, TextRowEncoder) else features
    row_tokens, note = row_limit(arrange, note, row_tokens, encoder.max_positions)
    n_samples = math.ceil(epochs * len(source))
    preprocess: Preprocess = model.tower.preprocess
    loader = train_loader(
        source, texts, encoder, arrange, drawing(preprocess) if draw_frames else preprocess, steps=-(-n_samples // (batch_size * world)),
        batch_size=batch_size, seed=seed, workers=workers, rank=rank, world=world, patches=features, row_tokens=row_tokens,
        bucket_pool=bucket_pool, order=order, window=window, nodes=nodes,
    )  # fmt: skip
    return Batches(model, loader, note, BadSamples(budget=bad_samples), n_samples)

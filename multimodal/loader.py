"""Samples to batches, in worker processes, in an exact order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from adalink.errors import DataError
from multimodal.bad_samples import BadSample
from multimodal.batch import Batch, collate
from multimodal.encode import Row, RowEncoder, TextTooLong
from multimodal.images import BadImage, decode_image
from multimodal.order import SampleOrder
from multimodal.packing import Arrange
from multimodal.sample import Sample, SampleSource
from multimodal.shards import DamagedSample
from multimodal.template import Text

__all__ = ["Loaded", "Texts", "train_loader"]

Texts = Callable[[Sample, random.Random], Sequence[Text]]
"""What a task learns from a sample; it may draw from the generator, which is a function of seed and position."""

Preprocess = Callable[[Image.Image], Tensor]


class Kept(Protocol):
    """Features that are kept, by sample index."""

    def __getitem__(self, index: int) -> Tensor | BadSample: ...


@dataclass(frozen=True)
class Loaded:
    """What one step reads: a batch (None where every sample of it was bad) and the bad samples that it would have held."""

    batch: Batch | None
    bad: tuple[BadSample, ...]


@dataclass(frozen=True)
class _Item:
    key: str
    picture: Tensor
    rows: tuple[Row, ...]


class _Positions(Dataset["_Item | BadSample"]):
    """Position in the stream -> rows with their picture. `patches` holds features by sample index where they are kept in memory."""

    def __init__(
        self,
        source: SampleSource,
        order: SampleOrder,
        texts: Texts,
        encoder: RowEncoder,
        arrange: Arrange,
        preprocess: Preprocess,
        patches: Kept | None,
    ) -> None:
        self.source, self.order, self.texts, self.encoder = source, order, texts, encoder
        self.arrange, self.preprocess, self.patches = arrange, preprocess, patches

    def __getitem__(self, position: int) -> _Item | BadSample:
        index = self.order.sample(position)
        try:
            sample = self.source[index]
        except DamagedSample as error:
            return error.bad
        texts = self.texts(sample, random.Random(self.order.seed * 1_000_003 + position))
        if not texts:
            return BadSample(key=sample.key, reason="no text", detail=f"{sample.key} has no text to learn from")
        try:
            rows = tuple(self.arrange([self.encoder.row(text) for text in texts]))
            if self.patches is None:
                return _Item(sample.key, self.preprocess(decode_image(sample.image)), rows)
            kept = self.patches[index]
            return kept if isinstance(kept, BadSample) else _Item(sample.key, kept, rows)
        except BadImage as error:
            return BadSample(key=sample.key, reason=error.reason, detail=str(error))
        except TextTooLong as error:
            return BadSample(key=sample.key, reason="text too long", detail=str(error))
        except DataError as error:
            return BadSample(key=sample.key, reason="unreadable", detail=str(error))


class _StepSampler(Sampler[list[int]]):
    """The positions of each step of one rank, from a step on: rank r of W reads every step's r-th part of the global batch."""

    def __init__(self, first: int, last: int, batch_size: int, rank: int, world: int) -> None:
        self.first, self.last, self.batch_size, self.rank, self.world = first, last, batch_size, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            start = (step * self.world + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return self.last - self.first


class _Collate:
    def __init__(self, kind: Literal["pixels", "patches"], pad_id: int) -> None:
        self.kind, self.pad_id = kind, pad_id

    def __call__(self, items: list[_Item | BadSample]) -> Loaded:
        good = [item for item in items if isinstance(item, _Item)]
        bad = tuple(item for item in items if isinstance(item, BadSample))
        if not good:
            return Loaded(None, bad)
        rows = [row for item in good for row in item.rows]
        image = [i for i, item in enumerate(good) for _ in item.rows]
        pictures = torch.stack([item.picture for item in good])
        return Loaded(collate(rows, image, pictures, kind=self.kind, side="right", pad_id=self.pad_id, keys=[item.key for item in good]), bad)


def train_loader(
    source: SampleSource,
    texts: Texts,
    encoder: RowEncoder,
    arrange: Arrange,
    preprocess: Preprocess,
    *,
    steps: range,
    batch_size: int,
    seed: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    patches: Kept | None = None,
) -> DataLoader[_Item | BadSample]:
    """Yields `Loaded` for each step of `steps`; resume by starting the range later. batch_size: pictures per step and rank."""
    positions = _Positions(source, SampleOrder(len(source), seed), texts, encoder, arrange, preprocess, patches)
    return DataLoader(
        positions,
        batch_sampler=_StepSampler(steps.start, steps.stop, batch_size, rank, world),
        collate_fn=_Collate("pixels" if patches is None else "patches", encoder.placeholder),
        num_workers=workers,
        persistent_workers=False,
        pin_memory=torch.cuda.is_available(),
    )

"""The batches that a model learns from, in an exact order: what `train` reads, and any loop of one's own.

    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    for batch in model.batches(samples, task, batch_size=16, epochs=3):
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from multimodal.bad_samples import BadSamples
from multimodal.batch import Batch
from multimodal.joined_rows import row_limit
from multimodal.kept import Kept
from multimodal.loader import Texts, TrainLoader, train_loader
from multimodal.packing import arrangement_of, separate_rows
from multimodal.sample import Sample, SampleSource
from multimodal.template import Text

if TYPE_CHECKING:
    from multimodal.model import VisionLanguageModel

__all__ = ["Batches", "Learns", "new_batches"]

CHOSEN = "one row per question: its answer is chosen from the state of its row; loss: binary cross entropy in nats per question"


class Learns(Protocol):
    """A task, as far as training asks it: `tasks.captioning.Captioning` and `tasks.vqa.Vqa` are such."""

    def texts(self, sample: Sample, rng: random.Random) -> Sequence[Text]:
        """What is learnt from a sample; may draw from the generator."""


class Batches:
    """Batches on the model's device. Each loop over it reads `epochs` passes more of the data, in an order that only seed and data decide.

    loader   what `train` reads: the same batches with the samples that were left out of each, and a state to go on from
    told     how texts share rows, a line for a log
    bad      the samples that were left out so far
    """

    def __init__(self, model: VisionLanguageModel, loader: TrainLoader, told: str, bad: BadSamples, n_samples: int) -> None:
        self.loader, self.told, self.bad = loader, told, bad
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
    model: VisionLanguageModel,
    source: SampleSource,
    task: Learns | Texts,
    *,
    epochs: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    workers: int = 0,
    features: Kept | None = None,
    row_tokens: int = 0,
    bucket_pool: int = 0,
    bad_samples: int = 10,
    rank: int = 0,
    world: int = 1,
    weights: Literal["whole", "split"] = "whole",
) -> Batches:
    """What the model's active adapter learns from. Settings are those of TrainSettings of the same names.

    task      or a function of a sample and a generator that gives its texts
    features  kept ones (`multimodal.patch_table.encode_all`); without, images are decoded, and encoded in the model's call
    rank      reads the rank-th part of `world` parts of each step
    weights   split over processes (FSDP2) or whole

    Raises ConfigError where no adapter is active, or lengths are asked for that the source cannot say.
    """
    texts: Texts = task if callable(task) else task.texts
    arrange, told = (separate_rows, CHOSEN) if model.head is not None else arrangement_of(model, weights)
    encoder = model.row_encoder()
    row_tokens, told = row_limit(arrange, told, row_tokens, encoder.max_positions)
    n_samples = math.ceil(epochs * len(source))
    loader = train_loader(
        source, texts, encoder, arrange, model.tower.preprocess, steps=-(-n_samples // (batch_size * world)), batch_size=batch_size,
        seed=seed, workers=workers, rank=rank, world=world, patches=features, row_tokens=row_tokens, bucket_pool=bucket_pool,
    )  # fmt: skip
    return Batches(model, loader, told, BadSamples(budget=bad_samples), n_samples)

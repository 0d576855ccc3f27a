"""The form in which a run's settings let a model learn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from adalink.still import without_dropout
from multimodal.batch import Batch
from multimodal.compiled import compiled
from multimodal.kept_states import kept_states
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.train_settings import TrainSettings

__all__ = ["learner", "mean_loss"]


@contextlib.contextmanager
def learner(model: VisionLanguageModel, settings: TrainSettings, n_pictures: int) -> Iterator[None]:
    """Inside the block the model is compiled, or keeps the states of its texts, where that is asked for. Raises ConfigError where it cannot."""
    with compiled(model, settings.compile), kept_states(model, settings.states_gib, n_pictures):
        yield


@torch.no_grad()
def mean_loss(model: VisionLanguageModel, batches: Iterable[Batch]) -> float | None:
    """The loss per target (per question, where a head chooses) over all batches of all processes, without dropout; None where they hold no target.

    Every process gives its own part of the batches, and gets the whole loss.
    """
    state, lower, call = process_state(), model.language_loss.lower, model.language_loss.call
    total = torch.zeros(2, dtype=torch.float64)  # loss, targets
    model.language_loss.lower, model.language_loss.call = None, model.adapted.base  # neither kept nor compiled for
    try:
        with without_dropout(model):
            for batch in batches:
                total += torch.tensor([float(model(batch)) * batch.n_targets, batch.n_targets], dtype=torch.float64)
    finally:
        model.language_loss.lower, model.language_loss.call = lower, call
    if state.num_processes > 1:
        shared = total.float().to(state.device)  # some devices have no float64
        torch.distributed.all_reduce(shared)
        total = shared.double().cpu()
    return float(total[0] / total[1]) if total[1] else None

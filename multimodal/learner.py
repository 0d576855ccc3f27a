"""The form in which a run's settings let a model learn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from multimodal.compiled import compiled
from multimodal.kept_states import kept_states
from multimodal.model import VisionLanguageModel
from multimodal.train_settings import TrainSettings

__all__ = ["learner"]


@contextlib.contextmanager
def learner(model: VisionLanguageModel, settings: TrainSettings, n_pictures: int) -> Iterator[None]:
    """Inside the block the model is compiled, or keeps the states of its texts, where that is asked for. Raises ConfigError where it cannot."""
    with compiled(model, settings.compile), kept_states(model, settings.states_gib, n_pictures):
        yield

"""What the processes of the tests do that fill a folder of features together; importable, because a process is sent its function by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from composed import Drawn
from rank_jobs import GO, SETTINGS, holding, model, ragged

from multimodal.data.feature_cache.encode import opened_writer
from multimodal.data.feature_cache.format import all_contents, needed_contents
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

N, BAD = 13, (4,)


def filled(folder: Path, features: Path, batch_size: int = 2, held: int = 0, resume: bool = False) -> int:
    """Train, and fill the features in the first epoch."""
    made, source = model(), Drawn(N, BAD)
    fields: dict[str, Any] = {**SETTINGS, "steps": 8, "batch_size": batch_size, "checkpoint_every": 1, "measure_every": int(held > 0)}
    settings = TrainSettings(**fields, features="fill")
    contents = needed_contents(made.adapted.active_adapter(), all_contents(made.tower))
    with opened_writer(made.tower, source, features, contents) as writer:
        train(made, source, ragged, settings, folder, resume=resume, patches=writer, measure=holding(held, folder / GO))
    return 0


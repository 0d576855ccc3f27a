"""The pictures that a tracker shows at each measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adalink.errors import DataError
from multimodal.images import decode_image
from multimodal.sample import SampleSource
from multimodal.trackers import Shown
from tasks.task import Task

__all__ = ["shown_samples"]

N_SHOWN = 6


def shown_samples(source: SampleSource, task: Task, texts: Mapping[int, str]) -> Sequence[Shown]:
    """Some pictures, always the same ones and spread over the source, each with the first thing asked and what was said."""
    shown: list[Shown] = []
    for index in range(0, len(source), max(len(source) // N_SHOWN, 1)):
        sample = source[index]
        asked = next((one for one in task.asked(sample) if one.item in texts), None)
        if asked is None or len(shown) == N_SHOWN:
            continue
        try:
            image = decode_image(sample.image)
        except DataError:  # a source that has become unreadable is the evaluation's to report
            continue
        shown.append(Shown(key=sample.key, image=image, said=f"{asked.question} {texts[asked.item]}".strip()))
    return shown

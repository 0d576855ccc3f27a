"""What TensorBoard or Weights & Biases are told at a measurement: figures, and pictures with what was said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

__all__ = ["Shown", "track"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture, and what the model said about it. key: the sample's, which the tracker lists it under."""

    key: str
    image: Image.Image
    said: str


def track(accelerator: Accelerator, step: int, figures: Mapping[str, float], shown: Sequence[Shown] = ()) -> None:
    """Tell every tracker of the run; nothing where there is none, and on the main process alone."""
    accelerator.log(dict(figures), step=step)
    if not accelerator.is_main_process:
        return
    for tracker in accelerator.trackers:
        {"tensorboard": _to_tensorboard, "wandb": _to_wandb}[tracker.name](tracker, step, shown)


def _to_tensorboard(tracker: Any, step: int, shown: Sequence[Shown]) -> None:
    """Picture and text under one name each, so that the page has a slider over the steps."""
    for one in shown:
        tracker.writer.add_image(f"samples/{one.key}", np.asarray(one.image.convert("RGB")), step, dataformats="HWC")
        tracker.writer.add_text(f"samples/{one.key}", one.said, step)
    tracker.writer.flush()  # whoever looks while it trains sees this measurement


def _to_wandb(tracker: Any, step: int, shown: Sequence[Shown]) -> None:
    import wandb  # type: ignore[import-not-found]  # late: an extra, and only where it is asked for

    if shown:
        tracker.log({"samples": [wandb.Image(one.image, caption=f"{one.key}: {one.said}") for one in shown]}, step=step)

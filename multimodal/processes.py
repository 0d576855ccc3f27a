"""The processes that train together: one, or several under `torchrun` or `accelerate launch`, with DDP or FSDP2."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import signal
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import nn

from adalink.errors import AdalinkError, ConfigError
from multimodal.bad_samples import BadSample
from multimodal.loader import Loaded
from multimodal.train_settings import TrainSettings

__all__ = ["Agreed", "agree", "check_trackers", "done_by_main", "gathered", "opened_accelerator", "process_state", "step_seed"]

T = TypeVar("T")


@dataclass(frozen=True)
class Agreed:
    """What all processes know about a step before they take it.

    n_targets   what the loss is divided by: the targets of all processes and micro-batches; 0 where there is nothing to learn
    asked       how many samples of each set of the data were asked for
    good        how many of them could be used
    bad         the bad samples of all processes, in the order of their ranks: each counts and stops as one does
    stop        the signal by which any of them was asked to end; 0 where none was
    """

    n_targets: float
    asked: tuple[int, ...]
    good: tuple[int, ...]
    bad: tuple[BadSample, ...]
    stop: int


def agree(accelerator: Accelerator, group: Sequence[Loaded], stop: int, ends: Sequence[int]) -> Agreed:
    """One exchange of a few numbers, and of the bad samples themselves in the rare step that has some.

    ends: the index after the last sample of each set of the data.
    """
    bad = [sample for loaded in group for sample in loaded.bad]
    n_targets = sum(loaded.batch.n_targets for loaded in group if loaded.batch)
    # A process alone asks no device: that would wait for all that the device has still to do.
    counted = [*_per_set([loaded.asked for loaded in group], ends), *_per_set([loaded.pictures for loaded in group], ends)]
    signals = [float(stop == number) for number in (signal.SIGTERM, signal.SIGINT)]
    own = torch.tensor([float(n_targets), float(len(bad)), *signals, *counted], device=accelerator.device if accelerator.num_processes > 1 else "cpu")
    targets, n_bad, n_terminated, n_interrupted, *counts = accelerator.reduce(own, "sum").tolist()
    asked, good = tuple(map(int, counts[: len(ends)])), tuple(map(int, counts[len(ends) :]))
    ended_by = signal.SIGTERM if n_terminated else signal.SIGINT if n_interrupted else 0
    return Agreed(targets, asked, good, tuple(gathered(accelerator, bad)) if n_bad else (), ended_by)


def _per_set(indices: Sequence[Sequence[int]], ends: Sequence[int]) -> list[float]:
    """How many of the indices are of each set."""
    found = [0.0] * len(ends)
    for index in chain.from_iterable(indices):
        found[bisect_right(ends, index)] += 1
    return found


def gathered(accelerator: Accelerator, items: list[T]) -> list[T]:
    """The items of all processes, in the order of their ranks, on every one of them."""
    return list(gather_object(items)) if accelerator.num_processes > 1 else items


def process_state() -> PartialState:
    """The processes as accelerate knows them, read from the environment as its Accelerator reads it, so that a training finds the same state.

    On a machine without a GPU accelerate would leave processes that torchrun started each to itself, without a word, unless it is told.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def done_by_main(function: Callable[[], T]) -> T:
    """What the function gives in the main process, in every process; what the caller can mend is raised in every one of them too."""
    state = process_state()
    done: list[Any] = [None, None]
    if state.is_main_process:
        try:
            done = [function(), None]
        except AdalinkError as error:
            done = [None, error]
    if state.num_processes > 1:
        broadcast_object_list(done)
    value, raised = done
    if raised is not None:
        raise raised
    return value  # type: ignore[no-any-return]


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step's random numbers on one rank, so that they go on after a resume with any number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8]) >> 1


def check_trackers(settings: TrainSettings) -> None:
    """Raises ConfigError where a tracker is not installed, which accelerate would leave out without a word."""
    if missing := [name for name in settings.trackers if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"train.trackers names {', '.join(missing)}, and no such package is here: pip install 'adalink[trackers]', or leave it out")


@contextlib.contextmanager
def opened_accelerator(settings: TrainSettings, model: nn.Module, folder: Path) -> Iterator[Accelerator]:
    """An accelerator that leaves nothing behind: accelerate keeps one precision for a whole process, and wraps the model's forward in it.

    Raises as `check_trackers`.
    """
    check_trackers(settings)
    folder.mkdir(parents=True, exist_ok=True)
    process_state()
    before = dict(AcceleratorState._shared_state)  # of an accelerator in the same program: transformers' Trainer, or a loop of one's own
    if is_other := before.get("_mixed_precision", settings.precision) != settings.precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=settings.precision, log_with=list(settings.trackers) or None, project_dir=str(folder))
    try:
        yield accelerator
        for tracker in accelerator.trackers:  # not end_training, which ends the processes' connection too: they evaluate together after this
            tracker.finish()
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        vars(model).pop("forward", None)  # the class's own again, not a copy of it on the instance
        if is_other or not before:
            AcceleratorState._reset_state()
            AcceleratorState._shared_state.update(before)

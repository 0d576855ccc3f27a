"""The processes that work together under `torchrun` or `accelerate launch`: how many there are, and what one does for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from adalink.errors import AdalinkError

__all__ = ["done_by_main", "process_state"]

T = TypeVar("T")


def process_state() -> PartialState:
    """The processes as accelerate knows them, read from the environment as its Accelerator reads it, so that a training finds the same state.

    On a machine without a GPU, accelerate would silently run each process of torchrun by itself, unless ACCELERATE_USE_CPU is set.
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

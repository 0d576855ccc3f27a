"""The processes that train together: one, or several under `torchrun` or `accelerate launch`, with DDP or FSDP2."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import signal
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from adalink.checkpoint.precision import quantised_names
from adalink.errors import ConfigError
from multimodal.data.loader import Loaded
from multimodal.processes import process_state
from multimodal.sample import BadSample
from multimodal.training.settings import TrainSettings

__all__ = [
    "Agreed", "StopSignal", "agree", "check_trackers", "deterministic", "gathered", "host_group", "interrupts_noted", "n_nodes", "opened_accelerator",
    "rewrapped", "seed_all", "sigterm_noted", "step_seed", "take_off", "together",
]  # fmt: skip


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


def host_group(accelerator: Accelerator) -> torch.distributed.ProcessGroup | None:
    """The processes as they exchange what lies on the host, which no device is waited for; None of one alone. Every process must call it."""
    return torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None


def n_nodes(accelerator: Accelerator) -> int:
    """Machines that the processes are on, as `torchrun` and `accelerate launch` say it; 1 where they are not equally many on each."""
    world, local = accelerator.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return world // local if local > 0 and world % local == 0 else 1


def agree(
    accelerator: Accelerator, group: Sequence[Loaded], stop: int, ends: Sequence[int], host: torch.distributed.ProcessGroup | None
) -> Agreed:
    """One exchange of a few numbers, and of the bad samples themselves in the rare step that has some.

    ends: the index after the last sample of each set of the data. host: see `host_group`.
    """
    bad = [sample for loaded in group for sample in loaded.bad]
    n_targets = sum(loaded.batch.n_targets for loaded in group if loaded.batch)
    counted = [*_per_set([loaded.asked for loaded in group], ends), *_per_set([loaded.images for loaded in group], ends)]
    signals = [float(stop == number) for number in (signal.SIGTERM, signal.SIGINT)]
    # On the host: a device would be waited for until it has done all that it has still to do.
    own = torch.tensor([float(n_targets), float(len(bad)), *signals, *counted], dtype=torch.float64)
    if host is not None:
        torch.distributed.all_reduce(own, group=host)
    targets, n_bad, n_terminated, n_interrupted, *counts = own.tolist()
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


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step's random numbers on one rank, so that they go on after a resume with any number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8]) >> 1


def seed_all(seed: int) -> None:
    """As torch.manual_seed, which queues a call with its stack for each kind of device that is not there: every step would leave some KiB behind."""
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)


def check_trackers(settings: TrainSettings) -> None:
    """Raises ConfigError where a tracker is not installed, which accelerate would leave out without a word."""
    if missing := [name for name in settings.trackers if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"train.trackers names {', '.join(missing)}, and no such package is here: pip install 'adalink[trackers]', or leave it out")


@contextlib.contextmanager
def opened_accelerator(settings: TrainSettings, model: nn.Module, folder: Path) -> Iterator[Accelerator]:
    """An accelerator that leaves nothing behind: accelerate keeps one precision for a whole process, and wraps the model's forward in it.

    DDP sends the first process's weights to the others, but not quantised ones: it cannot send them, and each process has loaded them from the same file.
    Raises as `check_trackers`.
    """
    check_trackers(settings)
    folder.mkdir(parents=True, exist_ok=True)
    process_state()
    before = dict(AcceleratorState._shared_state)  # of an accelerator in the same program: transformers' Trainer, or a loop of one's own
    if is_other := before.get("_mixed_precision", settings.precision) != settings.precision:
        AcceleratorState._reset_state()
    # What is frozen has no buffers that change, and gradients need no copy beside the buckets that are reduced.
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision=settings.precision, log_with=list(settings.trackers) or None, project_dir=str(folder), kwargs_handlers=[parallel]
    )
    if quantised := quantised_names(model):
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, quantised)
    try:
        yield accelerator
        for tracker in accelerator.trackers:  # not end_training, which ends the processes' connection too: they evaluate together after this
            tracker.finish()
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        vars(model).pop("forward", None)  # the class's own again, not a copy of it on the instance
        vars(model).pop("_ddp_params_and_buffers_to_ignore", None)
        if is_other or not before:
            AcceleratorState._reset_state()
            AcceleratorState._shared_state.update(before)


def rewrapped(model: nn.Module) -> nn.Module:
    """A model that waits for gradients of the weights that have one now: DDP finds out when it is made. Other models come back as they are."""
    if not isinstance(model, DistributedDataParallel):
        return model
    places: dict[str, Any] = {"device_ids": model.device_ids, "output_device": model.output_device, "process_group": model.process_group}
    return DistributedDataParallel(model.module, **places, broadcast_buffers=model.broadcast_buffers, gradient_as_bucket_view=model.gradient_as_bucket_view)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside the block torch runs nothing whose result differs from run to run, where that is wanted: sums that a GPU makes in any order, above all.

    Raises ConfigError where an operation of the block has no other form.
    """
    if not wanted:
        yield
        return
    before, only_warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")  # cuBLAS is deterministic with this alone, and torch refuses it without
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise ConfigError(f"train.deterministic is true, and {operation} of torch has no deterministic form: train with train.deterministic: false") from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


# ----------------------------------------
# FSDP2: weights that are split over processes, put together where a model generates, and left whole where a training ends.


@contextlib.contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Inside the block every process holds all weights, and runs the model as often as it likes without waiting for the others."""
    shards = _shards(model)
    for shard in shards:
        # Else a layer would be split again after its first call, and the next would wait for processes that generate less.
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.set_reshard_after_forward(shard is not model, recurse=False)  # fully_shard's own default: all but the root
            shard.reshard()
            # What ran in the block in this process alone would else stand in the order in which all fetch weights in the next backward pass.
            for group in shard._get_fsdp_state()._fsdp_param_groups:
                group._post_forward_indices.clear()
                group.comm_ctx.post_forward_order.clear()


def take_off(model: nn.Module) -> None:
    """Make a model that FSDP2 split an ordinary one again, with whole parameters, no hooks, and the classes it had.

    torch has no call for it (2.13); what is undone here is what `fully_shard` does, and a test compares the result with a model that was
    never split. Does nothing to other models. Every process must call it.
    """
    shards = _shards(model)
    for shard in shards:
        shard.unshard()
    whole: dict[int, nn.Parameter] = {}  # a tied weight stays one
    for module in model.modules() if shards else ():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            new = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            module._parameters[name] = whole.setdefault(id(parameter), new)
    for shard in shards:
        state: Any = shard._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for group in state._fsdp_param_groups:
            for handles in (group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle):
                for handle in handles.values():
                    handle.remove()
    for module in shards:
        module.__class__ = type(module).__bases__[1]  # fully_shard made a class of FSDPModule and the module's own


def _shards(model: nn.Module) -> list[Any]:
    """Modules whose parameters are split."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


# ----------------------------------------
# SIGTERM, which a cluster sends some seconds before it takes the machine away, and Ctrl-C: noted, so that a step can end and be saved.


_NOTED = b"\nadalink: Ctrl-C: the step is finished and saved first; press it again to stop at once\n"


class StopSignal:
    """The signal by which this process was asked to end; 0 where it was not."""

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal handler. Raises KeyboardInterrupt at the second Ctrl-C."""
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            os.write(2, _NOTED)  # print is not for signal handlers
        self.number = number


@contextlib.contextmanager
def sigterm_noted() -> Iterator[StopSignal]:
    """Inside the block SIGTERM ends nothing and is noted; outside of a program's main thread, where no signal arrives, nothing changes."""
    stop = StopSignal()
    with _handled(signal.SIGTERM, stop):
        yield stop


@contextlib.contextmanager
def interrupts_noted(stop: StopSignal) -> Iterator[None]:
    """Inside the block, the steps of a training, Ctrl-C is noted too, once; a program that handles it in its own way keeps that."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with _handled(signal.SIGINT, stop):
            yield
    else:
        yield


@contextlib.contextmanager
def _handled(number: signal.Signals, stop: StopSignal) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, stop.note)
    try:
        yield
    finally:
        signal.signal(number, before)

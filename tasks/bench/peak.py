"""What one side of a training step needs at most, measured in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from adalink.errors import DataError
from tasks.bench.clock import seconds_on
from tasks.bench.composed import Work, drawn_tower
from tasks.bench.shapes import TINY_LLAMA, TINY_OPT, Machine, Shape
from tasks.bench.sides import Step, Taught, our_model, our_step, their_step

__all__ = ["Needs", "Side", "needs"]

Side = Literal["adalink", "peft"]
STATUS, PEAK_SWITCH = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_WARM = Work(n_patches=5)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Of one side: MiB above the loaded model at most, NaN where the system does not tell, and the median seconds of a step."""

    mib: float
    seconds: float


def needs(side: Side, shape: Shape, machine: Machine, work: Work, taught: Taught, rank: int = 8, repetitions: int = 2) -> Needs:
    """Runs steps in a fresh process.

    On a CPU, VmHWM of the steps above VmRSS after the model is loaded and a tiny model of its kind has taken a step, which brings the
    libraries' code into memory; on a GPU what torch allocates at most above what it held before the steps. Raises DataError where the
    process dies, as it does without memory enough.
    """
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    context.set_forkserver_preload([__name__])  # a process starts at once, and nothing in it has run before
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(there, side, shape, machine, work, taught, rank, repetitions))
    process.start()
    there.close()
    try:
        found: Needs = here.recv()
    except EOFError:
        raise DataError(
            f"the process that measured {side} on {shape.name} with {work.n_patches} image tokens died: is there memory enough for it?"
        ) from None
    finally:
        process.join()
    return found


def _child(pipe: Connection, side: Side, shape: Shape, machine: Machine, work: Work, taught: Taught, rank: int, repetitions: int) -> None:
    torch.set_num_threads(machine.n_threads)
    warm = TINY_OPT if shape.config.model_type == "opt" else TINY_LLAMA
    _step(side, warm, machine, _WARM, taught, rank)()
    step = _step(side, shape, machine, work, taught, rank)
    before = _mib(machine.device, fresh=True)
    seconds = []
    for _ in range(1 + repetitions):
        started = seconds_on(machine.device)
        step()
        seconds.append(seconds_on(machine.device) - started)
    pipe.send(Needs(mib=_mib(machine.device) - before, seconds=statistics.median(seconds[1:])))


def _step(side: Side, shape: Shape, machine: Machine, work: Work, taught: Taught, rank: int) -> Step:
    model = our_model(shape, machine, drawn_tower(work.n_patches), taught, rank)
    features = work.features(machine)
    if side == "adalink":
        return our_step(model, work, lambda: features)
    repeated = features.repeat_interleave(work.n_texts, 0)
    return their_step(model, shape, machine, work, lambda: repeated, taught, rank)


def _mib(device: torch.device, *, fresh: bool = False) -> float:
    """The most that was held since the last fresh count; what is held now where it is fresh."""
    if device.type == "cuda":
        if fresh:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not PEAK_SWITCH.exists():
        return float("nan")
    if fresh:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and is still held would hide what comes
        PEAK_SWITCH.write_text("5")
    return float(next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))) / 1024

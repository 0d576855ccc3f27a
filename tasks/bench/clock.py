"""Sides that take turns, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from adalink.errors import DataError
from tasks.bench.existing import TINY_LLAVA, TINY_QWEN2_VL, existing_step, is_existing
from tasks.bench.models import TINY_LLAMA, TINY_OPT, Bench, Machine, Shape, Step, Taught, Work, drawn_tower, our_model, our_step, their_step
from tasks.metrics.bootstrap import software

__all__ = ["Finding", "Needs", "Side", "Turns", "about", "alternate", "as_json", "as_line", "as_markdown", "needs", "peak_mib", "seconds_on"]


LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative; other dtypes 2e-2


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Seconds of each side in each repetition, as `seconds_on` counts them."""

    seconds: Mapping[str, tuple[float, ...]]

    def ratios(self, slow: str, fast: str) -> tuple[float, ...]:
        """How many times as long the slow side took, for each repetition."""
        return tuple(a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True))

    def median(self, side: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[side])


def alternate(
    sides: Mapping[str, Callable[[], float]],
    repetitions: int,
    device: torch.device,
    dtype: torch.dtype,
    tolerance: float | None = None,
    now: Callable[[], float] | None = None,
) -> Turns:
    """Runs the sides in turn, every other time in reverse; the first round warms up and is not counted.

    now: another clock, for sides that work in processes of their own. Each side gives a number, its loss. Raises DataError where those
    of the first round differ by more than a rounding of the dtype (or by `tolerance`, relative): then no ratio means anything.
    """
    first = {name: side() for name, side in sides.items()}
    allowed = LOSS_TOLERANCE.get(dtype, 2e-2) if tolerance is None else tolerance
    if max(first.values()) - min(first.values()) > allowed * max(map(abs, first.values())):
        raise DataError(
            f"the sides of one measurement give {first}, expected the same: a defect of adalink or of its peer, please report it"
        )
    clock = now or partial(seconds_on, device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repetitions):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            started = clock()
            sides[name]()
            seconds[name].append(clock() - started)
    return Turns(seconds={name: tuple(values) for name, values in seconds.items()})


def seconds_on(device: torch.device) -> float:
    """Seconds up to now: of the processor and all threads of this process on a CPU, which other work disturbs less; by the clock on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


# ----------------------------------------
# What one side of a training step needs at most, measured in a process of its own.


Side = Literal["adalink", "peft"]
STATUS, PEAK_SWITCH = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_WARM = Work(n_patches=5)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Of one side: MiB above the loaded model at most, NaN where the system does not report it, and the median seconds of a step."""

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
    warm, few = _warm(shape)
    _step(side, warm, machine, few, taught, rank)()
    step = _step(side, shape, machine, work, taught, rank)
    before = peak_mib(machine.device, fresh=True)
    seconds = []
    for _ in range(1 + repetitions):
        started = seconds_on(machine.device)
        step()
        seconds.append(seconds_on(machine.device) - started)
    pipe.send(Needs(mib=peak_mib(machine.device) - before, seconds=statistics.median(seconds[1:])))


def _warm(shape: Shape) -> tuple[Shape, Work]:
    """A tiny model of a model's kind, and a small step of it."""
    if is_existing(shape):
        return (TINY_LLAVA if shape.config.model_type == "llava" else TINY_QWEN2_VL), Work(n_patches=9)
    return (TINY_OPT if shape.config.model_type == "opt" else TINY_LLAMA), _WARM


def _step(side: Side, shape: Shape, machine: Machine, work: Work, taught: Taught, rank: int) -> Step:
    if is_existing(shape):
        return existing_step(side, shape, machine, work, rank)
    model = our_model(shape, machine, drawn_tower(work.n_patches), taught, rank)
    features = work.features(machine)
    if side == "adalink":
        return our_step(model, work, lambda: features)
    repeated = features.repeat_interleave(work.n_texts, 0)
    return their_step(model, shape, machine, work, lambda: repeated, taught, rank)


def peak_mib(device: torch.device, *, fresh: bool = False) -> float:
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


# ----------------------------------------
# What was found: a ratio for each repetition, and the target that it is held against.


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table.

    ratios   one for each repetition
    target   what the ratio should be, at least or at most; None where nothing is aimed at
    detail   both sides of the ratio, in absolute numbers
    """

    part: str
    what: str
    ratios: tuple[float, ...]
    target: float | None = None
    sense: Literal["at least", "at most"] = "at least"
    detail: str = ""

    @property
    def median(self) -> float:
        """Of the ratios."""
        return statistics.median(self.ratios)

    @property
    def outcome(self) -> str:
        """met, missed by how much, or nothing where nothing is aimed at."""
        if self.target is None or not self.ratios:
            return ""
        is_met = self.median >= self.target if self.sense == "at least" else self.median <= self.target
        return "met" if is_met else f"missed by {100 * abs(self.median / self.target - 1):.1f} %"


# ----------------------------------------
# Findings as lines for the screen, as a table in Markdown, and as JSON.


def about(bench: Bench) -> dict[str, str]:
    """Where and with what a run measures."""
    machine = bench.machine
    is_gpu = machine.device.type == "cuda"
    threads = "" if is_gpu else f", {machine.n_threads} thread{'s' * (machine.n_threads > 1)} of {os.cpu_count()} cores"
    return {
        "machine": (torch.cuda.get_device_name(machine.device) if is_gpu else f"{platform.machine()} {platform.system()}") + threads,
        "precision": str(machine.dtype).removeprefix("torch.") + (", compiled" if machine.is_compiled else ""),
        "seconds": "by the clock" if is_gpu else "of the processor",
        "repetitions": str(bench.repetitions),
        "software": ", ".join([software(), *(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft"))]),
    }


def as_line(finding: Finding) -> str:
    """One line: median, spread, target, outcome, what it is."""
    return f"{finding.part:10s}  {_ratio(finding):24s}  {_goal(finding):14s}  {finding.outcome:14s}  {finding.what}; {finding.detail}"


def as_markdown(findings: Sequence[Finding], where: Mapping[str, str]) -> str:
    """A table below a sentence on where it was measured."""
    lines = [
        "; ".join(f"{name}: {value}" for name, value in where.items()),
        "",
        "| what | ratio | target | | in numbers |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {found.what} | {_ratio(found)} | {_goal(found)} | {found.outcome} | {found.detail} |" for found in findings]
    return "\n".join(lines) + "\n"


def as_json(findings: Sequence[Finding], where: Mapping[str, str]) -> str:
    """One object: where, and findings with every ratio."""
    rows: list[dict[str, Any]] = [
        {**vars(found), "median": found.median if found.ratios else None, "verdict": found.outcome} for found in findings
    ]
    return json.dumps({"where": dict(where), "findings": rows}, indent=2) + "\n"


def _ratio(finding: Finding) -> str:
    if not finding.ratios:
        return ""
    spread = f" ({min(finding.ratios):.3g} to {max(finding.ratios):.3g})" if len(finding.ratios) > 1 else ""
    return f"{finding.median:.3g}{spread}"


def _goal(finding: Finding) -> str:
    return "" if finding.target is None else f"{finding.sense} {finding.target:g}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

"""Real processes that train together on this machine (gloo), see forkserver.py."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from shared import PATIENCE
from torch.distributed import TCPStore


def _child(function: Callable[..., Any], rank: int, world: int, port: int, errors: str, arguments: tuple[Any, ...], env: dict[str, str]) -> None:
    os.environ.update(ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",  # as torchrun does: the place where they meet is there before they are
        )  # fmt: skip
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its own workers, as in a process that a person starts
    sys.stderr = sys.stdout = open(errors, "a", buffering=1)  # noqa: SIM115 (the process ends with it)
    try:
        code = function(*arguments) or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if torch.distributed.is_initialized() and code == 0:
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(code)


class Group:
    """The processes of one run."""

    def __init__(self, processes: list[BaseProcess], errors: Path, meeting: TCPStore) -> None:
        self.processes, self.errors, self.meeting = processes, errors, meeting

    def ended(self, code: int = 0) -> str:
        """What they printed, once all have ended with this exit code."""
        for process in self.processes:
            process.join(PATIENCE)
        printed = self.errors.read_text()
        assert [process.exitcode for process in self.processes] == [code] * len(self.processes), printed[-3000:]
        return printed

    def send(self, number: signal.Signals, ranks: slice = slice(None)) -> None:
        assert all(process.is_alive() for process in self.processes[ranks]), self.errors.read_text()[-3000:]
        for process in self.processes[ranks]:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):  # one that fails because another was just killed
                os.kill(process.pid, number)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < give_up
            assert all(process.is_alive() for process in self.processes), self.errors.read_text()[-3000:]
            time.sleep(0.005)

    def killed(self) -> None:
        """SIGKILL, and every process and its workers gone."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                while True:
                    os.kill(process.pid, 0)
                    process.is_alive()
                    time.sleep(0.005)


class Machine:
    """Starts groups of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.n = folder, 0
        self.context = multiprocessing.get_context("forkserver")

    def start(self, world: int, function: Callable[..., Any], *arguments: Any, **env: str) -> Group:
        """Each of the processes calls the function, whose number it returns is the exit code."""
        self.n += 1
        errors = self.folder / f"errors{self.n}.txt"
        errors.touch()
        meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that is free, and held from here on
        note = (meeting.port, str(errors), arguments, env)
        processes = [self.context.Process(target=_child, args=(function, rank, world, *note)) for rank in range(world)]
        for process in processes:
            process.start()
        return Group(processes, errors, meeting)

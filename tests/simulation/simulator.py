"""Scenarios in a process of their own: a device that torch knows cannot be forgotten, and other tests must not meet it."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.connection import Connection
from typing import Any

from shared import PATIENCE

__all__ = ["Simulator"]


class Simulator:
    """One process, which runs one scenario after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there,), daemon=True)
        self._process.start()
        self._outcomes: dict[str, Any] = {}
        there.close()

    def run(self, name: str) -> Any:
        """The outcome of a scenario, see scenarios.py. Fails with the scenario's traceback where it raised."""
        if name not in self._outcomes:
            self._here.send(name)
            assert self._here.poll(PATIENCE), f"{name} hangs"
            self._outcomes[name], error = self._here.recv()
            assert not error, error
        return self._outcomes[name]

    def close(self) -> None:
        """End it."""
        self._here.send("")
        self._process.join(PATIENCE)


def _work(there: Connection[Any, Any]) -> None:
    import torch
    from scenarios import run

    torch.set_num_threads(1)
    while name := there.recv():
        try:
            answer: tuple[Any, str] = (run(name), "")
        except BaseException:
            answer = (None, traceback.format_exc())
        there.send(answer)

"""Work that worker processes do ahead: in order, whole, and told where a process dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from shared import PATIENCE, ROOT
from torch import Tensor

from adalink.errors import DataError
from multimodal.data import workers
from multimodal.data.workers import dead_workers_named, made_in_order


def made(task: int) -> dict[str, Any]:
    """Of another size each time, so that blocks are outgrown and used again."""
    return {"task": task, "tensors": [torch.full((task * 37 % 1001, 3), float(task)), torch.tensor(task)], "process": os.getpid()}


def whole(thing: dict[str, Any]) -> bool:
    task, tensors = thing["task"], thing["tensors"]
    return tensors[0].shape == (task * 37 % 1001, 3) and bool((tensors[0] == task).all()) and tensors[1].item() == task


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_everything_comes_whole_and_in_the_order_of_the_tasks(workers: int) -> None:
    retained = list(made_in_order(made, range(60), workers=workers))
    assert [thing["task"] for thing in retained] == list(range(60))
    assert all(whole(thing) for thing in retained)  # looked at when all have come: nothing was written over
    processes = {thing["process"] for thing in retained}
    assert len(processes) == max(workers, 1)
    assert (os.getpid() in processes) == (workers == 0)


def test_the_file_descriptors_in_use_do_not_grow_with_what_is_kept() -> None:
    before = len(os.listdir("/proc/self/fd"))
    retained = []
    for thing in made_in_order(made, range(200), workers=1):
        retained.append(thing)
        assert len(os.listdir("/proc/self/fd")) < before + 30
    assert len(retained) == 200


def small(task: int) -> Tensor:
    return torch.zeros(task)


def large(task: int) -> Tensor:
    return torch.zeros(2**21, dtype=torch.uint8)


def slow(task: int) -> Tensor:
    until = time.thread_time() + 0.011
    while time.thread_time() < until:
        pass
    return torch.zeros(task)


@pytest.mark.parametrize(("make", "ahead"), [(small, 2 * 2 * 8 + 8), (large, 2 * 2), (slow, 2 * 2)])
def test_tasks_are_drawn_no_further_ahead_than_two_parcels_for_each_worker(make: Any, ahead: int) -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(60):
            drawn.append(task)
            yield task

    for number, _ in enumerate(made_in_order(make, tasks(), workers=2), start=1):
        assert len(drawn) <= number + ahead
    assert number == 60


def failing(task: int) -> int:
    if task == 3:
        raise DataError("the shard x.tar is gone")
    return task


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_comes_in_its_turn(workers: int) -> None:
    found: list[int] = []
    with pytest.raises(DataError, match=r"the shard x\.tar is gone"):
        found.extend(made_in_order(failing, range(9), workers=workers))
    assert found == [0, 1, 2]


def test_a_program_that_an_error_ends_does_not_wait_for_its_workers() -> None:
    code = "from multimodal.data.workers import made_in_order\nstream = made_in_order(str, range(9), workers=1)\nfor each in stream:\n    raise SystemError('of a step')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "SystemError: of a step"


def dying(how: int, task: int) -> Tensor:
    if task == 4:
        os.kill(os.getpid(), how)
        time.sleep(60)
    return torch.zeros(task)


def test_a_worker_that_is_killed_is_told_and_what_came_before_it_is_whole() -> None:
    found: list[Tensor] = []
    with pytest.raises(DataError, match=r"ended before its work \((DataLoader worker .*|with its samples on their way)\): most often the memory is too small"):
        found.extend(made_in_order(partial(dying, signal.SIGKILL), range(9), workers=1))
    assert all(len(each) == task for task, each in enumerate(found))


def test_a_worker_leaves_the_signals_to_its_parent() -> None:
    def ask_to_end(task: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return task

    assert list(made_in_order(ask_to_end, range(3), workers=1)) == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_programs_own_random_numbers_do_not_move(workers: int) -> None:
    before = torch.get_rng_state()
    list(made_in_order(made, range(5), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def _lend_and_die(queue: Any) -> None:
    queue.put(torch.zeros(3).share_memory_())
    queue.close()
    queue.join_thread()
    os._exit(1)


def test_a_worker_that_dies_with_tensors_on_their_way_is_told() -> None:
    context = multiprocessing.get_context("fork")
    queue = torch.multiprocessing.get_context("fork").Queue()
    process = context.Process(target=_lend_and_die, args=(queue,))
    process.start()
    process.join()
    with pytest.raises(DataError, match=r"ended before its work \(with its samples on their way\).*go on with --resume"), dead_workers_named():
        queue.get()


def test_a_death_that_torch_tells_while_another_sign_of_it_is_looked_at_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(error: BaseException) -> bool:  # by torch's handler of the signal, which comes when it comes
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(workers, "_between_processes", interrupted)
    with pytest.raises(DataError, match=r"ended before its work \(DataLoader worker \(pid 7\)"), dead_workers_named():
        raise ConnectionResetError("of a connection")


def test_what_is_no_death_of_a_worker_is_not_told_as_one() -> None:
    with pytest.raises(EOFError, match="of a file"), dead_workers_named():
        raise EOFError("of a file")
    with pytest.raises(RuntimeError, match="of a layer"), dead_workers_named():
        raise RuntimeError("of a layer")

"""Work that is done ahead in worker processes, and handed over in order."""

from __future__ import annotations

import atexit
import contextlib
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import resource_sharer
from typing import Any, Generic, TypeVar

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, get_worker_info

from adalink.errors import DataError
from multimodal.parcel import Parcel, Receiver, Sender

__all__ = ["dead_workers_told", "made_in_order"]

Task = TypeVar("Task")
Made = TypeVar("Made")


def made_in_order(make: Callable[[Task], Made], tasks: Iterable[Task], *, workers: int) -> Iterator[Made]:
    """`make(task)` for each task, in their order, made in so many processes; in this one where `workers` is 0.

    make     pickles where processes are spawned; each process has its copy
    tasks    drawn in this process, no further ahead than two parcels for each worker, of one task or, where little is made quickly, up to eight

    Raises DataError where a worker process dies, and what `make` raises.
    """
    receiver = Receiver(workers)
    loader = DataLoader(
        _Job(make),
        batch_size=None,
        sampler=_Told(tasks, receiver),
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # its seeds reach nobody; without one, the program's own random numbers would move
    )
    with dead_workers_told(), _started(loader) as given:
        for item in given:
            for made in receiver.open(item) if isinstance(item, Parcel) else item:
                if isinstance(made, ExceptionWrapper):
                    made.reraise()
                yield made


@dataclass(frozen=True)
class _Told(Generic[Task]):
    """The tasks of each parcel, with what the receiver has copied out when they are drawn."""

    tasks: Iterable[Task]
    receiver: Receiver

    def __iter__(self) -> Iterator[tuple[tuple[Task, ...], tuple[int, ...]]]:
        tasks = iter(self.tasks)
        while group := tuple(islice(tasks, self.receiver.worth_a_parcel)):
            yield group, tuple(self.receiver.n_copied)


class _Job(Dataset[Any], Generic[Task]):
    def __init__(self, make: Callable[[Task], Any]) -> None:
        self.make = make
        self.sender: Sender | None = None

    def __getitem__(self, told: tuple[tuple[Task, ...], tuple[int, ...]]) -> Any:
        tasks, n_copied = told
        worker = get_worker_info()
        if worker is None:
            return map(self.make, tasks)
        self.sender = self.sender or Sender(worker.id)
        things: list[Any] = []
        started = time.thread_time()
        try:
            things.extend(map(self.make, tasks))
        except Exception:  # what was made before it arrives before it
            things.append(ExceptionWrapper(where=f"in DataLoader worker process {worker.id}"))
        return self.sender.pack(things, n_copied[worker.id], time.thread_time() - started)


def _as_it_is(made: Any) -> Any:
    return made


@contextlib.contextmanager
def _started(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """What the loader gives. Its processes end with the block, and with a program that an error ends inside the block.

    torch would wait for them: an error keeps alive what it passed through, and the signal that should then end them is one that they ignore.
    """
    given: Any = iter(loader)
    end: Callable[[], None] = getattr(given, "_shutdown_workers", lambda: None)
    atexit.register(end)
    try:
        yield given
    finally:
        end()
        atexit.unregister(end)


@contextlib.contextmanager
def dead_workers_told() -> Iterator[None]:
    """Raises DataError where a worker process dies inside the block.

    torch tells it in the middle of anything, of what is done about an error too, as a RuntimeError of its own; or, where the worker died with
    tensors on their way, the connection that was to bring them ends.
    """
    try:
        try:
            yield
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            if not _between_processes(error):
                raise
            raise _ended("with its samples on their way") from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _ended(str(error).splitlines()[0].rstrip(". ")) from error


def _ended(said: str) -> DataError:
    return DataError(
        f"a worker process that reads samples ended before its work ({said}): most often the memory "
        "is too small; give fewer train.workers or a smaller train.batch_size, and go on with --resume"
    )


def _between_processes(error: BaseException) -> bool:
    """Whether the error arose where one process takes over another's tensors."""
    return any(frame.filename == resource_sharer.__file__ for frame in traceback.extract_tb(error.__traceback__))


def _leave_signals_to_the_parent(worker: int) -> None:
    """SIGTERM and Ctrl-C reach a whole group of processes: the training process then finishes its step, and needs its workers for that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

"""Work that is done ahead in worker processes, and handed over in order."""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing import resource_sharer
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, get_worker_info

from adalink.errors import DataError

__all__ = ["SharedBatch", "Receiver", "Sender", "dead_workers_named", "made_in_order"]


# ----------------------------------------
# What a worker process made, handed over in memory that both processes keep.
#
# torch sends each tensor of a batch in new shared memory and asks for it by a connection of its own: 0.3 ms a tensor, and as much again for every
# half megabyte of new pages. Here the tensors of a batch lie side by side in one block that is used again, and are copied out once; and small
# batches that were made quickly travel together, because a process that sleeps and wakes for each costs as much as a megabyte.


_ALIGNED = 64  # bytes; every dtype may begin there
_SMALLEST = 2**16  # bytes of a block
_WORTH_SHARING = 2**21  # bytes, or
_WORTH_WAITING = 0.01  # seconds of work: what takes long is sent at once, and shared out between the workers to the last
_MOST = 8  # things in a batch that is sent


@dataclass(frozen=True, kw_only=True)
class SharedBatch:
    """Some things on their way.

    things    how many they are
    seconds   of work, that all of them took
    content   their list, pickled without its tensors
    bounds    start and end of each tensor in the block, in bytes
    block     which of the sender's blocks holds them
    memory    uint8 [bytes]: the block itself, in the first batch that uses it; None where the receiver has it
    """

    sender: int
    things: int
    seconds: float
    content: bytes
    bounds: tuple[tuple[int, int], ...]
    block: int
    memory: Tensor | None


class Sender:
    """A worker process's side: numbers its batches from 0, and writes into a block again once its last batch has been copied out."""

    def __init__(self, number: int) -> None:
        self._number, self._sent = number, 0
        self._blocks: list[Tensor] = []
        self._last: list[int] = []  # the batch that each block holds

    def pack(self, things: Sequence[Any], n_copied: int, seconds: float = 0.0) -> SharedBatch:
        """things: whatever pickles, at least one. n_copied: how many of this sender's batches the receiver has copied out."""
        stripped = _Stripped(things)
        bounds, end = [], 0
        for tensor in stripped.tensors:
            bounds.append((end, end + tensor.nbytes))
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        block, is_new = self._block(end, n_copied)
        for tensor, (start, stop) in zip(stripped.tensors, bounds, strict=True):
            self._blocks[block][start:stop] = tensor.reshape(-1).view(torch.uint8)
        self._last[block] = self._sent
        self._sent += 1
        memory = self._blocks[block] if is_new else None
        return SharedBatch(
            sender=self._number, things=len(things), seconds=seconds, content=stripped.content, bounds=tuple(bounds), block=block, memory=memory
        )

    def _block(self, size: int, n_copied: int) -> tuple[int, bool]:
        """A block that nobody reads any more, and whether the receiver has not seen it yet."""
        free = next((block for block, last in enumerate(self._last) if last < n_copied), None)
        if free is not None and len(self._blocks[free]) >= size:
            return free, False
        # With room for a longer text; pages that nothing is written to take no memory.
        shared = torch.UntypedStorage._new_shared(max(size + size // 4, _SMALLEST), device="cpu")
        memory = torch.empty(0, dtype=torch.uint8).set_(shared)
        if free is None:
            self._blocks.append(memory)
            self._last.append(-1)
            return len(self._blocks) - 1, True
        self._blocks[free] = memory
        return free, True


class Receiver:
    """The other side.

    n_copied         how many batches of each sender were copied out; the senders need the number
    worth_sharing   how many things a sender should pack together, by those that came last: 2 MiB, a hundredth of a second's work, or eight
    """

    def __init__(self, n_senders: int) -> None:
        self.n_copied = [0] * n_senders
        self.worth_sharing = 1
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self._is_pinned = torch.cuda.is_available()  # a copy to the device then goes on beside other work

    def open(self, shared_batch: SharedBatch) -> Sequence[Any]:
        """The things, with memory of their own. A sender's batches are opened in the order in which they were packed."""
        place = shared_batch.sender, shared_batch.block
        if shared_batch.memory is not None:
            self._blocks[place] = shared_batch.memory
        size = shared_batch.bounds[-1][1] if shared_batch.bounds else 0
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned)
        memory.copy_(self._blocks[place][:size])
        self.n_copied[shared_batch.sender] += 1
        share = max(size / _WORTH_SHARING, shared_batch.seconds / _WORTH_WAITING) / shared_batch.things
        self.worth_sharing = math.ceil(min(_MOST, 1 / max(share, 1 / _MOST)))
        things: Sequence[Any] = _Refilled(shared_batch.content, [memory[start:stop] for start, stop in shared_batch.bounds]).load()
        return things


class _Stripped(pickle.Pickler):
    """The things' pickle, and the tensors that are left out of it."""

    def __init__(self, things: Sequence[Any]) -> None:
        out = io.BytesIO()
        super().__init__(out, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.dump(things)
        self.content = out.getvalue()

    def persistent_id(self, value: Any) -> tuple[int, torch.dtype, torch.Size] | None:
        if type(value) is not Tensor or value.device.type != "cpu" or value.layout != torch.strided or value.requires_grad:
            return None  # pickled as it is
        self.tensors.append(value.contiguous())
        return len(self.tensors) - 1, value.dtype, value.shape


class _Refilled(pickle.Unpickler):
    def __init__(self, content: bytes, parts: list[Tensor]) -> None:
        super().__init__(io.BytesIO(content))
        self._parts = parts

    def persistent_load(self, place: tuple[int, torch.dtype, torch.Size]) -> Tensor:
        number, dtype, shape = place
        return self._parts[number].view(dtype).view(shape)


Task = TypeVar("Task")
Made = TypeVar("Made")


def made_in_order(make: Callable[[Task], Made], tasks: Iterable[Task], *, workers: int) -> Iterator[Made]:
    """`make(task)` for each task, in their order, made in so many processes; in this one where `workers` is 0.

    make     pickles where processes are spawned; each process has its copy
    tasks    drawn in this process, no further ahead than two batches for each worker, of one task or, where little is made quickly, up to eight

    Raises DataError where a worker process dies, and what `make` raises.
    """
    receiver = Receiver(workers)
    loader = DataLoader(
        _Job(make),
        batch_size=None,
        sampler=_Groups(tasks, receiver),
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # its seeds reach nobody; without one, the program's own random numbers would move
    )
    with dead_workers_named(), _started(loader) as given:
        for item in given:
            for made in receiver.open(item) if isinstance(item, SharedBatch) else item:
                if isinstance(made, ExceptionWrapper):
                    made.reraise()
                yield made


@dataclass(frozen=True)
class _Groups(Generic[Task]):
    """The tasks of each shared batch, with what the receiver has copied out when they are drawn."""

    tasks: Iterable[Task]
    receiver: Receiver

    def __iter__(self) -> Iterator[tuple[tuple[Task, ...], tuple[int, ...]]]:
        tasks = iter(self.tasks)
        while group := tuple(islice(tasks, self.receiver.worth_sharing)):
            yield group, tuple(self.receiver.n_copied)


class _Job(Dataset[Any], Generic[Task]):
    def __init__(self, make: Callable[[Task], Any]) -> None:
        self.make = make
        self.sender: Sender | None = None

    def __getitem__(self, sent: tuple[tuple[Task, ...], tuple[int, ...]]) -> Any:
        tasks, n_copied = sent
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
    unregister = atexit.unregister  # a module has no names any more where a program ends inside the block
    try:
        yield given
    finally:
        end()
        unregister(end)


@contextlib.contextmanager
def dead_workers_named() -> Iterator[None]:
    """Raises DataError where a worker process dies inside the block.

    torch raises a RuntimeError of its own, at any line, inside the handling of an error too; or, where the worker died with
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


def _ended(stated: str) -> DataError:
    return DataError(
        f"a worker process that reads samples ended before its work ({stated}): most often the memory "
        "is too small; give fewer train.workers or a smaller train.batch_size, and go on with --resume"
    )


def _between_processes(error: BaseException) -> bool:
    """Whether the error arose where one process takes over another's tensors."""
    return any(frame.filename == resource_sharer.__file__ for frame in traceback.extract_tb(error.__traceback__))


def _leave_signals_to_the_parent(worker: int) -> None:
    """SIGTERM and Ctrl-C reach a whole group of processes: the training process then finishes its step, and needs its workers for that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

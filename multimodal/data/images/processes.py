"""Processes that decode images: what takes too long or too much memory ends its process, and nobody else waits for it."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import queue
import resource
import signal
from multiprocessing import forkserver, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image

from multimodal.data.images.decode import BadImage, ImageLimits, decode_image

__all__ = ["Decoders", "n_cores", "start_early"]

PATIENCE = 60  # seconds, and ten times the limit of processor time: so long an image may take on a machine that is busy with other things
# Of memory beyond what the process has before its first image: Pillow keeps up to 35 bytes of a pixel at once while it turns a WebP upright.
MEMORY, MEMORY_PER_PIXEL, MEMORY_PER_BYTE = 512 * 2**20, 40, 4


def n_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_early() -> None:
    """Begin to start the process that the decoders are copies of, which takes seconds, beside other work."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    forkserver.ensure_running()


class Decoders:
    """Decodes in up to `n` processes, one for each core. They are started when they are needed, and again after one has ended.

    limits    of the images
    seconds   of processor time for one image
    """

    def __init__(self, n: int, limits: ImageLimits, seconds: float) -> None:
        start_early()
        self.limits = limits
        self.seconds = seconds
        self._free: queue.LifoQueue[_Decoder | None] = queue.LifoQueue()  # None: one that is not started; the one used last is used first
        for _ in range(n):
            self._free.put(None)

    def decode(self, data: bytes) -> Image.Image:
        """As `multimodal.data.images.decode.decode_image`; waits for a process that is free. Raises BadImage, also with the reason `too slow`."""
        decoder = self._free.get()
        try:
            if decoder is None or not decoder.is_alive:
                decoder = _Decoder(self.limits, self.seconds)
            return decoder.decode(data)
        except _Ended as ended:
            decoder = None
            raise BadImage("too slow", f"an image of {len(data)} bytes {ended}: save it anew, as a plain JPEG or PNG") from None
        finally:
            self._free.put(decoder)

    def close(self) -> None:
        """End the processes that are free."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (decoder := self._free.get_nowait()) is not None:
                    decoder.end()


class _Ended(Exception):
    """A process has ended in the middle of an image; says why."""


class _Decoder:
    """One process."""

    def __init__(self, limits: ImageLimits, seconds: float) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        self.seconds = seconds
        self._most = PATIENCE + 10 * seconds
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, limits, seconds), name="decoder", daemon=True)
        self._process.start()
        other.close()
        util.Finalize(self, self._process.kill, exitpriority=1)  # multiprocessing itself sends SIGTERM, and waits

    @property
    def is_alive(self) -> bool:
        """Whether the process is there, and not ended by whatever ends processes."""
        return bool(self._process.is_alive())

    def decode(self, data: bytes) -> Image.Image:
        """The image. Raises BadImage, and _Ended where the process is gone."""
        try:
            self._connection.send_bytes(data)
            if not self._connection.poll(self._most):
                self._process.kill()
                raise _Ended(f"was not decoded within {self._most:g} seconds")
            answer = self._connection.recv()
            if isinstance(answer, BadImage):
                raise answer
            return Image.frombytes("RGB", answer, self._connection.recv_bytes())
        except (EOFError, OSError):
            self._process.join(PATIENCE)
            in_time = self._process.exitcode != -signal.SIGXCPU
            self.end()
            raise _Ended("ended its decoder" if in_time else f"takes more than {self.seconds:g} seconds of processor time to decode") from None

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _work(connection: Connection, limits: ImageLimits, seconds: float) -> None:
    """Decode what comes, until the other side is gone. The kernel ends the process where an image takes too long."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal or a service manager sends to all processes of a group
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(MEMORY + MEMORY_PER_PIXEL * limits.max_pixels + MEMORY_PER_BYTE * limits.max_bytes)
    with contextlib.suppress(EOFError, OSError):
        while True:
            data = connection.recv_bytes()
            _limit_time(seconds)
            try:
                image = decode_image(data, limits=limits)
            except BadImage as error:
                connection.send(error)
            except MemoryError:
                connection.send(BadImage("too much memory", f"an image of {len(data)} bytes needs too much memory to decode: save it anew"))
            else:
                connection.send(image.size)
                connection.send_bytes(image.tobytes())


def _limit_time(seconds: float) -> None:
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds), resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _limit_memory(n_bytes: int) -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))

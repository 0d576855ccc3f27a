"""Trials: a ledger of what was asked and what came of it, and `adalink` in processes of their own, with the sentence why one failed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import adalink
from adalink.errors import AdalinkError, DataError, TerminatedError

__all__ = ["Ledger", "Process", "TrialFailed", "end_trainings", "folder_bytes", "read_metrics", "run_adalink"]


# ----------------------------------------
# A file of JSON lines that only grows, safe from a kill at any moment.


class Ledger:
    """The lines of the file, and one more with each event.

    A last line that a kill cut is dropped. Raises DataError where a line in the middle is no JSON, or the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), start=1):
            try:
                event = json.loads(line)
                event["event"]
            except (ValueError, TypeError, KeyError):
                raise DataError(f"{path} is damaged: line {number} is no event, {line[:60]!r}; give another --out, or the file as it was") from None
            self.events.append(event)
        if len(whole) < len(content):
            os.truncate(path, len(whole))

    def add(self, event: str, **values: Any) -> dict[str, Any]:
        """Append an event, which is on the disk when this returns. Raises DataError where it cannot be written."""
        line = {"event": event, **values}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write((json.dumps(line) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}; is its folder writable and not full?") from None
        self.events.append(line)
        return line

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of some kinds, in their order."""
        return [event for event in self.events if event["event"] in kinds]

    def begin(self, header: Mapping[str, Any], what: str) -> None:
        """Write what the events are a function of as the first line; raises DataError where the file begins with something else. what: of a search."""
        if not self.events:
            self.add("begun", **header)
            return
        first = {name: value for name, value in self.events[0].items() if name != "event"}
        header = json.loads(json.dumps(header))
        if changed := [name for name in {**first, **header} if first.get(name) != header.get(name)]:
            name = changed[0]
            raise DataError(
                f"{self.path} is of {what} with another {name.replace('_', ' ')} ({_short(first.get(name))}, and now {_short(header.get(name))}): "
                "go on with what it began with, or give another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ----------------------------------------
# Commands in processes of their own.


_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|bad_alloc|MemoryError", re.IGNORECASE)
ENDED = (130, 143)  # exit codes of a command that was asked to end


class TrialFailed(AdalinkError):
    """A training that gave no score, with the reason."""


@dataclass(frozen=True)
class Process:
    """What a finished command took. mib: the most memory that it held at once."""

    seconds: float
    mib: float


_RUNNING: set[subprocess.Popen[bytes]] = set()


def end_trainings(number: int, frame: object) -> NoReturn:
    """What a search does on a signal: it asks its trainings to end, each with a checkpoint. Raises TerminatedError."""
    for process in tuple(_RUNNING):
        process.send_signal(signal.SIGTERM)
    raise TerminatedError(f"ended by {signal.Signals(number).name}: go on with --resume", 128 + number)


def run_adalink(arguments: Sequence[str], log: Path, *, threads: int) -> Process:
    """Run a command and wait for it; what it prints goes to the end of `log`. One that a killed search left behind is waited for first.

    Raises TrialFailed with the command's own sentence where it fails, TerminatedError where it was asked to end.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "PYTHONUNBUFFERED": "1"}
    lock = os.open(log.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # which the process has too, until it ends
        started = time.perf_counter()
        with log.open("ab") as file:
            begin = file.tell()
            command = [sys.executable, str(Path(adalink.__file__).with_name("__main__.py")), *arguments]  # by its file, as `adalink launch` does
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, pass_fds=(lock,))
        _RUNNING.add(process)
        _, status, used = os.wait4(process.pid, 0)
        _RUNNING.discard(process)
    finally:
        os.close(lock)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    if code in ENDED:
        raise TerminatedError(f"`adalink {arguments[0]}` was asked to end ({log}): go on with --resume", code)
    if code:
        raise TrialFailed(_reason(code, log.read_bytes()[begin:].decode("utf-8", errors="replace")))
    return Process(time.perf_counter() - started, used.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20))


def _reason(code: int, printed: str) -> str:
    """The command's own sentence, or the last line of its traceback, or the signal that ended it."""
    lines = [line.strip() for line in printed.replace("\r", "\n").splitlines() if line.strip()]
    own = [line.removeprefix("adalink: ") for line in lines if line.startswith("adalink: ")]
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", as the system does where memory runs out" if name == "SIGKILL" else "")
    last = own[-1] if own else lines[-1] if lines else f"exit code {code}"
    starved = next((line for line in reversed(lines) if _NO_MEMORY.search(line)), "")
    return f"out of memory: {starved[:300]}" if starved and not own else last[:400]


def read_metrics(folder: Path) -> Mapping[str, Any]:
    """metrics.json of a run folder. Raises DataError where it is missing or damaged."""
    try:
        found: Mapping[str, Any] = json.loads((folder / "metrics.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no metrics.json of a finished run: {error}") from None
    return found


def folder_bytes(folder: Path) -> int:
    """What the files of a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

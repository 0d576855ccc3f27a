"""Files and folders that are there whole or not at all, and a lock on a folder that one process at a time writes."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adalink.errors import ConfigError, DataError

__all__ = ["locked", "new_folder", "refuse_full", "write_whole"]


# ----------------------------------------
# A file or a folder that is there whole or not at all.


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside `path` and renames onto it: a reader sees the old file or the new one, never a part of either.

    Raises DataError where it cannot be written (no such folder, no permission, disk full); nothing is then left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        beside.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}; is its folder there, writable and not full?") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def refuse_full(out: Path) -> None:
    """Raise ConfigError where `out` holds something already, or is a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: give another --out, or remove it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it once everything is written; nothing is left where that fails.

    Raises ConfigError where `out` holds something already, or the folder cannot be made.
    """
    refuse_full(out)
    part = out.with_name(f".{out.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=False)
    except OSError as error:
        raise ConfigError(f"the folder {out} cannot be made: {error.strerror}") from None
    try:
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ----------------------------------------
# A lock on a folder that one process at a time writes; it ends with the process, however that ends.


def locked(file: Path, taken: str) -> int:
    """An open file with the lock. Raises ConfigError, which says `taken`, where another process has it; OSError where it cannot be made."""
    lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ConfigError(taken) from error
    except OSError:
        pass  # a file system without locks
    return lock

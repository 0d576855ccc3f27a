"""A file that is there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from adalink.errors import DataError

__all__ = ["write_whole"]


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

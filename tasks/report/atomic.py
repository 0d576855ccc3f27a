"""A file that is there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from adalink.errors import ConfigError

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename it onto `path`; a reader sees the old file or the new one, never a part.

    Raises ConfigError where the folder is missing or cannot be written, or `path` is a folder; nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the content
        beside.replace(path)
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {path}: {error.strerror or error}; expected a file name in a folder that exists and "
            "can be written: make the folder or name another"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink()

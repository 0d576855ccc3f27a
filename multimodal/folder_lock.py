"""A lock on a folder that one process at a time writes; it ends with the process, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from adalink.errors import ConfigError

__all__ = ["locked"]


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

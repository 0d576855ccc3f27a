"""The folder that a run writes into."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from adalink.errors import AdalinkError, ConfigError

__all__ = ["refuse_taken", "run_folder"]


def refuse_taken(out: Path, *, resume: bool) -> None:
    """Raises ConfigError where the folder holds something already and is not to be gone on with."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not resume)):
        raise ConfigError(f"the run folder {out} is there already: give another `out`, or --resume to go on with it")


@contextlib.contextmanager
def run_folder(out: Path) -> Iterator[Path]:
    """The run folder, made if need be; one that was made here and holds no checkpoint is removed where the run fails.

    Raises ConfigError where it cannot be made.
    """
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run folder {out} cannot be made: {error.strerror}") from None
    try:
        yield out
    except AdalinkError:
        if is_new and not (out / "checkpoints").exists():
            shutil.rmtree(out, ignore_errors=True)  # other processes of the run remove it too
        raise

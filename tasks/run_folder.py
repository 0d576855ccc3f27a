"""The folder that a run writes into."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from adalink.errors import AdalinkError, ConfigError
from multimodal.run_facts import flat

__all__ = ["changed_config", "refuse_taken", "run_folder"]


def refuse_taken(out: Path, *, resume: bool) -> None:
    """Raises ConfigError where the folder holds something already and is not to be gone on with."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not resume)):
        raise ConfigError(f"the run folder {out} is there already: give another `out`, or --resume to go on with it")


def changed_config(file: Path, config_text: str) -> list[str]:
    """`generation.num_beams 3 -> 1` for each setting of a run's config.yaml that is another now; of those that its checkpoints hold, training tells."""
    try:
        was, now = (flat(yaml.safe_load(text) or {}) for text in (file.read_text(encoding="utf-8"), config_text))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []  # a process that was killed while it wrote it
    names = [name for name in {**was, **now} if was and not name.startswith(("train.", "methods.", "vision_methods.")) and name != "out"]
    return [f"{name} {was.get(name)} -> {now.get(name)}" for name in names if was.get(name) != now.get(name)]


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

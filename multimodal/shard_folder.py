"""The folder into which shards are written: under `.writing` until all are there, then moved up, the manifest last.

So a reader finds all shards or none, and a writing that was killed can go on: whole shards under `.writing` are used again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from adalink.atomic import write_whole
from adalink.errors import AdalinkError, ConfigError, DataError
from multimodal.folder_lock import locked
from multimodal.manifest import MANIFEST, Manifest, write_manifest

__all__ = ["WRITING", "find_shards", "publish", "refuse_unfinished", "shard_part", "workplace"]

WRITING = ".writing"
_LOCK = "lock"
_PLAN = "publish.json"  # which file is about to get which name; written before the first is moved


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """The folder `out/.writing`, locked against a second writer; what a killed writing left in it is there again.

    It is removed, and `out` too where it is new and empty, when an error ends the writing that the caller can mend; after a kill or
    Ctrl-C it stays. Raises ConfigError where `out` holds anything else, or somebody writes there now; DataError where it cannot be made.
    """
    new = not out.exists()
    _check_only_ours(out)
    lock = _locked(out)
    try:
        _take_back(out)
        yield out / WRITING
    except AdalinkError:
        shutil.rmtree(out / WRITING, ignore_errors=True)
        if new:
            with suppress(OSError):
                out.rmdir()
        raise
    finally:
        os.close(lock)


def publish(out: Path, manifest: Manifest, prefix: str) -> Manifest:
    """Moves the manifest's shards from `out/.writing` to `out/PREFIX-000000.tar` and so on, then writes the manifest.

    Raises DataError where the disk refuses it.
    """
    names = [(shard.file, f"{prefix}-{number:06d}.tar") for number, shard in enumerate(manifest.shards)]
    named = replace(manifest, shards=tuple(replace(shard, file=name) for shard, (_, name) in zip(manifest.shards, names, strict=True)))
    write_whole(out / WRITING / _PLAN, json.dumps(names).encode())
    try:
        for part, name in names:
            (out / WRITING / part).replace(out / name)
    except OSError as error:
        raise DataError(f"the shards cannot be moved to {out}: {error.strerror}") from error
    write_manifest(named, out)
    shutil.rmtree(out / WRITING, ignore_errors=True)
    return named


def refuse_unfinished(folder: Path) -> None:
    """Raises DataError where a writing to this folder has not ended."""
    if (folder / WRITING).exists() and not (folder / MANIFEST).exists():
        raise DataError(f"the shards in {folder} are not finished: a writing was interrupted or still goes on; run the same command again")


def find_shards(folder: Path) -> Sequence[Path]:
    """The tar files of a folder by name; raises DataError where there are none."""
    refuse_unfinished(folder)
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == ".tar")
    except OSError as error:
        raise DataError(f"the shards folder {folder} cannot be listed: {error.strerror}") from error
    packed = sorted(path.name for path in folder.iterdir() if re.search(r"\.(tar\.\w+|tgz)$", path.name))
    if packed:
        raise DataError(f"{folder / packed[0]} is compressed, which allows no random access; unpack it to a plain .tar")
    if not found:
        raise DataError(f"there are no shards in {folder}; expected files that end in .tar")
    return found


def shard_part(work: Path, number: int) -> Path:
    """Where shard `number` is written before it has its name."""
    return work / f"{number:06d}.tar"


def _check_only_ours(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder, new or empty, for the shards")
    ours = {WRITING, *(name for _, name in _plan(out))} if (out / WRITING / _LOCK).exists() else set()
    others = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if others:
        raise ConfigError(f"the folder {out} is not empty: it holds {others[0]!r} ({len(others)} files); give a new folder, or empty it")


def _locked(out: Path) -> int:
    """An open file in `out/.writing` with a lock that ends with the process."""
    try:
        (out / WRITING).mkdir(parents=True, exist_ok=True)
        return locked(out / WRITING / _LOCK, f"another process writes shards to {out} now; wait for it, or give another folder")
    except OSError as error:
        raise DataError(f"shards cannot be written to {out}: {error.strerror}; is it writable?") from error


def _take_back(out: Path) -> None:
    """Undoes a publishing that was killed between two moves."""
    for part, name in _plan(out):
        if (out / name).exists():
            (out / name).replace(out / WRITING / part)
    (out / WRITING / _PLAN).unlink(missing_ok=True)


def _plan(out: Path) -> list[tuple[str, str]]:
    try:
        return [(Path(part).name, Path(name).name) for part, name in json.loads((out / WRITING / _PLAN).read_bytes())]
    except (OSError, ValueError, TypeError):
        return []

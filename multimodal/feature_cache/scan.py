"""What an interrupted writing left: which pictures have features as they were written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adalink.errors import DataError
from multimodal.feature_cache.contents import Contents
from multimodal.feature_cache.shard import ABSENT, ShardFile, trim
from multimodal.progress import progress

__all__ = ["found_pictures", "shard_files"]


def shard_files(folder: Path) -> Sequence[Path]:
    """The files of features in a folder, by name."""
    return sorted(folder.glob("*.safetensors"))


def found_pictures(folder: Path, contents: Contents, n_pictures: int) -> NDArray[np.bool_]:
    """bool [n]: whose features are there. Every record is read; one that is damaged is taken out of its file, and a file without a head removed.

    Raises DataError where that is refused.
    """
    done = np.zeros(n_pictures, dtype=np.bool_)
    for path in progress(shard_files(folder), f"checking {folder}"):
        try:
            try:
                file = ShardFile(path, contents, is_written=True)
                pictures, checks = file.index()
            except DataError:
                path.unlink()
                continue
            for slot in np.flatnonzero(pictures != ABSENT).tolist():
                picture = int(pictures[slot])
                if 0 <= picture < n_pictures and _is_whole(file, slot, picture, int(checks[slot])):
                    done[picture] = True
                else:
                    file.erase(slot)
            trim(path, contents)  # of what a full disk or a kill left of a record
        except OSError as error:
            raise DataError(f"the features in {path} cannot be mended: {error.strerror}; can the folder be written?") from error
    return done


def _is_whole(file: ShardFile, slot: int, picture: int, check: int) -> bool:
    try:
        file.read(slot, picture, check)
    except DataError:
        return False
    return True

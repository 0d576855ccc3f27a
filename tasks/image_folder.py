"""The picture files that annotations name: found by one listing of each folder, never by one question per file."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from string import Formatter

from adalink.errors import ConfigError, DataError

__all__ = ["ImageFolder", "ImageName"]


class ImageName:
    """A file name with the image's id in it, such as `COCO_val2014_{image_id:012d}.jpg`.

    Raises ConfigError where the pattern has another field, none, or a format that a whole number does not have.
    """

    def __init__(self, pattern: str) -> None:
        try:
            fields = [field for _, field, _, _ in Formatter().parse(pattern) if field is not None]
            if fields and set(fields) == {"image_id"}:
                pattern.format(image_id=1)
        except (ValueError, KeyError, IndexError) as error:
            raise ConfigError(f"the image name pattern {pattern!r} cannot be used: {error}; {_EXAMPLES}") from error
        unknown = sorted(set(fields) - {"image_id"})
        if unknown:
            raise ConfigError(f"the image name pattern {pattern!r} has the unknown field {unknown[0]!r}; {_EXAMPLES}")
        if not fields:
            raise ConfigError(f"the image name pattern {pattern!r} has no field, so all images would have one name; {_EXAMPLES}")
        self._pattern = pattern

    def __call__(self, image_id: int) -> str:
        """Such as `COCO_val2014_000000000042.jpg`."""
        return self._pattern.format(image_id=image_id)


_EXAMPLES = "the only field is image_id, as in COCO_val2014_{image_id:012d}.jpg or image{image_id}.jpg"


class ImageFolder:
    """A folder of pictures, which may have folders in it; raises DataError where it is none."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            found = "is a file" if root.exists() else "does not exist"
            raise DataError(f"the images folder {root} {found}; expected a folder of pictures")
        self._root = root
        self._listed: dict[str, frozenset[str]] = {}

    def find(self, name: str, where: str) -> Path | None:
        """The path of the picture called `name` (`a.jpg` or `train/a.jpg`), None where there is no such file.

        Raises DataError where the name would leave the folder; `where` is the row that holds it, for the message.
        """
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/" or "\0" in name or "\\" in name:
            raise DataError(f"{where} names the picture {name!r}; expected a file name inside the images folder {self._root}")
        parent = "/".join(parts[:-1])
        if parent not in self._listed:
            self._listed[parent] = _names(self._root / parent)
        return self._root / name if parts[-1] in self._listed[parent] else None


def _names(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise DataError(f"the images folder {folder} cannot be listed: {error.strerror}") from error

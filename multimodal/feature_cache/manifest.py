"""What a folder of kept features holds, in `features.json`; written last, so that a folder with it is whole.

While the folder is being filled the same is in `unfinished.json`, without shards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from adalink.atomic import write_whole
from adalink.errors import ConfigError, DataError
from multimodal.bad_samples import BadSample
from multimodal.feature_cache.binding import Binding
from multimodal.feature_cache.contents import Contents

__all__ = ["FINISHED", "UNFINISHED", "FeatureManifest", "is_finished", "read_manifest", "write_manifest"]

FINISHED, UNFINISHED = "features.json", "unfinished.json"
_FORMAT = "adalink features 1"


@dataclass(frozen=True, kw_only=True)
class FeatureManifest:
    """A set of feature files.

    shards  file name -> bytes
    bad     sample index -> why it has no features
    """

    binding: Binding
    contents: Contents
    shards: Mapping[str, int] = field(default_factory=dict)
    bad: Mapping[int, BadSample] = field(default_factory=dict)


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a whole set."""
    return os.path.exists(folder / FINISHED)  # unlike Path.exists, no error where one may not look


def write_manifest(manifest: FeatureManifest, path: Path) -> None:
    """Write it, whole or not at all. Raises DataError."""
    content = {
        "format": _FORMAT,
        "of": manifest.binding.to_json(),
        "kept": asdict(manifest.contents),
        "shards": dict(manifest.shards),
        "bad": [[index, *bad.to_row()] for index, bad in manifest.bad.items()],
    }
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode("ascii"))


def read_manifest(folder: Path, name: str = FINISHED) -> FeatureManifest:
    """What the folder holds. Raises DataError where it is no folder of features, not finished, damaged or of another version."""
    path = folder / name
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"its format is {str(content.get('format') if isinstance(content, dict) else content)[:60]!r}, expected {_FORMAT!r}")
        return FeatureManifest(
            binding=Binding.from_json(content["of"]),
            contents=Contents(**content["kept"]),
            shards={_file_name(file): int(size) for file, size in content["shards"].items()},
            bad={int(index): BadSample.from_row(row) for index, *row in content["bad"]},
        )
    except OSError as error:
        raise DataError(_not_there(folder, error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise DataError(f"{path} is damaged or of another version ({error}): remove the folder and write the features again") from None


def _not_there(folder: Path, error: OSError) -> str:
    if os.path.exists(folder / UNFINISHED):
        return (
            f"the features in {folder} are not finished: a writing was interrupted or still goes on; run `adalink features` again, "
            "or train with train.features: fill"
        )
    if os.path.isdir(folder) and not isinstance(error, PermissionError):
        below = sorted(path.parent.name for path in folder.glob(f"*/{FINISHED}"))
        found = f"it holds features of {', '.join(below)} in folders of their own" if below else f"it has no {FINISHED}"
        return f"{folder} is no folder of features: {found}; write them with `adalink features`"
    return f"there are no features in {folder} ({error.strerror}): write them with `adalink features`, or train with train.features: fill"


def _file_name(file: str) -> str:
    if Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
        raise ValueError(f"{file!r} is no name of a file of features")
    return file

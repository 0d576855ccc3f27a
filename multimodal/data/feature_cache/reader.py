"""Features on disk, read by sample index.

    cache = FeatureCache.open("features/train")     # a folder that `adalink features` wrote
    cache[7]                                        # float16 [N + L, Dv] of picture 7, or the BadSample that has none
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adalink.errors import ConfigError, DataError
from multimodal.bad_samples import BadSample
from multimodal.data.feature_cache.format import ABSENT, MEND, Contents, ShardFile
from multimodal.data.feature_cache.manifest import FeatureManifest, bind, read_manifest, refuse_other
from multimodal.encoders.tower import VisionTower
from multimodal.sample import SampleSource

__all__ = ["FeatureCache", "matching_features"]


class FeatureCache:
    """The features of a data set. Every read is compared with its check sum; reading needs no model. Pickles as the names of its files.

    kind      patches: as `Features.joined` has them, patches first; taps: pooled vectors alone
    contents  what `cache[i]` gives
    bad       the samples that have no features, by index
    """

    def __init__(self, files: Sequence[ShardFile], places: NDArray[np.int64], contents: Contents, bad: Mapping[int, BadSample]) -> None:
        """places: int64 [n, 4]: file, record in it, the picture's number there, and its check sum."""
        self._files, self._places, self.contents, self.bad = tuple(files), places, contents, dict(bad)
        stored = files[0].contents if files else contents
        self._parts = None if stored == contents else contents.inside(stored)

    @classmethod
    def open(cls, folder: str | Path) -> FeatureCache:
        """A whole folder; what is in a file is read when it is asked for.

        Raises DataError where the folder is none, is not finished, or a file of it is missing or of another size.
        """
        return cls.of(Path(folder), read_manifest(Path(folder)))

    @classmethod
    def of(cls, folder: Path, manifest: FeatureManifest) -> FeatureCache:
        """As `open`, with the manifest read already. Raises DataError as it does."""
        places = np.full((manifest.binding.pictures, 4), ABSENT, dtype=np.int64)
        files = []
        for number, (name, size) in enumerate(manifest.shards.items()):
            path = folder / name
            files.append(ShardFile(path, manifest.contents))
            if (found := path.stat().st_size) != size:
                raise DataError(f"{path} has {found} bytes, and its manifest says {size}; {MEND}")
            pictures, checks = files[-1].index()
            slots = np.flatnonzero((pictures >= 0) & (pictures < len(places)))
            places[pictures[slots]] = np.stack([np.full_like(slots, number), slots, pictures[slots], checks[slots]], 1)
        lost = [index for index in np.flatnonzero(places[:, 0] == ABSENT).tolist() if index not in manifest.bad]
        if lost:
            raise DataError(
                f"the files in {folder} lack the features of {len(lost)} pictures, the first number {lost[0]}, which its manifest promises; {MEND}"
            )
        return cls(files, places, manifest.contents, manifest.bad)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shape(self) -> tuple[int, int]:
        """Of one picture's features."""
        return self.contents.shape

    @property
    def kind(self) -> Literal["patches", "taps"]:
        """What the features are."""
        return "patches" if self.contents.patches else "taps"

    def __getitem__(self, index: int) -> Tensor | BadSample:
        """[N + L, Dv] in the dtype that is kept, in memory of its own. Raises DataError where the file was cut or changed since."""
        if index in self.bad:
            return self.bad[index]
        number, slot, picture, check = self._places[index].tolist()
        record = self._files[number].read(slot, picture, check)
        if self._parts is None:
            return record
        return record[self._parts[0]] if len(self._parts) == 1 else torch.cat([record[part] for part in self._parts])

    def usable(self) -> list[int]:
        """The indices of the samples that have features."""
        return [index for index in range(len(self)) if index not in self.bad]

    def only(self, indices: Sequence[int]) -> FeatureCache:
        """The features of these samples alone: index i is the i-th of them."""
        bad = {i: self.bad[index] for i, index in enumerate(indices) if index in self.bad}
        return FeatureCache(self._files, self._places[list(indices)], self.contents, bad)

    def reading(self, needed: Contents, folder: Path) -> FeatureCache:
        """The same, of which only what is needed is handed out, in the dtype that is kept. Raises ConfigError where that is not in it."""
        wanted = Contents(patches=needed.patches, pooled=needed.pooled, width=needed.width, dtype=self.contents.dtype)
        if wanted.inside(self.contents) is None:
            raise ConfigError(
                f"the features in {folder} are {self.contents}, and these methods read {wanted}: write them with `adalink features` and this config"
            )
        return FeatureCache(self._files, self._places, wanted, self.bad)


# ----------------------------------------
# Features on disk for a model that is here: read where they are its own, refused where they are not.


def matching_features(folder: Path, tower: VisionTower, source: SampleSource, needed: Contents) -> FeatureCache:
    """The folder's features of these pictures by this encoder, of which only what is needed is read.

    Raises DataError as `FeatureCache.open`; ConfigError, naming both sides, where they are of another encoder, layer, preprocessing or data
    set, or lack what is needed, and where the encoder has trained weights.
    """
    manifest = read_manifest(folder)
    refuse_other(manifest.binding, bind(tower, source), folder)
    return FeatureCache.of(folder, manifest).reading(needed, folder)

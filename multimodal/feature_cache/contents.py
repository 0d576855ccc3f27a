"""Which vectors of a picture are kept, and in which dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adalink import Adapter
from adalink.errors import ConfigError, DataError
from adalink.methods.bridge import Projection
from adalink.methods.inject import Tap
from multimodal.features import Features
from multimodal.vision import VisionTower

__all__ = ["Contents", "StoredDtype", "all_contents", "as_size", "needed_contents"]

StoredDtype = Literal["float16", "bfloat16", "float32"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The vectors that a record holds: the patches, then pooled vectors; [patches + pooled, width].

    patches  all N of the encoder, or 0
    pooled   of the last so many blocks, or 0
    width    Dv
    """

    patches: int
    pooled: int
    width: int
    dtype: StoredDtype = "float16"

    def __post_init__(self) -> None:
        """Check what a manifest can get wrong."""
        if self.patches < 0 or self.pooled < 0 or self.patches + self.pooled < 1 or self.width < 1:
            raise ConfigError(f"{self.patches} patches and {self.pooled} pooled vectors of width {self.width} cannot be kept: give one vector or more")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"features cannot be kept in {self.dtype!r}: give one of {', '.join(_DTYPES)}")

    def __str__(self) -> str:
        parts = [f"{count} {name}" for count, name in ((self.patches, "patches"), (self.pooled, "pooled vectors")) if count]
        return f"{' and '.join(parts)} of width {self.width} in {self.dtype}"

    @property
    def shape(self) -> tuple[int, int]:
        """Of one record."""
        return self.patches + self.pooled, self.width

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the file holds."""
        return _DTYPES[self.dtype]

    @property
    def n_bytes(self) -> int:
        """Of one record. 50 patches of width 768 in float16: 76,800."""
        return self.shape[0] * self.width * self.torch_dtype.itemsize

    def of(self, features: Features) -> Tensor:
        """[B, patches + pooled, Dv] in the dtype that is kept. Raises DataError for values that it cannot hold."""
        parts = [features.patches] if self.patches else []
        if self.pooled:
            parts.append(features.pooled[-self.pooled :].transpose(0, 1))
        exact = torch.cat(parts, 1)
        rounded = exact.to(self.torch_dtype)
        if not rounded.isfinite().all() and exact.isfinite().all():
            raise DataError(
                f"an encoder's feature is {float(exact.abs().max()):.3g}, and {self.dtype} holds at most {torch.finfo(self.torch_dtype).max:.0f}: "
                "keep the features in bfloat16 or float32 (features_dtype)"
            )
        return rounded

    def inside(self, whole: Contents) -> list[slice] | None:
        """Where these vectors lie in a record that holds more; None where it does not hold them all."""
        if self.width != whole.width or self.patches not in (0, whole.patches) or self.pooled > whole.pooled:
            return None
        end = whole.patches + whole.pooled
        return [part for part in (slice(0, self.patches), slice(end - self.pooled, end)) if part.stop > part.start]


def as_size(n_bytes: int) -> str:
    """2 ** 34 -> 16.00 GiB; in MiB below one GiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def all_contents(tower: VisionTower, dtype: StoredDtype = "float16") -> Contents:
    """All that an encoder says of a picture: its patches, and the pooled vector of each block where they have one width."""
    return Contents(patches=tower.n_patches, pooled=tower.n_kept - tower.n_patches, width=tower.width, dtype=dtype)


def needed_contents(adapter: Adapter, everything: Contents) -> Contents:
    """What an adapter reads of a picture: a bridge the patches, eP-ALM the last few pooled vectors. All, where nothing says that it reads."""
    patches, pooled = 0, 0
    for module in adapter.modules():
        if isinstance(module, (Projection, Tap)) and module.source == "image":
            patches = everything.patches
        elif isinstance(module, Tap) and module.source == "image_taps":
            pooled = max(pooled, -module.block)
    if not patches and not pooled:
        return everything
    return Contents(patches=patches, pooled=pooled, width=everything.width, dtype=everything.dtype)

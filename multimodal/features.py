"""What a frozen tower says about a batch of pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adalink.errors import ConfigError

__all__ = ["Features"]


@dataclass(frozen=True, kw_only=True)
class Features:
    """One batch of encoded pictures.

    patches  float[B, N, Dv]   one vector for each place of the picture
    pooled   float[L, B, Dv]   one vector for the whole picture after each block; Dv may differ from that of the patches
    """

    patches: Tensor
    pooled: Tensor

    def __post_init__(self) -> None:
        if self.patches.dim() != 3 or self.pooled.dim() != 3 or self.patches.shape[0] != self.pooled.shape[1]:
            raise ConfigError(
                f"features need patches [B, N, Dv] and pooled [L, B, Dv] of the same B, "
                f"got {list(self.patches.shape)} and {list(self.pooled.shape)}; pass what a vision tower returns"
            )

    @property
    def joined(self) -> Tensor:
        """float[B, N + L, Dv]: all of it in one tensor, to be kept: patches first, then the pooled vectors. Patches alone where widths differ."""
        if self.pooled.shape[2] != self.patches.shape[2]:
            return self.patches
        return torch.cat([self.patches, self.pooled.transpose(0, 1)], 1)

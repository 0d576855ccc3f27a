"""Features of the pictures that were asked about last, so that a second question about one costs no encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from multimodal.model import VisionLanguageModel
from tasks.serve.job import Picture

__all__ = ["KeptFeatures"]


class KeptFeatures:
    """Encodes pictures, each once; the least recently asked about are forgotten. Used by the generation thread alone."""

    def __init__(self, model: VisionLanguageModel, n_kept: int) -> None:
        self.model = model
        self.n_kept = n_kept
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def of(self, pictures: Sequence[Picture]) -> tuple[Tensor, list[int]]:
        """float [I, N + L, Dv] of the different pictures, and for each of `pictures` which of them it is."""
        different = {picture.key: picture for picture in pictures}
        features = {key: self._kept[key] for key in different if key in self._kept}
        if new := [picture for key, picture in different.items() if key not in features]:
            encoded = self.model.encode(torch.stack([picture.pixels for picture in new]))
            # Copies: a row of the batch would keep all of it in memory.
            features |= {picture.key: row.clone() for picture, row in zip(new, encoded, strict=True)}
        for key, row in features.items():
            self._kept[key] = row
            self._kept.move_to_end(key)
        while len(self._kept) > self.n_kept:
            self._kept.popitem(last=False)
        order = {key: i for i, key in enumerate(different)}
        return torch.stack([features[key] for key in different]), [order[picture.key] for picture in pictures]

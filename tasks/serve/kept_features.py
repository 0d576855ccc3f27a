"""Features of the pictures that were asked about last, so that a second question about one costs neither decoder nor encoder.

Of an adapted encoder no features are kept, but the pixels that it reads: a second question costs the encoder.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from multimodal.model import VisionLanguageModel
from tasks.serve.job import Picture

__all__ = ["KeptFeatures"]


class KeptFeatures:
    """Encodes pictures, each once; above a number and a sum of bytes, those least recently asked about are forgotten.

    `get` is for any thread, `of` for the generation thread.
    """

    def __init__(self, model: VisionLanguageModel, n_kept: int, most_bytes: int = 2**28) -> None:
        self.model = model
        self.n_kept = n_kept
        self.most_bytes = most_bytes
        self.n_bytes = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def kind(self) -> Literal["patches", "pixels"]:
        """What `of` gives."""
        return "patches" if self.model.tower.adapter is None else "pixels"

    def get(self, key: str) -> Tensor | None:
        """float [N + L, Dv], or [3, H, W] of pixels, where the picture is known."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def of(self, pictures: Sequence[Picture]) -> tuple[Tensor, list[int]]:
        """float [I, N + L, Dv], or [I, 3, H, W] of pixels, of the different pictures, and for each of `pictures` which of them it is."""
        different = {picture.key: picture for picture in pictures}
        features = {key: found for key, picture in different.items() if (found := self.get(key) if picture.features is None else picture.features) is not None}
        if new := [picture for key, picture in different.items() if key not in features]:
            pixels = torch.stack([picture.pixels for picture in new if picture.pixels is not None])
            encoded = pixels if self.kind == "pixels" else self.model.encode(pixels)
            # Copies: a row of the batch would keep all of it in memory.
            features |= {picture.key: row.clone() for picture, row in zip(new, encoded, strict=True)}
        with self._lock:
            for key, value in features.items():
                self.n_bytes += value.nbytes - (self._kept[key].nbytes if key in self._kept else 0)
                self._kept[key] = value
            while len(self._kept) > self.n_kept or self.n_bytes > self.most_bytes:
                self.n_bytes -= self._kept.popitem(last=False)[1].nbytes
        order = {key: i for i, key in enumerate(different)}
        return torch.stack([features[key] for key in different]), [order[picture.key] for picture in pictures]

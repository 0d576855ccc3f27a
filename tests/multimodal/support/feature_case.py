"""Made-up features of made-up images, for the tests of what is kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.batches.prepared import Prepared
from multimodal.data.feature_cache.format import Contents
from multimodal.data.feature_cache.reader import Binding, Sketch
from multimodal.data.feature_cache.writer import FeatureWriter

N = 10
CONTENTS = Contents(patches=3, pooled=2, width=4)


def binding(**fields: Any) -> Binding:
    """Of `N` images."""
    sketch = Sketch((3, 2, 2), (0.0, 1.0, 0.5))
    own = {"encoder": "one", "fingerprint": "f1", "precision": "float32", "layer": -1, "pixels": sketch, "features": sketch, "images": N, "data": "d1"}
    return Binding(**{**own, **fields})


def records(images: list[int], contents: Contents = CONTENTS) -> Tensor:
    """A record of each image, told apart from every other."""
    made = [torch.randn(contents.shape, generator=torch.Generator().manual_seed(image)) for image in images]
    return torch.stack(made).to(contents.torch_dtype)


def written(folder: Path, contents: Contents = CONTENTS, n: int = N) -> Path:
    """A whole folder."""
    writer = FeatureWriter(folder, binding(images=n), contents)
    writer.add(list(range(n)), records(list(range(n)), contents))
    writer.finish({})
    writer.close()
    return folder


def only_shard(folder: Path) -> Path:
    """The one file of features in a folder."""
    (path,) = folder.glob("*.safetensors")
    return path


def same_images(one: object, other: object) -> bool:
    """Whether two images of a model that sees already are alike, bit for bit."""
    assert isinstance(one, Prepared)
    assert isinstance(other, Prepared)
    assert one.vectors is not None
    assert other.vectors is not None
    said = (one.wording, one.counts, [grid.tolist() for grid in one.grids]) == (other.wording, other.counts, [grid.tolist() for grid in other.grids])
    return said and one.vectors.dtype == other.vectors.dtype and torch.equal(one.vectors, other.vectors)

"""A sample's image or clip as an encoder takes it, decoded as the sample says."""

from __future__ import annotations

import random
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adalink.errors import ConfigError
from multimodal.data.images.clips import read_frames, read_sound
from multimodal.data.images.decode import decode_image
from multimodal.data.order import fingerprint_of, shard_sizes_of, texts_fingerprint_of
from multimodal.sample import BadSample, Lengths, Measure, MediaKind, Sample, SampleSource, lengths_of

if TYPE_CHECKING:
    from torch import Tensor

    from multimodal.batches.prepared import Prepared

__all__ = ["CachedFeatures", "Drafted", "NoFeatures", "StoredDtype", "blank", "drawing", "kind_of", "needed_side", "prepared", "read_pixels"]


BLANK = Image.new("RGB", (8, 8))
_RAMP = 512  # pixels a side of the test images


class Drafted:
    """A data set whose JPEGs are decoded at a half, a quarter or an eighth of their size, where that is still all the encoder needs.

    Faster, with other pixels: of 672 x 448 for an encoder of 224 2.6 times, 38 dB from the exact pixels (tests/benchmarks/RESULTS.md).
    """

    def __init__(self, source: SampleSource) -> None:
        self.source = source

    @property
    def fingerprint(self) -> str:
        """The set's own and how it is decoded; empty where the set has none."""
        known = fingerprint_of(self.source)
        return f"{known} draft" if known else ""

    @property
    def texts_fingerprint(self) -> str:
        """Likewise, of its texts."""
        known = texts_fingerprint_of(self.source)
        return f"{known} draft" if known else ""

    @property
    def shard_sizes(self) -> NDArray[np.int64] | None:
        """The set's, as `multimodal.data.order.shard_sizes_of`."""
        return shard_sizes_of(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Raises what the set raises."""
        return replace(self.source[index], decode="draft")

    def text_lengths(self, measure: Measure) -> Lengths:
        """The set's own."""
        return lengths_of(self.source, measure)


def read_pixels(sample: Sample, preprocess: Callable[[Any], Any], epoch: tuple[int, int] | None = None) -> Any:
    """float [3, H, W], a clip as its encoder takes it, or a Prepared of all images: what an encoder's preprocessing makes of a sample's media.

    epoch   the seed of a run and the number of the epoch: frames that are drawn are a function of these and of the sample's key

    Raises BadImage, DataError for a sound too short, and ConfigError where a composed model is given several images or none, or clips of another kind.
    """
    kind = kind_of(preprocess)
    if sample.kind != kind:
        raise ConfigError(
            f"sample {sample.key!r} is of the kind {sample.kind}, and the encoder takes {kind}: give data of the kind {kind}, or an encoder of {sample.kind}"
        )
    at_least = needed_side(preprocess) if sample.decode == "draft" and kind == "image" else None
    draw = random.Random(f"{epoch} {sample.key}") if epoch is not None and getattr(preprocess, "is_drawing", False) else None
    read = [prepared(media, preprocess, at_least=at_least, draw=draw) for media in sample.images]
    if len(read) == 1:
        return read[0]
    if not hasattr(preprocess, "processor"):
        raise ConfigError(f"sample {sample.key!r} has {len(read) or 'no'} images, and a composed model reads one: give each sample one image")
    from multimodal.batches.prepared import joined  # late: it loads torch

    return joined(read)


def kind_of(preprocess: Callable[[Any], Any]) -> MediaKind:
    """What an encoder's preprocessing takes; an existing model's images."""
    found: MediaKind = getattr(preprocess, "kind", "image")
    return found


def prepared(media: Any, preprocess: Callable[[Any], Any], *, at_least: int | None = None, draw: random.Random | None = None) -> Any:
    """An image or a clip, read and as the encoder takes it. at_least: as in `decode_image`; draw: of frames, as in `read_frames`. Raises BadImage."""
    kind, own = kind_of(preprocess), typing.cast("Any", preprocess)
    if kind == "video":
        return preprocess(read_frames(media, own.n_frames, draw))
    return preprocess(read_sound(media, own.rate) if kind == "audio" else decode_image(media, at_least=at_least))


def drawing(preprocess: Callable[[Any], Any]) -> Any:
    """A video encoder's preprocessing, for a training that draws frames. Raises ConfigError for any other."""
    if kind_of(preprocess) != "video":
        raise ConfigError(f"train.draw_frames draws frames of clips, and the encoder takes {kind_of(preprocess)}: leave it out")
    return replace(typing.cast("Any", preprocess), is_drawing=True)


def blank(preprocess: Callable[[Any], Any]) -> Any:
    """What a model is given in the place of an image or a clip: black pixels, or silence."""
    return preprocess(getattr(preprocess, "blank", BLANK))


@lru_cache(maxsize=8)
def needed_side(preprocess: Callable[[Image.Image], Tensor]) -> int:
    """The size in pixels of a square image that the preprocessing would neither enlarge nor shrink: 256 where it resizes to 256 and crops 224.

    Found out from how much of a ramp from black to white it shows; up to a hundredth less than it is.
    """
    black, white = (preprocess(Image.new("RGB", (_RAMP, _RAMP), color)) for color in ("black", "white"))
    if hasattr(black, "inputs"):
        return 2**30  # an existing model's processor looks at the image's own size
    ramp = Image.linear_gradient("L").rotate(90).resize((_RAMP, _RAMP), Image.Resampling.BILINEAR)
    displayed = preprocess(Image.merge("RGB", [ramp] * 3))
    height, width = displayed.shape[-2:]
    row = displayed[0, height // 2]
    share = float((row[-1] - row[0]).abs() / (white[0, 0, 0] - black[0, 0, 0]).abs())
    return max(height, round(max(width, height) / min(share + 0.01, 1.0)))


# ----------------------------------------
# Features that are cached, in memory or on disk.


StoredDtype = Literal["float16", "bfloat16", "float32"]


class CachedFeatures(Protocol):
    """Features by sample index."""

    @property
    def bad(self) -> Mapping[int, BadSample]:
        """The samples that have none, and why."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's features."""

    @property
    def kind(self) -> Literal["patches", "taps", "pixels"]:
        """patches: as `Features.joined` has them; taps: pooled vectors alone, of the last blocks; pixels: nothing is cached (an adapted encoder)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor | Prepared | BadSample: ...

    def usable(self) -> list[int]:
        """The indices of the samples that have features."""

    def only(self, indices: Sequence[int]) -> CachedFeatures:
        """The features of these samples alone: index i is the i-th of them."""


class NoFeatures:
    """In the place of features where a model has no encoder: every sample can be used, and has none."""

    kind: Literal["patches"] = "patches"
    shape = (0, 0)

    def __init__(self, count: int) -> None:
        self._count = count
        self.bad: Mapping[int, BadSample] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """float [0, 0]."""
        from torch import zeros  # late: settings modules load this one

        return zeros(self.shape)

    def usable(self) -> list[int]:
        """All of them."""
        return list(range(self._count))

    def only(self, indices: Sequence[int]) -> NoFeatures:
        """Of so many samples."""
        return NoFeatures(len(indices))

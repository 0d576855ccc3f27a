"""Where pictures and texts come from: files in the official formats, webdataset shards, or the embedded scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adalink.errors import ConfigError, DataError
from multimodal.bad_samples import BadSample
from multimodal.sample import Sample, SampleSource
from multimodal.shards import ShardSource
from tasks.coco_files import read_coco_captions
from tasks.scenes.dataset import Scenes
from tasks.vqa_files import read_vqa

__all__ = ["Chosen", "DataConfig", "Opened"]


@dataclass(frozen=True)
class Opened:
    """A data set that was opened, and the samples that are known to be bad already."""

    source: SampleSource
    problems: tuple[BadSample, ...]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set: pictures with annotations (and questions), or shards, or scenes."""

    images: Path | None = None  # the folder of pictures
    annotations: Path | None = None  # COCO captions, or VQAv2 annotations
    questions: Path | None = None  # VQAv2 questions
    image_name: str | None = None  # file name of a picture where the annotations hold none: COCO_val2014_{image_id:012d}.jpg
    shards: Path | None = None  # a folder of webdataset shards
    scenes: str | None = None  # the embedded data set: SPLIT/SIZE, for instance train/2000
    limit: int = 0  # take the first so many pictures; 0: all

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        given = [name for name in ("images", "shards", "scenes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"a data set needs one of images, shards and scenes, got {', '.join(given) or 'none'}")
        if self.images is not None and self.annotations is None and self.questions is None:
            raise ConfigError(f"the pictures in {self.images} come without texts: give annotations (and, for vqa, questions)")
        unused = [name for name in ("annotations", "questions", "image_name") if getattr(self, name) is not None and self.images is None]
        if unused:
            raise ConfigError(f"{', '.join(unused)} would not be read: {given[0]} holds its own texts, so give them with images only")
        if self.limit < 0:
            raise ConfigError(f"the data set's limit is {self.limit}: give 0 (all) or more")

    def open(self) -> Opened:
        """Read annotations or manifest; pictures are read later. Raises DataError where nothing is left to read."""
        source: SampleSource
        problems: tuple[BadSample, ...] = ()
        if self.scenes is not None:
            source = _scenes(self.scenes)
        elif self.shards is not None:
            shards = ShardSource(self.shards)
            source, problems = shards, tuple(shards.problems)
        else:
            source, problems = self._files()
        if self.limit:
            source = Chosen(source, range(min(self.limit, len(source))))
        if not len(source):
            raise DataError(f"the data set has no usable sample: {problems[0].detail if problems else self}")
        return Opened(source, problems)

    def _files(self) -> tuple[SampleSource, tuple[BadSample, ...]]:
        assert self.images is not None
        if self.questions is not None:
            answered = read_vqa(images=self.images, questions=self.questions, annotations=self.annotations, image_name=self.image_name)
            return answered, tuple(answered.problems)
        assert self.annotations is not None
        captioned = read_coco_captions(images=self.images, annotations=self.annotations, image_name=self.image_name)
        return captioned, tuple(captioned.problems)


class Chosen:
    """Some samples of a source: index i is the i-th of `indices`."""

    def __init__(self, source: SampleSource, indices: Sequence[int]) -> None:
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of these {len(self)} samples")
        return self._source[self._indices[index]]


def _scenes(text: str) -> Scenes:
    split, _, size = text.partition("/")
    if split not in ("train", "val") or not (size.isascii() and size.isdigit()):
        raise ConfigError(f"scenes is {text!r}: give SPLIT/SIZE, for instance train/2000 or val/200")
    return Scenes(split=split, size=int(size))  # type: ignore[arg-type]

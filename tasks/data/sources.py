"""Where images and texts come from: files in the official formats, webdataset shards, or the embedded scenes."""

from __future__ import annotations

import hashlib
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError, DataError
from multimodal.data.inputs import Drafted
from multimodal.data.order import MixedSet, Mixture, fingerprint_of, shard_sizes_of, texts_fingerprint_of
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.storage import RemoteSettings, is_url, redacted
from multimodal.sample import BadSample, Decode, Measure, Sample, SampleSource, counted, lengths_of
from tasks.data.benchmarks import BenchmarkSource
from tasks.data.coco import read_coco_captions, read_coco_images, read_karpathy
from tasks.data.files import FileSource, loaded_once
from tasks.data.parquet import RowSource
from tasks.data.reader import Given, Official, ReadSource
from tasks.data.readers import open_path
from tasks.data.table import TableSource
from tasks.data.text import TextSource, open_disk, open_glue, open_table
from tasks.data.vqa import VQA_SPLITS, read_vqa, read_vqa_split, split_parts
from tasks.scenes.dataset import Scenes

__all__ = ["Chosen", "DataConfig", "Opened", "open_mix", "open_shards", "place_of", "saved_data", "scorer_of"]


# ----------------------------------------
# Shards as a config names them, a folder or a URL; and several data sets mixed by weight.


def open_shards(places: str | Path | Sequence[str], remote: RemoteSettings) -> tuple[SampleSource, tuple[BadSample, ...]]:
    """The samples of a folder or a URL, or of several, and those that are known to be bad."""
    source = ShardSource(places, remote=remote)
    return source, tuple(source.problems)


def open_mix(mix: Mapping[str, int], remote: RemoteSettings, decode: Decode) -> tuple[Mixture, tuple[BadSample, ...]]:
    """The samples of several data sets, by path or URL, which a training stream mixes by weight; `coco:42` is sample 42 of .../coco."""
    sources = {place: ShardSource(place, remote=remote) if is_url(place) else _read_path(place, remote.cache) for place in mix}
    short = {place: redacted(place).rstrip("/").rpartition("/")[2] for place in mix}
    names = {place: name if list(short.values()).count(name) == 1 else redacted(place) for place, name in short.items()}
    problems = tuple(replace(bad, key=f"{names[place]}:{bad.key}") for place, source in sources.items() for bad in source.problems)
    return Mixture(
        {names[place]: MixedSet(Drafted(source) if decode == "draft" else source, mix[place]) for place, source in sources.items()}
    ), problems


def _read_path(place: str, cache: Path | None) -> ReadSource:
    with loaded_once():
        return open_path(Given(path=Path(place), cache=cache))[1]


@dataclass(frozen=True)
class Opened:
    """A data set that was opened, and the samples that are known to be bad already.

    item_ids   what an official result file for the whole split must hold; empty where only the samples themselves say it
    left_out   images that `limit` leaves out
    sentence   how a path was understood, for the log; empty where the config says it
    files      the samples as the reader of a path gives them
    """

    source: SampleSource
    problems: tuple[BadSample, ...]
    item_ids: tuple[int, ...] = ()
    left_out: int = 0
    sentence: str = ""
    files: ReadSource | None = None

    @property
    def official(self) -> Official | None:
        """How the benchmark's own result file calls its items, where it differs from the usual one."""
        return self.files.official if isinstance(self.files, BenchmarkSource) else None

    @property
    def beyond(self) -> Mapping[str, int]:
        """How many rows have what not every model reads: several images, no image, earlier turns."""
        return self.files.beyond if isinstance(self.files, TableSource) else {}


# What gives texts to a folder of images, with what may stand beside each.
_TEXTS: Mapping[str, tuple[str, ...]] = {
    "karpathy": ("split",),
    "vqav2": ("split",),
    "questions": ("annotations", "image_name"),
    "image_info": ("image_name",),
    "annotations": ("image_name",),
}


_KINDS = ("path", "images", "shards", "mix", "glue", "table", "disk", "scenes")
_OF_TEXTS: Mapping[str, tuple[str, ...]] = {"glue": ("split",), "table": ("columns",), "disk": ("split", "columns")}  # what is read beside each


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set: a path that shows what it is, or images with a file of texts, or shards, or scenes."""

    path: str | Path | None = (
        None  # a file or folder that shows what it is: a table, an annotation file, an imagefolder, shards; `--data.train PATH`
    )
    format: str | None = None  # of path, where that may be two things: table, imagefolder, coco, karpathy, vqav2, caption_folder, ...
    glue: Path | None = None  # task: text; a folder of GLUE, such as glue_data/CoLA; split says which file
    table: Path | None = None  # task: text; a .jsonl, .csv or .tsv file with a label in each row
    disk: Path | None = None  # task: text; a folder that `datasets` saved (save_to_disk)
    columns: dict[str, str | None] | None = (
        None  # of path, table or disk, where they are not called as usual: {image: file, caption: text}; {text: question, pair: null, label: label}
    )
    images: Path | None = None  # the folder of images; with path by default where that lies
    media: Path | None = None  # the same for a folder of videos or sounds
    annotations: Path | None = None  # COCO captions, or VQAv2 annotations
    questions: Path | None = None  # VQAv2 questions; a test split has these alone
    image_info: Path | None = None  # COCO's list of images without captions, such as image_info_test2014.json: a test split of captioning
    karpathy: Path | None = None  # Karpathy's dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json; needs split
    vqav2: Path | None = None  # the folder of VQAv2's official questions and annotations; needs split
    split: str | None = None  # karpathy: train, restval, val or test; vqav2: train, val, test or test-dev; several as in train+restval; glue: train, dev, ...
    image_name: str | None = None  # file name of an image where the annotations hold none: COCO_val2014_{image_id:012d}.jpg
    shards: str | Path | list[str] | None = (
        None  # webdataset shards: a folder, or its http, https, s3, gs or hf URL; or a list of folders and tar files, with * and {000..123}
    )
    mix: dict[str, int] | None = (
        None  # several data sets, path or URL: weight, for instance {coco: 3, vqa.parquet: 1}, three of each four images coco's
    )
    cache: Path | None = None  # a folder for unpacked copies of parquet, and for whole shards from a URL; none: shards are read from the server each time
    cache_gib: float = 50.0  # most that the cache may hold
    scenes: str | None = None  # the embedded data set: SPLIT/SIZE, for instance train/2000
    limit: int = 0  # take the first so many images; 0: all
    shots: int = 0  # of these, take so many images of a permutation that shots_seed draws, as published few-shot subsets do; 0: all
    shots_seed: int = 0  # numpy's default_rng(seed).permutation(n)
    after_shots: int = 0  # with shots: in the place of these, at most so many that follow them; data.val with this alone: those of data.train; 0: the shots
    decode: Decode = "exact"  # draft: JPEGs at 1/2, 1/4 or 1/8 of their size where the encoder needs no more; faster, and CHANGES PIXELS (by about 38 dB)

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.media is not None:
            if self.images is not None:
                raise ConfigError(f"images is {self.images} and media {self.media}: a data set has one folder, so leave one out")
            object.__setattr__(self, "images", self.media)
            object.__setattr__(self, "media", None)
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if given == ["path", "images"]:
            given = ["path"]
        if len(given) != 1 and not (self.after_shots and not given):
            raise ConfigError(f"a data set needs one of {', '.join(_KINDS[:-1])} and {_KINDS[-1]}, got {', '.join(given) or 'none'}")
        if given:
            self._check_texts(given[0])
        if self.limit < 0 or not self.cache_gib >= 0:
            raise ConfigError(f"the data set's limit is {self.limit} and its cache_gib {self.cache_gib}: give 0 or more")
        if min(self.shots, self.shots_seed, self.after_shots) < 0 or (self.after_shots and given and not self.shots):
            raise ConfigError(
                f"the data set's shots is {self.shots}, shots_seed {self.shots_seed} and after_shots {self.after_shots}: give 0 or more, and shots "
                "with after_shots"
            )
        if self.shots and self.mix is not None:
            raise ConfigError(f"shots is {self.shots} and mix was given, whose weights choose images: leave one out")
        if self.mix is not None and (self.limit or not self.mix or min(self.mix.values()) < 1):
            raise ConfigError(
                f"mix is {self.mix} and limit {self.limit}: give data sets by path, each with a whole number from 1, and no limit"
            )
        if self.decode not in ("exact", "draft") or (self.decode == "draft" and self.scenes is not None):
            raise ConfigError(f"decode is {self.decode!r}: give exact or draft, which is for JPEGs (scenes are none)")
        if self.cache is not None and self.shards is None and self.mix is None and self.path is None:
            raise ConfigError(f"the cache {self.cache} would not be used: it keeps shards from a URL and unpacked parquet, and the data set is {given[0]}")

    def _check_texts(self, given: str) -> None:
        """Raise ConfigError where texts are missing, given twice, or given to what has its own."""
        if self.path is not None:
            named = [name for name in _TEXTS if name != "annotations" and getattr(self, name) is not None]
            if named:
                raise ConfigError(f"path and {named[0]} were given: path is the file of texts itself, so leave one out")
            return
        own = _OF_TEXTS.get(given, ())
        if unread := [name for name in ("format", "columns") if getattr(self, name) is not None and name not in own]:
            raise ConfigError(f"{' and '.join(unread)} would not be read: they are for path, and the data set is {given}")
        texts = next((name for name in _TEXTS if getattr(self, name) is not None), None)
        if self.images is not None and texts is None:
            raise ConfigError(
                f"the images in {self.images} come without texts: give annotations (and, for vqa, questions), or image_info for a test split"
            )
        names = dict.fromkeys(["annotations", "questions", *_TEXTS, "split", "image_name"])
        read = {texts, *_TEXTS[texts]} if texts is not None and self.images is not None else set(own)
        if unused := [name for name in names if getattr(self, name) is not None and name not in read]:
            by = (
                f"{given} holds its own texts, so give them with images only"
                if self.images is None
                else f"{texts} gives the texts, so leave them out"
            )
            raise ConfigError(f"{', '.join(unused)} would not be read: {by}")
        if "split" in read and self.split is None and not own:
            raise ConfigError(f"{texts} holds several splits: give split, such as val or test")

    @property
    def _is_remote(self) -> bool:
        return self.path is not None and is_url(str(self.path))

    @property
    def split_name(self) -> str:
        """What official result files call the split: `val2014`, `test-dev2015`, `karpathy-test`; `val` where nothing says it."""
        if self.glue is not None:
            return self.glue.stem if self.glue.is_file() else self._text_split
        if (self.path is not None or self.disk is not None) and self.split is not None:
            return _in_a_name(self.split)
        if self.split is not None:
            parts = [VQA_SPLITS[part][0] for part in split_parts(self.split)] if self.vqav2 else ["karpathy", self.split]
            return _in_a_name("-".join(parts))
        file = self.questions or self.image_info or (self.path and Path(self.path)) or self.annotations
        words = file.stem.removesuffix("_questions").split("_") if file is not None else []
        return _in_a_name(words[-1]) if len(words) > 1 else "val"

    @property
    def is_after_shots(self) -> bool:
        """Whether it is some rows of the training data, and names no set of its own."""
        return bool(self.after_shots) and all(getattr(self, kind) is None for kind in _KINDS)

    @property
    def _text_split(self) -> str:
        """The split that is given, else the one that models are evaluated on."""
        if self.glue is None:
            return self.split or "validation"
        return self.split or ("dev" if (self.glue / "dev.tsv").exists() else "dev_matched")

    def open(self, *, in_order: bool = False) -> Opened:
        """Read annotations or manifest; images are read later. in_order: as in `Given`. Raises DataError where nothing is left to read."""
        source: SampleSource
        files: ReadSource | None
        problems: tuple[BadSample, ...] = ()
        item_ids: tuple[int, ...] = ()
        sentence, files = "", None
        if self.scenes is not None:
            source = _scenes(self.scenes)
        elif self.shards is not None or self._is_remote:
            source, problems = open_shards(str(self.path) if self.shards is None else self.shards, self._remote())
        elif self.mix is not None:
            source, problems = open_mix(self.mix, self._remote(), self.decode)
        else:
            files, sentence = self._texts() or ((self._files(), "") if self.path is None else self._at_path(in_order))
            source, problems, item_ids = files, files.problems, files.item_ids
        if self.decode == "draft" and self.mix is None:
            source = Drafted(source)
        whole = len(source)
        if self.limit:
            source = Chosen(source, range(min(self.limit, whole)))
        if self.shots:
            source = Chosen(source, self._shots(len(source)))
        if not len(source):
            raise DataError(f"the data set has no usable sample: {problems[0].detail if problems else self}")
        return Opened(source, problems, item_ids, whole - len(source), sentence, files)

    def _shots(self, n: int) -> list[int]:
        """The indices of the shots among n samples, or of those that follow. Raises DataError where there are fewer."""
        if self.shots + bool(self.after_shots) > n:
            more = " with samples after them" if self.after_shots else ""
            raise DataError(f"the data set's shots is {self.shots}{more}, and it holds {counted(n, 'sample')}: give fewer shots")
        drawn: list[int] = np.random.default_rng(self.shots_seed).permutation(n).tolist()
        return drawn[self.shots : self.shots + self.after_shots] if self.after_shots else drawn[: self.shots]

    def _remote(self) -> RemoteSettings:
        return RemoteSettings(cache=self.cache, cache_bytes=int(self.cache_gib * 2**30))

    def _texts(self) -> tuple[TextSource, str] | None:
        """The rows of a set of texts with labels, and a line about them; None for images. Raises ConfigError where the set is data.train's, alone."""
        if self.glue is not None:
            found = open_glue(self.glue, self._text_split)
        elif self.table is not None:
            found = open_table(self.table, self.columns or {})
        elif self.disk is not None:
            found = open_disk(self.disk, self._text_split, self.columns or {})
        elif self.is_after_shots:
            raise ConfigError("data.val has after_shots, which are rows of data.train, and data.train is not given: give both, or another data.val")
        else:
            return None
        skipped = f", {len(found.problems):,} skipped (short rows)" if found.problems else ""
        return found, f"{self.glue or self.table or self.disk}: {counted(len(found), 'row')}{skipped}"

    def _at_path(self, in_order: bool) -> tuple[ReadSource, str]:
        """The samples at `path`, and what was understood."""
        path = Path(str(self.path))
        given = Given(
            path=path, images=self.images, annotations=self.annotations, image_name=self.image_name, split=self.split,
            columns={role: name for role, name in (self.columns or {}).items() if name is not None},
            cache=self.cache, in_order=in_order,
        )  # fmt: skip
        with loaded_once():
            reader, source = open_path(given, self.format)
        more = f" ({source.sentence})" if isinstance(source, (TableSource, RowSource)) else f" ({counted(len(source), 'image')})"
        return source, f"{path} is read as {reader.about}{more}"

    def _files(self) -> FileSource:
        assert self.images is not None
        if self.karpathy is not None:
            return read_karpathy(self.karpathy, self.images, self.split or "")
        if self.vqav2 is not None:
            return read_vqa_split(self.vqav2, self.images, self.split or "")
        if self.questions is not None:
            return read_vqa(images=self.images, questions=self.questions, annotations=self.annotations, image_name=self.image_name)
        if self.image_info is not None:
            return read_coco_images(images=self.images, annotations=self.image_info, image_name=self.image_name)
        assert self.annotations is not None
        return read_coco_captions(images=self.images, annotations=self.annotations, image_name=self.image_name)


def saved_data(settings: Mapping[str, object]) -> DataConfig:
    """The data set that a run's config.yaml names, from the settings under `data.val`. Raises ConfigError on another setting."""
    hints = typing.get_type_hints(DataConfig)
    if unknown := [name for name in settings if name not in hints]:
        raise ConfigError(f"a data set has no setting {unknown[0]!r}: was the config written by another version?")
    is_path = {name for name, hint in hints.items() if Path in typing.get_args(hint) and str not in typing.get_args(hint)}  # a str may be a URL
    return DataConfig(**{name: Path(str(value)) if name in is_path and value is not None else value for name, value in settings.items()})  # type: ignore[arg-type]


def _in_a_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text)


def place_of(source: SampleSource, index: int) -> str:
    """Where a sample stands, `captions.csv, line 7`; empty where the data set has no lines."""
    place: Callable[[int], str] | None = getattr(source, "place", None)
    return place(index) if place is not None else ""


class Chosen:
    """Some samples of a source: index i is the i-th of `indices`."""

    def __init__(self, source: SampleSource, indices: Sequence[int]) -> None:
        self.source, self._indices = source, indices

    @property
    def fingerprint(self) -> str:
        """Of the source's fingerprint and the indices; empty where the source has none."""
        return self._of(fingerprint_of(self.source))

    @property
    def texts_fingerprint(self) -> str:
        """Likewise, of the source's texts."""
        return self._of(texts_fingerprint_of(self.source))

    @property
    def shard_sizes(self) -> NDArray[np.int64] | None:
        """The source's, where the first samples were chosen: the last shard is then smaller, and those after it hold none."""
        sizes = shard_sizes_of(self.source) if self._indices == range(len(self)) else None
        if sizes is None:
            return None
        chosen: NDArray[np.int64] = np.diff(np.minimum(np.cumsum(sizes), len(self)), prepend=0)
        return chosen

    def _of(self, whole: str) -> str:
        return whole and hashlib.sha256(f"{whole} {list(self._indices)}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of these {len(self)} samples")
        return self.source[self._indices[index]]

    def place(self, index: int) -> str:
        """As `place_of`."""
        return place_of(self.source, self._indices[index])

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        """Those of the source, at the indices."""
        return lengths_of(self.source, measure)[np.asarray(self._indices)]


def scorer_of(source: SampleSource) -> str:
    """The scorer of the task vqa that a benchmark has of its own; empty where it has none."""
    while isinstance(source, (Chosen, Drafted)):
        source = source.source
    return source.scorer if isinstance(source, BenchmarkSource) else ""


def _scenes(text: str) -> Scenes:
    split, _, size = text.partition("/")
    if split not in ("train", "val") or not (size.isascii() and size.isdigit()):
        raise ConfigError(f"scenes is {text!r}: give SPLIT/SIZE, for instance train/2000 or val/200")
    return Scenes(split=split, size=int(size))  # type: ignore[arg-type]

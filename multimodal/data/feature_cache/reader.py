"""Cached features on disk: what a folder holds, what they are features of, and reading them by sample index."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adalink import fingerprint
from adalink.checkpoint.fingerprint import Sketch
from adalink.errors import ConfigError, DataError
from adalink.files import write_whole
from multimodal.batches.prepared import Prepared
from multimodal.data.feature_cache.format import ABSENT, MEND, AnyContents, ShardFile, contents_from
from multimodal.data.images.decode import ImageOrFile
from multimodal.data.order import fingerprint_of
from multimodal.encoders.bound_parts import test_pixels
from multimodal.encoders.tower import VisionTower
from multimodal.existing.tower import ModelTower
from multimodal.sample import BadSample, DamagedSample, Sample, SampleSource

__all__ = [
    "FINISHED", "UNFINISHED", "Binding", "FeatureCache", "FeatureManifest", "Sketch", "bind", "is_finished", "matching_features",
    "read_manifest", "refuse_other", "write_manifest",
]  # fmt: skip


# ----------------------------------------
# What a folder of cached features holds, in `features.json`; written last, so that a folder with it is whole.
#
# While the folder is being filled the same is in `unfinished.json`, without shards.


# ----------------------------------------
# What cached features are features of: an encoder, its preprocessing, a layer, and a data set.


N_READ = 64  # images of a folder whose bytes are compared; of the others names and sizes
SLICE_BYTES = 4096  # of each of four slices of every image
N_THREADS, N_WAITING = 16, 4096
SAME_PIXELS = 0.05  # of the range of values; one step in 255 of a normalised image is 0.004 of it
SAME_FEATURES = 0.03  # of the largest value; bfloat16 and TF32 stay under 0.01


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What features are of; two that agree give the same features.

    encoder      the name it was loaded by, for messages
    fingerprint  of its weights
    precision    the dtype that it computes in
    layer        the block that the patches come from
    pixels       of a test image, prepared
    features     of the test image: they reveal what no fingerprint of weights does, such as another activation
    images     how many the data set has
    data         a fingerprint of them and their order; texts do not count, so captions and questions of one list of images share features
    slices       of some bytes of every image that is a file: one that was replaced by another of its size shows; empty where `data` says it
                 all, and in folders that were written before it was looked at
    processor    of a model that sees already: the settings of its processor that decide what it makes of an image, as JSON by name
    """

    encoder: str
    fingerprint: str
    precision: str
    layer: int
    pixels: Sketch
    features: Sketch
    images: int
    data: str
    slices: str = ""
    processor: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, under the keys of the file's format."""
        known = {"pictures" if name == "images" else name: value for name, value in asdict(self).items()}
        return {name: value for name, value in known.items() if value or name != "processor"}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Binding:
        """The reverse. Raises KeyError, TypeError or ValueError where something does not fit."""
        sketches: dict[str, Any] = {name: Sketch.from_json(content[name]) for name in ("pixels", "features")}
        words: dict[str, Any] = {name: str(content[name]) for name in ("encoder", "fingerprint", "precision", "data")}
        words |= {"slices": str(content.get("slices", "")), "processor": {str(name): str(value) for name, value in content.get("processor", {}).items()}}
        return cls(**words, **sketches, layer=int(content["layer"]), images=int(content["pictures"]))


def bind(tower: VisionTower | ModelTower, source: SampleSource) -> Binding:
    """What this encoder's features of these images are bound to; one image is encoded for it.

    Raises ConfigError where the encoder has trained weights: its features change with every step.
    """
    data, slices = _fingerprints_of_images(source)
    if isinstance(tower, ModelTower):
        weights, sketches, processor = tower.language.model, tower.sketches(), tower.processor.settings()
    else:
        pixels = test_pixels(tower.preprocess)
        weights, processor = tower, {}
        sketches = {"pixels": Sketch.of(pixels), "features": Sketch.of(tower.encode(pixels[None]).joined)}
    return Binding(
        encoder=tower.name,
        fingerprint=fingerprint(weights),
        precision=str(next(weights.parameters()).dtype).removeprefix("torch."),
        layer=tower.layer,
        **sketches,
        images=len(source),
        data=data,
        slices=slices,
        processor=processor,
    )


def refuse_other(written: Binding, here: Binding, folder: Path) -> None:
    """Raise ConfigError, naming both sides, where features that were written are not those that would be made here."""
    differing = next(_differences(written, here), None)
    if differing is not None:
        what, was, now = differing
        raise ConfigError(f"the features in {folder} are of {what} {was}, and here it is {now}: give another folder, or none (features: null)")


def _differences(was: Binding, now: Binding) -> Iterator[tuple[str, object, object]]:
    if was.fingerprint != now.fingerprint:
        yield "the model" if was.processor and now.processor else "the encoder", f"{was.encoder} ({was.fingerprint})", f"{now.encoder} ({now.fingerprint})"
    for name, words in (("layer", "the encoder's layer"), ("precision", "an encoder that computes in")):
        if getattr(was, name) != getattr(now, name):
            yield words, getattr(was, name), getattr(now, name)
    for name in sorted({*was.processor, *now.processor}):
        if (given := was.processor.get(name)) != (here := now.processor.get(name)):
            yield f"a processor whose {name} is", given, here
    if (gap := was.pixels.difference(now.pixels)) > SAME_PIXELS:
        yield "images prepared as", f"{was.pixels}", f"{now.pixels} (a test image differs by {100 * gap:.0f} % of the range)"
    if (gap := was.features.difference(now.features)) > SAME_FEATURES:
        yield "an encoder that makes of a test image", f"{was.features}", f"{now.features} (they differ by {100 * gap:.0f} % of the range)"
    if was.images != now.images:
        yield "a data set of", f"{was.images:,} images", f"{now.images:,}"
    if was.data != now.data:
        yield "the data set", was.data, f"{now.data} (other images, or in another order)"
    elif was.slices and now.slices and was.slices != now.slices:
        yield "the data set", f"{was.data}-{was.slices}", f"{now.data}-{now.slices} (an image was replaced by another of the same name and size)"


def _fingerprints_of_images(source: SampleSource) -> tuple[str, str]:
    """`Binding.data` and `Binding.slices`, 16 digits each.

    The set's own, where it has one; else of each image's key, name and size (or bytes), and the bytes of some.
    """
    digest = hashlib.sha256()
    if known := fingerprint_of(source):
        digest.update(known.encode())
        return digest.hexdigest()[:16], ""
    step = max(len(source) // N_READ, 1)
    files = []
    for index in range(len(source)):
        try:
            sample = source[index]
            if not sample.images:
                digest.update(f"{sample.key}\0no image\0".encode())
            for image in _files(sample):
                digest.update(_note(sample, image, is_read=index % step == 0))
                if isinstance(image, (str, Path)):
                    files.append(Path(image))
        except DamagedSample as error:
            digest.update(f"{error.bad.key}\0damaged\0".encode())
    return digest.hexdigest()[:16], _slices(files)


def _files(sample: Sample) -> Sequence[ImageOrFile]:
    """Its images; of a clip that is a folder the files in it."""
    is_folder = sample.kind == "video" and isinstance(sample.media, (str, Path)) and Path(sample.media).is_dir()
    return sorted(Path(sample.media).iterdir()) if is_folder else sample.images  # type: ignore[arg-type]  # a folder is a path


def _slices(files: Sequence[Path]) -> str:
    """Several files at a time, since a network disk answers late; a few thousand, since each waits in memory."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(N_THREADS) as pool:
        for start in range(0, len(files), N_WAITING):
            for found in pool.map(_some_bytes, files[start : start + N_WAITING]):
                digest.update(found)
    return digest.hexdigest()[:16] if files else ""


def _some_bytes(path: Path) -> bytes:
    """A sha256 of a file, or of four slices of it, the first and the last bytes among them, where it is large."""
    digest = hashlib.sha256()
    with suppress(OSError, ValueError), path.open("rb", buffering=0) as file:
        last = os.fstat(file.fileno()).st_size - SLICE_BYTES
        for start in range(0, SLICE_BYTES * 4, SLICE_BYTES) if last < 3 * SLICE_BYTES else (0, last // 3, last * 2 // 3, last):
            digest.update(os.pread(file.fileno(), SLICE_BYTES, start))
    return digest.digest()


def _note(sample: Sample, image: ImageOrFile, *, is_read: bool) -> bytes:
    key = sample.key if sample.decode == "exact" else f"{sample.key}\0{sample.decode}"
    if isinstance(image, (bytes, Image.Image)):
        content = image if isinstance(image, bytes) else image.tobytes()
        return f"{key}\0{hashlib.sha256(content).hexdigest()}\0".encode()
    path, size, read = Path(image), -1, b""
    with suppress(OSError, ValueError):  # a missing image raises an error where it is encoded
        size = path.stat().st_size
        read = hashlib.sha256(path.read_bytes()).digest() if is_read else b""
    return f"{key}\0{path.name}\0{size}\0".encode() + read


FINISHED, UNFINISHED = "features.json", "unfinished.json"
_FORMAT = "adalink features 1"


@dataclass(frozen=True, kw_only=True)
class FeatureManifest:
    """A set of feature files.

    shards  file name -> bytes
    bad     sample index -> why it has no features
    """

    binding: Binding
    contents: AnyContents
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
            contents=contents_from(content["kept"]),
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


# ----------------------------------------
# Features on disk, read by sample index.
#
#     cache = FeatureCache.open("features/train")     # a folder that `adalink features` wrote
#     cache[7]                                        # float16 [N + L, Dv] of image 7, or the BadSample that has none


class FeatureCache:
    """The features of a data set. Every read is compared with its check sum; reading needs no model. Pickles as the names of its files.

    kind      patches: as `Features.joined` has them, patches first; taps: pooled vectors alone
    contents  what `cache[i]` gives
    bad       the samples that have no features, by index
    """

    def __init__(self, files: Sequence[ShardFile], places: NDArray[np.int64], contents: AnyContents, bad: Mapping[int, BadSample]) -> None:
        """places: int64 [n, 4]: file, record in it, the image's number there, and its check sum."""
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
        places = np.full((manifest.binding.images, 4), ABSENT, dtype=np.int64)
        files = []
        for number, (name, size) in enumerate(manifest.shards.items()):
            path = folder / name
            files.append(ShardFile(path, manifest.contents))
            if (found := path.stat().st_size) != size:
                raise DataError(f"{path} has {found} bytes, and its manifest says {size}; {MEND}")
            images, checks = files[-1].index()
            slots = np.flatnonzero((images >= 0) & (images < len(places)))
            places[images[slots]] = np.stack([np.full_like(slots, number), slots, images[slots], checks[slots]], 1)
        lost = [index for index in np.flatnonzero(places[:, 0] == ABSENT).tolist() if index not in manifest.bad]
        if lost:
            raise DataError(
                f"the files in {folder} lack the features of {len(lost)} images, the first number {lost[0]}, which its manifest promises; {MEND}"
            )
        return cls(files, places, manifest.contents, manifest.bad)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shape(self) -> tuple[int, int]:
        """Of one image's features."""
        return self.contents.shape

    @property
    def kind(self) -> Literal["patches", "taps"]:
        """What the features are."""
        return self.contents.kind

    def __getitem__(self, index: int) -> Tensor | Prepared | BadSample:
        """[N + L, Dv] in the dtype of the cache, or a Prepared, in memory of its own. Raises DataError where the file was cut or changed since."""
        if index in self.bad:
            return self.bad[index]
        number, slot, image, check = self._places[index].tolist()
        record = self._files[number].read(slot, image, check)
        if self._parts is None or isinstance(record, Prepared):
            return record
        return record[self._parts[0]] if len(self._parts) == 1 else torch.cat([record[part] for part in self._parts])

    def usable(self) -> list[int]:
        """The indices of the samples that have features."""
        return [index for index in range(len(self)) if index not in self.bad]

    def only(self, indices: Sequence[int]) -> FeatureCache:
        """The features of these samples alone: index i is the i-th of them."""
        bad = {i: self.bad[index] for i, index in enumerate(indices) if index in self.bad}
        return FeatureCache(self._files, self._places[list(indices)], self.contents, bad)

    def reading(self, needed: AnyContents, folder: Path) -> FeatureCache:
        """The same, but only the needed vectors are read, in the dtype of the cache. Raises ConfigError where they are not in it."""
        wanted = replace(needed, dtype=self.contents.dtype)
        if wanted.inside(self.contents) is None:
            raise ConfigError(
                f"the features in {folder} are {self.contents}, and these methods read {wanted}: write them with `adalink features` and this config"
            )
        return FeatureCache(self._files, self._places, wanted, self.bad)


# ----------------------------------------
# Features on disk for a model that is here: read where they are its own, refused where they are not.


def matching_features(folder: Path, tower: VisionTower | ModelTower, source: SampleSource, needed: AnyContents) -> FeatureCache:
    """The folder's features of these images by this encoder, of which only what is needed is read.

    Raises DataError as `FeatureCache.open`; ConfigError, naming both sides, where they are of another encoder, layer, preprocessing or data
    set, or lack what is needed, and where the encoder has trained weights.
    """
    manifest = read_manifest(folder)
    refuse_other(manifest.binding, bind(tower, source), folder)
    return FeatureCache.of(folder, manifest).reading(needed, folder)

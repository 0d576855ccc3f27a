"""What a folder of kept features holds, in `features.json`; written last, so that a folder with it is whole.

While the folder is being filled the same is in `unfinished.json`, without shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from adalink import fingerprint
from adalink.checkpoint.fingerprint import Sketch
from adalink.errors import ConfigError, DataError
from adalink.files import write_whole
from multimodal.bad_samples import BadSample
from multimodal.data.feature_cache.format import Contents
from multimodal.data.order import fingerprint_of
from multimodal.data.shards.reader import DamagedSample
from multimodal.encoders.bound_parts import test_image
from multimodal.encoders.tower import VisionTower
from multimodal.sample import Sample, SampleSource

__all__ = [
    "FINISHED", "UNFINISHED", "Binding", "FeatureManifest", "Sketch", "bind", "is_finished", "read_manifest", "refuse_other",
    "write_manifest",
]  # fmt: skip


# ----------------------------------------
# What kept features are features of: an encoder, its preprocessing, a layer, and a data set.


N_READ = 64  # pictures of a folder whose bytes are compared; of the others names and sizes
SLICE_BYTES = 4096  # of each of four slices of every picture
N_THREADS, N_WAITING = 16, 4096
SAME_PIXELS = 0.05  # of the range of values; one step in 255 of a normalised picture is 0.004 of it
SAME_FEATURES = 0.03  # of the largest value; bfloat16 and TF32 stay under 0.01


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What features are of; two that agree give the same features.

    encoder      the name it was loaded by, for messages
    fingerprint  of its weights
    precision    the dtype that it computes in
    layer        the block that the patches come from
    pixels       of a test picture, prepared
    features     of the test picture: what no fingerprint of weights tells, such as another activation
    pictures     how many the data set has
    data         a fingerprint of them and their order; texts do not count, so captions and questions of one list of pictures share features
    slices       of some bytes of every picture that is a file: one that was replaced by another of its size shows; empty where `data` says it
                 all, and in folders that were written before it was looked at
    """

    encoder: str
    fingerprint: str
    precision: str
    layer: int
    pixels: Sketch
    features: Sketch
    pictures: int
    data: str
    slices: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Binding:
        """The reverse. Raises KeyError, TypeError or ValueError where something does not fit."""
        sketches: dict[str, Any] = {name: Sketch.from_json(content[name]) for name in ("pixels", "features")}
        words: dict[str, Any] = {name: str(content[name]) for name in ("encoder", "fingerprint", "precision", "data")}
        return cls(**words, **sketches, layer=int(content["layer"]), pictures=int(content["pictures"]), slices=str(content.get("slices", "")))


def bind(tower: VisionTower, source: SampleSource) -> Binding:
    """What this encoder's features of these pictures are bound to; one picture is encoded for it.

    Raises ConfigError where the encoder has trained weights: its features change with every step.
    """
    pixels = tower.preprocess(test_image())
    data, slices = _fingerprints_of_pictures(source)
    return Binding(
        encoder=tower.name,
        fingerprint=fingerprint(tower),
        precision=str(next(tower.encoder.parameters()).dtype).removeprefix("torch."),
        layer=tower.layer,
        pixels=Sketch.of(pixels),
        features=Sketch.of(tower.encode(pixels[None]).joined),
        pictures=len(source),
        data=data,
        slices=slices,
    )


def refuse_other(written: Binding, here: Binding, folder: Path) -> None:
    """Raise ConfigError, naming both sides, where features that were written are not those that would be made here."""
    differing = next(_differences(written, here), None)
    if differing is not None:
        what, was, now = differing
        raise ConfigError(f"the features in {folder} are of {what} {was}, and here it is {now}: give another folder, or none (features: null)")


def _differences(was: Binding, now: Binding) -> Iterator[tuple[str, object, object]]:
    if was.fingerprint != now.fingerprint:
        yield "the encoder", f"{was.encoder} ({was.fingerprint})", f"{now.encoder} ({now.fingerprint})"
    for name, words in (("layer", "the encoder's layer"), ("precision", "an encoder that computes in")):
        if getattr(was, name) != getattr(now, name):
            yield words, getattr(was, name), getattr(now, name)
    if (gap := was.pixels.difference(now.pixels)) > SAME_PIXELS:
        yield "pictures prepared as", f"{was.pixels}", f"{now.pixels} (a test picture differs by {100 * gap:.0f} % of the range)"
    if (gap := was.features.difference(now.features)) > SAME_FEATURES:
        yield "an encoder that makes of a test picture", f"{was.features}", f"{now.features} (they differ by {100 * gap:.0f} % of the range)"
    if was.pictures != now.pictures:
        yield "a data set of", f"{was.pictures:,} pictures", f"{now.pictures:,}"
    if was.data != now.data:
        yield "the data set", was.data, f"{now.data} (other pictures, or in another order)"
    elif was.slices and now.slices and was.slices != now.slices:
        yield "the data set", f"{was.data}-{was.slices}", f"{now.data}-{now.slices} (a picture was replaced by another of the same name and size)"


def _fingerprints_of_pictures(source: SampleSource) -> tuple[str, str]:
    """`Binding.data` and `Binding.slices`, 16 digits each.

    The set's own, where it has one; else of each picture's key, name and size (or bytes), and the bytes of some.
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
            digest.update(_told(sample, is_read=index % step == 0))
            if isinstance(sample.image, (str, Path)):
                files.append(Path(sample.image))
        except DamagedSample as error:
            digest.update(f"{error.bad.key}\0damaged\0".encode())
    return digest.hexdigest()[:16], _slices(files)


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


def _told(sample: Sample, *, is_read: bool) -> bytes:
    key = sample.key if sample.decode == "exact" else f"{sample.key}\0{sample.decode}"
    if isinstance(sample.image, (bytes, Image.Image)):
        content = sample.image if isinstance(sample.image, bytes) else sample.image.tobytes()
        return f"{key}\0{hashlib.sha256(content).hexdigest()}\0".encode()
    path, size, read = Path(sample.image), -1, b""
    with suppress(OSError, ValueError):  # a missing picture is told where it is encoded
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
    contents: Contents
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
            contents=Contents(**content["kept"]),
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

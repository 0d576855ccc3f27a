"""Small data sets and tar files, whole and damaged, for the tests of shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from multimodal.data.shards.manifest import read_manifest
from multimodal.data.shards.members import index_name
from multimodal.data.shards.writer import write_shards
from multimodal.sample import Question, Sample


def image(number: int, kind: str = "JPEG") -> bytes:
    """A small image whose bytes differ from those of other numbers."""
    out = io.BytesIO()
    Image.new("RGB", (16 + number % 7, 16), (number * 37 % 256, number * 59 % 256, 90)).save(out, format=kind)
    return out.getvalue()


def made_sample(number: int, key: str | None = None) -> Sample:
    """One to three captions and none to two questions, each with two answers; JPEG, PNG and WebP in turn."""
    return Sample(
        key=str(number) if key is None else key,
        image_id=number,
        image=image(number, ("JPEG", "PNG", "WEBP")[number % 3]),
        captions=tuple(f"caption {each} of {number}, é" for each in range(1 + number % 3)),
        questions=tuple(
            Question(
                question_id=number * 10 + each, text=f"What is {each}?", answers=("yes", " no\n"), question_type="what", answer_type="other"
            )
            for each in range((number + 1) % 3)
        ),
    )


class ListSource:
    """Samples in memory."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def made_source(count: int) -> ListSource:
    return ListSource(made_sample(number) for number in range(count))


def made_shards(folder: Path, count: int = 10, samples_per_shard: int = 4) -> ListSource:
    """Writes three shards (0000, 0001 whole, 0002 shorter) and gives what is in them."""
    source = made_source(count)
    write_shards(source, folder, samples_per_shard=samples_per_shard)
    return source


def as_first_form(folder: Path) -> None:
    """Gives a set the manifest that the first version of adalink wrote, which holds all places itself."""
    shards = []
    for shard in (manifest := read_manifest(folder)).shards:
        entry = {"file": shard.file, "bytes": shard.size, "sha256": shard.sha256, "samples": len(shard.members), "keys": list(shard.members.all_keys())}
        columns = {part: shard.members.table[:, index] for index, part in enumerate(("image", "json", "txt"))}
        shards.append(entry | {part: column.ravel().tolist() for part, column in columns.items() if (column[:, 0] >= 0).any()})
        (folder / index_name(shard.file)).unlink()
    document = {"format": "adalink shards 1", "samples": len(manifest), "skipped": [], "ignored": {}, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(document))


def tar_of(path: Path, members: Sequence[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file that Python's own tarfile writes."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def flip(path: Path, at: int, bit: int = 1) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def everything(source: object) -> list[Sample]:
    return [source[index] for index in range(len(source))]  # type: ignore[index, arg-type]

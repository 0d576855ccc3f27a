"""Parquet and Arrow files that are written: samples as parquet, and parquet unpacked into Arrow files whose rows are read where they lie."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from adalink.errors import ConfigError, DataError
from multimodal.data.images.decode import BadImage, ImageLimits, check_header, read_image_bytes
from multimodal.progress import progress
from multimodal.sample import BadSample, BadSamples, DamagedSample, Question, Sample, SampleSource
from tasks.data.arrow.rows import ArrowRows, file_fingerprint, import_arrow

__all__ = ["LAYOUT", "WrittenParquet", "sample_of", "unpack", "write_parquet"]

_LOG = logging.getLogger("adalink")

# ----------------------------------------
# Samples as parquet: images as `datasets` has them, all texts of an image in its row.

LAYOUT = b"adalink.samples"  # the key of the schema's metadata that says it
_VERSION = b"1"
_GROUP_ROWS, _GROUP_BYTES = 1000, 2**25  # of a row group: at most these


@dataclass(frozen=True, kw_only=True)
class WrittenParquet:
    """What was written.

    size   bytes of all files
    """

    files: tuple[Path, ...]
    samples: int
    size: int
    skipped: tuple[BadSample, ...]


def write_parquet(
    source: SampleSource,
    out: Path,
    *,
    samples_per_file: int = 10_000,
    split: str = "train",
    budget: int = 0,
    skipped: Sequence[BadSample] = (),
) -> WrittenParquet:
    """Writes `out/SPLIT-00000-of-00003.parquet` and so on, or the one file `out` where it ends in .parquet. Images are not encoded again.

    A row is a sample: key, image_id, image {bytes, path}, further (images), captions, and questions with their answers. `datasets` loads it as
    it loads its own; read here again, every sample is what it was.

    budget    how many images may be unusable before the writing stops
    skipped   what the source itself left out; it counts against the budget

    Raises ConfigError where `out` is there already, BudgetError, and DataError where there is no sample or the disk is full: nothing is then left.
    """
    if samples_per_file < 1:
        raise ConfigError(f"samples_per_file is {samples_per_file}; give 1 or more")
    bad = BadSamples(budget=budget, found=skipped)
    bad.check()
    is_file = out.suffix == ".parquet"
    if out.exists() and (is_file or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: give a name that is new, or an empty folder")
    n = len(source)
    ranges = [range(n)] if is_file else [range(at, min(at + samples_per_file, n)) for at in range(0, n, samples_per_file)]
    names = [out] if is_file else [out / f"{split}-{k:05d}-of-{len(ranges):05d}.parquet" for k in range(len(ranges))]
    left_out = list(skipped)
    with _all_or_nothing(names) as parts:
        indices = iter(progress(range(n), "writing parquet", n))
        written = sum(_write_file(source, part, islice(indices, len(one)), bad, left_out) for part, one in zip(parts, ranges, strict=True))
        if not written:
            raise DataError(f"there is no sample to write to {out}")
    return WrittenParquet(files=tuple(names), samples=written, size=sum(name.stat().st_size for name in names), skipped=tuple(left_out))


@contextmanager
def _all_or_nothing(names: Sequence[Path]) -> Iterator[list[Path]]:
    """Files beside those names, which get their names at the end of the block; after an error none is left."""
    folder = names[0].parent if names else Path()
    is_new = not folder.exists()
    parts = [name.with_name(f".{name.name}.{os.getpid()}") for name in names]
    try:
        with _writing_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            yield parts
            for part, name in zip(parts, names, strict=True):
                part.replace(name)
    except BaseException:
        for part in parts:
            part.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _writing_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{place} cannot be written: {error.strerror or error}; is the disk full?") from error


def _write_file(source: SampleSource, path: Path, indices: Iterable[int], bad: BadSamples, left_out: list[BadSample]) -> int:
    """How many samples were written."""
    arrow, schema = import_arrow(), samples_schema()
    leaves = {"image.bytes": "none", "image.path": "snappy", "further.list.element.bytes": "none"}
    written, rows, size = 0, [], 0
    with arrow.parquet.ParquetWriter(
        path, schema, compression={**dict.fromkeys(("key", "image_id", "captions", "questions"), "snappy"), **leaves},
        use_dictionary=["questions.list.element.question_type", "questions.list.element.answer_type"],
    ) as writer:  # fmt: skip
        for index in indices:
            try:
                row = _row(source[index])
            except (BadImage, DamagedSample) as error:
                left_out.append(error.bad if isinstance(error, DamagedSample) else _bad(source[index], error))
                bad.add(left_out[-1])
                bad.check()
                continue
            rows.append(row)
            written, size = written + 1, size + (len(row["image"]["bytes"]) if row["image"] else 0)
            if len(rows) >= _GROUP_ROWS or size >= _GROUP_BYTES:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            writer.write_table(arrow.Table.from_pylist(rows, schema))
    return written


def _bad(sample: Sample, error: BadImage) -> BadSample:
    return BadSample(key=sample.key, reason=error.reason, detail=str(error), file=sample.file)


def _row(sample: Sample) -> dict[str, Any]:
    """Raises BadImage."""
    images = [_image(image) for image in sample.images]
    questions = [
        {
            "question_id": asked.question_id, "question": asked.text, "answers": asked.answers, "question_type": asked.question_type,
            "answer_type": asked.answer_type, "marks": asked.marks, "turns": [{"role": role, "text": text} for role, text in asked.turns],
            "places": None if asked.places is None else [{"turn": turn, "letter": letter} for turn, letter in asked.places],
        }
        for asked in sample.questions
    ]  # fmt: skip
    return {
        "key": sample.key, "image_id": sample.image_id, "image": images[0] if images else None, "further": images[1:], "captions": sample.captions,
        "questions": questions,
    }  # fmt: skip


def _image(image: bytes | str | Path | Image.Image) -> dict[str, object]:
    data = read_image_bytes(image)
    name = Path(image).name if isinstance(image, (str, Path)) else None
    check_header(data, limits=ImageLimits(), name=str(image) if name else "its image")
    return {"bytes": data, "path": name}


def samples_schema() -> Any:
    """The pyarrow schema of samples, with the features that `datasets` reads."""
    arrow = import_arrow()
    text, number, texts = arrow.string(), arrow.int64(), arrow.list_(arrow.string())
    image = arrow.struct([("bytes", arrow.binary()), ("path", text)])
    turn, place = arrow.struct([("role", text), ("text", text)]), arrow.struct([("turn", number), ("letter", number)])
    question = arrow.struct([
        ("question_id", number), ("question", text), ("answers", texts), ("question_type", text), ("answer_type", text), ("marks", texts),
        ("turns", arrow.list_(turn)), ("places", arrow.list_(place)),
    ])  # fmt: skip
    fields = [("key", text), ("image_id", number), ("image", image), ("further", arrow.list_(image)), ("captions", texts), ("questions", arrow.list_(question))]
    string, integer = {"dtype": "string", "_type": "Value"}, {"dtype": "int64", "_type": "Value"}
    strings, image_feature = {"feature": string, "_type": "List"}, {"_type": "Image"}
    asked = {
        "question_id": integer, "question": string, "answers": strings, "question_type": string, "answer_type": string, "marks": strings,
        "turns": {"feature": {"role": string, "text": string}, "_type": "List"},
        "places": {"feature": {"turn": integer, "letter": integer}, "_type": "List"},
    }  # fmt: skip
    features = {
        "key": string, "image_id": integer, "image": image_feature, "further": {"feature": image_feature, "_type": "List"}, "captions": strings,
        "questions": {"feature": asked, "_type": "List"},
    }  # fmt: skip
    return arrow.schema(fields, metadata={LAYOUT: _VERSION, b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def sample_of(row: Mapping[str, Any]) -> Sample:
    """What `write_parquet` wrote as this row."""
    return Sample(
        key=row["key"],
        image_id=row["image_id"],
        media=None if row["image"] is None else row["image"]["bytes"],
        further=tuple(image["bytes"] for image in row["further"]),
        captions=tuple(row["captions"]),
        questions=tuple(
            Question(
                question_id=asked["question_id"], text=asked["question"], answers=tuple(asked["answers"]), question_type=asked["question_type"],
                answer_type=asked["answer_type"], marks=tuple(asked["marks"]), turns=tuple((turn["role"], turn["text"]) for turn in asked["turns"]),
                places=None if asked.get("places") is None else tuple((place["turn"], place["letter"]) for place in asked["places"]),
            )
            for asked in row["questions"]
        ),
    )  # fmt: skip


# ----------------------------------------
# Parquet unpacked into Arrow files, once: a row of these is read where it lies, and one of parquet with its whole row group.


def unpack(rows: ArrowRows, folder: Path, columns: Sequence[str]) -> list[Path]:
    """For each file an Arrow file in `folder` with these columns, not compressed, by which the rows are read; what is there already stays.

    The name holds the fingerprint of what was unpacked. A file gets its name when it is whole; of several processes one writes, and the others
    wait. Raises DataError where the disk has no room.
    """
    with _writing_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies = [folder / f"{file.stem}-{_digest(file, columns)}.arrow" for file in rows.files]
            for part in folder.glob("*.part"):  # of a process that was killed: the lock is held by nobody else
                part.unlink(missing_ok=True)
            missing = {file: copy for file, copy in zip(rows.files, copies, strict=True) if not copy.exists()}
            if missing:
                size = ArrowRows(rows.path, list(missing), columns=columns).decoded_bytes
                _check_room(folder, size)
                _LOG.warning(
                    "unpacking %s once, about %.1f GiB in %s (data.train.cache): its rows are then read in any order without decoding others",
                    rows.path, size / 2**30, folder,
                )  # fmt: skip
            for file, copy in missing.items():
                _unpack_file(ArrowRows(file, [file], columns=columns), copy)
    return copies


def _digest(file: Path, columns: Sequence[str]) -> str:
    return hashlib.sha256(f"1 {file_fingerprint(file)} {list(columns)}".encode()).hexdigest()[:16]


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} has {free / 2**30:.1f} GiB free, and the unpacked data set needs about {needed / 2**30:.1f}: give data.train.cache a folder with more"
        )


def _unpack_file(rows: ArrowRows, copy: Path) -> None:
    arrow = import_arrow()
    part = copy.with_suffix(f".{os.getpid()}.part")
    try:
        writer: Any = None
        for batch in progress(rows.batches(rows.columns), f"unpacking {rows.path.name}"):
            plain = arrow.RecordBatch.from_arrays([_decoded(column) for column in batch.columns], names=batch.schema.names)
            writer = writer or arrow.ipc.new_file(str(part), plain.schema)
            writer.write_batch(plain)
        writer.close()
        part.replace(copy)
    finally:
        part.unlink(missing_ok=True)


def _decoded(column: Any) -> Any:
    """A column's values themselves where they are numbers of a dictionary's."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column

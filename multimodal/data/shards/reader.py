"""Shards as a data set with random access: one read at the manifest's offsets per sample, no scanning, nothing decoded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adalink.errors import DataError
from multimodal.data.images.clips import CLIP_ENDINGS, clip_ending
from multimodal.data.shards.ahead import Ahead, Plan
from multimodal.data.shards.cache import ShardCache
from multimodal.data.shards.index import ShardLimits
from multimodal.data.shards.members import PARTS, UNKNOWN_CRC, Place, Shard
from multimodal.data.shards.opening import OpenIndexes, StoredLengths, open_shards, shard_places
from multimodal.data.shards.storage import RemoteFiles, RemoteSettings, redacted
from multimodal.sample import BadSample, DamagedSample, Lengths, Measure, Question, Sample

__all__ = [
    "LocalShards", "Record", "RemoteShards", "ShardSource", "Span", "decode_caption", "decode_record", "encode_record",
    "shard_key",
]  # fmt: skip


# ----------------------------------------
# A sample's texts as the `json` member of a shard, and back; foreign shards' JSON and text too.


_DECODER = json.JSONDecoder()
_WHERE_GIVEN: Mapping[str, object] = {"marks": (), "turns": (), "places": None}  # what fields of a question are that most have not
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")


class Span(NamedTuple):
    """Where bytes lie in a shard's file, and their crc32."""

    offset: int
    size: int
    crc: int


class Record(NamedTuple):
    """What a `json` member says; None where it does not."""

    key: str | None = None
    image_id: int | None = None
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    further: tuple[Span, ...] = ()


def shard_key(key: str) -> str:
    """The key as a member's name, which must hold no dot (webdataset ends a key there) and nothing that unpacks elsewhere.

    `42` stays `42`; `val/a.b` becomes `val_a_b-` and sixteen digits of its sha256, so that two keys do not become one.
    """
    if _KEY.fullmatch(key):
        return key
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", key).lstrip("_-")[:60] or "key"
    return f"{clean}-{hashlib.sha256(key.encode('utf-8', 'backslashreplace')).hexdigest()[:16]}"


def encode_record(sample: Sample, further: Sequence[Span] = ()) -> bytes:
    """JSON with the sample's own key, its image id and all its texts. further: where its images after the first lie in the shard."""
    record: dict[str, object] = {
        "key": sample.key,
        "image_id": sample.image_id,
        "captions": sample.captions,
        "questions": [
            {name: value for name, value in asdict(question).items() if name not in _WHERE_GIVEN or value != _WHERE_GIVEN[name]}
            for question in sample.questions
        ],
    }
    if further:
        record["further"] = further
    return json.dumps(record).encode("ascii")


def decode_record(data: bytes) -> Record:
    """Reads what `encode_record` wrote, and img2dataset's JSON, whose only text is `caption`.

    Raises DataError where it is no JSON object, or a field that is used is of another type.
    """
    try:
        found = _loaded(data)
        if b"\\u" in data and (b"\\ud" in data or b"\\uD" in data):
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair would stop a tokenizer later
    except (ValueError, RecursionError) as error:
        raise DataError(f"its json member is not JSON of Unicode texts: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"its json member holds a {type(found).__name__}; expected an object")
    image_id, key = found.get("image_id"), found.get("key")
    return Record(
        key=key if isinstance(key, str) else None,
        image_id=image_id if type(image_id) is int else None,
        captions=_captions(found),
        questions=tuple([_question(row) for row in _list(found, "questions")]) if found.get("questions") else (),
        further=tuple([_span(row) for row in _list(found, "further")]) if found.get("further") else (),
    )


def decode_caption(data: bytes) -> tuple[str, ...]:
    """The caption of a `txt` member, UTF-8; none where it holds only white space. Raises DataError where it is not UTF-8."""
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"its txt member is not UTF-8: {error}") from error
    return (caption,) if caption else ()


def _loaded(data: bytes) -> object:
    try:
        text = data.decode("utf-8")
        found, end = _DECODER.raw_decode(text)  # half the time of json.loads, which looks for the encoding and for spaces first
        if end == len(text):
            return found
    except ValueError:
        pass
    return json.loads(data)


def _captions(found: Mapping[str, object]) -> tuple[str, ...]:
    captions = []
    for caption in _list(found, "captions") or [found.get("caption") or ""]:
        if not isinstance(caption, str):
            raise DataError(f"a caption of its json member is a {type(caption).__name__}; expected a text")
        if stripped := caption.strip():
            captions.append(stripped)
    return tuple(captions)


def _list(found: Mapping[str, object], key: str) -> list[object]:
    value = found.get(key) or []
    if not isinstance(value, list):
        raise DataError(f"{key!r} of its json member is a {type(value).__name__}; expected a list")
    return value


def _question(row: object) -> Question:
    if not isinstance(row, dict):
        raise DataError(f"a question of its json member is a {type(row).__name__}; expected an object")
    question_id, text, answers, marks = row.get("question_id"), row.get("text"), row.get("answers", []), row.get("marks", [])
    if type(question_id) is not int or not isinstance(text, str) or not isinstance(answers, list) or not isinstance(marks, list):
        raise DataError(f"a question of its json member has the fields {sorted(map(str, row))}; expected question_id, text and answers")
    types = row.get("question_type", ""), row.get("answer_type", "")
    if not all(isinstance(each, str) for each in (*answers, *types, *marks)):
        raise DataError(f"question {question_id} of its json member has answers or types that are no text")
    return Question(
        question_id=question_id, text=text, answers=tuple(answers), question_type=types[0], answer_type=types[1], marks=tuple(marks),
        turns=_turns(row.get("turns") or []), places=None if row.get("places") is None else _places(row["places"]),
    )  # fmt: skip


def _turns(found: object) -> tuple[tuple[str, str], ...]:
    turns: list[Any] = found if isinstance(found, list) else [found]
    if not all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(each, str) for each in turn) for turn in turns):
        raise DataError("the turns before a question of its json member are no pairs of role and text")
    return tuple((role, text) for role, text in turns)


def _places(found: object) -> tuple[tuple[int, int], ...]:
    places: list[Any] = found if isinstance(found, list) else [found]
    if not all(isinstance(place, list) and len(place) == 2 and all(type(each) is int and each >= 0 for each in place) for place in places):
        raise DataError("the places of a question's images in its json member are no pairs of turn and letter")
    return tuple((turn, letter) for turn, letter in places)


def _span(row: object) -> Span:
    if not isinstance(row, list) or len(row) != 3 or not all(type(each) is int and each >= 0 for each in row):
        raise DataError(f"a further image of its json member is at {row!r:.60}; expected offset, size and crc32")
    return Span(*row)


# ----------------------------------------
# Bytes of shards, by place: files that stay open, and shards on servers with their cache.


_OPEN_FILES = 256  # per process; a set may have more shards than a process may have open files


class RemoteShards:
    """Shards by URL: from the cache where they are in it, else by ranges."""

    at_once = 2**62  # bytes up to which a sample's members are read together: a request costs more than any copy

    def __init__(self, files: RemoteFiles, settings: RemoteSettings, shards: Mapping[str, Shard]) -> None:
        self._files, self._local = files, LocalShards()
        self._cache = ShardCache(settings, files, shards) if settings.cache is not None else None
        self._finder: Ahead | ShardCache | None = self._cache

    def follow(self, plan: Plan | None, sizes: NDArray[np.int64]) -> Ahead | None:
        """Fetch shards as a stream reads them, where there is a cache; sizes: bytes of each. Raises ConfigError where it is too small."""
        self._finder = self._cache
        if self._cache is None or plan is None:
            return None
        self._finder = ahead = Ahead(self._cache, sizes, plan, self._local.close)
        return ahead

    def read(self, place: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes; raises DataError."""
        path = self._finder.find(place) if self._finder is not None else None
        if path is not None:
            with suppress(DataError):  # another process has put the file out
                return self._local.read(path, offset, size)
        return self._files.read(place, offset, size)

    def forget(self, place: str) -> bool:
        """Whether reading again may give other bytes, because a copy in the cache was damaged.

        The file that was read may have been discarded by another process, and the one of its name now may be a good one: it stays.
        """
        if self._cache is None:
            return False
        path = self._cache.path(place)
        was_read, now = self._local.close(path), _identity(path)
        return self._cache.discard(place) if was_read in (None, now) else True


class LocalShards:
    """Files open for reading at an offset, the first opened closed first; safe between threads and after a fork.

    Order of opening and not of use: a run reads all shards evenly, and a lock around every read would cost a tenth of it.
    """

    at_once = 2**15  # bytes up to which cutting one block in parts costs less than reading each

    def __init__(self) -> None:
        self._open: dict[Path, _OpenFile] = {}
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[LocalShards], tuple[()]]:
        return LocalShards, ()  # a worker process opens its own

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Exactly `size` bytes; raises DataError where the file ends before."""
        try:
            file = self._open.get(path) or self._opened(path)
            data = os.pread(file.number, size, offset)
            while 0 < len(data) < size and (more := os.pread(file.number, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"the shard {path} cannot be read: {error.strerror}; is it still there?") from error
        if len(data) < size:
            end = os.fstat(file.number).st_size
            raise DataError(f"the shard {path} was cut at byte {end} since it was opened; write or fetch it again")
        return data

    def forget(self, path: Path) -> bool:
        """Whether reading again may give other bytes."""
        return False

    def close(self, path: Path) -> tuple[int, int] | None:
        """Read this file anew the next time; which file was open under its name, None where none was."""
        with self._lock:
            file = self._open.pop(path, None)
        return None if file is None else _identity(file.number)

    def _opened(self, path: Path) -> _OpenFile:
        with self._lock:
            file = self._open[path] = _OpenFile(path)
            while len(self._open) > _OPEN_FILES:
                del self._open[next(iter(self._open))]
        return file


def _identity(file: Path | int) -> tuple[int, int] | None:
    """Which file on the disk it is: two of one name are two."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _OpenFile:
    """Closed when nobody reads from it any more, so that another thread may still be reading when it leaves the table."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # AttributeError: it was never opened
            os.close(self.number)


LIMITS = ShardLimits()
REMOTE = RemoteSettings()
_GAP = 2**16  # bytes between two members up to which one read is cheaper than two


class ShardSource:
    """The samples of a folder of shards, of a URL with a manifest beside its shards, or of a list of these and of tar files, in their order.

    With a manifest, opening compares each file's size with it, and each read is compared with its crc32. Tar files without one
    (img2dataset's, or any that webdataset reads) are indexed by one look at their headers; `adalink shards img2dataset` writes the
    manifest once and for all.

    problems      samples of foreign shards that cannot be used (no image, no text), and those over the limits
    item_ids      none: only the samples themselves say what results must hold
    ignored       members that no sample uses, counted by suffix: what is no image, txt or json is never opened
    places        where each shard is: a file, or a URL
    shard_sizes   int64 [shards]: samples of each, in that order; the set's indices count through one shard after the other
    shard_bytes   int64 [shards]: the size of each
    cache_bytes   most that the cache of shards on servers holds; None without one
    """

    item_ids: tuple[int, ...] = ()

    def __init__(self, shards: Path | str | Sequence[Path | str], *, limits: ShardLimits = LIMITS, remote: RemoteSettings = REMOTE) -> None:
        """Raises DataError where a shard is missing, cut or damaged, where two have one key, and where no sample is left."""
        found = open_shards(shard_places([shards] if isinstance(shards, (Path, str)) else shards), limits, remote)
        table = found.table
        # reads at places: of files, or of URLs
        self._files: Any = LocalShards() if found.files is None else RemoteShards(found.files, remote, table.by_place)
        self._touched = OpenIndexes(table)
        self.places: Sequence[Place] = table.places
        self.shard_sizes: NDArray[np.int64] = table.rows["samples"].astype(np.int64)
        self.shard_bytes: NDArray[np.int64] = table.rows["size"].astype(np.int64)
        self.cache_bytes = None if remote.cache is None else remote.cache_bytes
        self._ends = array("q", np.cumsum(self.shard_sizes).tolist())  # its elements are read one by one, for which NumPy is slow
        self.problems = found.problems
        self.ignored = found.ignored
        self.fingerprint = found.fingerprint
        self._lengths_digest = found.known.lengths if found.known is not None else ""
        if len(self) == 0:
            first = f"; {len(self.problems)} cannot be used, the first because {self.problems[0].detail}" if self.problems else ""
            raise DataError(f"the shards in {_folder(self.places[0])} hold no sample{first}")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Raises DamagedSample, and DataError where the shard is missing or cut since it was opened."""
        number, row = self.shard_of(index)
        members, path = self._touched[number]
        key, places = members.key(row), members.table[row].tolist()
        parts, damaged = self._read(path, places)
        if damaged is not None and self._files.forget(path):
            parts, damaged = self._read(path, places)
        if damaged is not None:
            part, start = damaged
            detail = f"the {part} of {key!r} in {_name(path)}, from byte {start} on, is not what was written; fetch or write the shard again"
            raise DamagedSample(BadSample(key=key, reason="damaged bytes", detail=detail))
        try:
            return _sample(key, index % len(self), parts, lambda place: self._further(path, place))
        except DataError as error:
            raise DamagedSample(BadSample(key=key, reason="damaged text", detail=f"{key!r} of {_name(path)}: {error}")) from error

    def shard_of(self, index: int) -> tuple[int, int]:
        """The number of the shard that holds a sample, and the sample's number in it. Raises IndexError."""
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, at)
        return number, at - (self._ends[number - 1] if number else 0)

    def _further(self, path: Any, place: Span) -> bytes:
        """The bytes of an image after the first. Raises DataError."""
        data: bytes = self._files.read(path, place.offset, place.size)
        if zlib.crc32(data) != place.crc and self._files.forget(path):
            data = self._files.read(path, place.offset, place.size)
        if zlib.crc32(data) != place.crc:
            raise DataError(f"an image from byte {place.offset} on is not what was written; fetch or write the shard again")
        return data

    def follow(self, plan: Plan | None) -> Ahead | None:
        """Fetch shards in the order of a stream, which from now on says `at(position)` before each sample; None where all of them are at hand.

        plan: None where the stream's order does not say what it reads next. Raises ConfigError where the cache is smaller than one window of the order.
        """
        return self._files.follow(plan, self.shard_bytes) if isinstance(self._files, RemoteShards) else None

    def text_lengths(self, measure: Measure) -> Lengths:
        """Bytes of each sample's txt member, or of its json where it has none, from the indexes: the same wherever the shards lie."""
        lengths = StoredLengths(self._touched, self.shard_sizes, self._lengths_digest)
        return lengths if self._lengths_digest else np.asarray(lengths)

    def _read(self, path: Place, places: Sequence[tuple[int, int, int]]) -> tuple[dict[str, bytes], tuple[str, int] | None]:
        """The sample's parts, those that lie together in one read; and a part whose bytes are not those that were written, with its start.

        Two loops and no helpers: this is done for every sample.
        """
        start, end, needed = 2**63, 0, 0
        for at, size, _ in places:
            if at >= 0:
                needed += size
                start = at if at < start else start
                end = at + size if at + size > end else end
        is_together = end - start <= needed + _GAP and needed <= self._files.at_once
        block = self._files.read(path, start, end - start) if is_together else b""
        parts: dict[str, bytes] = {}
        damaged: tuple[str, int] | None = None
        for part, (at, size, crc) in zip(PARTS, places, strict=True):
            if at >= 0:
                data = parts[part] = block[at - start : at - start + size] if is_together else self._files.read(path, at, size)
                if crc != UNKNOWN_CRC and zlib.crc32(data) != crc:
                    damaged = damaged or (part, at)
        return parts, damaged


def _name(place: Place) -> str:
    return redacted(place) if isinstance(place, str) else str(place)


def _folder(place: Place) -> str:
    return _name(place).rpartition("/")[0]


def _sample(key: str, index: int, parts: Mapping[str, bytes], further: Callable[[Span], bytes]) -> Sample:
    """What was written, with the key it had before it became a member's name; img2dataset's JSON and text likewise.

    An image id is the JSON's, and where it has none, as in foreign shards, the sample's place in the set.
    """
    record = decode_record(parts["json"]) if "json" in parts else Record()
    captions = record.captions
    if not captions and "txt" in parts:
        captions = decode_caption(parts["txt"])
    return Sample(
        key=record.key if record.key is not None and record.key != key and shard_key(record.key) == key else key,
        image_id=index if record.image_id is None else record.image_id,
        media=(media := parts["image"]),
        kind=CLIP_ENDINGS.get(clip_ending(media) or "", "image"),
        captions=captions,
        questions=record.questions,
        further=tuple(map(further, record.further)),
    )

"""Which vectors of an image are cached, and in which dtype."""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adalink import Adapter
from adalink.errors import ConfigError, DataError
from adalink.methods.bridge import Projection
from adalink.methods.epalm import Tap
from multimodal.batches.prepared import Prepared
from multimodal.data.inputs import StoredDtype
from multimodal.encoders.base import Features
from multimodal.encoders.tower import VisionTower
from multimodal.existing.tower import ModelTower

__all__ = [
    "ABSENT", "MEND", "AnyContents", "Contents", "ShardFile", "StoredDtype", "VectorContents", "all_contents", "as_size", "check_of",
    "contents_from", "needed_contents", "rounded", "seal", "trim", "word_bytes",
]  # fmt: skip


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The vectors that a record holds: the patches, then pooled vectors; [patches + pooled, width].

    patches  all N of the encoder, or 0
    pooled   of the last so many blocks, or 0
    width    Dv
    """

    patches: int
    pooled: int
    width: int
    dtype: StoredDtype = "float16"
    columns: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Check what a manifest can get wrong."""
        if self.patches < 0 or self.pooled < 0 or self.patches + self.pooled < 1 or self.width < 1:
            raise ConfigError(f"{self.patches} patches and {self.pooled} pooled vectors of width {self.width} cannot be cached: give one vector or more")
        _check_dtype(self.dtype)

    def __str__(self) -> str:
        parts = [f"{count} {name}" for count, name in ((self.patches, "patches"), (self.pooled, "pooled vectors")) if count]
        return f"{' and '.join(parts)} of width {self.width} in {self.dtype}"

    @property
    def shape(self) -> tuple[int, int]:
        """Of one record."""
        return self.patches + self.pooled, self.width

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the file holds."""
        return _DTYPES[self.dtype]

    @property
    def n_bytes(self) -> int:
        """Of one record. 50 patches of width 768 in float16: 76,800."""
        return self.shape[0] * self.width * self.torch_dtype.itemsize

    @property
    def size(self) -> str:
        """Of one record, for a reader."""
        return f"{self.n_bytes:,} bytes"

    @property
    def kind(self) -> Literal["patches", "taps"]:
        """What the features are; see `CachedFeatures.kind`."""
        return "patches" if self.patches else "taps"

    def of(self, features: Features) -> Tensor:
        """[B, patches + pooled, Dv] in the dtype of the cache. Raises DataError for values that it cannot hold."""
        parts = [features.patches] if self.patches else []
        if self.pooled:
            parts.append(features.pooled[-self.pooled :].transpose(0, 1))
        return rounded(torch.cat(parts, 1), self.torch_dtype)

    def packed(self, records: Sequence[Tensor]) -> list[NDArray[np.uint8]]:
        """The bytes of each record."""
        return [record.cpu().contiguous().view(-1).view(torch.uint8).numpy() for record in records]

    def unpacked(self, words: Tensor) -> Tensor:
        """The record of these bytes, which it goes on using."""
        return words.view(self.torch_dtype).view(self.shape)

    def tensor(self, n_bytes: int) -> dict[str, Any]:
        """What a file's header says of so many bytes of records."""
        return {"dtype": _NAMES[self.dtype], "shape": [n_bytes // self.n_bytes, *self.shape]}

    def inside(self, whole: AnyContents) -> list[slice] | None:
        """Where these vectors lie in a record that holds more; None where it does not hold them all."""
        if isinstance(whole, VectorContents):
            return None
        if self.width != whole.width or self.patches not in (0, whole.patches) or self.pooled > whole.pooled:
            return None
        end = whole.patches + whole.pooled
        return [part for part in (slice(0, self.patches), slice(end - self.pooled, end)) if part.stop > part.start]


@dataclass(frozen=True, kw_only=True)
class VectorContents:
    """The vectors that a record holds for a model that sees already: each image has a number of its own, and its words and grid beside them.

    vectors  how many a test image has, from which sizes are estimated
    width    W of a vector, deep features included
    """

    vectors: int
    width: int
    dtype: StoredDtype = "float16"
    columns: ClassVar[int] = 3
    kind: ClassVar[Literal["patches"]] = "patches"

    def __post_init__(self) -> None:
        """Check what a manifest can get wrong."""
        if self.vectors < 1 or self.width < 1:
            raise ConfigError(f"{self.vectors} vectors of width {self.width} cannot be cached: give one vector or more")
        _check_dtype(self.dtype)

    def __str__(self) -> str:
        return f"image vectors of width {self.width} in {self.dtype} ({self.vectors} of a test image)"

    @property
    def shape(self) -> tuple[int, int]:
        """Of one vector."""
        return 1, self.width

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the vectors."""
        return _DTYPES[self.dtype]

    @property
    def n_bytes(self) -> int:
        """Of the test image's vectors; other images have more or fewer."""
        return self.vectors * self.width * self.torch_dtype.itemsize

    @property
    def size(self) -> str:
        """Of one record, for a reader."""
        return f"about {self.n_bytes:,} bytes"

    def of(self, images: Sequence[Prepared]) -> list[Prepared]:
        """The same with vectors in the dtype of the cache. Raises DataError for values that it cannot hold."""
        return [image.encoded(rounded(image.vectors, self.torch_dtype)) for image in images if image.vectors is not None]

    def packed(self, records: Sequence[Prepared]) -> list[NDArray[np.uint8]]:
        """The bytes of each record: how many the JSON of words, counts and grids takes, that JSON, and the vectors; in multiples of 8 bytes."""
        found = []
        for record in records:
            assert record.vectors is not None
            stated = {"wording": record.wording, "counts": record.counts, "grids": [grid.flatten().tolist() for grid in record.grids]}
            words = json.dumps(stated).encode("ascii")
            words = struct.pack("<Q", _aligned(len(words))) + words.ljust(_aligned(len(words)))
            vectors = record.vectors.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found.append(np.frombuffer(bytearray(words + vectors.ljust(_aligned(len(vectors)), b"\0")), dtype=np.uint8))
        return found

    def unpacked(self, words: Tensor) -> Prepared:
        """The record of these bytes, which its vectors go on using."""
        raw = words.view(torch.uint8)
        start = 8 + int(words[0])
        stated = json.loads(raw[8:start].numpy().tobytes())
        n_bytes = sum(stated["counts"]) * self.width * self.torch_dtype.itemsize
        vectors = raw[start : start + n_bytes].view(self.torch_dtype).view(sum(stated["counts"]), self.width)
        grids = tuple(torch.tensor([grid], dtype=torch.int64) for grid in stated["grids"])
        return Prepared(wording=tuple(stated["wording"]), counts=tuple(stated["counts"]), grids=grids, vectors=vectors)

    def tensor(self, n_bytes: int) -> dict[str, Any]:
        """What a file's header says of so many bytes of records."""
        return {"dtype": "U8", "shape": [n_bytes]}

    def inside(self, whole: AnyContents) -> list[slice] | None:
        """All of a record; None where it is of other vectors."""
        return [slice(None)] if isinstance(whole, VectorContents) and whole.width == self.width else None


AnyContents = Contents | VectorContents


def contents_from(content: Mapping[str, Any]) -> AnyContents:
    """The reverse of `dataclasses.asdict`. Raises TypeError or ConfigError where something does not fit."""
    return VectorContents(**content) if "vectors" in content else Contents(**content)


def _check_dtype(name: str) -> None:
    if name not in _DTYPES:
        raise ConfigError(f"features cannot be cached in {name!r}: give one of {', '.join(_DTYPES)}")


def _aligned(n_bytes: int) -> int:
    """The next multiple of 8."""
    return -(-n_bytes // 8) * 8


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Features in the dtype of the cache. Raises DataError for values that it cannot hold."""
    found = exact.to(dtype)
    if not found.isfinite().all() and exact.isfinite().all():
        raise DataError(
            f"an encoder's feature is {float(exact.abs().max()):.3g}, and {str(dtype).removeprefix('torch.')} holds at most {torch.finfo(dtype).max:.0f}: "
            "keep the features in bfloat16 or float32 (features_dtype)"
        )
    return found


def as_size(n_bytes: int) -> str:
    """2 ** 34 -> 16.00 GiB; in MiB below one GiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def all_contents(tower: VisionTower | ModelTower, dtype: StoredDtype = "float16") -> AnyContents:
    """All that an encoder says of an image: its patches, and the pooled vector of each block where they have one width; or a model's vectors."""
    if isinstance(tower, ModelTower):
        return VectorContents(vectors=tower.example.n_vectors, width=tower.width, dtype=dtype)
    return Contents(patches=tower.n_patches, pooled=tower.n_retained - tower.n_patches, width=tower.width, dtype=dtype)


def needed_contents(adapter: Adapter, everything: AnyContents) -> AnyContents:
    """What an adapter reads of an image: a bridge the patches, eP-ALM the last few pooled vectors. All, where nothing says that it reads."""
    if isinstance(everything, VectorContents):
        return everything  # the model itself reads them
    patches, pooled = 0, 0
    for module in adapter.modules():
        if isinstance(module, (Projection, Tap)) and module.source == "image":
            patches = everything.patches
        elif isinstance(module, Tap) and module.source == "image_taps":
            pooled = max(pooled, -module.block)
    if not patches and not pooled:
        return everything
    return Contents(patches=patches, pooled=pooled, width=everything.width, dtype=everything.dtype)


# ----------------------------------------
# A file of features: a safetensors file of three tensors, which is written record by record, in any order of the images.
#
#     image   int64 [C]          which image each record is of; -1 where there is none (yet)
#     check     int64 [C]          the crc32 of the image's number and the record: a changed bit changes it, and so do words that changed places
#     features  [M, N + L, Dv]     the first M of C records are written
#
# Records of a model that sees already differ in size. Their file has one tensor more, and its features are bytes:
#
#     end       int64 [C]          where each record ends; it begins where the one before it ends
#     features  uint8 [bytes]
#
# A record becomes part of the file when its image is written, which is last. While a file is being written its header says M = C;
# `seal` puts the true M there, and other programs can then read the file too. Files of format 1, whose check is a sum, are read and continued
# as they are.


ABSENT = -1
MEND = "run `adalink features` again, which writes anew what is damaged"
HEADER = 1024  # bytes, of which 8 say how many follow
_FORMATS = ("adalink features 1", "adalink features 2")
_STRIDE = 0x9E3779B97F4A7C15 - 2**64  # odd, as int64; of format 1
_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def check_of(words: Tensor, image: int) -> int:
    """Of a record in words of `word_bytes`: from 0 to 2^32 - 1. Two images of equal features have other checks."""
    return zlib.crc32(words.numpy().data, zlib.crc32(image.to_bytes(8, "little")))


def _sum_of(words: Tensor, image: int) -> int:
    """The check of format 1, an int64: blind to words that changed places."""
    return (int(words.sum().item()) + image * _STRIDE + 2**63) % 2**64 - 2**63


def word_bytes(n_bytes: int) -> int:
    """8, or 2 where a record is no multiple of it."""
    return 2 if n_bytes % 8 else 8


def _header(contents: AnyContents, capacity: int, n_bytes: int, version: str) -> bytes:
    """The head of a file with so many bytes of records; safetensors allows the spaces after the JSON."""
    tensors: dict[str, Any] = {"__metadata__": {"format": version}}
    for i, name in enumerate(("picture", "check", "end")[: contents.columns]):
        tensors[name] = {"dtype": "I64", "shape": [capacity], "data_offsets": [8 * capacity * i, 8 * capacity * (i + 1)]}
    start = 8 * capacity * contents.columns
    tensors["features"] = {**contents.tensor(n_bytes), "data_offsets": [start, start + n_bytes]}
    return struct.pack("<Q", HEADER - 8) + json.dumps(tensors).encode("ascii").ljust(HEADER - 8)


class ShardFile:
    """An open file of features, for reading at any record, and for writing after the last.

    Reads seek to a record and map nothing: a file that was cut short raises an error, where a memory map would end the process with SIGBUS.
    """

    def __init__(self, path: Path, contents: AnyContents, *, is_written: bool = False) -> None:
        """Raises DataError where the file cannot be opened, or begins as none of these contents."""
        self.path, self.contents = path, contents
        try:
            self._number = os.open(path, (os.O_RDWR if is_written else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"the features in {path} cannot be read: {error.strerror}; {MEND}") from error
        self.capacity, self.version = _capacity(os.pread(self._number, HEADER, 0), contents, path)
        self._check = _sum_of if self.version == _FORMATS[0] else check_of
        # Asked for at every read.
        self._size, self._start = contents.n_bytes if contents.columns == 2 else 0, HEADER + 8 * contents.columns * self.capacity
        self._word = np.dtype(f"i{word_bytes(self._size)}")

    def __reduce__(self) -> tuple[type[ShardFile], tuple[Path, AnyContents]]:
        return ShardFile, (self.path, self.contents)  # a worker process that is not forked opens its own

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)

    @classmethod
    def create(cls, path: Path, contents: AnyContents, capacity: int) -> ShardFile:
        """A new file without a record. Raises OSError."""
        with path.open("xb") as file:
            file.write(_header(contents, capacity, capacity * contents.n_bytes, _FORMATS[-1]))
            file.write(np.full(capacity, ABSENT, dtype=np.int64).tobytes())
            file.truncate(HEADER + 8 * contents.columns * capacity)
        return cls(path, contents, is_written=True)

    def index(self) -> NDArray[np.int64]:
        """int64 [2, C]: the image and the check of each slot. Raises DataError where the file ends before."""
        data = bytearray(16 * self.capacity)
        if os.preadv(self._number, [data], HEADER) != len(data):
            raise DataError(f"{self.path} is cut: it has {os.fstat(self._number).st_size} bytes; {MEND}")
        return np.frombuffer(data, dtype=np.int64).reshape(2, self.capacity)

    def read(self, slot: int, image: int, check: int) -> Tensor | Prepared:
        """One record, [N + L, Dv] or a Prepared, in memory of its own. Raises DataError where it is not what was written."""
        start, end = self._place(slot)
        buffer = np.empty((end - start) // self._word.itemsize, dtype=self._word)
        found = os.preadv(self._number, [buffer], self._start + start)  # type: ignore[list-item]  # a buffer, whatever its type says
        words = torch.from_numpy(buffer)
        if start == end or found != end - start or check != self._check(words, image):
            raise DataError(
                f"the features of image {image} in {self.path} are not what was written: the file was cut or changed; {MEND}"
            )
        return self.contents.unpacked(words)

    def write(self, slot: int, images: Sequence[int], records: Sequence[Tensor] | Sequence[Prepared]) -> None:
        """Put records, [B, N + L, Dv] or of B images, at a slot and after it; their images last. Raises OSError, the disk being full for instance."""
        raw = self.contents.packed(records)  # type: ignore[arg-type]  # the contents' own kind
        checks = [self._check(torch.from_numpy(one.view(self._word)), image) for one, image in zip(raw, images, strict=True)]
        start = self.end(slot - 1)
        self._put(np.concatenate(raw), self._start + start)
        if not self._size:
            self._put(start + np.cumsum([len(one) for one in raw], dtype=np.int64), HEADER + 8 * (2 * self.capacity + slot))
        self._put(np.asarray(checks, dtype=np.int64), HEADER + 8 * (self.capacity + slot))
        self._put(np.asarray(images, dtype=np.int64), HEADER + 8 * slot)

    def end(self, slot: int) -> int:
        """Where a record ends, in bytes from the first one's beginning; 0 before the first."""
        if self._size or slot < 0:
            return self._size * (slot + 1)
        return int.from_bytes(os.pread(self._number, 8, HEADER + 8 * (2 * self.capacity + slot)), sys.byteorder, signed=True)

    def _place(self, slot: int) -> tuple[int, int]:
        """Where a record begins and ends; nowhere, where that cannot be."""
        start, end = self.end(slot - 1), self.end(slot)
        is_there = self._size or (0 <= start < end <= os.fstat(self._number).st_size and start % 8 == end % 8 == 0)
        return (start, end) if is_there else (0, 0)

    def erase(self, slot: int) -> None:
        """Take a damaged record away. Raises OSError."""
        self._put(np.asarray([ABSENT], dtype=np.int64), HEADER + 8 * slot)

    def _put(self, data: NDArray[Any], offset: int) -> None:
        view = memoryview(data.reshape(-1)).cast("B")  # type: ignore[arg-type]  # likewise
        while view:
            written = os.pwrite(self._number, view, offset)
            view, offset = view[written:], offset + written


def trim(path: Path, contents: AnyContents) -> tuple[int, int]:
    """End a file after its last record; the bytes of its records and of the file. A file without records is removed: (0, 0).

    Raises DataError where it is none of these contents, OSError where the disk refuses it.
    """
    file = ShardFile(path, contents)
    used = np.flatnonzero(file.index()[0] != ABSENT)
    if not len(used):
        path.unlink()
        return 0, 0
    n_bytes = file.end(int(used[-1]))
    size = HEADER + 8 * contents.columns * file.capacity + n_bytes
    if path.stat().st_size != size:
        os.truncate(path, size)
    return n_bytes, size


def seal(path: Path, contents: AnyContents) -> int:
    """End a file, say in its header how many records it holds, and put it on the disk; its bytes, 0 where it is removed. Raises as `trim`."""
    n_bytes, size = trim(path, contents)
    if n_bytes:
        with path.open("r+b") as stream:
            file = ShardFile(path, contents)
            stream.write(_header(contents, file.capacity, n_bytes, file.version))
            stream.flush()
            os.fsync(stream.fileno())
    return size


def _capacity(head: bytes, contents: AnyContents, path: Path) -> tuple[int, str]:
    """The records that a file has room for, and its format; DataError where its header is not, to the byte, one that we write."""
    try:
        stated = json.loads(head[8:])
        capacity, (start, end) = int(stated["picture"]["shape"][0]), map(int, stated["features"]["data_offsets"])
        version = str(stated["__metadata__"]["format"])
        if version not in _FORMATS or _header(contents, capacity, end - start, version) != head:
            raise ValueError("another header than it should have")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} is no file of {contents}: {error}; {MEND}") from None
    return capacity, version

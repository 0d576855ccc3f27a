"""TIFF files: the size of the first page, and a file that holds nothing but what its pixels depend on.

A TIFF is a directory of tags that point anywhere. So a small file may say that its strips lie upon each other, or that a tag has a value of
many MiB a thousand times, and a reader would follow. Here the directory is read first, and a decoder is given one of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from multimodal.data.images.parts import MAX_PARTS, MAX_SCANS, ImageParts, TooManyParts

__all__ = ["TIFF_TYPES", "Tiff", "tiff_parts", "tiff_size"]

TIFF_TYPES = {1: "B", 3: "H", 4: "I"}  # unsigned integers of 1, 2 and 4 bytes
# Of the first page: sizes, how pixels are stored, where they lie. No resolution, texts, EXIF data or profiles.
_TIFF_PIXELS = frozenset(
    (254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347, 530, 532)
)
_TIFF_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)  # of one value, by type
_TIFF_PACKED = frozenset((1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000, 50001))  # none, fax, LZW, JPEG, deflate, PackBits, Zstandard, WebP
_MOST_TILE = 2**26  # pixels


@dataclass(frozen=True)
class Tiff:
    """The first directory of a TIFF file. entries: tag -> type, count, where its 12 bytes stand."""

    data: bytes
    order: str
    entries: Mapping[int, tuple[int, int, int]]

    @classmethod
    def of(cls, data: bytes) -> Tiff:
        """Raises struct.error where it is cut."""
        order = {b"II": "<", b"MM": ">"}[data[:2]]
        (first,) = struct.unpack_from(order + "I", data, 4)
        (n_entries,) = struct.unpack_from(order + "H", data, first)
        places = range(first + 2, first + 2 + 12 * n_entries, 12)
        return cls(
            data, order, {tag: (kind, count, at) for at in places for tag, kind, count, _ in [struct.unpack_from(order + "HHII", data, at)]}
        )

    def size(self, tag: int) -> int:
        """The bytes of a tag's values."""
        kind, count, _ = self.entries[tag]
        return count * (_TIFF_BYTES[kind] if kind < len(_TIFF_BYTES) else 1)

    def values(self, tag: int) -> Sequence[int]:
        """Whole numbers; none where the tag has no such. Raises struct.error where they are cut."""
        kind, count, _ = self.entries.get(tag, (0, 0, 0))
        if kind not in TIFF_TYPES or count > MAX_PARTS:
            return ()
        return struct.unpack_from(f"{self.order}{count}{TIFF_TYPES[kind]}", self.data, self.place(tag))

    def place(self, tag: int) -> int:
        """Where a tag's values stand."""
        at = self.entries[tag][2] + 8
        return at if self.size(tag) <= 4 else int(struct.unpack_from(self.order + "I", self.data, at)[0])

    def strips(self) -> list[tuple[int, int]]:
        """Where each strip or tile stands, and its bytes; none where it says nothing of one of both."""
        return list(zip(self.values(273) or self.values(324), self.values(279) or self.values(325), strict=False))

    def is_cut(self) -> bool:
        """Whether strips, tiles or values that pixels depend on lie beyond the end."""
        values = ((self.place(tag), self.size(tag)) for tag in self.entries if tag in _TIFF_PIXELS and self.size(tag) > 4)
        return any(at + size > len(self.data) for at, size in (*values, *self.strips()))

    def needed(self) -> int:
        """Bytes of the pixels where they are not packed, 0 where they are."""
        bits, samples = self.values(258) or (1,), (*self.values(277), 1)[0]
        row = self.values(256)[0] * (sum(bits) if len(bits) > 1 else bits[0] * samples)
        is_plain = (*self.values(259), 1)[0] == 1 and (*self.values(262), 1)[0] != 6  # YCbCr has fewer bytes of colour than pixels
        return -(-row // 8) * self.values(257)[0] if is_plain else 0


def tiff_parts(data: bytes) -> ImageParts:
    """The file with a directory of its own at the end, which has the tags that pixels depend on alone. Raises TooManyParts."""
    tiff = Tiff.of(data)
    retained = [tag for tag in sorted(tiff.entries) if tag in _TIFF_PIXELS]
    _check_tiff(tiff, retained)
    start = len(data) + len(data) % 2
    entries = b"".join(data[at : at + 12] for at in (tiff.entries[tag][2] for tag in retained))
    directory = struct.pack(tiff.order + "H", len(retained)) + entries + bytes(4)
    head = data[:4] + struct.pack(tiff.order + "I", start)
    return ImageParts(head + data[8:] + bytes(start - len(data)) + directory, exif=data)


def _check_tiff(tiff: Tiff, retained: Sequence[int]) -> None:
    """Strips and tiles that lie upon each other, or to be many or large, would be read again and again."""
    data, most = tiff.data, len(tiff.data)
    if any(tiff.entries[tag][1] > MAX_PARTS for tag in retained):
        raise TooManyParts("too many chunks", f"a TIFF of more than {MAX_PARTS} strips or tiles")
    strips = tiff.strips()
    start = min((at for at, _ in strips), default=8)
    if start + tiff.needed() > most or tiff.is_cut():
        raise TooManyParts("truncated", f"a TIFF whose pixels reach beyond its {most} bytes")
    if sum(size for _, size in strips) > most or sum(map(tiff.size, retained)) > most:
        raise TooManyParts("too many chunks", "a TIFF whose strips, tiles or tags lie upon each other")
    tile = [*tiff.values(322)[:1], *tiff.values(323)[:1]]
    if len(tile) == 2 and tile[0] * tile[1] > _MOST_TILE:
        raise TooManyParts("too many pixels", f"a TIFF with tiles of {tile[0]} x {tile[1]} pixels, and the limit is {_MOST_TILE}")
    packed = (*tiff.values(259), 1)[0]
    if packed not in _TIFF_PACKED:
        raise TooManyParts("corrupt", f"a TIFF that is packed by method {packed}, which is not read")
    scans = (data.count(b"\xff\xda", at, at + size) for at, size in strips) if packed == 7 else ()
    if max(scans, default=0) > MAX_SCANS:
        raise TooManyParts("too many scans", f"a TIFF with a JPEG of more than {MAX_SCANS} scans")


def tiff_size(data: bytes) -> tuple[int, int]:
    """Width and height of the first page. Raises struct.error and IndexError where they are not there."""
    tiff = Tiff.of(data)
    return tiff.values(256)[0], tiff.values(257)[0]

"""What kind of image some bytes are, and how many pixels it claims, read from the first bytes alone.

Pillow's WebP reader allocates the whole canvas when it opens a file, and Pillow warns on standard error about large images before
a caller can refuse them. So the size is read here first, and an image over the limit never reaches a decoder.
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "MAX_PARTS", "MAX_SCANS", "ImageHeader", "ImageKind", "ImageParts", "TooManyParts", "image_kind", "image_parts",
    "jpeg_segments", "orientation", "read_image_header",
]  # fmt: skip


# ----------------------------------------
# The parts of an encoded image that its pixels come from, without its metadata.
#
# Metadata is where readers stumble: a colour profile of 3 MiB, a comment with a wrong check sum, a million empty segments, an EXIF directory
# that says it is larger than the file. No pixel depends on any of it, so a decoder is given the image without it, and the orientation is
# read here. Parsing is bounded by the number of parts; what is left for the decoder costs what its bytes, pixels and scans cost.


ImageKind = Literal["jpg", "png", "webp"]

# Each scan of a JPEG is a pass over all of its blocks, and 33 bytes are enough for one: 105 KB would take minutes. Cameras write 1 scan,
# progressive encoders about 10; 64 take half a second at 4096 x 4096 (1.2 s with arithmetic coding), on one core of 2024.
MAX_SCANS = 64
MAX_PARTS = 65_536  # segments of a JPEG, chunks of a PNG or WebP; each costs a reader some microseconds. 64 MiB in the chunks of libpng are 8,192
TRIED = 16  # places that may be the next chunk, after one whose length is wrong
MAX_TEXT = 2**20  # bytes of a compressed text chunk that may hold the orientation

# A marker anywhere, also after bytes that belong to nothing, as libjpeg finds it: not the stuffed FF 00, the fill FF FF or a restart marker.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SOI, _EOI, _SOS, _TEM, _COM = 0xD8, 0xD9, 0xDA, 0x01, 0xFE
# APP1 to APP15 but for APP14, which says how colours are stored, and comments.
_JPEG_METADATA = frozenset((*range(0xE1, 0xF0), _COM)) - {0xEE}
_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_WEBP_PIXELS = frozenset((b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"))
_WEBP_METADATA = 0x20 | 0x08 | 0x04  # ICC profile, EXIF, XMP
_XMP_JPEG, _XMP_PNG = b"http://ns.adobe.com/xap/1.0/\0", b"XML:com.adobe.xmp"
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112  # TIFF tag
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_TIFF_TYPES = {1: "B", 3: "H", 4: "I"}  # unsigned integers of 1, 2 and 4 bytes


class TooManyParts(Exception):
    """An image whose reading would take long, whatever its size; `reason` is short and stable: too many scans, too many chunks."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ImageParts:
    """An encoded image in two.

    pixels   the image without metadata, as a file of the same kind; cut or damaged wherever the image is
    exif     the TIFF structure of its EXIF data, empty where there is none
    xmp      its XMP packet, empty where there is none
    """

    pixels: bytes
    exif: bytes = b""
    xmp: bytes = b""


def image_parts(data: bytes, kind: ImageKind) -> ImageParts:
    """The parts of an encoded image of a kind. Raises TooManyParts."""
    split: Callable[[bytes], ImageParts] = {"jpg": _jpeg_parts, "png": _png_parts, "webp": _webp_parts}[kind]
    return split(data)


def jpeg_segments(data: bytes, at: int = 0) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment from a place to the end of the image, without the data of scans. Raises TooManyParts.

    The end of a segment that is cut lies behind the data.
    """
    for number in range(MAX_PARTS + 1):
        found = _MARKER.search(data, at)
        if found is None:
            return
        if number == MAX_PARTS:
            raise TooManyParts("too many chunks", f"a JPEG of more than {MAX_PARTS} segments")
        start, marker = found.start(), data[found.start() + 1]
        at = start + 2
        if marker not in (_SOI, _EOI, _TEM):
            at += int.from_bytes(data[at : at + 2], "big") if at + 2 <= len(data) else len(data)
        yield marker, start, at
        if marker == _EOI:
            return


def orientation(exif: bytes, xmp: bytes) -> int:
    """The orientation that EXIF data, or else XMP, gives: 1 (upright) to 8; 1 where there is none or it cannot be read."""
    found = _exif_orientation(exif)
    if found is None and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return found if found is not None and 1 <= found <= 8 else 1


def _jpeg_parts(data: bytes) -> ImageParts:
    retained, exif, xmp, n_scans = [], b"", b"", 0
    for marker, start, end in jpeg_segments(data):
        n_scans += marker == _SOS
        if n_scans > MAX_SCANS:
            raise TooManyParts("too many scans", f"a JPEG of more than {MAX_SCANS} scans, each of which is a pass over all of its pixels")
        if marker == _SOS and n_scans == 1:
            retained.append(data[start:])  # libjpeg passes over metadata between scans, and over what follows the image
        elif n_scans == 0 and marker not in _JPEG_METADATA:
            retained.append(data[start:end])
        elif n_scans == 0 and marker == 0xE1:
            content = data[start + 4 : end]
            exif = exif or (content if content.startswith(_EXIF) else b"")
            xmp = xmp or (content if content.startswith(_XMP_JPEG) else b"")
    return ImageParts(b"".join(retained), exif, xmp)


def _png_parts(data: bytes) -> ImageParts:
    retained, exif, xmp, profile = [data[:8]], b"", b"", b""
    for kind, start, end in _png_chunks(data):
        if kind in _PNG_PIXELS:
            retained.append(data[start:end])
            continue
        content = data[start + 8 : end - 4]
        if kind == b"eXIf":
            exif = exif or content
        elif kind == b"iTXt" and content.startswith(_XMP_PNG + b"\0"):
            xmp = xmp or _international_text(content)
        elif kind in (b"tEXt", b"zTXt") and content.startswith(b"Raw profile type exif\0"):  # as ImageMagick writes it
            profile = profile or _raw_profile(content.partition(b"\0")[2], kind)
    return ImageParts(b"".join(retained), exif or profile, xmp)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk; after one whose length is wrong, from the next that pixels depend on."""
    at = 8
    for number in range(MAX_PARTS + 1):
        if at >= len(data):
            return
        if number == MAX_PARTS:
            raise TooManyParts("too many chunks", f"a PNG of more than {MAX_PARTS} chunks")
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if kind not in _PNG_PIXELS and not data[end + 4 : end + 8].isalpha():
            end = _next_png_pixels(data, at + 8)
        yield kind, at, end
        if kind == b"IEND":
            return
        at = end


def _next_png_pixels(data: bytes, at: int) -> int:
    """The start of the next chunk with a right check sum that pixels depend on; the end of the data where none is near."""
    for found in itertools.islice(re.finditer(rb"PLTE|tRNS|IDAT", data[at:]), TRIED):
        name = at + found.start()
        end = name + 4 + int.from_bytes(data[name - 4 : name], "big")
        if int.from_bytes(data[end : end + 4], "big") == zlib.crc32(data[name:end]):
            return name - 4
    return len(data)


def _webp_parts(data: bytes) -> ImageParts:
    retained, found, at = [], dict[bytes, bytes](), 12
    for number in range(MAX_PARTS + 1):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if not kind:
            break
        if number == MAX_PARTS:
            raise TooManyParts("too many chunks", f"a WebP of more than {MAX_PARTS} chunks")
        end = at + 8 + size + size % 2
        if kind == b"VP8X":  # without the bits that announce metadata
            retained.append(data[at : at + 8] + bytes([data[at + 8] & ~_WEBP_METADATA]) + data[at + 9 : end] if at + 8 < len(data) else data[at:])
        elif kind in _WEBP_PIXELS:
            retained.append(data[at:end])
        elif kind in (b"EXIF", b"XMP "):
            found.setdefault(kind, data[at + 8 : at + 8 + size])
        at = end
    body = b"".join(retained)
    return ImageParts(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body, found.get(b"EXIF", b""), found.get(b"XMP ", b""))


def _international_text(content: bytes) -> bytes:
    """The text of an iTXt chunk: keyword, 0, whether it is compressed, how, language, 0, the keyword translated, 0, text."""
    _, _, rest = content.partition(b"\0")
    text = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return _inflated(text) if rest[:1] == b"\1" else text


def _raw_profile(content: bytes, kind: bytes) -> bytes:
    """EXIF data in hexadecimal, below lines that name it and its length."""
    text = _inflated(content[1:]) if kind == b"zTXt" else content
    digits = b"".join(text.split(b"\n")[3:])
    try:
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return b""


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, MAX_TEXT)
    except zlib.error:
        return b""


def _exif_orientation(exif: bytes) -> int | None:
    """The tag's value in the first directory of a TIFF structure; None where there is none."""
    while exif.startswith(_EXIF):
        exif = exif[len(_EXIF) :]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is None:
            return None
        (first,) = struct.unpack_from(order + "I", exif, 4)
        (n_entries,) = struct.unpack_from(order + "H", exif, first)
        for number in range(n_entries):
            tag, kind, count = struct.unpack_from(order + "HHI", exif, first + 2 + 12 * number)
            if tag == _ORIENTATION and kind in _TIFF_TYPES and count == 1:
                return int(struct.unpack_from(order + _TIFF_TYPES[kind], exif, first + 10 + 12 * number)[0])
    except struct.error:  # cut or damaged
        return None
    return None


# JPEG markers that hold the frame's size: SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What an image says about itself; sizes in pixels, before its EXIF orientation."""

    kind: ImageKind
    width: int
    height: int


def image_kind(data: bytes) -> ImageKind | None:
    """The kind by content, from the first 12 bytes; a file's name does not count. None where it is none of the three."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def read_image_header(data: bytes) -> ImageHeader | None:
    """Kind and size of a JPEG, PNG or WebP; None where it is none of these, or its header is cut or damaged."""
    kind = image_kind(data)
    if kind is None:
        return None
    try:
        width, height = {"jpg": _jpeg_size, "png": _png_size, "webp": _webp_size}[kind](data)
    except (struct.error, ValueError):
        return None
    return ImageHeader(kind=kind, width=width, height=height)


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise ValueError
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Of the first frame header."""
    for marker, start, _ in jpeg_segments(data):
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, start + 5)
            return width, height
    raise ValueError


def _webp_size(data: bytes) -> tuple[int, int]:
    """The canvas: of the extended header where there is one, else of the only frame (WebP container specification)."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return (low_w | high_w << 16) + 1, (low_h | high_h << 16) + 1
    if chunk == b"VP8L" and data[20:21] == b"\x2f":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError

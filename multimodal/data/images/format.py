"""What kind of image some bytes are, and how many pixels it claims, read from the first bytes alone.

Pillow's WebP reader allocates the whole canvas when it opens a file, and Pillow warns on standard error about large images before
a caller can refuse them. So the size is read here first, and an image over the limit never reaches a decoder.
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from multimodal.data.images.parts import MAX_PARTS, MAX_SCANS, ImageParts, TooManyParts
from multimodal.data.images.tiff import TIFF_TYPES, Tiff, tiff_parts, tiff_size

__all__ = [
    "ENDINGS", "KINDS", "MAX_PARTS", "MAX_SCANS", "ImageHeader", "ImageKind", "ImageParts", "TooManyParts", "ends_early", "image_kind", "image_parts",
    "jpeg_segments", "orientation", "read_image_header",
]  # fmt: skip


# ----------------------------------------
# The parts of an encoded image that its pixels come from, without its metadata.
#
# Metadata is where readers stumble: a colour profile of 3 MiB, a comment with a wrong check sum, a million empty segments, an EXIF directory
# that says it is larger than the file. No pixel depends on any of it, so a decoder is given the image without it, and the orientation is
# read here. Parsing is bounded by the number of parts; what is left for the decoder costs what its bytes, pixels and scans cost.


ImageKind = Literal["jpg", "png", "webp", "gif", "bmp", "tiff", "avif", "heic"]
KINDS = "jpg, png, webp, gif, bmp, tiff, avif and heic"  # for messages
ENDINGS: Mapping[str, ImageKind] = {
    "jpg": "jpg", "jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "png": "png", "apng": "png", "webp": "webp", "gif": "gif", "bmp": "bmp",
    "tif": "tiff", "tiff": "tiff", "avif": "avif", "heic": "heic", "heif": "heic",
}  # fmt: skip
"""The endings of image files' names, in lower case and without the dot; a folder or a shard is searched for these. The content says the kind."""

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


def image_parts(data: bytes, kind: ImageKind) -> ImageParts:
    """The parts of an encoded image of a kind. Raises TooManyParts."""
    split: Mapping[ImageKind, Callable[[bytes], ImageParts]] = {
        "jpg": _jpeg_parts, "png": _png_parts, "webp": _webp_parts, "gif": _gif_parts, "tiff": tiff_parts, "avif": _heif_parts, "heic": _heif_parts
    }  # fmt: skip
    return split[kind](data) if kind in split else ImageParts(data)


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


def _gif_parts(data: bytes) -> ImageParts:
    """Without what stands before the first frame, but for how transparent it is: a decoder joins the pieces of a comment one by one."""
    at, controls, start = _gif_start(data)
    return ImageParts(data[:at] + controls + data[start:])


def _gif_start(data: bytes) -> tuple[int, bytes, int]:
    """The end of the table of colours, the last control block before the first frame, and the frame's start. Raises IndexError at the end."""
    tables = at = 13 + (6 << (data[10] & 7) if data[10] & 0x80 else 0)
    controls, number = b"", 0
    while data[at] != ord(","):
        start, number = at, number + 1
        if data[at] == ord("!"):
            at += 2
            while data[at]:
                at, number = at + 1 + data[at], number + 1
                if number > MAX_PARTS:
                    break
            controls = data[start : at + 1] if data[start + 1] == 0xF9 else controls
        at += 1
        if number > MAX_PARTS:
            raise TooManyParts("too many chunks", f"a GIF of more than {MAX_PARTS} blocks before its first frame")
    return tables, controls, at


_METADATA_ITEM = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))(?:Exif|mime)", re.DOTALL)
_EXTENTS = re.compile(rb"ispe\0\0\0\0(.{8})", re.DOTALL)


def _heif_parts(data: bytes) -> ImageParts:
    """With the names of its EXIF and XMP items changed: how it is turned stands in its own boxes, which the decoder reads."""
    start, end = _heif_meta(data)
    return ImageParts(data[:start] + _METADATA_ITEM.sub(rb"\1skip", data[start:end]) + data[end:])


def _heif_meta(data: bytes) -> tuple[int, int]:
    """From where to where the box `meta` reaches. Raises ValueError where there is none."""
    at = 0
    for _ in range(MAX_PARTS):
        size, kind = struct.unpack_from(">I4s", data, at)
        size = struct.unpack_from(">Q", data, at + 8)[0] if size == 1 else size or len(data) - at
        if kind == b"meta":
            return at, at + size
        at += max(size, 8)
    raise ValueError


def ends_early(data: bytes, kind: ImageKind) -> bool:
    """Whether a TIFF, AVIF or HEIC file is shorter than it says."""
    try:
        if kind == "tiff":
            return Tiff.of(data).is_cut()
        at = 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            at += struct.unpack_from(">Q", data, at + 8)[0] if size == 1 else max(size, 8) if size else len(data) - at
        return at > len(data) or b"mdat" not in data
    except struct.error:
        return True


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
            if tag == _ORIENTATION and kind in TIFF_TYPES and count == 1:
                return int(struct.unpack_from(order + TIFF_TYPES[kind], exif, first + 10 + 12 * number)[0])
    except struct.error:  # cut or damaged
        return None
    return None


# JPEG markers that hold the frame's size: SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes of the header after the first 14 bytes
_MOST_BRANDS = 128  # bytes


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What an image says about itself; sizes in pixels, before its EXIF orientation."""

    kind: ImageKind
    width: int
    height: int


def image_kind(data: bytes) -> ImageKind | None:
    """The kind by content, from the first bytes; a file's name does not count. None where it is none of `KINDS`."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    return _heif_kind(data) if data[4:8] == b"ftyp" else None


def _heif_kind(data: bytes) -> ImageKind | None:
    """By its brands, the first of which may be that of the container alone."""
    brands = data[8 : min(int.from_bytes(data[:4], "big"), _MOST_BRANDS)]
    names = {brands[at : at + 4] for at in range(0, len(brands), 4)}
    return "avif" if names & {b"avif", b"avis"} else "heic" if names & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"} else None


def read_image_header(data: bytes) -> ImageHeader | None:
    """Kind and size of an image; None where it is none of `KINDS`, or its header is cut or damaged."""
    kind = image_kind(data)
    if kind is None:
        return None
    size: Callable[[bytes], tuple[int, int]] = {
        "jpg": _jpeg_size, "png": _png_size, "webp": _webp_size, "gif": _gif_size, "bmp": _bmp_size, "tiff": tiff_size, "avif": _heif_size,
        "heic": _heif_size,
    }[kind]  # fmt: skip
    try:
        width, height = size(data)
    except (struct.error, ValueError, IndexError):
        return None
    return ImageHeader(kind=kind, width=width, height=height) if width > 0 and height > 0 else None


def _gif_size(data: bytes) -> tuple[int, int]:
    """The screen, and the first frame where that reaches beyond it."""
    _, _, at = _gif_start(data)
    width, height = struct.unpack_from("<HH", data, 6)
    left, top, across, down = struct.unpack_from("<HHHH", data, at + 1)
    return max(width, left + across), max(height, top + down)


def _bmp_size(data: bytes) -> tuple[int, int]:
    """A height below 0 means that the first row is the top one."""
    width, height = struct.unpack_from("<HH" if data[14] == _BMP_HEADERS[0] else "<ii", data, 18)
    return width, abs(height)


def _heif_size(data: bytes) -> tuple[int, int]:
    """The largest of the images in it: whole ones, tiles and thumbnails."""
    start, end = _heif_meta(data)
    sizes = [struct.unpack(">II", match[1]) for match in _EXTENTS.finditer(data, start, end)]
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return width, height


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

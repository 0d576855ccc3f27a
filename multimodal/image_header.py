"""What kind of picture some bytes are, and how many pixels it claims, read from the first bytes alone.

Pillow's WebP reader allocates the whole canvas when it opens a file, and Pillow warns on standard error about large pictures before
a caller can refuse them. So the size is read here first, and a picture over the limit never reaches a decoder.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from multimodal.image_parts import ImageKind, jpeg_segments

__all__ = ["ImageHeader", "ImageKind", "image_kind", "read_image_header"]

# JPEG markers that hold the frame's size: SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What a picture says about itself; sizes in pixels, before its EXIF orientation."""

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

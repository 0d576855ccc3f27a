"""One image, decoded: an RGB image the right way up, or a `BadImage` that says why not.

JPEG, PNG and WebP, recognized by content and not by name. Limits on bytes and pixels are checked before a decoder sees the image.
A damaged image is refused, never filled with grey: Pillow's LOAD_TRUNCATED_IMAGES stays off. What no decoder can detect is a bit
that flipped inside a JPEG's data; the shard manifest's sha256 finds that.
"""

from __future__ import annotations

import io
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from adalink.errors import ConfigError, DataError
from multimodal.data.images.format import (
    ImageHeader,
    ImageKind,
    ImageParts,
    TooManyParts,
    image_kind,
    image_parts,
    orientation,
    read_image_header,
)

__all__ = ["BadImage", "ImageLimits", "ImageOrFile", "check_header", "decode_image", "read_image_bytes"]

ImageOrFile = bytes | str | Path | Image.Image
"""An encoded image, the path of one (also as text), or one that is decoded already."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Everything that Pillow's three readers were seen to raise on damaged bytes.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError, struct.error, zlib.error)
PILLOW_PIXELS = 89_478_485  # Pillow itself warns from here on, on standard error


class BadImage(DataError):
    """An image that cannot be used; `reason` is short and stable, so that reports can count by it.

    Reasons: missing file, unreadable file, empty file, not an image, truncated, corrupt, too many bytes, too many pixels, too many scans,
    too many chunks.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, because an exception is rebuilt from its arguments when a worker process sends it
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What an image may cost, checked before it is decoded."""

    max_bytes: int = 64 * 2**20  # of the encoded image
    max_pixels: int = 2**26  # width x height; 8192 x 8192, which is 192 MiB of RGB

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes is {self.max_bytes}; it must be at least 1")
        if not 1 <= self.max_pixels <= PILLOW_PIXELS:
            raise ConfigError(f"max_pixels is {self.max_pixels}; it must be from 1 to {PILLOW_PIXELS}, Pillow's own limit")


def decode_image(image: ImageOrFile, *, limits: ImageLimits = ImageLimits(), at_least: int | None = None) -> Image.Image:
    """The image in mode RGB, turned upright by its EXIF orientation; of an animation, the first frame.

    Transparent pixels show white, as on a page; a 16-bit greyscale image keeps its high byte.

    at_least  decode a JPEG at a half, a quarter or an eighth of its size where each side keeps so many pixels: faster, and other pixels

    Raises BadImage.
    """
    if isinstance(image, Image.Image):
        return _upright(image, limits)
    name = f"an image of {len(image)} bytes" if isinstance(image, bytes) else str(image)
    data = read_image_bytes(image, limits=limits)
    header, parts = _checked(data, limits, name)
    try:
        return _decode(parts, limits, name, at_least)
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels", f"{name} has more pixels than its first header says: {error}") from error
    except _DECODER_ERRORS as error:
        reason = "truncated" if _ends_early(data, header.kind) or "truncated" in str(error) else "corrupt"
        note = "which its decoder does not recognise" if isinstance(error, UnidentifiedImageError) else error  # Pillow's has a memory address
        raise BadImage(reason, f"{name} is {reason}: {header.kind} of {header.width} x {header.height} pixels, {note}") from error


def read_image_bytes(image: ImageOrFile, *, limits: ImageLimits = ImageLimits()) -> bytes:
    """The encoded bytes, not decoded, of a regular file no larger than the limit; of an image that is decoded already, those of a PNG.

    Raises BadImage; a folder, a pipe or a device is not opened, because reading one could wait forever.
    """
    if isinstance(image, Image.Image):
        png = io.BytesIO()
        _upright(image, limits).save(png, "PNG")
        return png.getvalue()
    image = Path(image) if isinstance(image, str) else image
    name = str(image) if isinstance(image, Path) else "an image"
    try:
        if isinstance(image, Path):
            status = image.stat()
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not an image", f"{name} is not a regular file; expected a jpg, png or webp image")
            _check_bytes(status.st_size, limits, name)
            with image.open("rb") as file:
                image = file.read(status.st_size + 1)  # not the limit: memory for it would be made and given back
                if len(image) > status.st_size:  # it has grown since
                    image += file.read(limits.max_bytes)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadImage("missing file", f"{name} is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadImage("unreadable file", f"{name!r} cannot be read: {error}") from error
    _check_bytes(len(image), limits, name)
    if not image:
        raise BadImage("empty file", f"{name} holds 0 bytes")
    return image


def check_header(data: bytes, *, limits: ImageLimits = ImageLimits(), name: str = "an image") -> ImageHeader:
    """Kind and size of an image that is worth a decoder's time; nothing is decoded.

    Raises BadImage where the bytes begin as none of the three kinds, end within the header, or promise too many pixels
    or more passes over them than any camera or encoder writes.
    """
    return _checked(data, limits, name)[0]


def _checked(data: bytes, limits: ImageLimits, name: str) -> tuple[ImageHeader, ImageParts]:
    try:
        header = read_image_header(data)
        if header is None:
            raise _headless(data, name)
        _check_pixels(header.width, header.height, limits, name)
        return header, image_parts(data, header.kind)
    except TooManyParts as error:
        raise BadImage(error.reason, f"{name} is {error.detail}: save it anew") from None


def _check_bytes(size: int, limits: ImageLimits, name: str) -> None:
    if size > limits.max_bytes:
        raise BadImage("too many bytes", f"{name} has {size} bytes, and the limit is {limits.max_bytes}")


def _check_pixels(width: int, height: int, limits: ImageLimits, name: str) -> None:
    if width * height > limits.max_pixels:
        raise BadImage("too many pixels", f"{name} has {width} x {height} pixels, and the limit is {limits.max_pixels}")


def _headless(data: bytes, name: str) -> BadImage:
    kind = image_kind(data)
    if kind is None:
        return BadImage("not an image", f"{name} begins with {data[:8]!r}, which is none of jpg, png and webp")
    reason = "truncated" if _ends_early(data, kind) else "corrupt"
    return BadImage(reason, f"{name} is {reason}: it begins as {kind}, but {len(data)} bytes hold no whole header")


def _ends_early(data: bytes, kind: ImageKind) -> bool:
    """Whether the end that the format prescribes is absent; asked only of images that failed, to name the reason."""
    if kind == "webp":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return (b"\xff\xd9" if kind == "jpg" else b"IEND") not in data


def _decode(parts: ImageParts, limits: ImageLimits, name: str, at_least: int | None) -> Image.Image:
    with Image.open(io.BytesIO(parts.pixels), formats=("JPEG", "PNG", "WEBP")) as opened:
        _check_pixels(*opened.size, limits, name)  # Pillow's own reading of the header, in case it differs
        if at_least is not None:
            opened.draft(None, (at_least, at_least))  # does nothing to other kinds
        opened.load()
        turn = _UPRIGHT.get(orientation(parts.exif, parts.xmp))
        image = _to_rgb(opened)
        return image.transpose(turn) if turn is not None else image


def _upright(image: Image.Image, limits: ImageLimits) -> Image.Image:
    """What `decode_image` gives of an image that a program holds, perhaps one whose file is not read yet."""
    _check_pixels(*image.size, limits, "an image")
    try:
        exif = image.info.get("exif", b"")
        turn = _UPRIGHT.get(orientation(exif if isinstance(exif, bytes) else b"", b""))
        rgb = _to_rgb(image)
        return rgb.transpose(turn) if turn is not None else rgb
    except _DECODER_ERRORS as error:
        raise BadImage("corrupt", f"an image of {image.width} x {image.height} pixels cannot be read: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255 and gives a white image
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif "A" in image.getbands() or "transparency" in image.info:
        # The colour under a transparent pixel is arbitrary, often black: dropping alpha would show what nobody was meant to see.
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB") if image.mode != "RGB" else image.copy()

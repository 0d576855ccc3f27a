"""One image, decoded: an RGB image the right way up, or a `BadImage` that says why not.

JPEG, PNG and WebP, recognized by content and not by name. Limits on bytes and pixels are checked before a decoder sees the image.
A damaged image is refused, never filled with grey: Pillow's LOAD_TRUNCATED_IMAGES stays off. What no decoder can detect is a bit
that flipped inside a JPEG's data; the shard manifest's sha256 finds that.
"""

from __future__ import annotations

import io
import stat
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from adalink.errors import ConfigError, DataError
from multimodal.data.images.format import (
    KINDS,
    ImageHeader,
    ImageKind,
    ImageParts,
    TooManyParts,
    ends_early,
    image_kind,
    image_parts,
    orientation,
    read_image_header,
)

__all__ = ["BadImage", "ImageLimits", "ImageOrFile", "check_header", "decode_image", "read_image_bytes"]

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # about tags, once for each process

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
# Everything that Pillow's readers were seen to raise on damaged bytes.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError, RuntimeError, struct.error, zlib.error
)  # fmt: skip
_FORMATS: Mapping[ImageKind, str] = {
    "jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "avif": "AVIF", "heic": "HEIF"
}  # fmt: skip
PILLOW_PIXELS = 89_478_485  # Pillow itself warns from here on, on standard error


class BadImage(DataError):
    """An image that cannot be used; `reason` is short and stable, so that reports can count by it.

    Reasons: missing file, unreadable file, empty file, not an image, truncated, corrupt, too many bytes, too many pixels, too many scans,
    too many chunks, no decoder.
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
    """The image in mode RGB, turned upright by its EXIF orientation; of an animation or several pages, the first.

    Transparent pixels show white, as on a page; of 16 bits a channel the high byte is read.

    at_least  decode a JPEG at a half, a quarter or an eighth of its size where each side keeps so many pixels: faster, and other pixels

    Raises BadImage.
    """
    if isinstance(image, Image.Image):
        return _upright(image, limits)
    name = f"an image of {len(image)} bytes" if isinstance(image, bytes) else str(image)
    data = read_image_bytes(image, limits=limits)
    header, parts = _checked(data, limits, name)
    try:
        return _decode(parts, header.kind, limits, name, at_least)
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
                raise BadImage("not an image", f"{name} is not a regular file; expected an image")
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

    Raises BadImage where the bytes begin as none of the kinds, end within the header, or promise too many pixels
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
    except (struct.error, ValueError, IndexError):  # a directory that is cut
        raise _headless(data, name) from None


def _check_bytes(size: int, limits: ImageLimits, name: str) -> None:
    if size > limits.max_bytes:
        raise BadImage("too many bytes", f"{name} has {size} bytes, and the limit is {limits.max_bytes}")


def _check_pixels(width: int, height: int, limits: ImageLimits, name: str) -> None:
    if width * height > limits.max_pixels:
        raise BadImage("too many pixels", f"{name} has {width} x {height} pixels, and the limit is {limits.max_pixels}")


def _headless(data: bytes, name: str) -> BadImage:
    kind = image_kind(data)
    if kind is None:
        return BadImage("not an image", f"{name} begins with {data[:8]!r}, which is none of {KINDS}")
    reason = "truncated" if _ends_early(data, kind) else "corrupt"
    return BadImage(reason, f"{name} is {reason}: it begins as {kind}, but {len(data)} bytes hold no whole header")


def _ends_early(data: bytes, kind: ImageKind) -> bool:
    """Whether the end that the format prescribes is absent; asked only of images that failed, to name the reason."""
    if kind == "webp":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "bmp":
        return len(data) < int.from_bytes(data[2:6], "little")
    if kind == "gif":
        return not data.rstrip(b"\0").endswith(b";")
    if kind in ("tiff", "avif", "heic"):
        return ends_early(data, kind)
    return (b"\xff\xd9" if kind == "jpg" else b"IEND") not in data


def _decode(parts: ImageParts, kind: ImageKind, limits: ImageLimits, name: str, at_least: int | None) -> Image.Image:
    if not _has_decoder(kind):
        package = "pillow-heif" if kind == "heic" else "pillow 11.3 or later with AVIF"
        raise BadImage("no decoder", f"{name} is {kind}, and this Python cannot read it: install {package}, or save the image anew")
    with Image.open(io.BytesIO(parts.pixels), formats=(_FORMATS[kind],)) as opened:
        _check_pixels(*opened.size, limits, name)  # Pillow's own reading of the header, in case it differs
        if at_least is not None:
            opened.draft(None, (at_least, at_least))  # does nothing to other kinds
        opened.load()
        exif = opened.info.get("exif") or b"" if kind == "avif" else parts.exif  # of an AVIF what its own boxes say
        turn = _UPRIGHT.get(orientation(exif, parts.xmp))
        image = _to_rgb(opened)
        return image.transpose(turn) if turn is not None else image


@cache
def _has_decoder(kind: ImageKind) -> bool:
    if kind == "avif":
        Image.init()
        return "AVIF" in Image.OPEN and bool(features.check("avif"))
    if kind == "heic":
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return False
        register_heif_opener(thumbnails=False)
    return True


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
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips at 255 and gives a white image
        image = Image.fromarray(_shades(np.asarray(image), image.mode))
    elif "A" in image.getbands() or "transparency" in image.info:
        # The colour under a transparent pixel is arbitrary, often black: dropping alpha would show what nobody was meant to see.
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _shades(values: NDArray[np.generic], mode: str) -> NDArray[np.uint8]:
    """Grey values in 8 bits: the high byte of 16; of 32 likewise, where one is above 255; of fractions from 0 to 1 their share of 255."""
    if mode == "F":
        grey = np.nan_to_num(values.astype(np.float64))
        return np.clip(np.round(grey * 255 if grey.min() >= 0 and grey.max() <= 1 else grey), 0, 255).astype(np.uint8)
    whole = np.clip(values.astype(np.int64), 0, 65535)
    return (whole >> 8 if mode != "I" or whole.max() > 255 else whole).astype(np.uint8)

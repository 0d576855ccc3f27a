"""An encoded image without its metadata, and how many parts one may have."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MAX_PARTS", "MAX_SCANS", "ImageParts", "TooManyParts"]

# Each scan of a JPEG is a pass over all of its blocks, and 33 bytes are enough for one: 105 KB would take minutes. Cameras write 1 scan,
# progressive encoders about 10; 64 take half a second at 4096 x 4096 (1.2 s with arithmetic coding), on one core of 2024.
MAX_SCANS = 64
MAX_PARTS = (
    65_536  # segments of a JPEG, chunks of a PNG or WebP; each costs a reader some microseconds. 64 MiB in the chunks of libpng are 8,192
)


class TooManyParts(Exception):
    """An image whose reading would take long, whatever its size.

    reason   short and stable: too many scans, too many chunks, too many pixels; of a TIFF truncated and corrupt too
    """

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

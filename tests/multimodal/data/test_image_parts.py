"""Metadata does not decide whether pixels are read, and no image costs more than its bytes, pixels and a bounded number of passes."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from multimodal.data.images.decode import BadImage, check_header, decode_image
from multimodal.data.images.format import MAX_PARTS, MAX_SCANS, image_parts, orientation

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def encoded(kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, kind, **options)
    return out.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)


def exif(value: int, order: str = "<") -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IHHHIHxx", 8, 1, 0x0112, 3, 1, value)


def xmp(value: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{value}"/></x:xmpmeta>'.encode()


def many_scans(n: int, frame: int, side: int = 64) -> bytes:
    """A JPEG of so many scans; the first gives every block its first coefficient, the others say that nothing changes."""
    components = (1, 2, 3)
    out = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64))
    out += segment(frame, struct.pack(">BHHB", 8, side, side, 3) + b"".join(bytes((number, 0x11, 0)) for number in components))
    if frame < 0xC8:  # Huffman tables: one code each
        out += segment(0xC4, b"\x00\x01" + bytes(15) + b"\0") + segment(0xC4, b"\x10\x01" + bytes(15) + b"\xe0")
    sequential, every = frame in (0xC0, 0xC1, 0xC9), b"\x03" + b"".join(bytes((number, 0)) for number in components)
    for number in range(n):
        if sequential:
            out += segment(0xDA, bytes((1, number % 3 + 1, 0, 0, 63, 0))) + b"\0\0"
        else:
            out += segment(0xDA, every + bytes((0, 0, 0x01 if number == 0 else 0x10))) + b"\0\0"
    return out + b"\xff\xd9"


@pytest.mark.parametrize("frame", [0xC0, 0xC1, 0xC2, 0xC9, 0xCA], ids=["baseline", "extended", "progressive", "arithmetic", "progressive arithmetic"])
def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(frame: int) -> None:
    assert decode_image(many_scans(MAX_SCANS, frame)).size == (64, 64)
    large = many_scans(5000, frame, side=8000)
    started = time.process_time()
    for read in (decode_image, check_header):
        with pytest.raises(BadImage, match=f"a JPEG of more than {MAX_SCANS} scans") as caught:
            read(large)
        assert caught.value.reason == "too many scans"
    assert time.process_time() - started < 5  # a second or two for each hundred of these scans


def test_scans_are_counted_behind_metadata_and_what_looks_like_scans_elsewhere_is_not_counted() -> None:
    progressive = encoded("JPEG", progressive=True)
    like_scans = b"\xff\xda\x00\x02" * 200
    hidden = many_scans(MAX_SCANS + 1, 0xC2).replace(b"\xff\xda", segment(0xE5, like_scans) + b"\xff\xff\xff\xda")
    with pytest.raises(BadImage, match="scans"):
        decode_image(hidden)
    for data in (progressive[:2] + segment(0xE1, b"Exif\0\0" + like_scans) + progressive[2:], progressive + like_scans):  # a thumbnail; a second image
        assert np.array_equal(decode_image(data), decode_image(progressive))


PNG, JPEG = encoded("PNG"), encoded("JPEG")


@pytest.mark.parametrize("data", [
    JPEG[:2] + b"\xff\xe5\x00\x02" * 400_000 + JPEG[2:],
    JPEG[:2] + b"\xff\xc4\x00\x02" * 400_000 + JPEG[2:],
    PNG[:33] + chunk(b"prVt", b"") * 200_000 + PNG[33:],
    PNG[:33] + chunk(b"IDAT", b"") * 200_000 + PNG[33:],
    encoded("WEBP") + (b"ABCD" + bytes(4)) * 200_000,
], ids=["application segments", "tables", "private chunks", "empty data", "unknown chunks"])  # fmt: skip
def test_an_image_of_too_many_chunks_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage, match=f"more than {MAX_PARTS} ") as caught:
        decode_image(data)
    assert caught.value.reason == "too many chunks"


LARGE = zlib.compress(b"A" * 3 * 2**20)
METADATA = {
    "a profile of 3 MiB": chunk(b"iCCP", b"profile\0\0" + LARGE),
    "a profile that is no zlib stream": chunk(b"iCCP", b"profile\0\0" + b"\xff" * 100),
    "a comment of 3 MiB": chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "an international comment of 3 MiB": chunk(b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
    "an XMP packet of 3 MiB": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    "forty comments of 3 MiB": chunk(b"zTXt", b"Comment\0\0" + LARGE) * 40,
    "a comment with a wrong check sum": chunk(b"tEXt", b"Comment\0hello", crc=0),
    "a profile with a wrong check sum": chunk(b"iCCP", b"profile\0\0" + LARGE, crc=1),
    "a comment that is said to be longer": struct.pack(">I", 40) + chunk(b"tEXt", b"Comment\0hello")[4:],
    "a comment that is said to be shorter": struct.pack(">I", 3) + chunk(b"tEXt", b"Comment\0hello, IDAT and IDAT")[4:],
    "a comment that is said to be longer than the file": b"\x7f\xff\xff\xff" + chunk(b"tEXt", b"Comment\0hello")[4:],
    "sizes that are cut": chunk(b"pHYs", b"\0") + chunk(b"gAMA", b"") + chunk(b"cHRM", b"\1") + chunk(b"sRGB", b""),
    "an animation that is cut": chunk(b"acTL", b"\0") + chunk(b"fcTL", b"\0\0"),
    "EXIF data that are cut": chunk(b"eXIf", exif(6)[:13]),
}


@pytest.mark.parametrize("name", METADATA)
def test_a_png_whose_pixels_are_whole_is_read_whatever_its_metadata_are(name: str) -> None:
    for data in (PNG[:33] + METADATA[name] + PNG[33:], PNG[:-12] + METADATA[name] + PNG[-12:]):  # before the pixels, and after them
        assert np.array_equal(decode_image(data), PIXELS)


@pytest.mark.parametrize("name", [b"EXIF", b"XMP "])
@pytest.mark.parametrize("size", [0, 1, 50, 10**6, 2**32 - 1])
def test_a_webp_whose_pixels_are_whole_is_read_whatever_the_size_of_its_metadata(name: bytes, size: int) -> None:
    data = bytearray(encoded("WEBP", lossless=True, exif=b"Exif\0\0" + exif(1), xmp=xmp(1), icc_profile=b"x" * 99))
    at = data.index(name)
    data[at + 4 : at + 8] = struct.pack("<I", size)
    assert np.array_equal(decode_image(bytes(data)), PIXELS)


@pytest.mark.parametrize("marker", [0xE1, 0xE2, 0xED, 0xFE])
def test_a_jpeg_whose_pixels_are_whole_is_read_whatever_its_metadata_are(marker: int) -> None:
    for content in (b"", b"Exif\0\0", b"Exif\0\0II*\0" + b"\xff" * 60_000, b"MPF\0" + b"\1" * 90, b"ICC_PROFILE\0\0\0", b"Photoshop 3.0\x008BIM\xff"):
        assert np.array_equal(decode_image(JPEG[:2] + segment(marker, content) * 3 + JPEG[2:]), decode_image(JPEG))


def test_the_orientation_is_found_wherever_cameras_and_tools_write_it() -> None:
    plain = {"jpg": JPEG, "png": PNG, "webp": encoded("WEBP", lossless=True, exif=b"Exif\0\0" + exif(6))}
    raw = b"\nexif\n      26\n" + (b"Exif\0\0" + exif(6)).hex().encode()
    cases = {
        "jpg": JPEG[:2] + segment(0xE1, b"Exif\0\0" + exif(6, ">")) + JPEG[2:],
        "jpg, XMP": JPEG[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6)) + JPEG[2:],
        "png": PNG[:33] + chunk(b"eXIf", exif(6)) + PNG[33:],
        "png, after the pixels": PNG[:-12] + chunk(b"eXIf", exif(6, ">")) + PNG[-12:],
        "png, ImageMagick": PNG[:33] + chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)) + PNG[33:],
        "png, ImageMagick's text": PNG[:33] + chunk(b"tEXt", b"Raw profile type exif\0" + raw) + PNG[33:],
        "png, XMP": PNG[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)) + PNG[33:],
        "png, XMP compressed": PNG[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0x\0" + zlib.compress(xmp(6))) + PNG[33:],
        "webp": plain["webp"],
        "webp, XMP": encoded("WEBP", lossless=True, xmp=xmp(6)),
    }
    for name, data in cases.items():
        turned = Image.fromarray(np.asarray(decode_image(plain["jpg"])) if name.startswith("jpg") else PIXELS).transpose(Image.Transpose.ROTATE_270)
        assert np.array_equal(decode_image(data), turned), name
    assert orientation(exif(3), xmp(6)) == 3  # EXIF first
    assert [orientation(exif(value), b"") for value in (0, 1, 8, 9)] == [1, 1, 8, 1]
    assert orientation(b"Exif\0\0" * 2 + exif(5), b"") == 5


def test_what_pixels_depend_on_is_still_checked() -> None:
    palette = io.BytesIO()
    Image.fromarray(PIXELS).quantize(16).save(palette, "PNG")
    data = bytearray(palette.getvalue())
    data[data.index(b"PLTE") + 4] ^= 1
    with pytest.raises(BadImage, match="corrupt"):
        decode_image(bytes(data))


def test_the_reason_tells_nothing_of_the_memory() -> None:
    with pytest.raises(BadImage) as caught:
        decode_image(PNG[:33] + chunk(b"IEND", b""))
    assert "0x" not in caught.value.detail


def test_an_image_without_metadata_is_passed_on_as_it_is() -> None:
    for kind, data in (("png", PNG), ("jpg", JPEG), ("webp", encoded("WEBP"))):
        assert image_parts(data, kind).pixels == data  # type: ignore[arg-type]

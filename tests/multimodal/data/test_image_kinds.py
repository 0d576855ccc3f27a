"""Odd images are read as Pillow itself reads them, upright, over white, and the first of several; none costs more than its size."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from multimodal.data.images.decode import BadImage, check_header, decode_image
from multimodal.data.images.format import ENDINGS, MAX_PARTS, MAX_SCANS, image_parts
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from multimodal.sample import Sample

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
SHADES = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
SIXTEEN = np.random.default_rng(1).integers(0, 65536, (30, 40, 3), dtype=np.uint16)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def rgb(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(SHADES).convert(mode)


def by_pillow(data: bytes) -> Image.Image:
    """What Pillow alone makes of the whole file."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def tiff16(order: str = "<") -> bytes:
    """A TIFF of 16 bits a channel in RGB, which Pillow reads and does not write."""
    tags = [(256, 3, 1, 40), (257, 3, 1, 30), (258, 3, 3, 8 + 10 * 12 + 6), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 200), (277, 3, 1, 3),
            (278, 3, 1, 30), (279, 4, 1, SIXTEEN.nbytes), (284, 3, 1, 1)]  # fmt: skip
    entries = b"".join(struct.pack(order + ("HHIHxx" if kind == 3 and n == 1 else "HHII"), tag, kind, n, value) for tag, kind, n, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4) + struct.pack(order + "HHH", 16, 16, 16)
    return head.ljust(200, b"\0") + SIXTEEN.astype(order + "u2").tobytes()


SAME: dict[str, bytes] = {
    "grey jpg": encoded(rgb("L"), "JPEG"),
    "CMYK jpg": encoded(rgb("CMYK"), "JPEG"),
    "jpg with a profile": encoded(rgb(), "JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "palette png": encoded(rgb("P"), "PNG"),
    "two colours": encoded(rgb("1"), "PNG"),
    "gif": encoded(rgb("P"), "GIF"),
    "interlaced gif": encoded(rgb("P"), "GIF", interlace=True),
    "grey gif": encoded(rgb("L"), "GIF"),
    "bmp": encoded(rgb(), "BMP"),
    "palette bmp": encoded(rgb("P"), "BMP"),
    "bmp of two colours": encoded(rgb("1"), "BMP"),
    "tiff": encoded(rgb(), "TIFF"),
    "tiff, LZW": encoded(rgb(), "TIFF", compression="tiff_lzw"),
    "tiff, deflate": encoded(rgb(), "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 2}),
    "tiff, JPEG": encoded(rgb(), "TIFF", compression="jpeg"),
    "tiff, fax": encoded(rgb("1"), "TIFF", compression="group4"),
    "tiff, PackBits": encoded(rgb("P"), "TIFF", compression="packbits"),
    "tiff, CMYK": encoded(rgb("CMYK"), "TIFF"),
    "tiff, strips": encoded(rgb(), "TIFF", strip_size=500),
    "tiff, grey": encoded(rgb("L"), "TIFF"),
    **{f"{kind}, turned {value}": encoded(rgb(), kind, exif=turned)
       for kind in ("JPEG", "PNG", "TIFF") for value in (3, 6) for turned in [Image.Exif()] if not turned.update({0x0112: value})},
}  # fmt: skip
if features.check("avif"):
    SAME |= {"avif": encoded(rgb(), "AVIF", quality=60), "avif, lossless": encoded(rgb(), "AVIF", quality=100, subsampling="4:4:4")}
    SAME |= {f"avif, turned {value}": encoded(rgb(), "AVIF", exif=exif) for value in range(1, 9) for exif in [Image.Exif()] if not exif.update({0x0112: value})}


@pytest.mark.parametrize("name", SAME)
def test_an_image_is_what_pillow_alone_makes_of_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "named.JPG"  # the name does not count
    path.write_bytes(SAME[name])
    for image in (SAME[name], path):
        assert np.array_equal(decode_image(image), by_pillow(SAME[name]))


def test_cmyk_that_adobe_wrote_inverted_shows_its_colours() -> None:
    data = SAME["CMYK jpg"]
    assert b"Adobe" in data  # Pillow writes them so too
    smooth = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    found = np.asarray(decode_image(encoded(smooth.convert("CMYK"), "JPEG", quality=95))).astype(int)
    assert np.abs(found - np.asarray(smooth)).max() < 12


def test_sixteen_bits_of_grey_and_of_colour_keep_their_high_byte() -> None:
    grey = SIXTEEN[..., 0]
    for data in (encoded(Image.fromarray(grey), "PNG"), encoded(Image.fromarray(grey), "TIFF"), encoded(Image.fromarray(grey), "TIFF", compression="tiff_lzw")):
        assert np.array_equal(np.asarray(decode_image(data))[..., 0], grey >> 8)
    for order in "<>":
        assert np.array_equal(decode_image(tiff16(order)), SIXTEEN >> 8)
    chunks = [struct.pack(">I4s", 13, b"IHDR") + struct.pack(">IIBBBBB", 40, 30, 16, 2, 0, 0, 0)]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in SIXTEEN)
    chunks += [struct.pack(">I4s", len(packed), b"IDAT") + packed for packed in [zlib.compress(rows)]] + [struct.pack(">I4s", 0, b"IEND")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunk + struct.pack(">I", zlib.crc32(chunk[4:])) for chunk in chunks)
    assert np.array_equal(decode_image(png), SIXTEEN >> 8)


def test_whole_numbers_of_32_bits_and_fractions_have_shades() -> None:
    whole = np.arange(1200, dtype=np.int32).reshape(30, 40)
    assert np.array_equal(np.asarray(decode_image(encoded(Image.fromarray(whole % 256), "TIFF")))[..., 0], whole % 256)
    assert np.array_equal(np.asarray(decode_image(encoded(Image.fromarray(whole * 50), "TIFF")))[..., 0], whole * 50 >> 8)
    part = (whole / 1199).astype(np.float32)
    assert np.array_equal(np.asarray(decode_image(encoded(Image.fromarray(part), "TIFF")))[..., 0], np.round(part.astype(np.float64) * 255))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", pytest.param("AVIF", marks=needs_avif), "GIF"])
def test_what_is_transparent_shows_white(kind: str) -> None:
    layer = Image.new("RGBA", (32, 32), (200, 0, 0, 255))
    layer.paste((0, 0, 0, 0), (0, 0, 16, 32))
    found = decode_image(encoded(layer, kind, **({"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {})))
    assert found.getpixel((4, 16)) == (255, 255, 255)
    assert np.abs(np.subtract(found.getpixel((28, 16)), (200, 0, 0))).max() < 4
    grey = Image.new("LA", (8, 8), (50, 0))
    assert decode_image(encoded(grey, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert decode_image(encoded(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", pytest.param("AVIF", marks=needs_avif)])
def test_of_an_animation_or_several_pages_the_first_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(np.subtract(decode_image(data).getpixel((8, 8)), (255, 0, 0))).max() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", pytest.param("AVIF", marks=needs_avif)])
@pytest.mark.parametrize("size", [(1, 1), (8000, 3), (2, 9000)])
def test_a_pixel_and_a_panorama_are_images(kind: str, size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size, "white"), kind)
    found = decode_image(data)
    assert (found.size, found.getpixel((0, 0)), check_header(data).width) == (size, (255, 255, 255), size[0])


def test_heic_is_read_with_pillow_heif_and_named_without_it() -> None:
    box = lambda kind, content: struct.pack(">I4s", 8 + len(content), kind) + content
    ispe = box(b"ispe", bytes(4) + struct.pack(">II", 64, 48))
    data = box(b"ftyp", b"heic" + bytes(4) + b"mif1heic") + box(b"meta", bytes(4) + box(b"iprp", box(b"ipco", ispe)))
    assert (check_header(data).kind, check_header(data).width) == ("heic", 64)
    try:
        import pillow_heif
    except ImportError:
        with pytest.raises(BadImage, match="is heic, and this Python cannot read it: install pillow-heif") as caught:
            decode_image(data)
        assert caught.value.reason == "no decoder"
        return
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.from_pillow(image).save(out, quality=95, exif=exif.tobytes())
    found = decode_image(out.getvalue())
    turned = image if found.size == image.size else image.transpose(Image.Transpose.ROTATE_270)
    assert found.size in ((64, 48), (48, 64))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(turned)).mean() < 4


# ----------------------------------------
# What would cost more than its size.


def tiff(tags: list[tuple[int, int, int, int]], more: bytes = b"") -> bytes:
    """A TIFF of 64 x 64 grey pixels with these tags in place of its own; `more` stands at byte 4096."""
    own = {256: (4, 1, 64), 257: (4, 1, 64), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, 64), 279: (4, 1, 4096)}
    own |= {tag: (kind, count, value) for tag, kind, count, value in tags}
    directory = struct.pack("<H", len(own)) + b"".join(struct.pack("<HHII", tag, *own[tag]) for tag in sorted(own)) + bytes(4)
    body = (bytes(4096 - 8) + more).ljust(8192, b"\0")
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def gif(before: bytes) -> bytes:
    data = encoded(rgb("P"), "GIF")
    at = 13 + 3 * 256
    return data[:at] + before + data[at:]


BOMBS = {
    "gif, screen": (encoded(rgb("P"), "GIF")[:6] + struct.pack("<HH", 65000, 65000) + encoded(rgb("P"), "GIF")[10:], "too many pixels"),
    "gif, frame": (lambda d: d[: d.index(b",", 781)] + b"," + struct.pack("<HHHH", 0, 0, 60000, 60000) + d[d.index(b",", 781) + 9 :], "too many pixels"),
    "gif, comment": (gif(b"!\xfe" + b"\1x" * 200_000 + b"\0"), "too many chunks"),
    "bmp": (encoded(rgb(), "BMP")[:18] + struct.pack("<ii", 60000, -60000) + encoded(rgb(), "BMP")[26:], "too many pixels"),
    "tiff, size": (tiff([(256, 4, 1, 70000), (257, 4, 1, 70000)]), "too many pixels"),
    "tiff, strips": (tiff([(273, 4, 2**20, 8)]), "too many chunks"),
    "tiff, tags": (tiff([(320, 3, 4000, 8), (347, 7, 6000, 8)]), "too many chunks"),
    "tiff, strips upon each other": (tiff([(278, 4, 1, 8), (273, 4, 8, 4096), (279, 4, 8, 4196)], (struct.pack("<I", 8) * 8).ljust(100, b"\0") + struct.pack("<I", 4000) * 8), "too many chunks"),
    "tiff, tile": (tiff([(322, 4, 1, 2**16), (323, 4, 1, 2**16)]), "too many pixels"),
    "tiff, scans": (tiff([(259, 3, 1, 7)], b"\xff\xda" * 99).replace(struct.pack("<HHII", 273, 4, 1, 8), struct.pack("<HHII", 273, 4, 1, 4096)), "too many scans"),
    "tiff, unknown packing": (tiff([(259, 3, 1, 34925)]), "corrupt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_an_image_that_would_cost_more_than_its_size_is_refused_before_it_is_decoded(name: str) -> None:
    data, reason = BOMBS[name]
    data = data(encoded(rgb("P"), "GIF")) if callable(data) else data
    tracemalloc.start()
    with pytest.raises(BadImage) as caught:
        check_header(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (caught.value.reason, peak < 2**24) == (reason, True)
    with pytest.raises(BadImage) as caught:
        decode_image(data)
    assert caught.value.reason == reason


@needs_avif
def test_an_avif_that_promises_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    data = encoded(rgb(), "AVIF")
    at = data.index(b"ispe") + 8
    with pytest.raises(BadImage, match="30000 x 30000 pixels, and the limit is") as caught:
        decode_image(data[:at] + struct.pack(">II", 30000, 30000) + data[at + 8 :])
    assert caught.value.reason == "too many pixels"


def test_the_tiff_that_the_bombs_are_made_of_is_an_image() -> None:
    assert decode_image(tiff([])).size == (64, 64)
    assert MAX_SCANS < 99
    assert MAX_PARTS < 200_000


def test_metadata_of_a_tiff_is_not_given_to_the_decoder() -> None:
    data = encoded(rgb(), "TIFF", description="x" * 9000, tiffinfo={700: b"x" * 9000})
    assert np.array_equal(decode_image(data), rgb())
    assert 700 not in Image.open(io.BytesIO(image_parts(data, "tiff").pixels)).tag_v2


@pytest.mark.parametrize("name", [name for name in SAME if name.startswith(("tiff", "avif", "gif", "bmp"))])
def test_an_image_that_is_cut_is_bad_or_lacks_no_pixel(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole, right = SAME[name], decode_image(SAME[name])
    for length in [*range(10, len(whole) - 20, max(1, len(whole) // 60)), *range(len(whole) - 20, len(whole))]:
        reason = ""
        try:
            found = decode_image(whole[:length])
        except BadImage as error:
            reason = error.reason
        assert reason in ("truncated", "not an image") or found == right
    assert capfd.readouterr() == ("", "")


def test_every_kind_is_itself_again_out_of_shards(tmp_path: Path) -> None:
    files = {name: data for name, data in SAME.items() if name in ("grey jpg", "palette png", "gif", "bmp", "tiff", "avif")}
    samples = [Sample(key=name, image_id=k, image=data, captions=("x",)) for k, (name, data) in enumerate(files.items())]
    write_shards(samples, tmp_path / "set")
    source = ShardSource(tmp_path / "set")
    assert [source[k].image for k in range(len(source))] == list(files.values())
    bare = ShardSource([(tmp_path / "set" / "shard-000000.tar").rename(tmp_path / "bare.tar")])  # without its manifest
    assert [bare[k].image for k in range(len(bare))] == list(files.values())
    assert set(ENDINGS.values()) >= {check_header(data).kind for data in files.values()}

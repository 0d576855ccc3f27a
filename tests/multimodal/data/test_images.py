from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from adalink.errors import ConfigError, DataError
from multimodal.data.images.decode import PILLOW_PIXELS, BadImage, ImageLimits, decode_image


def photo(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth image, so that JPEG keeps its colours."""
    width, height = size
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8), "RGB").convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def far(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).mean())


def outcome(data: bytes) -> str:
    try:
        decode_image(data)
    except BadImage as error:
        return error.reason
    return "decoded"


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A hand-made PNG whose header claims a size."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    whole = (header, *chunks, (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in whole)


WHOLE = {
    "jpg": encoded(photo(), "JPEG", quality=95),
    "progressive jpg": encoded(photo(), "JPEG", quality=95, progressive=True),
    "png": encoded(photo(), "PNG"),
    "webp": encoded(photo(), "WEBP", quality=95),
    "lossless webp": encoded(photo(), "WEBP", lossless=True),
    "extended webp": encoded(photo(), "WEBP", exif=b"Exif\0\0" + bytes(12)),
    "gif": encoded(photo("P"), "GIF", comment=b"a comment" * 99),
    "bmp": encoded(photo(), "BMP"),
    "tiff": encoded(photo(), "TIFF"),
    "packed tiff": encoded(photo(), "TIFF", compression="tiff_lzw"),
    "deflated tiff": encoded(photo(), "TIFF", compression="tiff_adobe_deflate"),
    **({"avif": encoded(photo(), "AVIF", quality=95)} if features.check("avif") else {}),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_each_allowed_kind_decodes_to_rgb_from_bytes_and_from_a_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "named.wrong"
    path.write_bytes(WHOLE[kind])
    for image in (WHOLE[kind], path):
        found = decode_image(image)
        assert (found.mode, found.size) == ("RGB", (40, 30))
        assert far(found, photo("P").convert("RGB") if kind == "gif" else photo()) < 3


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA"])
def test_other_kinds_are_refused_even_under_an_allowed_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(photo(), kind))
    with pytest.raises(BadImage, match=r"begins with b'.*', which is none of jpg, png, webp, gif") as caught:
        decode_image(path)
    assert caught.value.reason == "not an image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = photo() if back is None else photo().transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encoded(stored, kind, exif=exif, quality=95))
    assert found.size == (40, 30)
    assert far(found, photo()) < 3


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\x00\x02" * 4]
)
def test_damaged_exif_data_does_not_make_a_picture_bad(exif: bytes) -> None:
    assert decode_image(encoded(photo(), "JPEG", exif=exif)).size == (40, 30)


def test_damaged_exif_data_prints_nothing(tmp_path: Path) -> None:
    """In a process of its own, because pytest sets the warning filters anew."""
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    code = "import sys, pathlib, multimodal.data.images.decode as i; print(i.decode_image(pathlib.Path(sys.argv[1])).size)"
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("(40, 30)\n", "")


def test_grey_palette_bilevel_and_cmyk_pictures_show_their_colours() -> None:
    assert far(decode_image(encoded(photo("L"), "PNG")), photo("L").convert("RGB")) == 0
    assert far(decode_image(encoded(photo("1"), "PNG")), photo("1").convert("RGB")) == 0
    assert far(decode_image(encoded(photo("P"), "PNG")), photo("P").convert("RGB")) == 0
    assert far(decode_image(encoded(photo("CMYK"), "JPEG", quality=95)), photo()) < 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_pixels_show_white_and_not_the_colour_under_them(kind: str) -> None:
    layer = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    layer.paste((0, 0, 0, 0), (0, 0, 4, 8))
    found = decode_image(encoded(layer, kind, lossless=True))
    assert found.getpixel((1, 4)) == (255, 255, 255)
    assert found.getpixel((6, 4)) == (200, 0, 0)


def test_transparency_of_a_palette_and_of_grey_shows_white() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.putpixel((0, 0), 0)
    found = decode_image(encoded(palette, "PNG", transparency=0))
    assert (found.getpixel((0, 0)), found.getpixel((1, 1))) == ((255, 255, 255), (10, 200, 30))
    grey = Image.new("LA", (4, 4), (50, 255))
    grey.putpixel((0, 0), (0, 0))
    found = decode_image(encoded(grey, "PNG"))
    assert (found.getpixel((0, 0)), found.getpixel((1, 1))) == ((255, 255, 255), (50, 50, 50))


def test_a_sixteen_bit_picture_keeps_its_shades() -> None:
    shades = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    found = np.asarray(decode_image(encoded(Image.fromarray(shades), "PNG")))
    assert (found[..., 0] == shades >> 8).all()
    assert (found == found[..., :1]).all()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    found = decode_image(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert found.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_cut_picture_is_bad_at_every_length_or_lacks_no_pixel(kind: str) -> None:
    whole = WHOLE[kind]
    right = decode_image(whole)
    reasons = set()
    for length in range(1, len(whole)):
        try:
            found = decode_image(whole[:length])
        except BadImage as error:
            reasons.add(error.reason)
        else:
            assert far(found, right) == 0
            assert length > len(whole) - 24  # a check sum and an end mark alone may be absent
    assert reasons <= {"truncated", "not an image"}
    assert "truncated" in reasons


@pytest.mark.parametrize("options", [{"format": "JPEG", "quality": 90}, {"format": "PNG"}, {"format": "WEBP", "quality": 90}])
def test_a_large_cut_picture_is_bad_wherever_it_is_cut(options: dict[str, object]) -> None:
    """Large enough for several PNG chunks and for several of Pillow's reads."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8))
    out = io.BytesIO()
    noise.save(out, **options)
    whole = out.getvalue()
    assert len(whole) > 2**16
    assert decode_image(whole).size == (400, 400)
    for length in np.linspace(100, len(whole) - 100, 20).astype(int):
        with pytest.raises(BadImage, match="is truncated") as caught:
            decode_image(whole[:length])
        assert caught.value.reason == "truncated"


def test_pillow_still_refuses_truncated_files_itself() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), changed=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_damage_gives_a_picture_or_a_bad_image_and_nothing_else(kind: str, changed: list[tuple[int, int]]) -> None:
    damaged = bytearray(WHOLE[kind])
    for at, value in changed:
        damaged[at % len(damaged)] = value
    assert outcome(bytes(damaged)) in {"decoded", "not an image", "truncated", "corrupt", "too many pixels", "too many chunks", "too many scans"}


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(st.binary(max_size=200), *(st.binary(max_size=200).map(WHOLE[kind][:n].__add__) for kind in WHOLE for n in (12, 30))))
def test_any_bytes_give_a_picture_or_a_bad_image_and_nothing_else(data: bytes) -> None:
    assert outcome(data) in {"decoded", "empty file", "not an image", "truncated", "corrupt", "too many pixels", "too many chunks", "too many scans"}


def test_a_corrupt_picture_says_so() -> None:
    whole = WHOLE["png"]
    at = whole.index(b"IDAT") + 6
    with pytest.raises(BadImage, match=r"an image of .* bytes is corrupt: png of 40 x 30 pixels") as caught:
        decode_image(whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :])
    assert caught.value.reason == "corrupt"


def test_a_picture_without_a_whole_header_says_so() -> None:
    with pytest.raises(BadImage, match="begins as png, but 20 bytes hold no whole header") as caught:
        decode_image(WHOLE["png"][:20])
    assert caught.value.reason == "truncated"


BOMBS = {
    "png": png(15000, 10000, (b"IDAT", zlib.compress(bytes(1000)))),
    "jpg": WHOLE["jpg"].replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 65500, 65500)),
    "webp": WHOLE["webp"][:26] + struct.pack("<HH", 0x3FFF, 0x3FFF) + WHOLE["webp"][30:],
    "extended webp": WHOLE["extended webp"][:24] + b"\xff\xff\xff" * 2 + WHOLE["extended webp"][30:],
    "lossless webp": WHOLE["lossless webp"][:21] + b"\xff\xff\xff\x0f" + WHOLE["lossless webp"][25:],
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pixel_bomb_is_refused_without_memory_and_without_a_warning(kind: str) -> None:
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=r"\d+ x \d+ pixels, and the limit is 67108864") as caught:
            decode_image(BOMBS[kind])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason == "too many pixels"
    assert peak < 2**20


def test_the_pixel_limit_lets_through_exactly_its_own_size() -> None:
    assert decode_image(WHOLE["png"], limits=ImageLimits(max_pixels=1200)).size == (40, 30)
    with pytest.raises(BadImage, match="40 x 30 pixels, and the limit is 1199"):
        decode_image(WHOLE["png"], limits=ImageLimits(max_pixels=1199))


@pytest.mark.parametrize("size", [9_000, 60_000])
def test_a_second_frame_header_cannot_smuggle_a_larger_picture(size: int) -> None:
    """Pillow takes the last frame header before the data, this reader the first."""
    jpg = WHOLE["jpg"]
    at = jpg.index(b"\xff\xc0")
    length = 2 + struct.unpack(">H", jpg[at + 2 : at + 4])[0]
    second = bytearray(jpg[at : at + length])
    second[5:9] = struct.pack(">HH", size, size)
    with pytest.raises(BadImage, match=r"9000 x 9000 pixels|more pixels than its first header says") as caught:
        decode_image(jpg[: at + length] + bytes(second) + jpg[at + length :])
    assert caught.value.reason == "too many pixels"


def test_the_byte_limit_is_checked_for_bytes_and_for_files_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(10**12)  # a hole: reading it would not fit into memory
    for image, size in ((path, 10**12), (bytes(101), 101)):
        with pytest.raises(BadImage, match=f"has {size} bytes, and the limit is 100") as caught:
            decode_image(image, limits=ImageLimits(max_bytes=100))
        assert caught.value.reason == "too many bytes"


def test_a_missing_an_empty_and_an_unreadable_file_say_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jpg"
    empty.touch()
    cases = {
        tmp_path / "absent.jpg": ("missing file", "absent.jpg is missing"),
        empty / "below.jpg": ("missing file", "below.jpg is missing"),
        empty: ("empty file", "empty.jpg holds 0 bytes"),
        tmp_path: ("not an image", "is not a regular file"),
        Path("a\0b.jpg"): ("unreadable file", "cannot be read"),
        tmp_path / ("long" * 100): ("unreadable file", "cannot be read"),
    }
    for path, (reason, message) in cases.items():
        with pytest.raises(BadImage, match=message) as caught:
            decode_image(path)
        assert caught.value.reason == reason
    with pytest.raises(BadImage, match="holds 0 bytes"):
        decode_image(b"")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadImage, match="is not a regular file"):
        decode_image(tmp_path / "pipe.jpg")


def test_a_bad_image_is_a_data_error_and_crosses_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(BadImage("truncated", "a.jpg is truncated")))
    assert isinstance(error, DataError)
    assert (error.reason, str(error)) == ("truncated", "a.jpg is truncated")


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"max_bytes": 0}, "max_bytes is 0"), ({"max_pixels": 0}, "max_pixels is 0"), ({"max_pixels": 10**9}, "from 1 to 89478485")],
)
def test_senseless_limits_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageLimits(**limits)


def test_the_largest_pixel_limit_is_pillows_own() -> None:
    assert Image.MAX_IMAGE_PIXELS == PILLOW_PIXELS

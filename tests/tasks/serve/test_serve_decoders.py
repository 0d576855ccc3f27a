"""An image that takes too long, or whose decoder ends, is refused, and the next one is decoded."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import photo

from multimodal.data.images.decode import BadImage, ImageLimits, decode_image
from multimodal.data.images.format import MAX_SCANS
from multimodal.data.images.processes import Decoders


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def slow(side: int) -> bytes:
    """A JPEG of a kilobyte within every limit: as many scans with arithmetic coding as are admitted."""
    out = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64))
    out += segment(0xCA, struct.pack(">BHHB", 8, side, side, 3) + b"\1\x11\0\2\x11\0\3\x11\0")
    return out + b"".join(segment(0xDA, b"\3\1\0\2\0\3\0\0\0" + bytes([0x01 if number == 0 else 0x10])) + b"\0\0" for number in range(MAX_SCANS)) + b"\xff\xd9"


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    found = Decoders(2, ImageLimits(max_pixels=2**26), 0.001)  # the kernel counts whole seconds
    yield found
    found.close()


def test_an_image_is_what_it_is_without_the_process_and_a_bad_one_is_told(decoders: Decoders) -> None:
    for index in range(3):
        assert decoders.decode(photo(index)).tobytes() == decode_image(photo(index)).tobytes()
    with pytest.raises(BadImage, match="none of jpg, png, webp, gif") as caught:
        decoders.decode(b"8BPS, or so")
    assert caught.value.reason == "not an image"


def test_an_image_that_takes_too_long_is_refused_and_holds_up_nobody(decoders: Decoders) -> None:
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(decoders.decode, slow(8000))
        for _ in range(20):
            assert decoders.decode(photo(0)).size == decode_image(photo(0)).size
        error = late.exception()
    assert isinstance(error, BadImage)
    assert error.reason == "too slow"
    assert "takes more than 0.001 seconds of processor time to decode" in error.detail
    assert decoders.decode(photo(1)).size == decode_image(photo(1)).size


def test_a_decoder_that_is_killed_is_replaced(decoders: Decoders) -> None:
    decoders.decode(photo(0))
    used_last = decoders._free.queue[-1]
    assert used_last is not None
    os.kill(used_last._process.pid, signal.SIGKILL)
    used_last._process.join()
    assert decoders.decode(photo(0)).size == decode_image(photo(0)).size


def test_an_image_that_needs_too_much_memory_is_refused() -> None:
    small = Decoders(1, ImageLimits(max_pixels=2**26), 60)
    small.decode(photo(0))
    decoder = small._free.queue[-1]
    assert decoder is not None
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("the limits of another process can be set on Linux alone")
    used = int(Path(f"/proc/{decoder._process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(decoder._process.pid, resource.RLIMIT_AS, (used + 2**24, -1))
    with pytest.raises(BadImage, match=r"needs too much memory|is corrupt"):
        small.decode(slow(8000))
    assert small.decode(photo(0)).size == decode_image(photo(0)).size
    small.close()

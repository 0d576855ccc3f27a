"""Clips, decoded: the frames that are wanted of a video, and a sound as one wave; or a `BadClip` that says why not.

Video by PyAV (the extra `video`), or as a folder of numbered JPEG or PNG files, which needs no extra. Sound by soundfile and soxr (the
extra `audio`): WAV, FLAC, OGG and MP3. torchaudio is never imported. A damaged clip is refused, and no other takes its place.
"""

from __future__ import annotations

import importlib
import io
import random
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adalink.errors import ConfigError
from multimodal.data.images.decode import BadImage, ImageLimits, decode_image, read_image_bytes
from multimodal.data.images.format import image_kind
from multimodal.sample import MediaKind

__all__ = ["CLIP_ENDINGS", "BadClip", "ClipLimits", "clip_ending", "frame_numbers", "read_clip_bytes", "read_frames", "read_sound"]

CLIP_ENDINGS: dict[str, MediaKind] = {"mp4": "video", "wav": "audio", "flac": "audio"}  # of the clips that shards hold

_NUMBER = re.compile(r"(\d+)\D*$")
_MOST_CHANNELS, _LEAST_RATE = 8, 2000


class BadClip(BadImage):
    """A clip that cannot be used.

    Reasons beside those of images: no file, no video stream, no frames, too long, too many frames, gaps, mixed sizes, no samples, not finite,
    too many channels, too low a rate.
    """


@dataclass(frozen=True, kw_only=True)
class ClipLimits:
    """What a clip may cost."""

    max_bytes: int = 2**30  # of the file
    max_seconds: float = 1200.0
    max_frames: int = 36_000  # that are decoded to count them: 20 minutes of 30 a second
    max_pixels: int = 2**26  # of a frame

    def __post_init__(self) -> None:
        """Check what a program can get wrong."""
        for name in ("max_bytes", "max_seconds", "max_frames", "max_pixels"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: give more than 0")

    @property
    def of_images(self) -> ImageLimits:
        """Those of the files of frames, and of a clip's bytes."""
        return ImageLimits(max_bytes=self.max_bytes, max_pixels=self.max_pixels)


LIMITS = ClipLimits()


def clip_ending(data: bytes) -> str | None:
    """Which of CLIP_ENDINGS the bytes are, by their first; None where they are an image or anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav"
    if data[:4] == b"fLaC":
        return "flac"
    return "mp4" if data[4:8] == b"ftyp" and image_kind(data) is None else None


def read_clip_bytes(media: bytes | str | Path, *, limits: ClipLimits = LIMITS) -> bytes:
    """The encoded bytes of a clip, not decoded. Raises BadClip, also for a folder of frames."""
    try:
        return read_image_bytes(media, limits=limits.of_images)
    except BadImage as error:
        raise BadClip(error.reason.replace("not an image", "no file"), error.detail.replace("expected an image", "expected a clip")) from None


def frame_numbers(length: int, n_frames: int, draw: random.Random | None = None) -> list[int]:
    """Which of a video's `length` frames are taken: one of each of `n_frames` equal intervals of whole frames; a shorter one repeats its last frame.

    The middle of each interval, or with `draw` any of its frames. Source: eP-ALM's `video_utils.py`, whose draws leave out each last frame.
    """
    n = min(length, n_frames)
    bounds = [k * length // n for k in range(n + 1)]
    each = [(start + end - 1) // 2 if draw is None else draw.randrange(start, end) for start, end in pairwise(bounds)]
    return each + [length - 1] * (n_frames - n)


# ----------------------------------------
# Video.


def read_frames(media: bytes | str | Path, n_frames: int, draw: random.Random | None = None, *, limits: ClipLimits = LIMITS) -> NDArray[np.uint8]:
    """uint8 [n_frames, H, W, 3]: frames of a video or of a folder of them, upright, chosen as `frame_numbers` says.

    Raises BadClip, and ConfigError where a video is read without PyAV.
    """
    path = Path(media) if isinstance(media, (str, Path)) else None
    if path is not None and path.is_dir():
        return _folder_frames(path, n_frames, draw, limits)
    return _video_frames(read_clip_bytes(media, limits=limits), media, n_frames, draw, limits)


def _folder_frames(folder: Path, n_frames: int, draw: random.Random | None, limits: ClipLimits) -> NDArray[np.uint8]:
    """Of the files with a number in their names, in the numbers' order. The sizes of all are looked at, so that no draw decides whether a clip is good."""
    numbered = [(int(match[1]), path) for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png") and (match := _NUMBER.search(path.stem))]
    numbered.sort()
    if not numbered:
        raise BadClip("no frames", f"{folder} holds no numbered frame, expected files such as 0001.jpg")
    first = numbered[0][0]
    missing = next((first + k for k, (number, _) in enumerate(numbered) if number != first + k), None)
    if missing is not None:
        raise BadClip("gaps", f"{folder} holds frames from number {first} on, and number {missing} is missing or there twice: number them in a row")
    if len(numbered) > limits.max_frames:
        raise BadClip("too many frames", f"{folder} holds {len(numbered)} frames, and the limit is {limits.max_frames}")
    sizes = {_size(path) for _, path in numbered}
    if len(sizes) > 1:
        listed = " and ".join(f"{wide} x {high}" for wide, high in sorted(sizes)[:2])
        raise BadClip("mixed sizes", f"{folder} holds frames of {listed} pixels, expected one size")
    wanted = frame_numbers(len(numbered), n_frames, draw)
    frames = {number: np.asarray(decode_image(numbered[number][1], limits=limits.of_images)) for number in dict.fromkeys(wanted)}
    return np.stack([frames[number] for number in wanted])


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise BadClip("corrupt", f"the frame {path} cannot be read: {error}") from None


def _video_frames(data: bytes, media: object, n_frames: int, draw: random.Random | None, limits: ClipLimits) -> NDArray[np.uint8]:
    """One pass where the container says its number of packets truly; containers lie, so the count of a pass decides, and may ask for another."""
    av, name = _extra("av", "video"), _named(media, "a video")
    length = _guess(av, data, name, limits)
    while True:
        wanted = frame_numbers(max(length, 1), n_frames, draw and _again(draw))
        frames, n_found = _picked(av, data, name, set(wanted), limits)
        if n_found == 0:
            raise BadClip("no frames", f"{name} holds no frame")
        if n_found == length:
            return np.stack([frames[number] for number in wanted])
        length = n_found


def _again(draw: random.Random) -> random.Random:
    """A generator in the same state: each pass draws the same."""
    other = random.Random()
    other.setstate(draw.getstate())
    return other


def _guess(av: Any, data: bytes, name: str, limits: ClipLimits) -> int:
    """How many packets of video there are."""
    with _opened(av, data, name, limits) as container:
        try:
            return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
        except av.FFmpegError as error:
            raise _damaged(name, error) from None


def _picked(av: Any, data: bytes, name: str, wanted: set[int], limits: ClipLimits) -> tuple[dict[int, NDArray[np.uint8]], int]:
    """Frames by number, and how many there are: every one is decoded, none is sought."""
    found: dict[int, NDArray[np.uint8]] = {}
    number = -1
    with _opened(av, data, name, limits) as container:
        try:
            for number, frame in enumerate(container.decode(video=0)):
                if number >= limits.max_frames:
                    raise BadClip("too many frames", f"{name} has more than {limits.max_frames} frames, which is the limit: cut it")
                if number in wanted:
                    found[number] = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        except av.FFmpegError as error:
            raise _damaged(name, error) from None
    return found, number + 1


def _opened(av: Any, data: bytes, name: str, limits: ClipLimits) -> Any:
    try:
        container = av.open(io.BytesIO(data), metadata_errors="ignore")
    except (av.FFmpegError, ValueError) as error:
        raise _damaged(name, error) from None
    if not container.streams.video:
        raise BadClip("no video stream", f"{name} holds no video stream")
    context = container.streams.video[0].codec_context
    context.options = {"err_detect": "explode"}
    if context.width * context.height > limits.max_pixels:
        raise BadClip("too many pixels", f"{name} has frames of {context.width} x {context.height} pixels, and the limit is {limits.max_pixels}")
    if (container.duration or 0) > limits.max_seconds * av.time_base:
        raise BadClip("too long", f"{name} lasts {container.duration / av.time_base:.0f} seconds, and the limit is {limits.max_seconds:g}: cut it")
    return container


def _damaged(name: str, error: Exception) -> BadClip:
    return BadClip("corrupt", f"{name} is cut or damaged: {getattr(error, 'strerror', None) or error}")


# ----------------------------------------
# Sound.


def read_sound(media: bytes | str | Path, rate: int, *, limits: ClipLimits = LIMITS) -> NDArray[np.float32]:
    """float32 [samples] at `rate` samples a second: the mean of the channels, resampled where the file has another rate (announced once).

    Raises BadClip, and ConfigError where soundfile, or for another rate soxr, is not installed.
    """
    soundfile, name = _extra("soundfile", "audio"), _named(media, "a sound")
    data = read_clip_bytes(media, limits=limits)
    if (reason := _cut_wav(data)) is not None:
        raise BadClip("truncated", f"{name} is truncated: {reason}")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_sound(file, name, limits)
            wave, n_noted, own = file.read(dtype="float32", always_2d=True), file.frames, file.samplerate
    except soundfile.SoundFileError as error:
        raise _damaged(name, error) from None
    if not len(wave):
        raise BadClip("no samples", f"{name} holds 0 samples")
    if len(wave) < n_noted:
        raise BadClip("truncated", f"{name} is truncated: it holds {len(wave)} of {n_noted} samples")
    if not np.isfinite(wave).all():
        raise BadClip("not finite", f"{name} holds samples that are no numbers (NaN or infinite)")
    mono: NDArray[np.float32] = wave.mean(1)
    return mono if own == rate else _resampled(mono, own, rate)


def _check_sound(file: Any, name: str, limits: ClipLimits) -> None:
    if file.channels > _MOST_CHANNELS:
        raise BadClip("too many channels", f"{name} has {file.channels} channels, expected at most {_MOST_CHANNELS}")
    if file.samplerate < _LEAST_RATE:
        raise BadClip("too low a rate", f"{name} has {file.samplerate} samples a second, expected at least {_LEAST_RATE}")
    if file.frames > limits.max_seconds * file.samplerate:
        raise BadClip("too long", f"{name} lasts {file.frames / file.samplerate:.0f} seconds, and the limit is {limits.max_seconds:g}: cut it")


def _cut_wav(data: bytes) -> str | None:
    """Why a WAV file is cut, of which soundfile would read what there is; None where it is none, or whole."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    for name, size, start in _chunks(data):
        if name == b"data" and 0 < size < 0xFFFFFFF0 and start + size > len(data):  # a stream writes no size
            return f"it holds {len(data) - start} of {size} bytes of sound"
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        yield name, size, at + 8
        at += 8 + size + size % 2


def _resampled(wave: NDArray[np.float32], own: int, rate: int) -> NDArray[np.float32]:
    _announce(own, rate)
    made: NDArray[np.float32] = _extra("soxr", "audio").resample(wave, own, rate)
    return made


@cache
def _announce(own: int, rate: int) -> None:
    print(f"sounds of {own:,} samples a second are resampled to {rate:,}, which the encoder takes", file=sys.stderr)


# ----------------------------------------
# Both.


def _named(media: object, what: str) -> str:
    return f"{what} of {len(media)} bytes" if isinstance(media, bytes) else str(media)


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{extra} is read by the package {module}, which is not installed: pip install 'adalink[{extra}]'") from None

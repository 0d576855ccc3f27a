"""Frames of videos and folders, and sounds: what is read is what was written, and what is damaged is refused with a reason."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_clips import GREYS, frame_folder, grey_frames, mp4, sound, tone
from PIL import Image
from shared import fixtures

from adalink.errors import ConfigError
from multimodal.data.images import clips
from multimodal.data.images.clips import LIMITS, BadClip, ClipLimits, frame_numbers, read_frames, read_sound

needs_av = pytest.mark.skipif(not find_spec("av"), reason="PyAV (the extra `video`) is not installed")
needs_soundfile = pytest.mark.skipif(not find_spec("soundfile"), reason="soundfile (the extra `audio`) is not installed")


def levels(frames: Any) -> list[int]:
    """The grey level that each frame's right half has, to the nearest of those that were drawn."""
    return [min(GREYS, key=lambda level: abs(level - float(frame[:, -8:].mean()))) for frame in frames]


def refused(reason: str, words: str, media: Any, *, limits: ClipLimits = LIMITS, n: int = 4) -> None:
    with pytest.raises(BadClip, match=words) as caught:
        read_frames(media, n, limits=limits)
    assert caught.value.reason == reason


# ----------------------------------------
# Which frames.


def test_the_middle_frames_and_the_intervals_are_the_authors() -> None:
    cases = json.loads((fixtures("video_audio") / "frames_dev.json").read_text())["cases"]
    assert len(cases) > 10
    for case in cases:
        assert frame_numbers(case["length"], case["n_frames"]) == case["middle"]
        drawn = [frame_numbers(case["length"], case["n_frames"], random.Random(seed)) for seed in range(40)]
        spans = list(zip(case["interval_starts"], case["interval_ends_exclusive"], strict=True))
        for row in drawn:
            assert all(start <= number < end for number, (start, end) in zip(row, spans, strict=False))
            assert row[len(spans) :] == [case["length"] - 1] * (case["n_frames"] - len(spans))


def test_a_draw_reaches_every_frame_of_an_interval_and_is_a_function_of_its_seed() -> None:
    drawn = [frame_numbers(12, 3, random.Random(seed)) for seed in range(200)]
    assert [{row[k] for row in drawn} for k in range(3)] == [set(range(4 * k, 4 * k + 4)) for k in range(3)]
    assert frame_numbers(12, 3, random.Random(7)) == frame_numbers(12, 3, random.Random(7))


# ----------------------------------------
# Videos.


@needs_av
@pytest.mark.parametrize("n", [1, 4, 8, 37, 50])
def test_the_frames_of_an_mp4_have_the_expected_grey_levels(n: int, tmp_path: Path) -> None:
    data = mp4(grey_frames())
    (tmp_path / "a.mp4").write_bytes(data)
    expected = [GREYS[number] for number in frame_numbers(37, n)]
    assert levels(read_frames(data, n)) == levels(read_frames(tmp_path / "a.mp4", n)) == levels(read_frames(str(tmp_path / "a.mp4"), n)) == expected
    drawn = levels(read_frames(data, n, random.Random(3)))
    assert drawn == [GREYS[number] for number in frame_numbers(37, n, random.Random(3))]
    assert drawn != expected or n >= 37  # the control


@needs_av
def test_positions_are_frame_numbers_where_the_frame_rate_varies() -> None:
    times = [k if k < 30 else 30 + 50 * (k - 29) for k in range(37)]  # the last seven last half a second each
    assert levels(read_frames(mp4(grey_frames(), times=times), 4)) == [GREYS[number] for number in frame_numbers(37, 4)]


@needs_av
def test_a_count_of_packets_that_lies_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    data = mp4(grey_frames())
    expected = read_frames(data, 5)
    for wrong in (0, 3, 36, 100):
        monkeypatch.setattr(clips, "_guess", lambda *_, wrong=wrong: wrong)
        assert np.array_equal(read_frames(data, 5), expected)
        assert np.array_equal(read_frames(data, 5, random.Random(1)), read_frames(data, 5, random.Random(1)))


@needs_av
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_video_of_a_turned_phone_is_upright(turns: int) -> None:
    """The matrix of the track's header says how a player turns it; (a, b, c, d) in 16.16 fixed point."""
    data, matrix = mp4(grey_frames()), [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][turns]
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65536 for value in matrix)
    turned = data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]
    plain, found = read_frames(data, 2), read_frames(turned, 2)
    assert np.array_equal(found, np.rot90(plain, -turns, (1, 2)))  # b = 1: a quarter clockwise


@needs_av
@pytest.mark.parametrize("options", [None, {"movflags": "faststart"}])
def test_half_a_video_is_refused_and_a_whole_one_is_not(options: dict[str, str] | None) -> None:
    data = mp4([np.random.default_rng(k).integers(0, 256, (32, 48, 3), dtype=np.uint8) for k in range(37)], options=options)
    assert read_frames(data, 4).shape == (4, 32, 48, 3)
    refused("corrupt", "a video of .* bytes is cut or damaged: ", data[: len(data) // 2])
    refused("empty file", "holds 0 bytes", b"")
    refused("corrupt", "is cut or damaged", b"no video at all, but some words that are long enough to look at")


@needs_av
@needs_soundfile
def test_a_file_without_a_video_stream_is_refused() -> None:
    refused("no video stream", "holds no video stream", sound(tone(0.2), 16_000))


@needs_av
def test_the_limits_of_a_video(tmp_path: Path) -> None:
    data = mp4(grey_frames())
    (tmp_path / "a.mp4").write_bytes(data)
    refused("too many bytes", r"a\.mp4 has \d+ bytes, and the limit is 100", tmp_path / "a.mp4", limits=ClipLimits(max_bytes=100))
    refused("too many frames", "has more than 36 frames, which is the limit: cut it", data, limits=ClipLimits(max_frames=36))
    refused("too long", "lasts 1 seconds, and the limit is 1: cut it", data, limits=ClipLimits(max_seconds=1))
    refused("too many pixels", "frames of 48 x 32 pixels, and the limit is 1535", data, limits=ClipLimits(max_pixels=1535))
    assert read_frames(data, 4, limits=ClipLimits(max_frames=37, max_seconds=1.5, max_pixels=1536)).shape == (4, 32, 48, 3)
    refused("missing file", "is missing", tmp_path / "b.mp4")
    with pytest.raises(ConfigError, match="max_frames is 0: give more than 0"):
        ClipLimits(max_frames=0)


# ----------------------------------------
# Folders of frames, which need no extra.


def test_a_folder_of_numbered_frames_is_a_clip(tmp_path: Path) -> None:
    folder = frame_folder(tmp_path / "clip", grey_frames(), first=7)
    (folder / "thumbs.db").write_bytes(b"")
    assert levels(read_frames(folder, 8)) == [GREYS[number] for number in frame_numbers(37, 8)]
    assert levels(read_frames(folder, 8, random.Random(2))) == [GREYS[number] for number in frame_numbers(37, 8, random.Random(2))]
    (folder / "frame0011.png").unlink()
    refused("gaps", "holds frames from number 7 on, and number 11 is missing or there twice: number them in a row", folder)


def test_a_folder_of_frames_that_is_no_clip_is_refused(tmp_path: Path) -> None:
    refused("no frames", r"holds no numbered frame, expected files such as 0001\.jpg", tmp_path)
    folder = frame_folder(tmp_path / "clip", grey_frames([50] * 9))
    refused("too many frames", "holds 9 frames, and the limit is 8", folder, limits=ClipLimits(max_frames=8))
    Image.new("RGB", (10, 20)).save(folder / "frame0003.png")  # which is none of the frames that are taken
    refused("mixed sizes", "holds frames of 10 x 20 and 48 x 32 pixels, expected one size", folder, n=1)
    (folder / "frame0003.png").write_bytes(b"no image")
    refused("corrupt", r"the frame .*frame0003\.png cannot be read", folder)


# ----------------------------------------
# Sounds.


def unheard(reason: str, words: str, media: Any, *, limits: ClipLimits = LIMITS) -> None:
    with pytest.raises(BadClip, match=words) as caught:
        read_sound(media, 16_000, limits=limits)
    assert caught.value.reason == reason


@needs_soundfile
@pytest.mark.parametrize(("kind", "far"), [("WAV", 0.0), ("FLAC", 1e-4), ("OGG", 0.1)])
def test_a_sound_is_the_mean_of_its_channels(kind: str, far: float, tmp_path: Path) -> None:
    left, right = tone(0.5), tone(0.5, hertz=700)
    data = sound(np.stack([left, right], 1), 16_000, kind)
    (tmp_path / "a").write_bytes(data)
    expected = np.stack([left, right], 1).mean(1)
    found = read_sound(data, 16_000)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= far
    assert np.array_equal(found, read_sound(tmp_path / "a", 16_000))
    assert np.abs(found - left).max() > 0.1  # the control: not the first alone


@needs_soundfile
def test_another_rate_is_resampled_and_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("soxr")
    clips._announce.cache_clear()
    data = sound(tone(1.0, 44_100), 44_100)
    found = [read_sound(data, 16_000) for _ in range(2)][1]
    assert len(found) == 16_000
    assert np.abs(found - tone(1.0))[500:-500].max() < 1e-3
    assert capsys.readouterr().err == "sounds of 44,100 samples a second are resampled to 16,000, which the encoder takes\n"


@needs_soundfile
def test_sounds_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    whole = sound(tone(1.0), 16_000)
    unheard("truncated", r"a sound of \d+ bytes is truncated: it holds \d+ of 64000 bytes of sound", whole[: len(whole) // 2])
    flac = sound(tone(1.0), 16_000, "FLAC")
    with pytest.raises(BadClip, match=r"is truncated: it holds|is cut or damaged"):
        read_sound(flac[: len(flac) // 2], 16_000)
    unheard("no samples", "holds 0 samples", sound(np.zeros(0, np.float32), 16_000))
    unheard("not finite", r"holds samples that are no numbers \(NaN or infinite\)", sound(np.where(np.arange(900) == 5, np.nan, tone(900 / 16_000)), 16_000))
    unheard("too many channels", "has 9 channels, expected at most 8", sound(np.zeros((90, 9), np.float32), 16_000))
    unheard("too low a rate", "has 1999 samples a second, expected at least 2000", sound(tone(1.0), 1999))
    unheard("too long", "lasts 1 seconds, and the limit is 0.5: cut it", whole, limits=ClipLimits(max_seconds=0.5))
    unheard("corrupt", "is cut or damaged", b"these are words")
    unheard("empty file", "holds 0 bytes", b"")
    unheard("no file", "is not a regular file; expected a clip", tmp_path)
    assert len(read_sound(whole, 16_000)) == 16_000  # the control


# ----------------------------------------
# Extras.


@pytest.mark.parametrize(("module", "extra", "read"), [("av", "video", lambda: read_frames(b"x", 1)), ("soundfile", "audio", lambda: read_sound(b"x", 1))])
def test_a_missing_extra_is_named(module: str, extra: str, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"^{extra} is read by the package {module}, which is not installed: pip install 'adalink\[{extra}\]'$"):
        read()


def imported(program: str) -> str:
    """What a process of its own prints; it begins with `seen`, which lists who imports the packages of the extras, directly."""
    watch = (
        "import sys, importlib.abc\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('av', 'soundfile', 'soxr', 'torchaudio'):\n"
        "            frame = sys._getframe(1)\n"
        "            while 'importlib' in frame.f_code.co_filename: frame = frame.f_back\n"
        "            seen.append(name + ' by ' + frame.f_globals['__name__'].partition('.')[0])\n"
        "seen = []\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    return subprocess.run([sys.executable, "-c", watch + program], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_imports_no_extra() -> None:
    assert imported("import adalink, tasks.cli, multimodal.data.images.clips\nprint(seen)") == "[]"
    program = "import contextlib\nfrom multimodal.data.images.clips import _extra\nwith contextlib.suppress(Exception): _extra('av', 'video')\nprint(seen)"
    assert imported(program) == "['av by multimodal']"  # the control


@pytest.mark.slow
def test_composing_imports_no_extra() -> None:
    program = (
        "from tasks.runs.compose import compose\n"
        "from multimodal.template import Template\n"
        "compose('scenes:encoder', 'scenes:language', template=Template(prompt='<image>'))\n"
        "print([one for one in seen if not one.endswith('by transformers')])"  # which imports soundfile and soxr where they are installed
    )
    assert imported(program) == "[]"

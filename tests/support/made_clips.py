"""Videos and sounds made for tests: encoded by PyAV and soundfile where they are installed, or as folders of frames."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GREYS = [20 + 6 * k for k in range(37)]


def grey_frames(levels: Sequence[int] = GREYS, size: tuple[int, int] = (32, 48)) -> list[np.ndarray[Any, Any]]:
    """uint8 [H, W, 3] each, the left half a little darker, so that a turn shows."""
    frames = [np.full((*size, 3), level, np.uint8) for level in levels]
    for frame in frames:
        frame[:, : size[1] // 2] -= 10
    return frames


def mp4(frames: Sequence[np.ndarray[Any, Any]], *, times: Sequence[int] | None = None, options: dict[str, str] | None = None, gop: int = 12) -> bytes:
    """An MP4 file, nearly without loss; times: of each frame in hundredths of a second, by default four apart."""
    import av

    with tempfile.TemporaryDirectory() as folder, av.open(path := f"{folder}/a.mp4", "w", options=options or {}) as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "0", "g": str(gop)})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv444p"
        stream.codec_context.time_base = Fraction(1, 100)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = 4 * number if times is None else times[number]
            frame.time_base = Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.close()
        return Path(path).read_bytes()


def frame_folder(folder: Path, frames: Sequence[np.ndarray[Any, Any]], first: int = 1) -> Path:
    """Numbered PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(frames, first):
        Image.fromarray(pixels).save(folder / f"frame{number:04d}.png")
    return folder


def sound(wave: np.ndarray[Any, Any], rate: int, kind: str = "WAV") -> bytes:
    """[samples] or [samples, channels] as a file of this kind."""
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=kind, subtype="FLOAT" if kind == "WAV" else None)
    return out.getvalue()


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray[Any, Any]:
    """float32 [samples]"""
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)

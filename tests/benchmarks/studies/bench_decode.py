"""Decoding JPEGs for an encoder, exactly and at a fraction of their size: images a second, and how far apart the pixels are.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/studies/bench_decode.py --images FOLDER --side 224 --rounds 5 [--mosaic 3 2]

--mosaic joins so many columns and rows of small images into one JPEG (quality 90), where no large photographs are at hand. Each image is resized so that its shorter side is `side`, and cropped in the middle, as encoders do. Seconds are of the processor.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multimodal.data.inputs import needed_side, read_pixels
from multimodal.sample import Decode, Sample


@dataclass(frozen=True)
class Prepare:
    """The shorter side to `side`, the middle of it, float32 [3, side, side] from 0 to 1."""

    side: int

    def __call__(self, image: Image.Image) -> Tensor:
        scale = self.side / min(image.size)
        width, height = (max(round(length * scale), self.side) for length in image.size)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        small = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255


def encoded(files: Sequence[Path], columns: int, rows: int) -> Iterator[bytes]:
    """JPEGs: the files, or mosaics of as many of them as fill one."""
    if columns * rows == 1:
        yield from (path.read_bytes() for path in files)
        return
    for first in range(0, len(files) - columns * rows + 1, columns * rows):
        tiles = [Image.open(path).convert("RGB") for path in files[first : first + columns * rows]]
        width, height = tiles[0].size
        whole = Image.new("RGB", (columns * width, rows * height))
        for i, tile in enumerate(tiles):
            whole.paste(tile.resize((width, height)), (i % columns * width, i // columns * height))
        buffer = io.BytesIO()
        whole.save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mosaic", type=int, nargs=2, default=(1, 1))
    parser.add_argument("--limit", type=int, default=120)
    asked = parser.parse_args()
    prepare = Prepare(asked.side)
    images = list(islice(encoded(sorted(asked.images.rglob("*.jpg")), *asked.mosaic), asked.limit))
    needed_side(prepare)  # once for a run: not counted
    took: dict[Decode, list[float]] = {"exact": [], "draft": []}
    apart: list[float] = []
    how: tuple[Decode, ...] = ("exact", "draft")
    for _ in range(asked.rounds):
        seconds: Counter[str] = Counter()
        for i, data in enumerate(images):
            pixels = []
            for decode in how:
                began = time.process_time()
                pixels.append(read_pixels(Sample(key=str(i), image_id=i, image=data, decode=decode), prepare))
                seconds[decode] += time.process_time() - began
            apart.append(float((pixels[0] - pixels[1]).square().mean()))
        for decode in how:
            took[decode].append(seconds[decode])
    ratios = [exact / draft for exact, draft in zip(took["exact"], took["draft"], strict=True)]
    rates = {decode: len(images) / statistics.median(found) for decode, found in took.items()}
    shrunk = torch.tensor([noise for noise in apart if noise > 0])
    psnr = -10 * torch.log10(shrunk)
    print(f"{len(images)} images for an encoder of {asked.side}: exact {rates['exact']:.0f} a second, draft {rates['draft']:.0f}")
    print(f"draft is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    share = len(shrunk) / len(apart)
    if len(shrunk):
        worst = -10 * math.log10(float(shrunk.max()))
        print(f"{100 * share:.0f} % of the images shrink; PSNR of these to the exact ones: median {float(psnr.median()):.1f} dB, worst {worst:.1f} dB")


if __name__ == "__main__":
    main()

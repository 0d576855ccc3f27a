"""Samples per second from parquet and Arrow files beside `datasets`, and what opening a set of millions of rows takes.

    python tests/benchmarks/studies/bench_tables.py [--images 4000] [--records 40000] [--repetitions 5]
    python tests/benchmarks/studies/bench_tables.py --rows 10000000 [--folder FOLDER]
    python tests/benchmarks/studies/bench_tables.py --text_rows 1000000

The first compares reading: both read the same parquet files and decode with the same function, in the files' order and shuffled; `datasets` from the
Arrow files that it makes of them, this package from row groups in memory, or from its unpacked copy where the set is larger than those may be. Readers
take turns, and only ratios within one run mean anything. The second writes parquet files of tiny images, and opens them in a process of its own;
the third JSONL and CSV with names of images.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet as pq

from multimodal.data.images.decode import decode_image
from multimodal.data.order import SampleOrder
from tasks.data import parquet
from tasks.data.sources import DataConfig

FILES, GROUP = 4, 1000  # parquet files, and rows of a row group


def jpeg(number: int, side: int) -> bytes:
    """An image of noise, smoothed to the bytes of a photograph of its size."""
    noise = np.random.default_rng(number).integers(0, 256, size=(side // 2, side // 2, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
    return out.getvalue()


def png(number: int) -> bytes:
    """A tiny image."""
    out = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 0, 0)).save(out, "PNG")
    return out.getvalue()


def captions(number: int) -> list[str]:
    """Five, of usual length."""
    return [f"a photograph number {number} of a street with some people and a {word}" for word in ("car", "dog", "bus", "tree", "kite")]


def write(folder: Path, rows: int, images: Sequence[bytes], texts: Callable[[int], Any], files: int = FILES) -> None:
    """Parquet as the Hub has it: image {bytes, path}, and captions; the images come again and again."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    first = texts(0)
    schema = pa.schema([("image", kind), ("caption", pa.list_(pa.string()) if isinstance(first, list) else pa.string())])
    for number in range(files):
        numbers = range(rows * number // files, rows * (number + 1) // files)
        # As `datasets` writes images: neither compressed nor in a dictionary.
        options = {"use_dictionary": ["caption"], "compression": {"image.bytes": "none", "image.path": "snappy", "caption": "snappy"}}
        with pq.ParquetWriter(folder / f"train-{number:05d}-of-{files:05d}.parquet", schema, **options) as writer:
            for start in range(numbers.start, numbers.stop, 50 * GROUP):
                part = range(start, min(start + 50 * GROUP, numbers.stop))
                data = pa.array([images[k % len(images)] for k in part], pa.binary())
                column = pa.StructArray.from_arrays([data, pa.nulls(len(part), pa.string())], fields=list(kind))
                table = pa.table([column, pa.array([texts(k) for k in part], schema.field("caption").type)], schema=schema)
                writer.write_table(table, row_group_size=GROUP)


Decode = Callable[[bytes], object]


def as_image(data: bytes) -> object:
    """Decoded whole."""
    return decode_image(data)


class Ours:
    """This package's source."""

    def __init__(self, folder: Path, cache: Path, decode: Decode, *, is_unpacked: bool) -> None:
        with mock.patch.object(parquet, "HELD", 0 if is_unpacked else 2**40):
            self.source, self.decode = DataConfig(path=folder, cache=cache).open().source, decode

    def read(self, order: Iterable[int]) -> int:
        """Letters of all captions."""
        letters = 0
        for index in order:
            sample = self.source[index]
            assert isinstance(sample.image, bytes)
            self.decode(sample.image)
            letters += sum(map(len, sample.captions))
        return letters


class Datasets:
    """`datasets`, with random access to its Arrow files."""

    def __init__(self, folder: Path, cache: Path, decode: Decode) -> None:
        import datasets

        datasets.disable_progress_bars()
        loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))
        self.set, self.decode = loaded.cast_column("image", datasets.Image(decode=False)), decode

    def read(self, order: Iterable[int]) -> int:
        """Likewise."""
        letters = 0
        for index in order:
            row = self.set[index]
            self.decode(row["image"]["bytes"])
            letters += sum(map(len, row["caption"]))
        return letters


def compare(name: str, folder: Path, n: int, decode: Decode, repetitions: int) -> None:
    """Print a table: seconds a sample, and how often faster."""
    makers: Mapping[str, Callable[[], Any]] = {
        "adalink": lambda: Ours(folder / "files", folder / "ours", decode, is_unpacked=False),
        "adalink, unpacked": lambda: Ours(folder / "files", folder / "ours", decode, is_unpacked=True),
        "datasets": lambda: Datasets(folder / "files", folder / "theirs", decode),
    }  # fmt: skip
    readers, first = {}, {}
    for reader, make in makers.items():
        started = time.perf_counter()
        readers[reader] = make()
        first[reader] = time.perf_counter() - started
    again = {}
    for reader, make in makers.items():
        started = time.perf_counter()
        make()
        again[reader] = time.perf_counter() - started
    order = SampleOrder(n, 0)
    orders = {"in order": list(range(n)), "shuffled": [order.sample(position) for position in range(n)]}
    size = sum(file.stat().st_size for file in (folder / "files").iterdir()) / 2**20
    print(f"\n{name}: {n} rows, {size:.0f} MiB of parquet; opened the first time in " + ", ".join(f"{first[k]:.1f} s ({k})" for k in first), end="")
    print(", then in " + ", ".join(f"{again[k]:.2f} s ({k})" for k in again))
    print("\n| order | reader | us of CPU a sample | datasets takes so many times as long (range) |\n|---|---|---|---|")
    for kind, indices in orders.items():
        taken: dict[str, list[float]] = {reader: [] for reader in readers}
        for repetition in range(repetitions + 1):
            letters = set()
            for reader, source in readers.items():
                started = time.process_time()
                letters.add(source.read(indices))
                if repetition:  # the first warms the page cache
                    taken[reader].append((time.process_time() - started) / n * 1e6)
            assert len(letters) == 1
        for reader, own in taken.items():
            ratios = [theirs / ours for theirs, ours in zip(taken["datasets"], own, strict=True)]
            print(f"| {kind} | {reader} | {statistics.median(own):.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |", flush=True)


OPEN = """
import sys, time
from pathlib import Path
from tasks.data import parquet
from tasks.data.sources import DataConfig
def resident(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024
import pyarrow.parquet, pyarrow.compute, multimodal.sample
before, started, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
opened = DataConfig(path=sys.argv[1], images=Path(sys.argv[2]), cache=Path(sys.argv[3])).open()
wall, used = time.perf_counter() - started, time.process_time() - cpu
n = len(opened.source)
first, last = opened.source[0], opened.source[n - 1]
print(f"{n:,} samples opened in {wall:.2f} s ({used:.2f} s of CPU), {resident('VmRSS') - before:.0f} MiB more resident, at most {resident('VmHWM') - before:.0f}")
"""


def open_large(folder: Path, rows: int) -> None:
    """Print what opening takes: images in the rows, before and after they are unpacked; and names of images, two rows each."""
    embedded, names, images = folder / "embedded", folder / "names", folder / "images"
    for made in (embedded, names, images):
        made.mkdir(parents=True, exist_ok=True)
    tiny = [png(number) for number in range(64)]
    if not any(embedded.iterdir()):
        write(embedded, rows, tiny, lambda k: f"a tiny image number {k}", files=10)
    n_files = min(rows, 1000)
    for k in range(n_files):
        (images / f"{k}.png").write_bytes(tiny[k % len(tiny)])
    numbers = np.arange(rows)
    pq.write_table(pa.table({"file_name": pa.array([f"{k % n_files}.png" for k in numbers]), "caption": pa.array([f"text {k}" for k in numbers])}), names / "t.parquet")
    places = {"images in the rows, first time": embedded, "images in the rows, again": embedded, "names of images": names / "t.parquet"}
    for label, path in places.items():
        report_opening(label, path, images, folder / "cache")


def open_texts(folder: Path, rows: int) -> None:
    """Print what opening JSONL and CSV takes, two rows about each image."""
    images = folder / "images"
    images.mkdir(parents=True)
    for k in range(rows // 2):
        (images / f"{k:07d}.jpg").touch()
    pairs = [(f"{k // 2:07d}.jpg", f"a caption number {k} of an image with a few words") for k in range(rows)]
    (folder / "t.jsonl").write_text("".join(json.dumps({"image": name, "text": text}) + "\n" for name, text in pairs))
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "text"), *pairs])
    for name in ("t.jsonl", "t.csv"):
        report_opening(name, folder / name, images, folder)


def report_opening(label: str, path: Path, images: Path, cache: Path) -> None:
    """Open a data set in a process of its own."""
    done = subprocess.run([sys.executable, "-c", OPEN, path, images, cache], capture_output=True, text=True, check=True)
    print(f"{label}: {done.stdout.strip()}", flush=True)


def main() -> None:
    """Run what is asked for, in a temporary folder where none is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=4000, help="JPEGs of 256 x 256; 0: none")
    parser.add_argument("--records", type=int, default=40000, help="rows of small images, which are not decoded; 0: none")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rows", type=int, default=0, help="open so many rows, and compare nothing")
    parser.add_argument("--text_rows", type=int, default=0, help="open so many rows of JSONL and CSV, and compare nothing")
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    logging.getLogger("adalink").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        if given.rows or given.text_rows:
            open_large(folder, given.rows) if given.rows else open_texts(folder, given.text_rows)
            return
        for label, n, side, decode in (("JPEGs, decoded", given.images, 256, as_image), ("small images, not decoded", given.records, 32, len)):
            if n:
                (folder / label / "files").mkdir(parents=True)
                write(folder / label / "files", n, [jpeg(number, side) for number in range(min(n, 500))], captions)
                compare(label, folder / label, n, decode, given.repetitions)


if __name__ == "__main__":
    main()

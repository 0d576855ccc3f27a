"""Samples per second from shards: this package, plain webdataset, a plain tarfile loop, and a folder of files; and what writing costs.

    python tests/benchmarks/bench_shards.py [--images 240] [--records 20000] [--repetitions 5]

Every reader decodes with the same functions and gives the same batches of the same tensors, put together in the worker processes: this
package's as in training (`made_in_order`), webdataset's as its documentation advises (`batched`, `WebLoader`), the others' by a DataLoader.
Only ratios within one run mean anything: readers take turns, and the median of the turns is what is printed. `wall` is a whole pass, with
the start of the worker processes; `CPU` is seconds of all processes together, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import shutil
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from multimodal.data.images.decode import decode_image
from multimodal.data.order import SampleOrder
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from multimodal.data.workers import made_in_order
from multimodal.sample import Sample

SIDE = 64
Decode = Callable[[bytes], NDArray[Any]]
Json = json.loads


def as_image(data: bytes) -> NDArray[Any]:
    """uint8 [64, 64, 3] of a JPEG, decoded whole."""
    return np.asarray(decode_image(data).resize((SIDE, SIDE), Image.Resampling.NEAREST))


def as_record(data: bytes) -> NDArray[Any]:
    """float16 [4608]: six pooled features of 768, 9,216 bytes behind a header of 64."""
    return np.frombuffer(data, dtype=np.float16, offset=HEADER)


class ReadImages:
    """JPEGs of 640 x 480 with about the bytes of a photograph."""

    def __init__(self, n: int, folder: Path) -> None:
        self.n, self.folder = n, folder
        folder.mkdir(parents=True)
        for i in range(n):
            noise = np.random.default_rng(i).integers(0, 256, size=(240, 320, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=80)
            (folder / f"{i}.json").write_text(json.dumps({"key": str(i), "image_id": i, "captions": captions(i), "questions": []}))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        return Sample(key=str(index), image_id=index, image=self.folder / f"{index}.jpg", captions=captions(index))


HEADER = 64


class Records(ReadImages):
    """9 KB of features a sample. They stand where an image would, behind the first bytes of a JPEG, and are never decoded as one."""

    def __init__(self, n: int, folder: Path) -> None:
        self.n, self.folder = n, folder
        folder.mkdir(parents=True)
        out = io.BytesIO()
        Image.new("RGB", (8, 8)).save(out, format="JPEG")
        start = out.getvalue()
        at = start.index(b"\xff\xc0")
        head = (b"\xff\xd8" + start[at : at + 19]).ljust(HEADER, b"\0")
        for i in range(n):
            (folder / f"{i}.jpg").write_bytes(head + np.random.default_rng(i).normal(size=(6, 768)).astype(np.float16).tobytes())
            (folder / f"{i}.json").write_text(json.dumps({"key": str(i), "image_id": i, "captions": captions(i), "questions": []}))


def captions(index: int) -> tuple[str, ...]:
    """Five, of usual length."""
    return tuple(f"a photograph number {index} of a street with some people and a {word}" for word in ("car", "dog", "bus", "tree", "kite"))


@dataclass
class Ours:
    """Shuffled over the whole set, every sample compared with its check sum."""

    source: ShardSource
    order: SampleOrder
    decode: Decode

    def __call__(self, positions: range) -> tuple[Tensor, int]:
        return collate([self.item(self.source[self.order.sample(position)]) for position in positions])

    def item(self, sample: Sample) -> tuple[NDArray[Any], int]:
        assert isinstance(sample.image, bytes)
        return self.decode(sample.image), len(sample.captions)

    def batches(self, size: int, workers: int) -> Iterator[tuple[Tensor, int]]:
        n = len(self.source)
        return made_in_order(self, [range(at, min(at + size, n)) for at in range(0, n, size)], workers=workers)


@dataclass
class Folder(Dataset[tuple[NDArray[Any], int]]):
    """A map-style folder: each image and its texts in files of their own."""

    folder: Path
    n: int
    decode: Decode

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[NDArray[Any], int]:
        return self.decode((self.folder / f"{index}.jpg").read_bytes()), len(Json((self.folder / f"{index}.json").read_bytes())["captions"])


@dataclass
class TarLoop(IterableDataset[tuple[NDArray[Any], int]]):
    """Python's tarfile over the shards, which are split over the workers; in the order of the file."""

    shards: list[Path]
    decode: Decode

    def __iter__(self) -> Iterator[tuple[NDArray[Any], int]]:
        worker = get_worker_info()
        for path in self.shards[worker.id :: worker.num_workers] if worker else self.shards:
            parts: dict[str, bytes] = {}
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    parts[member.name.rpartition(".")[2]] = file.read()
                    if len(parts) == 2:
                        yield self.decode(parts["jpg"]), len(Json(parts["json"])["captions"])
                        parts = {}


def plain_webdataset(shards: list[Path], decode: Decode, batch_size: int, workers: int) -> Any:
    """As its documentation has it, with a buffer of 1,000 to shuffle in, and the same decoding."""

    def handler(key: str, data: bytes) -> Any:
        return decode(data) if key.endswith("jpg") else Json(data)

    dataset = wds.WebDataset([str(path) for path in shards], shardshuffle=len(shards), empty_check=False, seed=0).shuffle(1000)
    pairs = dataset.decode(handler, only=None).to_tuple("jpg", "json").map(lambda pair: (pair[0], len(pair[1]["captions"])))
    return wds.WebLoader(pairs.batched(batch_size, collation_fn=collate), batch_size=None, num_workers=workers)


def collate(items: list[tuple[NDArray[Any], int]]) -> tuple[Tensor, int]:
    """A batch."""
    return torch.from_numpy(np.stack([item for item, _ in items])), sum(count for _, count in items)


def cpu() -> float:
    """Seconds of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def one_pass(batches: Any, n: int) -> tuple[float, float]:
    """Seconds per sample, by the clock and of CPU."""
    started, clock = cpu(), time.perf_counter()
    counted = sum(len(batch) for batch, _ in batches)
    wall = time.perf_counter() - clock
    assert counted == n, (counted, n)
    return wall / n, (cpu() - started) / n


def readers_of(folder: Path, source: ReadImages, decode: Decode, batch_size: int, workers: int) -> dict[str, Callable[[], Any]]:
    """What gives the batches, by name."""
    shards = sorted((folder / "shards").glob("*.tar"))
    loader = partial(DataLoader, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    return {
        "adalink": lambda: Ours(ShardSource(folder / "shards"), SampleOrder(len(source), 0), decode).batches(batch_size, workers),
        "webdataset": lambda: plain_webdataset(shards, decode, batch_size, workers),
        "tarfile loop": lambda: loader(TarLoop(shards, decode)),
        "folder of files": lambda: loader(Folder(source.folder, len(source), decode)),
    }


def read(name: str, folder: Path, source: ReadImages, decode: Decode, batch_size: int, repetitions: int) -> None:
    """Print one table of readers for each number of workers."""
    write_shards(source, folder / "shards", samples_per_shard=len(source) // 8)
    for workers in (0, 1, 2):
        readers = readers_of(folder, source, decode, batch_size, workers)
        times: dict[str, list[tuple[float, float]]] = {reader: [] for reader in readers}
        for repetition in range(repetitions + 1):
            for reader, make in readers.items():
                found = one_pass(make(), len(source))
                if repetition:  # the first warms the page cache
                    times[reader].append(found)
        print(f"\n{name}, {workers} worker{'s' * (workers != 1)}\n\n| reader | samples/s | us of CPU a sample | adalink is faster, wall | adalink is faster, CPU |\n|---|---|---|---|---|")
        for reader, taken in times.items():
            ratios = [statistics.median(other[k] / own[k] for other, own in zip(taken, times["adalink"], strict=True)) for k in (0, 1)]
            wall, used = (statistics.median(each[k] for each in taken) for k in (0, 1))
            print(f"| {reader} | {1 / wall:.0f} | {1e6 * used:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


def share_of_state(name: str, folder: Path, decode: Decode, batch_size: int, repetitions: int) -> None:
    """Print what manifest, order and state cost, as a share of reading and decoding an epoch in one process."""
    shares = []
    for _ in range(repetitions):
        started = time.process_time()
        source = ShardSource(folder / "shards")
        order = SampleOrder(len(source), 0)
        indices = [order.sample(position) for position in range(len(source))]
        for _ in range(len(source) // batch_size):
            json.dumps({"position": 0, **order.state(), "data": source.fingerprint})
        cost = time.process_time() - started
        started = time.process_time()
        for index in indices:
            image = source[index].image
            assert isinstance(image, bytes)
            decode(image)
        shares.append(cost / (time.process_time() - started))
    print(f"\nmanifest, order and state: {100 * statistics.median(shares):.2f} % of an epoch of reading and decoding {len(indices)} {name} in one process")


def copy(source: ReadImages, out: Path, per_shard: int, hashed: Callable[[bytes], Any]) -> None:
    """Each image's bytes and its texts, into tar files by Python's tarfile, each of which reaches the disk."""
    out.mkdir()
    for start in range(0, len(source), per_shard):
        with (out / f"{start}.tar").open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for index in range(start, min(start + per_shard, len(source))):
                    for suffix in ("jpg", "json"):
                        data = (source.folder / f"{index}.{suffix}").read_bytes()
                        hashed(data)
                        info = tarfile.TarInfo(f"{index}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            file.flush()
            os.fsync(file.fileno())


def write(folder: Path, source: ReadImages, repetitions: int) -> None:
    """Print what writing costs against plain copy loops; four threads are what `adalink shards` takes."""
    per_shard = len(source) // 8
    loops: dict[str, Callable[[Path], Any]] = {
        "a plain copy loop": lambda out: copy(source, out, per_shard, len),
        "a copy loop with the manifest's check sums": lambda out: copy(source, out, per_shard, lambda data: (hashlib.sha256(data), zlib.crc32(data))),
    }
    writers: dict[str, Callable[[Path], Any]] = {f"{n} thread{'s' * (n > 1)}": lambda out, n=n: write_shards(source, out, samples_per_shard=per_shard, workers=n) for n in (1, 2, 4)}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in (*loops, *writers)}
    for repetition in range(repetitions + 1):
        for name, make in (*loops.items(), *writers.items()):
            clock, started = time.perf_counter(), cpu()
            make(folder / "written")
            if repetition:
                taken[name].append((time.perf_counter() - clock, cpu() - started))
            shutil.rmtree(folder / "written")
    print("\nWriting\n\n| writer | images/s | of the time of | wall | CPU |\n|---|---|---|---|---|")
    for name, loop in ((writer, loop) for writer in writers for loop in loops):
        wall, seconds = (statistics.median(own[k] / other[k] for own, other in zip(taken[name], taken[loop], strict=True)) for k in (0, 1))
        print(f"| {name} | {len(source) / statistics.median(own[0] for own in taken[name]):.0f} | {loop} | {wall:.2f} | {seconds:.2f} |", flush=True)


def main() -> None:
    """Run all of it in a temporary folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=240, help="0: none")
    parser.add_argument("--records", type=int, default=20000, help="0: none")
    parser.add_argument("--repetitions", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{given.images} JPEGs, {given.records} records of 9 KiB, {given.repetitions} repetitions, {os.cpu_count()} cores")
        for part in ("p", "r"):
            (folder / part).mkdir()
        if given.images:
            images = ReadImages(given.images, folder / "pictures")
            size = sum(path.stat().st_size for path in (folder / "pictures").glob("*.jpg")) / given.images
            read(f"JPEG decode ({size / 1024:.0f} KiB each)", folder / "p", images, as_image, 16, given.repetitions)
            share_of_state("pictures", folder / "p", as_image, 16, given.repetitions)
            write(folder, images, given.repetitions)
        if given.records:
            read("Small records", folder / "r", Records(given.records, folder / "records"), as_record, 64, given.repetitions)
            share_of_state("small records", folder / "r", as_record, 64, given.repetitions)


if __name__ == "__main__":
    main()

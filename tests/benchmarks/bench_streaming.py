"""Training data from a slow server beside the same data on the local disk: samples per second, and bytes that are downloaded for an epoch.

    PYTHONPATH=.:tests/support:tests/benchmarks python tests/benchmarks/bench_streaming.py [--samples 32000] [--repetitions 3]
    STREAM_WAIT=0.001 PYTHONPATH=... python tests/benchmarks/bench_streaming.py

With STREAM_WAIT a sample is not decoded, its worker process waits so many seconds: then other work on the processors decides little. The server runs in a process of its own, waits 50 ms before each answer, and sends 200 MB/s over all connections together. The cache holds 5 % of
the set. All readers decode JPEGs with one function in two worker processes and give the same batches. LitData and webdataset are measured where
they are installed: LitData reads its own format from the same server, with a downloader of its own kind (a whole chunk in one request) and its
cache bound at the same bytes; webdataset reads each shard through curl, as it does by default, and has no cache. Readers take turns; `after the
first seconds` leaves out the first tenth of the samples; only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import shutil
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_shards import collate, plain_webdataset
from PIL import Image

from multimodal.data.images.decode import decode_image
from multimodal.data.order import reading_plan
from multimodal.data.shards.ahead import Ahead
from multimodal.data.shards.order import ShardOrder
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.storage import RemoteSettings
from multimodal.data.shards.writer import write_shards
from multimodal.data.workers import made_in_order
from multimodal.sample import Sample

BATCH, WORKERS, PER_SHARD, WINDOW, DISTINCT = 4, 2, 200, 3, 100


_WAIT = float(os.environ.get("STREAM_WAIT", "0"))  # seconds in place of decoding; worker processes of all readers see it


def as_image(data: bytes) -> Any:
    """float32 [3, 224, 224] of a JPEG, as the preprocessing of a ViT makes it; with `--wait` nothing, after so long."""
    if _WAIT:
        time.sleep(_WAIT)
        return np.zeros(1, dtype=np.float32)
    image = decode_image(data).resize((224, 224), Image.Resampling.BICUBIC)
    return ((np.asarray(image, dtype=np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)


class Images:
    """JPEGs of 160 x 120, of which a hundred differ."""

    def __init__(self, n: int) -> None:
        self.n, self.files = n, [self.drawn(number) for number in range(DISTINCT)]

    def drawn(self, number: int) -> bytes:
        out = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, size=(60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC).save(out, format="JPEG", quality=80)
        return out.getvalue()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        return Sample(key=str(index), image_id=index, image=self.files[index % DISTINCT], captions=(f"image {index}",))


# ----------------------------------------
# The server, in a process of its own.


def serve(folder: Path, latency: float, rate: float, pipe: Connection) -> None:
    """Gives its URL, then the bytes that it has sent, each time it is asked."""
    from bad_server import served

    with served(folder) as server:
        server.latency, server.rate = latency, rate
        pipe.send(server.url)
        while pipe.recv():
            pipe.send(sum(server.sent.values()))


@dataclass
class Served:
    """The server, as its client sees it."""

    url: str
    pipe: Connection

    def sent(self) -> int:
        """Bytes since its start."""
        self.pipe.send(True)
        return int(self.pipe.recv())


@contextlib.contextmanager
def serving(folder: Path, latency: float, rate: float) -> Iterator[Served]:
    """In a block."""
    context = get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=serve, args=(folder, latency, rate, other), daemon=True)
    process.start()
    try:
        yield Served(own.recv(), own)
    finally:
        process.terminate()
        process.join()


# ----------------------------------------
# Readers: each gives the number of images of one batch after the other, for so many epochs.


@dataclass
class Ours:
    """Windows of shards, each sample compared with its check sum."""

    source: ShardSource
    order: ShardOrder
    ahead: Ahead | None

    def __call__(self, positions: range) -> tuple[torch.Tensor, int]:
        return collate([self.item(position) for position in positions])

    def item(self, position: int) -> tuple[Any, int]:
        if self.ahead is not None:
            self.ahead.at(position)
        sample = self.source[self.order.sample(position)]
        assert isinstance(sample.image, bytes)
        return as_image(sample.image), len(sample.captions)


def ours(place: Path | str, remote: RemoteSettings, epochs: int) -> Iterator[int]:
    """This package."""
    source = ShardSource(place, remote=remote)
    order = ShardOrder(source.shard_sizes, WINDOW, 0)
    plan = reading_plan(order)[0]
    assert plan is not None
    end = epochs * len(source)
    steps = [range(at, min(at + BATCH, end)) for at in range(0, end, BATCH)]
    for images, _ in made_in_order(Ours(source, order, source.follow(plan)), steps, workers=WORKERS):
        yield len(images)


def webdataset(places: list[str], epochs: int) -> Iterator[int]:
    """Shards in a drawn order, each streamed, and a buffer of 1,000 samples to shuffle in."""
    for _ in range(epochs):
        for images, _ in plain_webdataset(places, as_image, BATCH, WORKERS):  # type: ignore[arg-type]
            yield len(images)


def litdata(place: str, cache: Path, most: int, epochs: int) -> Iterator[int]:
    """Its streaming data set, shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader
    from litdata.streaming.resolver import Dir

    class Http(downloader.Downloader):
        def download_file(self, remote: str, local: str) -> None:
            os.makedirs(os.path.dirname(local), exist_ok=True)
            if not os.path.exists(local):
                temporary = self._temp_download_path(local)
                with urllib.request.urlopen(remote) as answer, open(temporary, "wb") as file:
                    shutil.copyfileobj(answer, file, 2**20)
                self._publish_file(temporary, local)

    downloader.register_downloader("http://", Http, overwrite=True)

    def decoded(row: dict[str, Any]) -> tuple[Any, int]:
        return as_image(row["image"]), 1

    data = StreamingDataset(Dir(path=str(cache), url=place), shuffle=True, seed=0, max_cache_size=most, transform=decoded)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=WORKERS, collate_fn=collate)
    for _ in range(epochs):
        for images, _ in loader:
            yield len(images)


def write_litdata(images: Images, out: Path) -> None:
    """Chunks of the size of a shard."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(out), chunk_size=PER_SHARD)
    for number in range(len(images)):
        writer[number] = {"image": images[number].image}
    writer.done()
    writer.merge()


# ----------------------------------------
# The measurement.


@dataclass(frozen=True)
class Passed:
    """rate: samples per second after the first tenth; epochs: bytes that the server sent in each."""

    rate: float
    epochs: tuple[int, ...]
    first: float  # seconds to the first batch


def measured(batches: Iterator[int], samples: int, epochs: int, sent: Callable[[], int]) -> Passed:
    """One pass of so many epochs."""
    started, done, after, marks = time.perf_counter(), 0, 0.0, [sent()]
    first = 0.0
    for n in batches:
        done += n
        first = first or time.perf_counter() - started
        if not after and done >= samples // 10:
            after, skipped = time.perf_counter(), done
        if done >= samples * len(marks):
            marks.append(sent())
    assert done == samples * epochs, (done, samples, epochs)
    return Passed((done - skipped) / (time.perf_counter() - after), tuple(b - a for a, b in itertools.pairwise(marks)), first)


def run(given: argparse.Namespace, folder: Path) -> None:
    """Print one table."""
    images = Images(given.samples)
    write_shards(images, folder / "web" / "set", samples_per_shard=PER_SHARD)
    size = sum(path.stat().st_size for path in (folder / "web" / "set").iterdir())
    most = int(0.05 * size)
    with serving(folder / "web", given.latency, given.rate) as server:
        cache, names = folder / "cache", sorted(path.name for path in (folder / "web" / "set").glob("*.tar"))
        remote = RemoteSettings(cache=cache, cache_bytes=most)
        readers: dict[str, Callable[[], Iterator[int]]] = {
            "adalink, local disk": partial(ours, folder / "web" / "set", RemoteSettings(), given.epochs),
            "adalink, server": partial(ours, f"{server.url}/set", remote, given.epochs),
            "webdataset, server": partial(webdataset, [f"{server.url}/set/{name}" for name in names], given.epochs),
        }
        with contextlib.suppress(ImportError):
            write_litdata(images, folder / "web" / "lit")
            readers["LitData, server"] = partial(litdata, f"{server.url}/lit", cache, most, given.epochs)
        chosen = [name for name in readers if "local" in name or not given.readers or any(part in name for part in given.readers)]
        readers = {name: readers[name] for name in chosen}
        found: dict[str, list[Passed]] = {name: [] for name in readers}
        for _ in range(given.repetitions):
            for name, reader in readers.items():
                shutil.rmtree(cache, ignore_errors=True)
                found[name].append(measured(reader(), len(images), given.epochs, server.sent))
                print(f"# {name}: {found[name][-1]}", flush=True)
    print(f"\n{len(names)} shards of {PER_SHARD} samples, {size / 1e6:.0f} MB, cache of {most / 1e6:.1f} MB, windows of {WINDOW} shards\n")
    print("| reader | samples/s | of the local disk | bytes sent for each epoch, of the set | seconds to the first batch |\n|---|---|---|---|---|")
    for name, passes in found.items():
        ratio = statistics.median(one.rate / local.rate for one, local in zip(passes, found["adalink, local disk"], strict=True))
        share = ", ".join(f"{statistics.median(one.epochs[k] for one in passes) / size:.3f}" for k in range(len(passes[0].epochs)))
        rate, first = (statistics.median(getattr(one, field) for one in passes) for field in ("rate", "first"))
        print(f"| {name} | {rate:.0f} | {ratio:.2f} | {share} | {first:.1f} |")


def main() -> None:
    """Run all of it in a temporary folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=32000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--readers", nargs="*", default=[], help="parts of the names of some; none: all")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--rate", type=float, default=200e6, help="bytes per second")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        run(parser.parse_args(), Path(name))


if __name__ == "__main__":
    main()

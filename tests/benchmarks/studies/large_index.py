"""What opening a set of a hundred million samples takes: 100,000 shards of 1,000 samples, of zeros, which take no room on the disk; 9 GB of indexes.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/studies/large_index.py --folder /tmp/large [--shards 100000] [--samples 1000] [--workers 8]

Each part runs in a process of its own: `opening` (seconds of a core, of the clock to the first sample, memory), `finding` (a position of an
epoch to its sample's place), `workers` (memory of every process while worker processes read samples in the order of shards), and `first form`,
the opening of a manifest that holds all places, of a hundredth of the shards. The folder is removed at the end; with --keep it is used again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.data.order import order_of
from multimodal.data.shards.manifest import Manifest, read_manifest, write_manifest
from multimodal.data.shards.members import LocalFolder, Members, Row, Shard, ShardTable, encode_index, index_name
from multimodal.data.shards.reader import ShardSource
from multimodal.data.workers import made_in_order

IMAGE, TEXT, BLOCK = 100_000, 60, 512  # bytes of an image, of a text, and of a tar header


def table_of(samples: int) -> np.ndarray:
    """int64 [samples, 3, 3]: where image and txt of each sample lie, all of them zeros."""
    whole = [BLOCK * (1 + -(-size // BLOCK)) for size in (IMAGE, TEXT)]  # with header and padding
    starts = np.arange(samples, dtype=np.int64) * sum(whole)
    table = np.full((samples, 3, 3), -1, dtype=np.int64)
    for part, before, size in ((0, 0, IMAGE), (2, whole[0], TEXT)):
        table[:, part, 0] = starts + before + BLOCK
        table[:, part, 1:] = size, zlib.crc32(bytes(size))
    return table


def make(folder: Path, shards: int, samples: int) -> None:
    """Shards that are holes of the right size, with their indexes and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    table, ends = table_of(samples), np.arange(1, samples + 1) * 10
    size = int(table[-1, 2, 0]) + 2 * BLOCK
    rows: list[Row] = []
    for number in range(shards):
        name, digest = f"shard-{number:06d}.tar", hashlib.sha256(str(number).encode()).hexdigest()
        with (folder / name).open("wb") as file:
            file.truncate(size)
        keys = b"".join([b"%010d" % each for each in range(number * samples, (number + 1) * samples)])
        index = encode_index(Shard(file=name, size=size, sha256=digest, members=Members.of(keys, ends, table)))
        (folder / index_name(name)).write_bytes(index)
        rows.append((name, size, digest, samples, hashlib.sha256(index).hexdigest(), (IMAGE, TEXT)))
    write_manifest(Manifest(shards=ShardTable.of_rows(rows, LocalFolder(folder))), folder)


def memory(process: int | str = "self") -> dict[str, float]:
    """MiB: resident, its share of what processes share, and its own."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {"resident": values["Rss"], "share": values["Pss"], "own": values["Private_Clean"] + values["Private_Dirty"]}


def opening(folder: Path) -> dict[str, float]:
    """One process that opens the set and reads one sample."""
    before, clock, begun = memory()["resident"], time.perf_counter(), time.process_time()
    source = ShardSource(folder)
    opened, core = time.perf_counter() - clock, time.process_time() - begun
    source[len(source) * 2 // 3]
    first = {"first sample": time.perf_counter() - clock, "first sample, core": time.process_time() - begun}
    now = memory()["resident"]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"core seconds": core, "seconds": opened, **first, "MiB before": before, "MiB": now, "MiB at most": most, "samples": len(source)}


def finding(folder: Path, window: int, tries: int = 2000) -> dict[str, float]:
    """Milliseconds of a core from a position to its sample's shard and place, in the order of shards: of one epoch, and each of another."""
    source = ShardSource(folder)
    order = order_of(source, 0, (window,))
    draws = np.random.default_rng(0)
    found: dict[str, float] = {}
    for name, epochs in (("one epoch", np.full(tries, 3)), ("any epoch", draws.integers(0, 1000, tries))):
        taken = []
        for position in (epochs * len(source) + draws.integers(0, len(source), tries)).tolist():
            start = time.thread_time()
            source.shard_of(order.sample(position))
            taken.append(1000 * (time.thread_time() - start))
        found |= {f"{name}, median": float(np.median(taken)), f"{name}, 99 %": float(np.quantile(taken, 0.99)), f"{name}, most": max(taken)}
    return found


@dataclass
class Reading:
    """Reads samples at positions, and says which process did and what memory it takes."""

    folder: Path
    window: int

    def __post_init__(self) -> None:
        self.source = ShardSource(self.folder)
        self.order = order_of(self.source, 0, (self.window,))

    def __call__(self, positions: range) -> tuple[int, dict[str, float], int]:
        return os.getpid(), memory(), sum(len(self.source[self.order.sample(position)].captions) for position in positions)


def workers(folder: Path, window: int, n_workers: int, batches: int = 400) -> dict[str, object]:
    """MiB of the process that trains, and of its worker processes, after each has read its part of batches of 64 samples."""
    import torch

    torch.set_num_threads(1)
    bare = memory()
    reading = Reading(folder, window)
    last: dict[int, dict[str, float]] = {}
    tasks = [range(at, at + 64) for at in range(0, 64 * batches, 64)]
    read = 0
    for process, used, count in made_in_order(reading, tasks, workers=n_workers):
        last[process], read = used, read + count
    rates = {name: max(each[name] for each in last.values()) for name in ("resident", "share", "own")}
    return {"bare": bare, "trainer": memory(), "workers": len(last), "most of a worker": rates, "samples": read}


def first_form(folder: Path, shards: int) -> int:
    """Gives the first so many shards, in a folder of their own, a manifest of the first form."""
    older = folder / "older"
    shutil.rmtree(older, ignore_errors=True)
    older.mkdir()
    lines = []
    for shard in read_manifest(folder).table.chosen(range(shards)):
        os.link(folder / shard.file, older / shard.file)
        members = shard.members.table
        columns = {part: members[:, at].ravel().tolist() for at, part in ((0, "image"), (2, "txt"))}
        line = {"file": shard.file, "bytes": shard.size, "sha256": shard.sha256, "samples": len(shard.members)}
        lines.append(line | {"keys": list(shard.members.all_keys())} | columns)
    head = {"format": "adalink shards 1", "samples": sum(line["samples"] for line in lines), "skipped": [], "ignored": {}}
    return (older / "manifest.json").write_text(json.dumps(head | {"shards": lines}))


def apart(name: str, *arguments: object) -> Any:
    """What a function of this file gives, in a process of its own that has imported nothing else."""
    code = f"import json, sys; from pathlib import Path; import large_index as here; print(json.dumps(here.{name}{arguments!r}))"
    code = code.replace("PosixPath", "Path")
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '.')}:{Path(__file__).parent}"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def measured(folder: Path, shards: int, samples: int, *, window: int, n_workers: int) -> dict[str, dict[str, float]]:
    """All parts."""
    if not (folder / "manifest.json").exists():
        with multiprocessing.get_context("fork").Pool(1) as pool:
            pool.apply(make, (folder, shards, samples))
    apart("first_form", folder, max(1, shards // 100))
    apart("opening", folder)  # warms the disk's cache
    return {
        "opening": apart("opening", folder),
        "finding": apart("finding", folder, window),
        "workers": apart("workers", folder, window, n_workers),
        "first form": apart("opening", folder / "older"),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--keep", action="store_true")
    values = parser.parse_args(given)
    try:
        for name, found in measured(values.folder, values.shards, values.samples, window=values.window, n_workers=values.workers).items():
            print(f"{name}: {json.dumps(found)}")
    finally:
        shutil.rmtree(values.folder / "older", ignore_errors=True)
        if not values.keep:
            shutil.rmtree(values.folder, ignore_errors=True)


if __name__ == "__main__":
    main()

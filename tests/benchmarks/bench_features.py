"""Microseconds of processor time to read the features of one image in random order: this package's files, a memory map, safetensors, .npy files, webdataset.

    python tests/benchmarks/bench_features.py [--records 2000] [--repetitions 9]

Every reader gives a tensor in memory of its own; ours compares each record with its check sum, the others compare nothing. webdataset reads in
the order of its files, which is what it can. Readers take turns, with the page cache warm. Only ratios within one run mean anything: median
over the turns of other / ours; the least time of a turn is what the machine does when nobody else runs on it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from safetensors import safe_open
from torch import Tensor

import multimodal  # noqa: F401  (makes torchvision importable)
from multimodal.data.feature_cache.format import Contents
from multimodal.data.feature_cache.reader import Binding, FeatureCache, Sketch
from multimodal.data.feature_cache.writer import SHARD_BYTES, FeatureWriter

SHAPES = {"six pooled vectors of 768": (0, 6, 768), "50 patches of 768": (50, 0, 768), "257 patches of 1024": (257, 0, 1024)}

Reader = Callable[[list[int]], Iterator[Tensor]]


def readers(folder: Path, contents: Contents, n: int) -> dict[str, Reader]:
    """Name -> what reads these records, each in its own format."""
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(n, *contents.shape)).astype(np.float16))
    sketch = Sketch((1,), (0.0,))
    bound = {"encoder": "", "fingerprint": "", "precision": "", "layer": -1, "pixels": sketch, "features": sketch, "pictures": n, "data": ""}
    writer = FeatureWriter(folder / "ours", Binding(**bound), contents)  # type: ignore[arg-type]
    writer.add(list(range(n)), values)
    cache = writer.finish({})
    writer.close()
    (folder / "npy").mkdir()
    (folder / "wds").mkdir()
    values.numpy().tofile(folder / "map")
    with wds.TarWriter(str(folder / "wds" / "0.tar")) as tar:
        for i in range(n):
            np.save(folder / "npy" / f"{i}.npy", values[i].numpy())
            tar.write({"__key__": str(i), "bin": values[i].numpy().tobytes()})
    mapped = np.memmap(folder / "map", dtype=np.float16, mode="r", shape=(n, *contents.shape))
    path = sorted((folder / "ours").glob("*.safetensors"))[0]  # the only one, where all records fit
    sliced = safe_open(path, "pt").__enter__().get_slice("features")  # type: ignore[no-untyped-call]

    def in_order(order: list[int]) -> Iterator[Tensor]:
        for sample in wds.WebDataset([str(folder / "wds" / "0.tar")], shardshuffle=False, empty_check=False):
            yield torch.from_numpy(np.frombuffer(sample["bin"], dtype=np.float16).reshape(contents.shape).copy())

    assert isinstance(cache, FeatureCache)
    return {
        "adalink, checked": lambda order: (cache[i] for i in order),  # type: ignore[misc]
        "numpy memory map, copied": lambda order: (torch.from_numpy(np.array(mapped[i])) for i in order),
        "safetensors slice": lambda order: (sliced[i].clone() for i in order),
        ".npy files": lambda order: (torch.from_numpy(np.load(folder / "npy" / f"{i}.npy")) for i in order),
        "webdataset, raw, in order": in_order,
    }


def one_turn(reader: Reader, order: list[int]) -> float:
    """Microseconds of processor time a record; all files are in the page cache, so that nothing else is waited for."""
    started = time.process_time()
    counted = sum(1 for _ in reader(order))
    taken = time.process_time() - started
    assert counted == len(order)
    return taken / counted * 1e6


def measure(name: str, shape: tuple[int, int, int], records: int, repetitions: int) -> None:
    """Print one table."""
    contents = Contents(patches=shape[0], pooled=shape[1], width=shape[2])
    n = min(records, SHARD_BYTES // contents.n_bytes)
    with tempfile.TemporaryDirectory() as folder:
        found = readers(Path(folder), contents, n)
        taken: dict[str, list[float]] = {reader: [] for reader in found}
        for repetition in range(repetitions + 1):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(repetition)).tolist()
            for reader, read in found.items():
                taken_now = one_turn(read, order)
                if repetition:  # the first warms the page cache
                    taken[reader].append(taken_now)
    own = taken["adalink, checked"]
    print(f"\n{name}: {contents.n_bytes:,} bytes\n\n| reader | us of CPU a record, median | least | adalink is faster |\n|---|---|---|---|")
    for reader, times in taken.items():
        ratio = statistics.median(other / ours for other, ours in zip(times, own, strict=True))
        print(f"| {reader} | {statistics.median(times):.0f} | {min(times):.0f} | {ratio:.2f} |", flush=True)


def main(arguments: Any = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--repetitions", type=int, default=9)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        measure(name, shape, given.records, given.repetitions)


if __name__ == "__main__":
    main()

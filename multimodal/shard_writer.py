"""Samples into webdataset tar files with a manifest: pictures as they are, not encoded again, and all texts of a picture as JSON.

Each shard holds a fixed range of the source, so that shards can be written side by side, and a killed writing can go on with the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from adalink.errors import ConfigError, DataError
from multimodal.bad_samples import BadSample, BadSamples
from multimodal.manifest import Manifest, Shard, find_twice
from multimodal.sample import SampleSource
from multimodal.shard_folder import publish, workplace
from multimodal.shard_job import ShardJob, Stopped, WrittenShard

__all__ = ["write_shards"]


def write_shards(
    source: SampleSource,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    prefix: str = "shard",
    budget: int = 0,
    skipped: Sequence[BadSample] = (),
    workers: int = 4,
) -> Manifest:
    """Writes `out/PREFIX-000000.tar` and so on, and `out/manifest.json`; the same source gives the same bytes.

    samples_per_shard   images in a shard, less those that are bad
    budget              how many pictures may be unusable (missing, no picture by content, over the limits) before the writing stops.
                        Pictures are not decoded here: damage inside one shows when it is read
    skipped             what the source itself left out; it counts against the budget and stands in the manifest with the rest
    workers             threads that write shards side by side: check sums and disk are waited for together

    Raises ConfigError on an argument, and where `out` holds anything but a writing of ours that was killed, which goes on where it ended;
    BudgetError, and DataError where two samples have one key or the disk is full: nothing is then left in `out`.
    """
    if samples_per_shard < 1 or workers < 1:
        raise ConfigError(f"samples_per_shard is {samples_per_shard} and workers {workers}; both must be at least 1")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", prefix):
        raise ConfigError(f"the prefix {prefix!r} cannot begin the shards' file names; use letters, digits, '-' and '_'")
    bad = BadSamples(budget=budget, found=skipped)
    ranges = [range(at, min(at + samples_per_shard, len(source))) for at in range(0, len(source), samples_per_shard)]
    with workplace(out) as work, tqdm(total=len(source), unit="image", desc="shards", disable=None) as bar:
        bad.check()
        written = _write_all(ShardJob(source, work, bad, bar.update), ranges, workers)
        shards = tuple(one.shard for one in written if len(one.shard.members))
        _check_keys(shards, out)
        left_out = (*skipped, *(sample for one in written for sample in one.skipped))
        return publish(out, Manifest(shards=shards, skipped=left_out), prefix)


def _write_all(job: ShardJob, ranges: Sequence[range], workers: int) -> list[WrittenShard]:
    """The shards in order; the first that fails stops the others at their next sample, and its error is raised."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(job.write, number, indices) for number, indices in enumerate(ranges)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            job.stopped.set()
            pool.shutdown(cancel_futures=True)
    failed = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, Stopped)):  # those that failed of themselves first
        raise error
    return [future.result() for future in futures]


def _check_keys(shards: Sequence[Shard], out: Path) -> None:
    if not shards:
        raise DataError(f"there is no sample to write to {out}")
    twice = find_twice(shards)
    if twice is not None:
        raise DataError(f"two samples have the key {twice[0]!r}; a data set's keys must be unique")

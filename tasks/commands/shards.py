"""`adalink shards ...`: write any data set as shards or as parquet, index shards that exist, and check a set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adalink.errors import ConfigError, DataError
from tasks.commands import Command
from tasks.commands.settings import add_data_set, data_set_of

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from multimodal.data.shards.manifest import Manifest
    from multimodal.sample import BadSample
    from tasks.data.arrow.write import WrittenParquet
    from tasks.data.sources import DataConfig, Opened

__all__ = ["CHECK", "FROM", "IMG2DATASET", "PLAN", "TO", "shards_check", "shards_from", "shards_img2dataset", "shards_to"]

_FAULTS_DISPLAYED = 10


def shards_from(data: DataConfig, *, out: Path, samples_per_shard: int = 1000, bad_samples: int = 0, workers: int = 4) -> Manifest:
    """Write any data set as webdataset shards: images byte for byte as they are, one with all its texts.

    out          a new or empty folder
    bad_samples  how many may be unusable before the command stops
    workers      shards written at a time

    Raises BudgetError, and DataError and ConfigError as opening does.
    """
    from multimodal.data.shards.writer import write_shards

    opened = _opened(data)
    manifest = write_shards(opened.source, out, samples_per_shard=samples_per_shard, budget=bad_samples, skipped=opened.problems, workers=workers)
    _report("wrote", manifest, out)
    return manifest


def shards_to(data: DataConfig, *, out: Path, samples_per_file: int = 10_000, bad_samples: int = 0) -> WrittenParquet:
    """Write any data set, shards too, as parquet that `datasets` loads: images byte for byte as they are, and all texts.

    out  a name that ends in .parquet, or a new or empty folder

    Raises BudgetError, and DataError and ConfigError as opening does.
    """
    from multimodal.sample import counted
    from tasks.data.arrow.write import write_parquet

    opened = _opened(data)
    written = write_parquet(opened.source, out, samples_per_file=samples_per_file, budget=bad_samples, skipped=opened.problems)
    size = written.size / 2**20
    print(f"wrote {counted(len(written.files), 'parquet file')} with {counted(written.samples, 'image')} ({size:.1f} MiB) in {out}")
    _report_skipped(written.skipped)
    return written


def shards_img2dataset(*, shards: Path, bad_samples: int = 0) -> Manifest:
    """Index webdataset shards that exist, such as img2dataset's, by writing a manifest beside them.

    Raises ConfigError where there is a manifest already, DataError where the shards hold no sample.

    Args:
        shards: The folder of tar files.
        bad_samples: How many samples may lack an image or a text, or be too large, before the command stops.
    """
    from multimodal.data.shards.check import index_folder
    from multimodal.data.shards.manifest import MANIFEST

    if (shards / MANIFEST).exists():
        raise ConfigError(f"{shards / MANIFEST} is there already; run `adalink shards check`, or delete it to index the shards again")
    manifest = index_folder(shards, budget=bad_samples)
    _report("indexed", manifest, shards)
    return manifest


def shards_check(*, shards: Path, upgrade: bool = False) -> None:
    """Check every byte of a set of shards against its manifest and its indexes.

    Raises DataError with what is wrong.

    Args:
        shards: The folder of tar files with its manifest.json.
        upgrade: First write the indexes that an older version's set does not have, and those that are missing or damaged. Runs go on with the set.
    """
    from multimodal.data.shards.check import verify_shards, write_indexes
    from multimodal.sample import counted

    if upgrade:
        print(f"wrote {counted(write_indexes(shards), 'index', 'indexes')} in {shards}")
    faults = verify_shards(shards)
    if faults:
        displayed = "; ".join(fault.detail for fault in faults[:_FAULTS_DISPLAYED])
        more = f"; and {len(faults) - _FAULTS_DISPLAYED} more" if len(faults) > _FAULTS_DISPLAYED else ""
        wrong = "1 thing is" if len(faults) == 1 else f"{len(faults)} things are"
        raise DataError(f"{wrong} wrong with the shards in {shards}: {displayed}{more}")
    print(f"the shards in {shards} are what their manifest says")


def _opened(data: DataConfig) -> Opened:
    """The data set, to be read from its first sample to its last; what was understood is printed."""
    opened = data.open(in_order=True)
    if opened.sentence:
        print(opened.sentence)
    return opened


def _report(verb: str, manifest: Manifest, folder: Path) -> None:
    size = int(manifest.table.rows["size"].sum()) / 2**20
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards)} shards"
    images = "1 image" if len(manifest) == 1 else f"{len(manifest)} images"
    print(f"{verb} {shards} with {images} ({size:.1f} MiB) in {folder}")
    _report_skipped(manifest.skipped)
    if manifest.ignored:
        print("members that no sample uses: " + ", ".join(f"{count} .{suffix}" for suffix, count in sorted(manifest.ignored.items())))


def _report_skipped(skipped: Sequence[BadSample]) -> None:
    from multimodal.sample import BadSamples

    if skipped:
        print(f"skipped: {BadSamples(budget=0, found=skipped).summary()}")


_WITHOUT = ("shards", "mix", "cache", "cache_gib", "scenes")  # of a data set's settings


def _add_data(parser: Any, out: str) -> None:
    add_data_set(parser, _WITHOUT)
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--bad_samples", type=int, default=0, help="how many images may be missing or unusable before the command stops")


def _add_from(parser: Any) -> None:
    _add_data(parser, "a new or empty folder")
    parser.add_argument("--samples_per_shard", type=int, default=1000, help="images in one shard")
    parser.add_argument("--workers", type=int, default=4, help="shards written at a time")


def _add_to(parser: Any) -> None:
    _add_data(parser, "a file that ends in .parquet, or a new or empty folder")
    parser.add_argument("--samples_per_file", type=int, default=10_000, help="images in one file of a folder")


def _from(values: Any, plain: Any) -> None:
    writing = {name: values[name] for name in ("out", "samples_per_shard", "bad_samples", "workers")}
    shards_from(data_set_of(values, _WITHOUT), **writing)


def _to(values: Any, plain: Any) -> None:
    writing = {name: values[name] for name in ("out", "samples_per_file", "bad_samples")}
    shards_to(data_set_of(values, _WITHOUT), **writing)


_NUMBERS = {  # of a plan, with units
    "samples": ("samples", None, "images of the set, such as 400M"),
    "bytes": ("sample_bytes", "100KB", "mean size of a sample, image and texts"),
    "bandwidth": ("bandwidth", "1.25GB/s", "from the store to each machine, in a second"),
    "disk": ("disk", "2GB/s", "of each machine, reading and writing together, in a second"),
    "rate": ("rate", "inf", "images that a rank trains in a second; inf: not known"),
    "decode": ("decode", "100", "images that a worker process decodes in a second"),
}
_COUNTS = {
    "samples_per_shard": (1000, "images in one shard"),
    "ranks": (8, "processes that train"),
    "ranks_per_node": (8, "of them on one machine"),
    "batch_size": (16, "images of each rank in a step"),
    "workers": (8, "worker processes of each rank"),
    "window": (16, "as train.window"),
    "ahead": (2, "windows that are fetched before they are read"),
    "connections": (8, "shards that a machine fetches at a time"),
}


def _add_plan(parser: Any) -> None:
    for name, (_, default, about) in _NUMBERS.items():
        parser.add_argument(f"--{name}", default=default, required=default is None, help=about)
    for name, (count, about) in _COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=about)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds from a request to its first byte")
    parser.add_argument("--apart", type=bool, default=True, help="machines read shards of their own: not where sets are mixed or bucket_pool is set")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _plan(values: Any, plain: Any) -> None:
    """Print what both orders need, and how fast they are."""
    from tasks.planning.shards import ReadingSetup, parsed_number, plan_reading, reading_as_json, reading_as_text

    given: dict[str, Any] = {name: values[name] for name in (*_COUNTS, "latency", "apart")}
    given |= {field: parsed_number(str(values[name])) for name, (field, _, _) in _NUMBERS.items()}
    setup = ReadingSetup(**{**given, "samples": int(given["samples"])})
    plans = plan_reading(setup, "shards"), plan_reading(setup, "global")
    print(reading_as_json(setup, plans) if values.json else reading_as_text(setup, plans))


FROM = Command(
    _add_from, _from,
    ("adalink shards from photographs --out shards/photographs", "adalink shards from captions.csv --images images --out shards/train"),
    first=("path", "out", "images", "columns", "format", "split", "annotations", "samples_per_shard", "bad_samples", "workers"),
)  # fmt: skip
TO = Command(
    _add_to, _to, ("adalink shards to shards/train --out train.parquet", "adalink shards to captions.csv --images images --out parquet/train"),
    first=("path", "out", "images", "columns", "format", "split", "samples_per_file", "bad_samples"),
)  # fmt: skip
PLAN = Command(
    _add_plan, _plan,
    ("adalink shards plan --samples 400M --bytes 100KB --ranks 1024 --bandwidth 1.25GB/s",
     "adalink shards plan --samples 12M --bytes 80KB --ranks 8 --latency 0.1 --rate 300 --json"),
)  # fmt: skip
IMG2DATASET = Command.of(shards_img2dataset, "adalink shards img2dataset --shards downloaded --bad-samples 100")
CHECK = Command.of(shards_check, "adalink shards check --shards shards/train", "adalink shards check --shards shards/older --upgrade true")

"""What the repository's own benchmark scripts measure, in alternated repetitions: reading shards, and the scorers.

The scripts lie in tests/benchmarks and do not travel with the installed package.
"""

from __future__ import annotations

import importlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adalink.errors import ConfigError
from tasks.bench.clock import alternate
from tasks.bench.finding import Finding
from tasks.bench.sizes import Bench

__all__ = ["metrics", "shards"]

FOLDER = Path(__file__).parents[2] / "tests" / "benchmarks"
CPU = torch.device("cpu")


def shards(bench: Bench) -> Iterator[Finding]:
    """Samples per processor second from shards in one process, against webdataset's own pipeline. Raises ConfigError outside the repository."""
    script = _script("bench_shards", "shards")
    for name, kind, decode, batch_size, n, target in (
        ("records of 9 KiB", script.Records, script.as_record, 64, bench.sizes.n_records, 5.0),
        ("JPEGs of 640 x 480", script.Pictures, script.as_picture, 16, bench.sizes.n_pictures, 1.0),
    ):
        with tempfile.TemporaryDirectory() as folder:
            source = kind(n, Path(folder) / "files")
            script.write_shards(source, Path(folder) / "shards", samples_per_shard=n // 4)
            readers = script.readers_of(Path(folder), source, decode, batch_size, 0)
            taken: dict[str, list[float]] = {"adalink": [], "webdataset": []}
            for turn in range(bench.repetitions + 1):
                for side in list(taken)[:: -1 if turn % 2 else 1]:
                    taken[side].append(script.one_pass(readers[side](), n)[1])
        rates = {side: 1 / statistics.median(seconds[1:]) for side, seconds in taken.items()}
        yield Finding(
            part="shards",
            what=f"{name} from shards, one process: samples per second, times webdataset's",
            ratios=tuple(theirs / own for theirs, own in zip(taken["webdataset"][1:], taken["adalink"][1:], strict=True)),
            target=target,
            detail=f"{rates['adalink']:.0f} against {rates['webdataset']:.0f} samples/s",
        )


def metrics(bench: Bench) -> Iterator[Finding]:
    """Seconds of the figures, against the official programs'; captions only where those are. Raises ConfigError outside the repository."""
    script = _script("bench_metrics", "metrics")
    script.N_QUESTIONS, script.N_CAPTIONS = bench.sizes.n_answers, bench.sizes.n_captions
    given, rows, graded = script.answer_rows()
    what = f"{len(given):,} answers scored: faster than the official algorithm in plain Python"
    yield _scored(bench, what, lambda: script.ours_answers(given, graded), lambda: float(script.evaluate(given, rows)["overall"]))
    what = f"{bench.sizes.n_captions:,} captions, words and CIDEr: faster than pycocoevalcap"
    if shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None:
        yield Finding(part="metrics", what=what, ratios=(), detail="not measured: it needs Java and pip install 'adalink[coco]'")
        return
    hypotheses, references = script.caption_corpus(None)
    theirs = partial(script.official_captions, hypotheses, references)
    yield _scored(bench, what, partial(script.ours_captions, hypotheses, references), theirs, time.perf_counter)


def _scored(bench: Bench, what: str, ours: Any, theirs: Any, now: Callable[[], float] | None = None) -> Finding:
    turns = alternate({"adalink": ours, "official": theirs}, bench.repetitions, CPU, torch.float64, 1e-9, now)
    return Finding(
        part="metrics",
        what=what,
        ratios=turns.ratios("official", "adalink"),
        detail=f"{turns.median('adalink'):.2f} s against {turns.median('official'):.2f} s",
    )


def _script(name: str, part: str) -> Any:
    if not (FOLDER / f"{name}.py").is_file():
        raise ConfigError(
            f"the part {part} runs tests/benchmarks/{name}.py, which the installed package does not hold: run it in a clone of the repository"
        )
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # the scripts import each other
    return importlib.import_module(name)

"""What a caption adapter of the scenes loses when it is compressed, in CIDEr with intervals; its size on disk, and the time that decoding takes.

    PYTHONPATH=.:tests/support OMP_NUM_THREADS=1 python tests/benchmarks/studies/compress.py [--images 100]

The adapter is the development fixture scenes_adapters/captioning: 74,368 weights, trained from seed 0.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scenes_adapters import trained_adapter

from adalink import Adapter
from adalink.checkpoint.compressed import COMPRESSED_FILE, read_compressed
from adalink.checkpoint.folder import WEIGHTS_FILE, read_config
from adalink.lifecycle.compress import compress
from adalink.lifecycle.flat import read_flat
from tasks.data.sources import DataConfig
from tasks.metrics.bootstrap import Resampling, paired_intervals
from tasks.runs.scored import ScoredAdapter

TRIES: tuple[dict[str, Any], ...] = (
    {"method": "int8"}, {"method": "int4"}, {"method": "ternary", "keep": 0.5, "alpha": 1.0}, {"method": "ternary", "keep": 0.5, "alpha": 1.5},
    {"method": "ternary", "keep": 0.5, "alpha": 2.0}, {"method": "ternary", "keep": 0.2, "alpha": 3.0}, {"method": "ternary", "keep": 0.1, "alpha": 3.0},
    {"method": "ternary", "keep": 0.05, "alpha": 3.0},
)  # fmt: skip


def cpu_ms(function: Callable[[], object]) -> float:
    """Median milliseconds of the processor."""
    times = []
    for _ in range(50):
        began = time.process_time()
        function()
        times.append(1000 * (time.process_time() - began))
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    n_images = parser.parse_args().images
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, start = trained_adapter(Path(temporary), "captioning")
        flat, scored = read_flat(folder), ScoredAdapter.load(folder, DataConfig(scenes=f"val/{n_images}"))
        whole, n_before = scored.answers(), sum(path.stat().st_size for path in folder.iterdir())
        drawn = cpu_ms(lambda: Adapter(read_config(folder).methods, scored.model.adapted.anatomy))
        print(f"{flat.vector.numel():,} weights, {n_images} images; drawing a start takes {drawn:.1f} ms of the processor")
        print("| codes | bytes | bits a weight | of float16 | 1,000 folders | decode | CIDEr | of the whole | paired difference |")
        print("|---|---|---|---|---|---|---|---|---|")
        print(f"| float32 | {(folder / WEIGHTS_FILE).stat().st_size:,} | 32 | 0.5 | {n_before / 1000:.1f} MB | | {whole.value:.1f} | 100 % | |")
        for number, (given, origin) in enumerate([*((one, start) for one in TRIES), (TRIES[1], None), (TRIES[2], None)]):
            out = Path(temporary, str(number))
            done = compress(folder, out, start=origin, **given)
            base, file = None if origin is None else origin.tensors(), out / COMPRESSED_FILE
            decoded = cpu_ms(lambda file=file, base=base: read_compressed(file).weights(base, file))  # type: ignore[misc]
            found = scored.answers(done.weights)
            paired = paired_intervals(whole.score.resampled, found.score.resampled, Resampling())["CIDEr"]  # type: ignore[arg-type]
            name = " ".join(str(value) for value in given.values()) + ("" if origin else ", from zeros")
            size = f"{len(done.content):,} | {done.bits:.2f} | {16 / done.bits:.1f} | {sum(path.stat().st_size for path in out.iterdir()) / 1000:.1f} MB"
            share = f"{found.value:.1f} | {100 * found.value / whole.value:.1f} % | {paired.low:+.1f} .. {paired.high:+.1f}"
            print(f"| {name} | {size} | {decoded:.1f} ms | {share} |", flush=True)


if __name__ == "__main__":
    main()

"""What an order by windows of shards does to a training where the shards are sorted, beside all samples shuffled.

    python tests/benchmarks/studies/sorted_shards.py --config examples/flickr8k.yaml --rows ROWS.jsonl --shards NEW_FOLDER --seeds 3 ...

The training images are written as shards in the order of their first captions, so that a shard's captions begin alike: the worst that a
set may be. Each row is one training; rows that the file holds already are not repeated. Window 0 is the order `global`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from share_of_full import score

from multimodal.data.feature_cache.encode import PatchTable, encode_all
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from multimodal.sample import Sample, SampleSource
from multimodal.training.train import train
from tasks.runs.compose import compose
from tasks.runs.config import RunConfig, chosen_methods


class Sorted:
    """A data set's samples in the order of their first captions."""

    def __init__(self, source: SampleSource) -> None:
        self.source = source
        texts = [source[index].captions[0].lower() for index in range(len(source))]
        self.order = sorted(range(len(source)), key=texts.__getitem__)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.order[index]]


def main() -> None:
    """Run what the file of rows lacks, then print the table."""
    parser = ArgumentParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--rows", type=Path, required=True, help="a file with a line for each run")
    parser.add_argument("--shards", type=Path, required=True, help="a folder for the sorted shards; written where it is not there")
    parser.add_argument("--samples_per_shard", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=list[int], default=[0, 16, 1])
    parser.add_class_arguments(RunConfig, None)
    values = parser.instantiate(parser.parse_args())
    config = RunConfig(**{name: values[name] for name in RunConfig.__dataclass_fields__})
    assert config.data.train is not None
    if not values.shards.exists():
        write_shards(Sorted(config.data.train.open().source), values.shards, samples_per_shard=values.samples_per_shard)
    source, val = ShardSource(values.shards), config.data.val.open()
    patches = encoded(config, source, val.source, values.shards.parent / f"{values.shards.name}.features")
    for seed in range(values.seeds):  # all orders of each seed before the next one
        for window in values.windows:
            if (window, seed) not in {(row["window"], row["seed"]) for row in read_rows(values.rows)}:
                settings = replace(config.train, seed=seed, order="shards" if window else "global", window=max(window, 1), measure_every=0)
                row = {"window": window, "seed": seed, **trained(replace(config, train=settings), source, val, patches)}
                with values.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print(table(read_rows(values.rows), len(source.shard_sizes)))


def encoded(config: RunConfig, source: SampleSource, val: SampleSource, file: Path) -> tuple[PatchTable, PatchTable]:
    """The features of both sets, read from the file where it is there."""
    if not file.exists():
        model = compose(config.encoder, config.language_model, template=config.chosen_task().template, layer=config.layer)
        torch.save([encode_all(model, one).patches for one in (source, val)], file)
    first, second = torch.load(file, weights_only=True)
    return PatchTable(first, {}), PatchTable(second, {})


def trained(config: RunConfig, source: SampleSource, val: Any, patches: tuple[PatchTable, PatchTable]) -> dict[str, float]:
    """One training's metric, and its last mean loss."""
    task = config.chosen_task()
    torch.manual_seed(config.train.seed)
    model = compose(config.encoder, config.language_model, template=task.template, layer=config.layer)
    model.add_adapter("default", chosen_methods(config.methods))
    with tempfile.TemporaryDirectory() as folder:
        steps = train(model, source, task.texts, config.train, Path(folder), patches=patches[0]).steps
        losses = [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {"metric": score(model, task, val, patches[1], config), "steps": steps, "loss": statistics.mean(losses[-5:])}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The runs done so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(rows: Sequence[Mapping[str, Any]], n_shards: int) -> str:
    """Markdown: for each order the metric of each seed, their mean, and how far it is from that of `global`."""
    by_window: dict[int, list[float]] = {}
    for row in rows:
        by_window.setdefault(row["window"], []).append(row["metric"])
    base = statistics.mean(by_window[0])
    lines = ["| order | metric of each seed | mean | from global |", "|---|---|---|---|"]
    for window, found in by_window.items():
        name = f"windows of {window} of {n_shards} shards" if window else "global"
        lines.append(f"| {name} | {', '.join(f'{one:.2f}' for one in found)} | {statistics.mean(found):.2f} | {statistics.mean(found) - base:+.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""How much of full fine-tuning an adapter reaches: the same data, steps and evaluation for each, one after the other.

    python tests/benchmarks/studies/share_of_full.py --config examples/flickr8k.yaml --encoder ... --language_model ... --data.train.images ...

Rows: the bridge alone; the config's methods; the bridge and every weight of the language model. A share is
(adapter - frozen) / (full - frozen), with the headline figure of the untrained model as `frozen`.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from torch import nn

from adalink import Method
from multimodal.data.feature_cache.encode import PatchTable, encode_all
from multimodal.training.train import train
from tasks.commands.train import results_table
from tasks.data.sources import Opened
from tasks.evaluation.evaluate import predict
from tasks.evaluation.representation import representation
from tasks.runs.compose import compose
from tasks.runs.config import RunConfig, chosen_methods

FULL_RATE = 5e-4  # of the language model's own weights


def main() -> None:
    """Run every variant and print the table; `--only NAME` runs one, for a machine with more time than memory."""
    parser = ArgumentParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--only", type=str, default="")
    parser.add_argument("--patches", type=Path | None, default=None, help="a file that keeps the encoded images between calls")
    parser.add_argument("--full_rate", type=float, default=FULL_RATE)
    parser.add_class_arguments(RunConfig, None)
    values = parser.instantiate(parser.parse_args())
    config = RunConfig(**{name: values[name] for name in RunConfig.__dataclass_fields__})
    methods = chosen_methods(config.methods)
    bridge = {name: method for name, method in methods.items() if name == "bridge"}
    variants: dict[str, tuple[Mapping[str, Method], bool]] = {
        "bridge alone": (bridge, False),
        " + ".join(methods): (methods, False),
        "bridge + full fine-tuning": (bridge, True),
    }
    assert config.data.train is not None
    data = config.data.train.open(), config.data.val.open()
    patches = kept_patches(config, data, values.patches)
    rows = {}
    for name, (chosen, is_full) in variants.items():
        if values.only in name:
            rows[name] = run(config, chosen, data, patches, values.full_rate if is_full else 0.0)
            print(json.dumps({"variant": name, **rows[name]}), file=sys.stderr, flush=True)
    print(results_table(rows))


def kept_patches(config: RunConfig, data: tuple[Opened, Opened], file: Path | None) -> tuple[PatchTable, PatchTable]:
    """The features of both data sets, read from `file` where it is there."""
    if file is not None and file.exists():
        first, second = torch.load(file, weights_only=True)
        return PatchTable(first, {}), PatchTable(second, {})
    model = compose(config.encoder, config.language_model, template=config.chosen_task().template, layer=config.layer)
    tables = encode_all(model, data[0].source), encode_all(model, data[1].source)
    if file is not None:
        torch.save((tables[0].patches, tables[1].patches), file)
    return tables


def run(config: RunConfig, methods: Mapping[str, Method], data: tuple[Opened, Opened], patches: tuple[PatchTable, PatchTable], full_rate: float) -> dict[str, float]:
    """Train one variant, and score it with its images and with others. full_rate: of the language model's weights; 0 keeps them frozen."""
    task = config.chosen_task()
    rates = {name: rate for name, rate in config.train.learning_rates.items() if name in methods}
    settings = replace(config.train, learning_rates=rates)
    torch.manual_seed(settings.seed)
    model = compose(config.encoder, config.language_model, template=task.template, layer=config.layer)
    adapter = model.add_adapter("default", methods)
    train_data, val = data
    frozen = score(model, task, val, patches[1], config)
    also: dict[str, nn.Parameter] = {}
    if full_rate:
        model.adapted.base.requires_grad_(True)
        also = {f"language_model.{name}": parameter for name, parameter in model.adapted.base.named_parameters()}
        settings = replace(settings, learning_rates={**settings.learning_rates, "language_model": full_rate})
    with tempfile.TemporaryDirectory() as folder:
        before, started = peak_megabytes(fresh=True), time.process_time()
        trained = train(model, train_data.source, task.texts, settings, Path(folder), patches=patches[0], also_trained=also)
        growth, spent = peak_megabytes() - before, time.process_time() - started
    n_trained = sum(p.numel() for p in [*adapter.parameters(), *also.values()])
    half = max(len(val.source) // 2, 1)
    own, blind = score(model, task, val, patches[1], config), score(model, task, val, patches[1], config, shift=half)
    last = [one for one in representation(model, val.source, task, patches[1]) if one.domain == "text"][-1]
    ranks = {"rank": last.rank, "frozen rank": last.host_rank or math.nan, "CKA": last.cka or math.nan, "drift": last.drift or math.nan}
    return {"trained": n_trained, "frozen": frozen, **ranks, task.headline: own, "blind": blind, "steps": trained.steps, "seconds": trained.seconds, "cpu": spent, "MB": growth}


def peak_megabytes(*, fresh: bool = False) -> float:
    """The most memory that this process has held, as Linux counts it; fresh: counting begins now. NaN on other systems."""
    status, switch = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not switch.exists():
        return math.nan
    if fresh:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and is still held would hide what comes
        switch.write_text("5")
    return float(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) / 1024


def score(model, task, val, patches, config, shift=0):  # type: ignore[no-untyped-def]
    """The headline figure."""
    texts = predict(model, val.source, task, patches, settings=config.generation, shift=shift).texts
    return task.score(texts, val.source).metrics[task.headline]


if __name__ == "__main__":
    main()

"""Two adapters of one frozen model merged by every method, each scored on both tasks, beside the two alone and a row each.

    python tests/benchmarks/studies/merge.py --adapters CAPTIONING VQA --rows rows.jsonl --limit 100

A merge is a line of --rows as soon as it is scored, with every text; merges that stand there are not scored again. Differences are paired, over
images and questions. Share = (score - start) / (score of the own adapter - start). Weights and scales are those of the table, not searched: so each
row is one measurement, and the best row of all is an upper end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adalink.lifecycle.flat import Flat, read_flat, start_of
from adalink.lifecycle.merge import MergeSettings, merge
from multimodal.model import VisionLanguageModel
from tasks.commands.parser import parsed
from tasks.evaluation.evaluate import ReadImages, predict, read_images
from tasks.metrics.bootstrap import Resampling, paired_intervals
from tasks.runs.compose import features_to_log, frozen_model
from tasks.runs.config import RunConfig
from tasks.task import Score

CAPTIONS, ANSWERS = "captioning adapter", "VQA adapter"
MERGES: dict[str, dict[str, Any]] = {
    **{f"stack {w:g}/{1 - w:g}": {"weights": (w, round(1 - w, 1))} for w in (0.7, 0.6, 0.5, 0.3)},
    **{f"average {w:g}/{1 - w:g}": {"method": "average", "weights": (w, round(1 - w, 1))} for w in (0.7, 0.5, 0.3)},
    **{f"arithmetic {s:g}": {"method": "arithmetic", "scale": s} for s in (0.7, 1.0)},
    **{f"TIES keep {k:g}": {"method": "ties", "keep": k} for k in (0.2, 0.5)},
    **{f"PCB keep {k:g} scale 1.2": {"method": "pcb", "keep": k, "scale": 1.2} for k in (0.1, 0.3)},
    "PCB keep 1": {"method": "pcb", "keep": 1.0},
    "PCB keep 0.3 scale 1.2, each method": {"method": "pcb", "keep": 0.3, "scale": 1.2, "scope": "method"},
    **{f"DARE keep {k:g}": {"method": "dare", "keep": k} for k in (0.5, 0.9)},
    "DARE keep 0.9, then TIES": {"method": "dare_ties", "keep": 0.9},
}


def config_of(file: str, limit: int) -> RunConfig:
    """The run of a config file; limit: of scenes, how many validation images."""
    values = parsed(["train", "--config", file, *(["--data.val.scenes", f"val/{limit}"] if limit else [])])[2]
    return RunConfig(**{name: values[name] for name in RunConfig.__dataclass_fields__})


class Bench:
    """Both tasks' validation data, encoded once, and the frozen model."""

    def __init__(self, files: list[str], limit: int, seed: int | None) -> None:
        self.runs = [config_of(file, limit) for file in files]
        torch.manual_seed(0 if seed is None else seed)
        self.model: VisionLanguageModel = frozen_model(self.runs[0].parts, template=self.runs[0].chosen_task().template, layer=self.runs[0].layer)
        self.state = torch.get_rng_state()
        self.images: list[ReadImages] = []
        for run in self.runs:
            val = run.data.val.open()
            self.images.append(read_images(val, features_to_log(self.model, val.source, run, "encoding")))

    def texts(self, folder: Path, only: str = "") -> list[dict[int, str]]:
        """What an adapter writes for each task, in its task's words."""
        self.model.load_adapter(folder, "measured")
        found = []
        for run, images in zip(self.runs, self.images, strict=True):
            task = run.chosen_task()
            self.model.adapted.task = {**self.model.adapted.task, **task.template.saved()}
            found.append(dict(predict(self.model, images.source, task, images.patches, settings=run.generation).texts))
        self.model.delete_adapter("measured")
        return found

    def scores(self, texts: list[dict[int, str]]) -> list[Score]:
        """Of both tasks."""
        return [run.chosen_task().score(one, images.source) for run, images, one in zip(self.runs, self.images, texts, strict=True)]


def main() -> None:
    """Score what the file of rows lacks, then print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", nargs=2, required=True, metavar="DIR", help="of the captioning run and of the VQA run")
    parser.add_argument("--configs", nargs=2, default=["tasks/scenes/captioning.yaml", "tasks/scenes/vqa.yaml"])
    parser.add_argument("--start_seed", type=int, help="the seed that the frozen parts are composed after, where a run drew its adapter after that")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="validation scenes; 0: as the configs say")
    parser.add_argument("--merges", default="", help="only merges whose name has this; comma separated")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=METHOD:W,W", help="more merges, such as 'stack 1/1=stack:1,1'")
    parser.add_argument("--seconds", type=float, default=420, help="begin no merge after so many")
    values = parser.parse_args()
    started, bench = time.perf_counter(), Bench(values.configs, values.limit, values.start_seed)
    done = {row["name"]: row for row in map(json.loads, values.rows.read_text().splitlines())} if values.rows.exists() else {}
    wanted: dict[str, Any] = {"start": None, CAPTIONS: values.adapters[0], ANSWERS: values.adapters[1], **MERGES}
    wanted |= {name: {"method": how.split(":")[0], "weights": tuple(map(float, how.split(":")[1].split(",")))} for name, _, how in (one.rpartition("=") for one in values.also)}
    for name, how in wanted.items():
        chosen = name in (CAPTIONS, ANSWERS, "start") or any(part in name for part in values.merges.split(","))
        if name in done or not chosen or time.perf_counter() - started > values.seconds:
            continue
        with TemporaryDirectory() as folder:
            done[name] = {"name": name, "texts": bench.texts(_folder(how, values.adapters, bench, Path(folder) / "made"))}
        with values.rows.open("a") as file:
            file.write(json.dumps(done[name]) + "\n")
    print(table(bench, {name: [{int(item): text for item, text in one.items()} for one in row["texts"]] for name, row in done.items()}))


def _folder(how: Any, adapters: list[str], bench: Bench, out: Path) -> Path:
    if isinstance(how, str):
        return Path(how)

    def start(folder: str | Path) -> Flat:
        return start_of(folder, bench.model.adapted, (bench.state,))

    if how is None:
        from adalink.checkpoint.folder import read_config
        from adalink.lifecycle.flat import derived_from, write_derived

        write_derived(out, read_config(Path(adapters[0])), start(adapters[0]), derived_from("start", {adapters[0]: read_flat(adapters[0])}, {}))
    else:
        merge(adapters, MergeSettings(**how), start=start).write(out)
    return out


def table(bench: Bench, texts: Mapping[str, list[dict[int, str]]]) -> str:
    """Markdown: both metrics, the shares, and the paired differences to each task's own adapter."""
    scores = {name: bench.scores(one) for name, one in texts.items()}
    own = [scores[CAPTIONS][0], scores[ANSWERS][1]]
    value = {name: [score.metrics[score.headline] for score in both] for name, both in scores.items()}
    floor, best = value.get("start", [0.0, 0.0]), [score.metrics[score.headline] for score in own]
    lines = ["| adapter | CIDEr | VQA accuracy | share | CIDEr less its own adapter's | accuracy less its own adapter's |", "|---|---|---|---|---|---|"]
    lines.append(f"| a row each (both adapters in one batch) | {best[0]:.1f} | {best[1]:.1f} | 1.00 1.00 | 0 | 0 |")
    for name, both in scores.items():
        shares = [(value[name][i] - floor[i]) / (best[i] - floor[i]) for i in (0, 1)]
        cells = []
        for i, score in enumerate(both):
            assert score.resampled is not None
            alone = own[i].resampled
            assert alone is not None
            interval = paired_intervals(alone, score.resampled, Resampling())[own[i].headline]
            cells.append(f"{interval.low:+.1f} to {interval.high:+.1f}")
        lines.append(f"| {name} | {value[name][0]:.1f} | {value[name][1]:.1f} | {shares[0]:.2f} {shares[1]:.2f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

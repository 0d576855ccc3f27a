"""Every method on the same frozen parts, data and steps, beside full fine-tuning: what it trains, scores, and costs.

    python tests/benchmarks/studies/methods_table.py --config tasks/scenes/captioning.yaml --rows rows.jsonl --seeds 3

Each run has a process of its own, so that its peak memory is its own, and is a line of the file --rows as soon as it is done; runs that
stand there already are not repeated, so a table can be made in pieces. Every method but eP-ALM has the config's bridge beside it. `--only STAGES`
makes the three rows of PT-PEFT: LoRA, a prefix with it, and a prefix before it. `--only LAYERS`: those that choose layers, beside their controls. Rank is the effective rank of the last layer's states at text tokens.
Processor seconds and peak memory of a step are relative to full fine-tuning; `--train.workers 0` keeps them in one process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from share_of_full import FULL_RATE, kept_patches, run

from adalink import (
    EPALM,
    IA3,
    IST,
    AdaLink,
    AdaLoRA,
    BitFit,
    Bottleneck,
    LoRA,
    Method,
    Prefix,
    Prompt,
    Selected,
    Sparse,
    SparseDelta,
    UniPELT,
)
from adalink.anatomy import Anatomy
from adalink.edit import Adapter, Placement
from adalink.methods.budgets.schedule import Schedule
from adalink.methods.budgets.selected import scores_of
from multimodal.training.settings import Stage
from tasks.runs.config import RunConfig, chosen_methods
from tasks.scenes.dataset import Scenes

FULL = "bridge + full fine-tuning"
AGNOSTIC: Mapping[str, tuple[str, ...]] = {"all": ("all",)}
SPECIFIC: Mapping[str, tuple[str, ...]] = {"image": ("image",), "text": ("text",)}
STAGES = {"prefix 10, then LoRA-8": (Stage(trains=("bridge", "prefix"), share=0.5), Stage(trains=("bridge", "prefix", "lora")))}
LAYERS = (
    "LoRA-8 per domain, IST", "LoRA-8 per domain, RST", "LoRA-4 per domain, gates (TAPS)", "LoRA-4 per domain, half open at random", "LoRA-8 per domain",
    "LoRA-4 per domain",
)  # fmt: skip
ONLY = {"STAGES": ("LoRA-8 agnostic", "prefix 10 + LoRA-8", *STAGES), "LAYERS": LAYERS}
BUDGET: dict[str, Any] = {"groups": SPECIFIC, "init_rank": 6, "target_rank": 4, "alpha": 12.0, "interval": 5}
HALF: dict[str, Any] = {"per": "group", "weight": 0.02, "rate": 0.5, "warmup": 20}


class PlacedAtRandom(AdaLoRA):
    """As many triplets as AdaLoRA ends with, in places that are drawn before training and stay."""

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """Of all triplets at the start, by the generator of the run's seed."""
        roles = [placement.role for placement in super().place(anatomy) for _ in range(self.init_rank)]
        left = torch.randperm(len(roles))[: len(roles) * self.target_rank // self.init_rank]
        return AdaLoRA(**{**vars(self), "ranks": Counter(roles[i] for i in left)}).place(anatomy)

    def schedule(self, name: str, adapter: Adapter) -> Schedule:
        """None."""
        return Schedule()


class OpenAtRandom(Selected):
    """Half of the gates, drawn before training, and no scores."""

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """Of all layers and groups, by the generator of the run's seed."""
        adapter = Adapter({"all": Selected(inner=self.inner, per=self.per)}, anatomy)
        keys = list(scores_of("all", adapter))
        return Selected(inner=self.inner, per=self.per, scores={keys[i]: 1.0 for i in torch.randperm(len(keys))[: len(keys) // 2].tolist()}).place(anatomy)

    def schedule(self, name: str, adapter: Adapter) -> Schedule:
        """None."""
        return Schedule()


def variants(adalink: AdaLink) -> dict[str, tuple[dict[str, Method], float | dict[str, float]]]:
    """Name in the table -> the methods beside the bridge, and the peak of their rate, or of each one's."""

    def lora(rank: int, groups: Mapping[str, tuple[str, ...]]) -> dict[str, Method]:
        return {"lora": LoRA(groups=groups, rank=rank, alpha=2.0 * rank)}

    both = {"prefix": Prefix(length=10, form="table", init_std=0.1), **lora(8, AGNOSTIC)}, {"prefix": 1e-2, "lora": 3e-3}
    return {
        "prefix 10 + LoRA-8": both,
        "prefix 10, then LoRA-8": both,
        "bridge alone": ({}, 0.0),
        "prompt 10": ({"prompt": Prompt(length=10, init_std=0.1)}, 1e-2),
        "AdaLink text": ({"adalink": replace(adalink, modalities=("text",))}, 1e-2),
        "AdaLink image + text": ({"adalink": adalink}, 1e-2),
        "eP-ALM": ({"epalm": EPALM(layers=(-3, -1), n_taps=1, connector="shared"), "prompt": Prompt(length=10, init_std=0.1)}, 3e-3),
        "prefix 10": ({"prefix": Prefix(length=10, form="table", init_std=0.1)}, 1e-2),
        "IA3 agnostic": ({"ia3": IA3(groups=AGNOSTIC)}, 1e-2),
        "IA3 per domain": ({"ia3": IA3(groups=SPECIFIC)}, 1e-2),
        "BitFit agnostic": ({"bitfit": BitFit(groups=AGNOSTIC, force_bias=True)}, 3e-3),
        "BitFit per domain": ({"bitfit": BitFit(groups=SPECIFIC, force_bias=True)}, 3e-3),
        "LoRA-1 agnostic": (lora(1, AGNOSTIC), 3e-3),
        "LoRA-1 per domain": (lora(1, SPECIFIC), 3e-3),
        "LoRA-8 agnostic": (lora(8, AGNOSTIC), 3e-3),
        "LoRA-8 per domain": (lora(8, SPECIFIC), 3e-3),
        "bottleneck 16": ({"bottleneck": Bottleneck(width=16)}, 3e-3),
        "LoRA-4 per domain": (lora(4, SPECIFIC), 3e-3),
        "AdaLoRA 6 to 4 per domain": ({"adalora": AdaLoRA(**BUDGET)}, 3e-3),
        "AdaLoRA 4, placed at random": ({"adalora": PlacedAtRandom(**BUDGET)}, 3e-3),
        **{
            f"{name} {kind}": ({key: made(kind == "moving")}, rate)
            for name, key, rate, made in (
                ("a tenth of LoRA-8,", "sparse", 3e-3, lambda moves: Sparse(inner=lora(8, SPECIFIC)["lora"], fraction=0.1, dynamic=moves)),
                ("a hundredth of q and v,", "sparse_delta", 1e-3, lambda moves: SparseDelta(groups=SPECIFIC, fraction=0.01, dynamic=moves)),
            )
            for kind in ("moving", "fixed")
        },
        "LoRA-4 per domain, gates (TAPS)": ({"selected": Selected(**HALF, inner=lora(4, SPECIFIC)["lora"])}, 3e-3),
        "LoRA-4 per domain, half open at random": ({"selected": OpenAtRandom(**HALF, inner=lora(4, SPECIFIC)["lora"])}, 3e-3),
        "LoRA-8 per domain, IST": ({**lora(8, SPECIFIC), "ist": IST()}, {"lora": 3e-3}),
        "LoRA-8 per domain, RST": ({**lora(8, SPECIFIC), "ist": IST(importance="uniform")}, {"lora": 3e-3}),
        "UniPELT APL": ({"unipelt": UniPELT(variant="APL", bottleneck=16, prefix_hidden=64)}, 1e-2),
    }


def main() -> None:
    """Run what the file of rows lacks, then print the table."""
    parser = ArgumentParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--rows", type=Path, required=True, help="a file with a line for each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=str, default="", help="part of a variant's name")
    parser.add_argument("--patches", type=Path, required=True, help="a file that keeps the encoded images between runs")
    parser.add_argument("--rate", type=float, default=0.0, help="in place of each method's own, scored on 200 scenes that no table has: to search for rates")
    parser.add_argument("--run", type=str, default="", help="the one variant that this process measures; the command itself gives it")
    parser.add_argument("--seed", type=int, default=0, help="of that run")
    parser.add_class_arguments(RunConfig, None)
    values = parser.instantiate(parser.parse_args())
    config = RunConfig(**{name: values[name] for name in RunConfig.__dataclass_fields__})
    if values.run:
        measure(config, values.run, values.seed, values)
        return
    done = {(row["variant"], row["seed"]) for row in read_rows(values.rows)}
    for seed in range(values.seeds):  # a whole table of each seed before the next one begins
        for name in [FULL, *variants(AdaLink(rank=1, modalities=("text",)))]:
            if (name in ONLY[values.only] if values.only in ONLY else values.only in name) and (name, seed) not in done:
                subprocess.run([sys.executable, *sys.argv, "--run", name, "--seed", str(seed)], check=True)
    print(table(read_rows(values.rows), config.chosen_task().headline))


def measure(config: RunConfig, name: str, seed: int, values: Any) -> None:
    """Train and score one variant, and add its line to the file."""
    chosen = chosen_methods(config.methods)
    assert isinstance(chosen["adalink"], AdaLink)
    assert config.data.train is not None
    extra, rate = variants(chosen["adalink"]).get(name, ({}, 0.0))
    methods = extra if "epalm" in extra else {"bridge": chosen["bridge"], **extra}
    data = config.data.train.open(), replace(config.data.val.open(), source=Scenes(split="val", size=200, seed=1)) if values.rate else config.data.val.open()
    rate = values.rate or rate
    patches = kept_patches(config, data, values.patches)
    rates = rate if isinstance(rate, dict) else dict.fromkeys(extra, rate)
    settings = replace(config.train, seed=seed, measure_every=0, learning_rates=rates, stages=STAGES.get(name, ()))
    row = run(replace(config, train=settings), methods, data, patches, FULL_RATE if name == FULL else 0.0)
    with values.rows.open("a") as file:
        file.write(json.dumps({"variant": name, "seed": seed, "rate": rate, **row}) + "\n")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The runs done so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(rows: Sequence[Mapping[str, Any]], headline: str) -> str:
    """Markdown: medians over seeds, the range of the figure in brackets."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], []).append(row)

    def median(name: str, column: str) -> float:
        return statistics.median(row[column] for row in by_name[name])

    lines = [f"| variant | trained | {headline} (range) | blind | time / full | memory / full | rank | seeds |", "|---|---|---|---|---|---|---|---|"]
    for name, runs in sorted(by_name.items(), key=lambda item: median(item[0], headline)):
        metrics = [run[headline] for run in runs]
        ranks = [row["rank"] for row in runs if "rank" in row]  # rows of before have none
        rank = f"{statistics.median(ranks):.1f} ({min(ranks):.1f} to {max(ranks):.1f})" if ranks else ""
        cost = [f"{median(name, column) / median(FULL, column):.2f}" if FULL in by_name else "" for column in ("cpu", "MB")]
        lines.append(
            f"| {name} | {median(name, 'trained'):,.0f} | {statistics.median(metrics):.1f} ({min(metrics):.1f} to {max(metrics):.1f}) "
            f"| {median(name, 'blind'):.1f} | {cost[0]} | {cost[1]} | {rank} | {len(runs)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

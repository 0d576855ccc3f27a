"""A search's configurations as runs: each is `adalink train` in a process of its own, which goes on from rung to rung, scored on a set of its own."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import yaml

from adalink.errors import ConfigError, DataError
from adalink.files import write_whole
from multimodal.data.order import fingerprint_of, texts_fingerprint_of
from multimodal.sample import DamagedSample
from tasks.data.sources import DataConfig, saved_data
from tasks.runs.search.search import Outcome, Trial
from tasks.runs.search.space import Choices, Config, Space
from tasks.runs.search.trials import TrialFailed, folder_bytes, read_metrics, run_adalink
from tasks.runs.text_task import settled
from tasks.task import TRAINED, Task

__all__ = ["Cost", "Plan", "Planned", "Prepared", "Read", "Runs", "Winner", "prepared"]

Cost = Literal["parameters", "step_ms", "bytes"]
SHARE = 5  # a fifth of the training data is what trials are scored on, where there is no data.search


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A config file that was read, without loading weights.

    settings    those of a run
    parameters  how many it would train: those of its methods and, where it has one, of its head
    base        those of the language model
    """

    settings: Any
    parameters: int
    base: int


Read = Callable[[Path], tuple[Any, str]]  # the settings of a config file, of which some may be missing; and all of them as YAML
Plan = Callable[[Path], Planned]  # raises an error of adalink's where a run would be refused


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What all trials have in common.

    base         the settings of the config; its validation data are those that trials are scored on
    val          the data that are scored once, at the end
    n_train      samples that are learned from
    fingerprint  of the samples that are learned from and scored
    metrics      that the task has of these data
    headline     the one that a run is judged by
    sentence     which samples trials learn from and are scored on
    """

    base: Config
    val: Config
    n_train: int
    fingerprint: Mapping[str, str]
    metrics: tuple[str, ...]
    headline: str
    sentence: str


def prepared(settings: Any, text: str) -> Prepared:
    """From the config as it was read, before its methods are chosen. The validation data are not opened.

    Raises ConfigError without training data, with ones that cannot be split, and without validation data.
    """
    base = _given(yaml.safe_load(text))
    data = base["data"]
    if settings.data.train is None:
        raise ConfigError("a search splits or reads data.train, and the config gives none: give data.train")
    if settings.data.val is None:
        raise ConfigError("the front of a search is scored on data.val at the end, and the config gives none: give data.val")
    val = data.pop("val")
    search = data.pop("search", None)
    if search is None:
        data["train"], search = _split(settings.data.train, data["train"])
    train_set, search_set = (saved_data(one).open() for one in (data["train"], search))
    data["val"] = search
    sources = {"train": train_set.source, "search": search_set.source}
    prints = {name: f"{fingerprint_of(source)} {texts_fingerprint_of(source)}".strip() for name, source in sources.items()}
    metrics, headline = _metrics(settled(settings.chosen_task(), train_set.source, search_set.source), search_set.source)
    base.pop("out", None)
    return Prepared(
        base=base, val=val, n_train=len(train_set.source), fingerprint=prints, metrics=metrics, headline=headline,
        sentence=f"{len(train_set.source):,} samples are learned from, {len(search_set.source):,} others score the trials",
    )  # fmt: skip


def _split(config: DataConfig, given: Config) -> tuple[Config, Config]:
    """Training data and the share that is scored: what follows the shots of a permutation that is always the same."""
    if config.mix is not None or config.after_shots:
        named = "a mixture" if config.mix is not None else "what follows some shots"
        raise ConfigError(f"data.train is {named}, of which no share can be split off: give data.search, on which trials are scored")
    n = len(config.open().source)
    if n < 2:
        raise ConfigError(f"data.train holds {n} sample, of which no share can be split off: give more, or data.search")
    n_search = max(1, n // SHARE)
    train = {**given, "shots": n - n_search}
    return train, {**train, "after_shots": n_search}


def _metrics(task: Task, source: Any) -> tuple[tuple[str, ...], str]:
    """The names of the metrics of a set, by scoring its first whole sample; and the headline. Raises DataError where nothing can be scored."""
    for index in range(len(source)):
        try:
            sample = source[index]
        except DamagedSample:
            continue
        if task.is_graded(sample):
            score = task.score({asked.item: "a" for asked in task.asked(sample)}, [sample])
            return tuple(score.metrics), score.headline
    raise DataError("the data that trials are scored on have nothing that people wrote, so no score can be had from them: give data.search")


def _given(settings: Any) -> Any:
    """Without the settings that are null."""
    return {name: _given(value) for name, value in settings.items() if value is not None} if isinstance(settings, dict) else settings


@dataclass
class Runs:
    """The objective: cost and score of a configuration, from run folders in `folder`.

    metric   of metrics.json, of which more is better
    features where the frozen features of all trials lie, or None
    """

    space: Space
    prepared: Prepared
    plan: Plan
    folder: Path
    cost: Cost
    metric: str
    threads: int
    features: Path | None = None
    planned: dict[str, Planned] = field(default_factory=dict)

    def config(self, choices: Choices) -> Config:
        """The config of a configuration."""
        found = self.space.config(copy.deepcopy(self.prepared.base), choices)
        return {**found, "features": str(self.features.absolute())} if self.features is not None else found

    def write(self, config: Config, file: Path, about: str = "") -> Planned:
        """Write a config as YAML, every setting in it, and plan it. about: lines of a comment above it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, (about + yaml.safe_dump(config, sort_keys=False)).encode())
        return self.plan(file)

    def outcome(self, name: str, choices: Choices, share: float) -> Outcome:
        """After a share of the steps; the run goes on from its last checkpoint. Raises TrialFailed, and what refuses the config."""
        file, out = self.folder / f"{name}.yaml", self.folder / name
        if name not in self.planned:
            self.planned[name] = self.write(self.config(choices), file)
        planned = self.planned[name]
        is_new, stop_at = not out.exists(), self.stop_at(planned, share)
        seconds = self.train(file, out, stop_at=stop_at)
        metrics = read_metrics(out)
        if self.cost == "step_ms" and "step_ms" not in metrics and not is_new:  # a run that was killed after its last step has none left to time
            shutil.rmtree(out)
            seconds += self.train(file, out, stop_at=stop_at)
            metrics = read_metrics(out)
        score = metrics["rows"].get(TRAINED, {}).get(self.metric)
        if score is None:
            raise TrialFailed(f"the metric {self.metric} is undefined for what the model answers")
        return Outcome(cost=self._cost(planned, out, metrics), score=float(score), seconds=round(seconds, 2))

    def train(self, file: Path, out: Path, *options: str, stop_at: int = 0) -> float:
        """Train into a folder, going on where it was ended; the seconds come back."""
        resume = ["--resume"] if out.exists() else []
        arguments = ["train", "--config", str(file), "--out", str(out), "--train.stop_at", str(stop_at), *options, *resume]
        return run_adalink(arguments, out.with_suffix(".log"), threads=self.threads).seconds

    def stop_at(self, planned: Planned, share: float) -> int:
        """The step of a rung; 0 at the end."""
        steps = planned.settings.train.n_steps(self.prepared.n_train, 1)
        return 0 if share >= 1 else max(1, round(steps * share))

    def _cost(self, planned: Planned, out: Path, metrics: Mapping[str, Any]) -> float:
        if self.cost == "parameters":
            return planned.parameters or sum(metrics["trained_parameters"].values())
        if self.cost == "bytes":
            return folder_bytes(out / "adapter")
        if "step_ms" not in metrics:
            raise TrialFailed("the first rung has at most 5 steps, which warm up, so no step can be timed: give more steps, or another cost")
        return float(metrics["step_ms"])


@dataclass(frozen=True, kw_only=True)
class Winner:
    """A configuration of the front.

    searched   its score in the search, which chose it
    again      seed -> the score on the same data of a training that chose nothing; a text is the reason why there is none
    val        seed -> the score on the validation data
    """

    trial: Trial
    cost: float
    searched: float
    again: Mapping[int, float | str]
    val: Mapping[int, float]
    config: Path

    def document(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """For front.json. values: its settings."""
        return {
            "trial": self.trial.name, "cost": self.cost, "score": self.searched, "values": dict(values), "config": self.config.name,
            "scores_of_seeds": {str(seed): score for seed, score in self.again.items()}, "validation": {str(seed): score for seed, score in self.val.items()},
            "validation_mean": mean(self.val.values()) if self.val else None,
        }  # fmt: skip

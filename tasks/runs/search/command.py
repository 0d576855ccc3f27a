"""`adalink search` from its files to its report: read, search, train the front again, write."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adalink.errors import AdalinkError, ConfigError, TerminatedError
from adalink.files import locked, write_whole
from multimodal.sample import counted
from tasks.data.sources import saved_data
from tasks.evaluation.evaluate import predict, read_images
from tasks.runs.compose import features_to_log, load_adapted, log
from tasks.runs.config import setting_names
from tasks.runs.search.page import write_page
from tasks.runs.search.runs import Cost, Plan, Prepared, Read, Runs, Winner, prepared
from tasks.runs.search.search import SEARCH, Search, SearchSettings, Trial, front_of
from tasks.runs.search.space import Space
from tasks.runs.search.trials import Ledger, TrialFailed, end_trainings, read_metrics, run_adalink
from tasks.runs.text_task import settled
from tasks.task import TRAINED

__all__ = ["LEDGER", "Paths", "finish", "run_search"]

LEDGER = "trials.jsonl"
N_SEEDS = 2


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The config of a run, the space file, the search's folder, and a folder of features or None."""

    config: Path
    space: Path
    out: Path
    features: Path | None = None


def run_search(
    paths: Paths, settings: SearchSettings, read: Read, plan: Plan, *, cost: Cost, metric: str | None, resume: bool
) -> Iterator[str]:
    """Do what is missing of a search; lines for the screen come as they are known.

    Raises ConfigError for a folder that is taken, a space or data that cannot be searched, and a metric that the task has not; DataError for a
    ledger that is damaged, or of a search with other settings.
    """
    out = paths.out
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: give another --out, or --resume to go on with it")
    given = yaml.safe_load(paths.space.read_text(encoding="utf-8"))
    space = Space.read(given, setting_names())
    common = prepared(*read(paths.config))
    metric = metric or common.headline
    if metric not in common.metrics:
        raise ConfigError(f"the metric is {metric!r}, and the task has {', '.join(common.metrics)} of these data: give one of them")
    out.mkdir(parents=True, exist_ok=True)
    lock = locked(out / ".lock", f"another search writes {out}: wait for its end, or give another --out")
    handler = signal.signal(signal.SIGTERM, end_trainings)
    try:
        ledger = Ledger(out / LEDGER)
        ledger.begin(_header(given, common, settings, cost, metric), "a search")
        _refuse_longer(ledger, settings)
        yield common.sentence
        threads = max(1, (os.cpu_count() or 1) // settings.jobs)
        runs = Runs(
            space=space, prepared=common, plan=plan, folder=out / "trials", cost=cost, metric=metric, threads=threads, features=paths.features
        )  # fmt: skip
        _write_features(runs, out)
        search = Search(space, runs, settings, ledger)
        search.run()
        for folder in (out / "trials").glob("*/checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)  # a longer search trains a trial that goes on from its first step
        winners = finish(search, runs, out / "front")
        yield from write_page(search, runs, winners, out / "report.html")
        for winner in winners:
            yield f"{winner.config}: {cost} {winner.cost:,g}, {metric} {winner.searched:.2f} in the search"
        yield f"report: {out / 'report.html'}"
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.close(lock)


def _header(space: Any, common: Prepared, settings: SearchSettings, cost: Cost, metric: str) -> dict[str, Any]:
    """What the trials are a function of; more trials of the same search may be asked for later."""
    return {
        "space": space, "data": dict(common.fingerprint), "config": common.base, "validation": common.val, "cost": cost, "metric": metric,
        "halving": settings.halving, "seed": settings.seed, "jobs": settings.jobs,
    }  # fmt: skip


def _refuse_longer(ledger: Ledger, settings: SearchSettings) -> None:
    """Raise ConfigError where more trials are asked for after the validation data were scored: these would choose."""
    done = sum(event["trial"].startswith(SEARCH) for event in ledger.of("asked"))
    if ledger.of("validated") and settings.trials > done:
        raise ConfigError(
            f"the search in {ledger.path.parent} has ended with {counted(done, 'trial')} and its front was scored on the validation data, by which "
            f"{settings.trials} trials would be chosen: give another --out"
        )


def _write_features(runs: Runs, out: Path) -> None:
    """The frozen features of all trials, where a folder is given; what is there is checked."""
    if runs.features is None:
        return
    file = out / "features.yaml"
    config = {name: value for name, value in runs.prepared.base.items() if name not in ("methods", "features")}
    file.write_text(yaml.safe_dump({**config, "methods": {}}, sort_keys=False), encoding="utf-8")
    log(f"features of all trials: {runs.features}")
    run_adalink(["features", "--config", str(file), "--features", str(runs.features), "--contents", "all"], out / "features.log", threads=os.cpu_count() or 1)


# ----------------------------------------
# The end: the front trained again with two seeds, scored once on the validation data, and written down as configs.


def finish(search: Search, runs: Runs, folder: Path) -> list[Winner]:
    """Train the front again, score it on the validation data, and write front.json and a config for each configuration.

    What the ledger has is not done again.
    """
    trials = front_of(search.of(SEARCH), len(search.settings.shares) - 1)
    first = int(runs.prepared.base.get("train", {}).get("seed", 0)) + 1
    seeds = range(first, first + N_SEEDS)
    for trial in trials:
        runs.write(_seeded(runs, trial, first), folder / f"{trial.name}.yaml")
    _train_again(search, runs, folder, trials, seeds)
    ended = search.ledger.of("retrained")
    again: dict[tuple[str, int], float | str] = {(one["trial"], one["seed"]): one["score"] if "score" in one else one["reason"] for one in ended}
    if not search.ledger.of("validated"):
        adapters = {f"{trial.name} {seed}": _run(folder, trial, seed) for trial in trials for seed in seeds if isinstance(again[trial.name, seed], float)}
        search.ledger.add("validated", metric=runs.metric, scores=_validated(adapters, folder, runs))
    scores = search.ledger.of("validated")[0]["scores"]
    winners = []
    for trial in trials:
        cost, score = trial.point(len(search.settings.shares) - 1)
        own = {seed: again[trial.name, seed] for seed in seeds}
        val = {seed: scores[f"{trial.name} {seed}"] for seed in seeds if f"{trial.name} {seed}" in scores}
        winners.append(Winner(trial=trial, cost=cost, searched=score, again=own, val=val, config=folder / f"{trial.name}.yaml"))
        runs.write(_seeded(runs, trial, first), winners[-1].config, _about(winners[-1], runs))
    found = {"metric": runs.metric, "cost": runs.cost, "front": [one.document(search.space.values(one.trial.choices)) for one in winners]}
    write_whole(folder.parent / "front.json", (json.dumps(found, indent=2) + "\n").encode())
    return winners


def _run(folder: Path, trial: Trial, seed: int) -> Path:
    return folder / f"{trial.name}-seed-{seed}"


def _seeded(runs: Runs, trial: Trial, seed: int) -> dict[str, Any]:
    config = runs.config(trial.choices)
    return {**config, "train": {**config.get("train", {}), "seed": seed}}


def _about(winner: Winner, runs: Runs) -> str:
    """The comment at the head of a config."""
    scores = ", ".join(f"seed {seed}: {score:.4f}" if isinstance(score, float) else f"seed {seed}: none ({score})" for seed, score in winner.again.items())
    val = ", ".join(f"seed {seed}: {score:.4f}" for seed, score in winner.val.items())
    return (
        f"# {winner.trial.name}: {runs.cost} {winner.cost:,g}, {runs.metric} {winner.searched:.4f} in the search, whose data data.val is here\n"
        f"# trained again from the first step, on the same data: {scores}\n# on the validation data, which nothing was chosen by: {val or 'none'}\n"
        "# adalink train --config THIS FILE --out RUN gives the score of the first of these seeds again, bit for bit\n"
    )


def _train_again(search: Search, runs: Runs, folder: Path, trials: Sequence[Trial], seeds: Sequence[int]) -> None:
    known = {(event["trial"], event["seed"]) for event in search.ledger.of("retrained")}
    missing = [(trial, seed) for trial in trials for seed in seeds if (trial.name, seed) not in known]

    def score(one: tuple[Trial, int]) -> dict[str, Any]:
        trial, seed = one
        out = _run(folder, trial, seed)
        try:
            seconds = runs.train(folder / f"{trial.name}.yaml", out, "--train.seed", str(seed))
            found = read_metrics(out)["rows"][TRAINED].get(runs.metric)
            if found is None:
                raise TrialFailed(f"the metric {runs.metric} is undefined for what the model answers")
        except TerminatedError:
            raise
        except AdalinkError as error:
            return {"reason": str(error)}
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        return {"score": float(found), "seconds": round(seconds, 2)}

    with ThreadPoolExecutor(search.settings.jobs) as pool:
        for (trial, seed), outcome in zip(missing, pool.map(score, missing), strict=True):
            search.ledger.add("retrained", trial=trial.name, seed=seed, **outcome)


def _validated(adapters: Mapping[str, Path], folder: Path, runs: Runs) -> dict[str, float | None]:
    """The metric of saved adapters on the validation data, which are opened here and nowhere else."""
    if not adapters:
        return {}
    log(f"the validation data are read: {len(adapters)} adapters of the front are scored")
    opened, found = saved_data(runs.prepared.val).open(), {}
    for name, run in adapters.items():
        settings = runs.plan(folder / f"{name.split()[0]}.yaml").settings
        settings = dataclasses.replace(settings, features=None, train=dataclasses.replace(settings.train, features="encode"))
        model, saved = load_adapted(run / "adapter", **vars(settings.parts))
        task = settled(settings.chosen_task(), opened.source, labels=saved.get("labels", ()))
        images = read_images(opened, features_to_log(model, opened.source, settings, name))
        texts = predict(model, images.source, task, images.patches, settings=settings.generation).texts
        found[name] = task.score(texts, images.source).metrics.get(runs.metric)
    return {name: score for name, score in found.items() if score is not None}

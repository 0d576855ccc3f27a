"""`adalink search` on the scenes: trials that train, fail and go on, the front trained again, and the validation data read once."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from cli_run import Done, adalink, refused, trial_here

from adalink.errors import TerminatedError
from tasks.data.sources import DataConfig, Opened
from tasks.runs.search import command, runs, trials
from tasks.runs.search.trials import Process, TrialFailed, _reason, run_adalink

pytest.importorskip("optuna", reason="the extra `search` is not installed")

RUN: dict[str, Any] = {
    "task": "captioning", "encoder": "scenes:encoder", "language_model": "scenes:language",
    "data": {"train": {"scenes": "train/10"}, "val": {"scenes": "val/3"}},
    "methods": {"bridge": {"kind": "mlp", "hidden": 16, "init_scale": 8.0}},
    "train": {"steps": 9, "batch_size": 2, "learning_rate": 0.01, "features": "memory", "log_every": 1},
    "generation": {"max_new_tokens": 3},
}  # fmt: skip
SPACE: dict[str, Any] = {"methods.bridge.hidden": {"log2": [3, 6]}, "train.learning_rate": {"log": [0.001, 0.02]}}


@dataclass
class Here:
    """Trainings in this process, where one takes a second, and which data sets were opened after how many events of the ledger."""

    out: Path
    trained: list[Sequence[str]] = field(default_factory=list)
    opened: list[tuple[str | None, str]] = field(default_factory=list)

    def run(self, arguments: Sequence[str], log: Path, *, threads: int) -> Process:
        self.trained.append(arguments)
        return trial_here(arguments)

    @contextmanager
    def patched(self) -> Iterator[None]:
        open_set = DataConfig.open

        def noted(config: DataConfig, **options: Any) -> Opened:
            events = (self.out / command.LEDGER).read_text().splitlines() if (self.out / command.LEDGER).exists() else []
            self.opened.append((config.scenes, json.loads(events[-1])["event"] if events else ""))
            return open_set(config, **options)

        with ExitStack() as stack:
            for module in (runs, command):
                stack.enter_context(mock.patch.object(module, "run_adalink", self.run))
            stack.enter_context(mock.patch.object(DataConfig, "open", noted))
            yield


def written(folder: Path, run: Any = RUN, space: Any = SPACE) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("run", run), ("space", space)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return ["search", "--config", str(folder / "run.yaml"), "--space", str(folder / "space.yaml"), "--out", str(folder / "out")]


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "out" / command.LEDGER).read_text().splitlines()]
    return [event for event in found if not kinds or event["event"] in kinds]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Here, Done]:
    folder = tmp_path_factory.mktemp("search")
    here = Here(folder / "out")
    with here.patched():
        done = adalink(*written(folder), "--trials", "3", "--control", "1")
    return folder, here, done


def test_rungs_the_front_and_chance_are_trained(searched: tuple[Path, Here, Done]) -> None:
    folder, here, done = searched
    assert done.code == 0, done.err
    rungs = [(event["trial"], event["rung"]) for event in events(folder, "rung")]
    best = rungs[3][0]
    assert rungs == [*((f"search-00{i}", 0) for i in range(3)), (best, 1), (best, 2), *(("control-000", rung) for rung in range(3))]
    stops = [next(value for name, value in pairwise(one) if name == "--train.stop_at") for one in here.trained]
    assert stops == ["1", "1", "1", "3", "0", "1", "3", "0", "0", "0"]
    costs = {event["trial"]: event["cost"] for event in events(folder, "rung")}
    trained = {name: json.loads((folder / "out" / "trials" / name / "metrics.json").read_text())["trained_parameters"] for name in costs}
    assert costs == {name: sum(counts.values()) for name, counts in trained.items()}
    assert len(set(costs.values())) > 1
    assert all(event["seconds"] > 0 for event in events(folder, "rung"))


def test_the_validation_data_are_read_once_after_the_last_trial(searched: tuple[Path, Here, Done]) -> None:
    """The control: the training data are read by every trial."""
    folder, here, _ = searched
    assert [event for scenes, event in here.opened if scenes == "val/3"] == ["retrained"]
    assert sum(scenes == "train/10" for scenes, _ in here.opened) > 20
    assert [event["event"] for event in events(folder)][-1] == "validated"


def test_the_config_of_the_front_trains_to_the_same_score_and_evaluates_to_the_same_on_the_validation_data(
    searched: tuple[Path, Here, Done], tmp_path: Path
) -> None:
    folder, _, _ = searched
    (best,) = json.loads((folder / "out" / "front.json").read_text())["front"]
    assert adalink("train", "--config", folder / "out" / "front" / best["config"], "--out", tmp_path / "run").code == 0
    row = "trained adapter"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"][row]["CIDEr"] == best["scores_of_seeds"]["1"]
    val = ("--data.val.scenes", "val/3", "--data.val.shots", "0", "--data.val.after_shots", "0")
    config = tmp_path / "run" / "config.yaml"
    assert adalink("evaluate", "--adapter", tmp_path / "run" / "adapter", "--config", config, *val, "--out", tmp_path / "val").code == 0
    assert json.loads((tmp_path / "val" / "metrics.json").read_text())["rows"][row]["CIDEr"] == best["validation"]["1"]
    assert set(best["validation"]) == {"1", "2"}


def test_the_page_names_the_front_chance_and_the_configs(searched: tuple[Path, Here, Done]) -> None:
    folder, _, done = searched
    page = (folder / "out" / "report.html").read_text()
    (best,) = json.loads((folder / "out" / "front.json").read_text())["front"]
    assert re.search(r"The search is (not )?better than chance: at 1 trials each", page)
    assert best["config"] in page
    assert f"CIDEr {best['score']:.4f} in the search" in page
    assert page.count('class="dot0"') == 1 + 3  # after all steps, and at the first rung
    assert page.count('class="dot1"') == 2
    assert "methods.bridge.hidden" in page
    assert done.out.splitlines()[-1] == f"report: {folder / 'out' / 'report.html'}"


def test_a_search_that_has_ended_trains_nothing_again_and_takes_no_more_trials(searched: tuple[Path, Here, Done]) -> None:
    folder, _, _ = searched
    before = events(folder)
    again = Here(folder / "out")
    arguments = ["search", "--config", folder / "run.yaml", "--space", folder / "space.yaml", "--out", folder / "out"]
    with again.patched():
        assert adalink(*arguments, "--trials", "3", "--control", "1", "--resume").code == 0
        assert "--resume to go on with it" in refused(adalink(*arguments, "--trials", "3", "--control", "1"))
        assert "its front was scored on the validation data" in refused(adalink(*arguments, "--trials", "4", "--control", "1", "--resume"))
        assert "of a search with another seed" in refused(adalink(*arguments, "--trials", "3", "--seed", "5", "--resume"))
        other = written(folder / "other", space={"methods.bridge.hidden": {"log2": [3, 5]}})
        assert "of a search with another space" in refused(adalink(*other[:-1], folder / "out", "--resume"))
        other = written(folder / "other", run={**RUN, "data": {**RUN["data"], "train": {"scenes": "train/11"}}})
        assert "of a search with another data" in refused(adalink(*other[:-1], folder / "out", "--resume"))
    assert again.trained == []
    assert events(folder) == before


BAD = {
    "excluded layers [7] are outside this model": {"methods.lora.exclude_layers": {"one_of": [[7], [8]]}},
    "not a number": {"train.learning_rate": {"one_of": [1e30, 1e31]}, "train.clip": {"one_of": [0.0]}},
    "out of memory": {"methods.bridge.hidden": {"one_of": [2**42, 2**43]}},
}


@pytest.mark.parametrize("reason", BAD)
def test_trials_that_fail_are_counted_and_named_and_the_search_goes_on(reason: str, tmp_path: Path) -> None:
    here = Here(tmp_path / "out")
    with here.patched():
        done = adalink(*written(tmp_path, space=BAD[reason]), "--trials", "1", "--control", "0", "--halving", "off")
    assert done.code == 0, done.err
    (failed,) = events(tmp_path, "failed")
    assert reason in failed["reason"]
    assert "1 configuration was tried, of which 1 failed: there is no front" in done.out
    assert "search-000" in (tmp_path / "out" / "report.html").read_text()


def test_a_process_that_fails_is_named_by_its_own_sentence_or_by_its_signal(tmp_path: Path) -> None:
    printed = "step 1\nadalink: the loss is not a number at step 3: lower train.learning_rate\n"
    assert _reason(2, printed) == "the loss is not a number at step 3: lower train.learning_rate"
    assert _reason(-9, printed) == "ended by SIGKILL, as the system does where memory runs out"
    assert _reason(1, "Traceback\nRuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\n").startswith("out of memory: Runtime")
    assert _reason(1, "Traceback\nKeyError: 'a'\n") == "KeyError: 'a'"
    with pytest.raises(TrialFailed, match="there is no command 'nothing'"):
        run_adalink(["nothing"], tmp_path / "log.log", threads=1)


def test_a_training_that_a_killed_search_left_behind_is_waited_for(tmp_path: Path) -> None:
    """The process holds the lock that it got from the search; another training of the same trial starts after its end."""
    lock, ended = tmp_path / "trial.lock", tmp_path / "ended"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        orphan = subprocess.Popen(["sh", "-c", f"sleep 1; touch {ended}"], pass_fds=(file.fileno(),))
    with pytest.raises(TrialFailed):
        run_adalink(["nothing"], tmp_path / "trial.log", threads=1)
    assert ended.exists()
    assert orphan.wait() == 0


def test_a_search_that_is_asked_to_end_asks_its_trainings(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"])
    with mock.patch.object(trials, "_RUNNING", {process}), pytest.raises(TerminatedError, match="ended by SIGTERM: go on with --resume"):
        trials.end_trainings(signal.SIGTERM, None)
    assert process.wait() == -signal.SIGTERM


WRONG: list[tuple[dict[str, Any], dict[str, Any], list[str], str]] = [
    ({"data": {"val": {"scenes": "val/3"}}}, SPACE, [], "the config gives none: give data.train"),
    ({"data": {"train": {"scenes": "train/9"}}}, SPACE, [], "the config gives none: give data.val"),
    ({"data": {"train": {"scenes": "train/1"}, "val": {"scenes": "val/3"}}}, SPACE, [], "data.train holds 1 sample, of which no share can be split off"),
    ({"data": {"train": {"scenes": "train/9", "shots": 3, "after_shots": 3}, "val": {"scenes": "val/3"}}}, SPACE, [], "data.train is what follows some shots"),
    ({}, {"methods.bridge.hiden": {"log2": [3, 6]}}, [], "the nearest is methods.bridge.hidden"),
    ({}, SPACE, ["--metric", "accuracy"], "the metric is 'accuracy', and the task has CIDEr, "),
    ({}, SPACE, ["--trials", "0"], "give 1 or more trials and jobs"),
    ({"train": {"stepz": 3}}, SPACE, [], "there is no setting train.stepz"),
]


@pytest.mark.parametrize("change, space, options, sentence", WRONG, ids=[sentence for *_, sentence in WRONG])
def test_what_cannot_be_searched_is_refused(change: dict[str, Any], space: dict[str, Any], options: list[str], sentence: str, tmp_path: Path) -> None:
    assert sentence in refused(adalink(*written(tmp_path, RUN | change, space), *options))
    assert not (tmp_path / "out").exists()


def test_without_optuna_the_extra_is_named(tmp_path: Path) -> None:
    with mock.patch.dict("sys.modules", {"optuna": None}):
        assert "pip install 'adalink[search]'" in refused(adalink(*written(tmp_path)))

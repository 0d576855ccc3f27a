"""The search on an objective whose every configuration is known: its front, chance beside it, thirds that go on, and a kill at any moment."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from shared import fixtures_root

from adalink.errors import ConfigError, DataError
from tasks.runs.search.search import CONTROL, SEARCH, Outcome, Point, Search, SearchSettings, front, hypervolume, ordered
from tasks.runs.search.space import Choices, Space
from tasks.runs.search.trials import Ledger, TrialFailed

pytest.importorskip("optuna", reason="the extra `search` is not installed")
FILE = fixtures_root() / "search" / "objective_dev.json"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the development data are not here")
RANK, LAYERS = "methods.lora.rank", "methods.lora.exclude_layers"


@cache
def known() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


class Objective:
    """The fixture's formula, on its learning curves. fails: names of trials that give no score."""

    def __init__(self, fails: Sequence[str] = (), kill_after: int = 10**9) -> None:
        self.fails, self.left, self.asked = fails, kill_after, 0

    def outcome(self, name: str, choices: Choices, share: float) -> Outcome:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left, self.asked = self.left - 1, self.asked + 1
        if name in self.fails:
            raise TrialFailed("the rank is above the width")
        about, k = known(), choices[RANK]
        on = [choices[f"{LAYERS}[{layer}]"] for layer in range(8)]
        whole = sum(w for w, used in zip(about["w"], on, strict=True) if used) * (1 - 2 ** -(0.6 * k + 0.8)) - 0.15 * max(0, sum(on) - 4) * k
        speed = about["speed"][k]
        learned = (1 - math.exp(-speed * share)) / (1 - math.exp(-speed))
        return Outcome(cost=64 * 2**k * sum(on), score=about["base"] + whole * learned)


def space() -> Space:
    return Space.read({RANK: {"log2": [0, 6]}, LAYERS: {"layers": 8}}, (RANK, LAYERS))


def searched(folder: Path, objective: Objective | None = None, **settings: Any) -> Search:
    search = Search(space(), objective or Objective(), SearchSettings(**settings), Ledger(folder / "trials.jsonl"))
    search.run()
    return search


def points(search: Search, kind: str, rung: int = 0) -> list[Point]:
    return [trial.point(rung) for trial in search.of(kind) if rung in trial.outcomes]


def share(found: Sequence[Point]) -> float:
    """Of the true hypervolume."""
    return hypervolume(found, known()["reference_point"]) / known()["true_hypervolume"]


def test_the_objective_and_the_hypervolume_are_those_of_the_fixture() -> None:
    about = known()
    exact = [(one["cost"], one["score"]) for one in about["front"]]
    assert share(exact) == pytest.approx(1, abs=1e-9)
    assert share(exact[:-1]) < 1
    for one in about["front"]:
        choices = {RANK: one["log2_rank"], **{f"{LAYERS}[{layer}]": used for layer, used in enumerate(one["layers"])}}
        outcome = Objective().outcome("", choices, 1.0)
        assert (outcome.cost, outcome.score) == pytest.approx((one["cost"], one["score"]), abs=1e-6)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_120_trials_enclose_93_percent_of_the_hypervolume_and_more_than_chance(seed: int, tmp_path: Path) -> None:
    search = searched(tmp_path, trials=120, control=40 if seed == 0 else 120, halving=False, seed=seed)
    found, chance = points(search, SEARCH), points(search, CONTROL)
    assert len(found) == 120
    assert len({search.space.key(trial.choices) for trial in search.of(SEARCH)}) == 120  # what is known is not tried again
    assert share(found) >= 0.93
    assert share(found[: len(chance)]) > share(chance)
    own = [found[i] for i in front(found)]
    assert not any(other[0] <= one[0] and other[1] >= one[1] and other != one for one in own for other in found)


@pytest.mark.slow
def test_thirds_that_go_on_beat_as_many_whole_runs_by_chance(tmp_path: Path) -> None:
    """81 configurations at a ninth, 27 at a third and 9 to the end cost 27 whole runs. Both sides are drawn by chance; TPE comes on top."""
    halved, whole = [], []
    for seed in range(20):
        halved.append(share(points(searched(tmp_path / f"{seed}h", trials=1, control=81, seed=seed), CONTROL, rung=2)))
        whole.append(share(points(searched(tmp_path / f"{seed}w", trials=1, control=27, halving=False, seed=seed), CONTROL)))
    assert mean(halved) > mean(whole)
    found = searched(tmp_path / "tpe", trials=81, control=0)
    assert [len(points(found, SEARCH, rung)) for rung in range(3)] == [81, 27, 9]
    assert share(points(found, SEARCH, rung=2)) > mean(halved)


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_resumed_the_ledger_is_that_of_a_straight_run(jobs: int, tmp_path: Path) -> None:
    """Killed in the first rung, in the middle of the second, and while chance draws: 20 trials, 7 at a third, 3 to the end, then 6 of chance."""
    of = {"trials": 20, "control": 6, "jobs": jobs}
    straight = searched(tmp_path / "straight", **of).ledger.path.read_text()
    assert '"rung": 2' in straight
    for killed_after in (5, 23, 33):
        folder = tmp_path / str(killed_after)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            searched(folder, Objective(kill_after=killed_after), **of)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert len((folder / "trials.jsonl").read_text()) < len(straight)
        again = Objective()
        assert searched(folder, again, **of).ledger.path.read_text() == straight
        assert 0 < again.asked < straight.count('"event": "rung"')


def test_twelve_trials_and_twelve_more_are_twenty_four(tmp_path: Path) -> None:
    whole = searched(tmp_path / "a", trials=24, control=0, halving=False)
    searched(tmp_path / "b", trials=12, control=0, halving=False)
    more = Objective()
    both = searched(tmp_path / "b", more, trials=24, control=0, halving=False)
    assert more.asked == 12
    assert [trial.choices for trial in both.of(SEARCH)] == [trial.choices for trial in whole.of(SEARCH)]
    assert [trial.choices for trial in searched(tmp_path / "c", trials=12, control=0, halving=False, seed=1).of(SEARCH)] != [
        trial.choices for trial in whole.of(SEARCH)[:12]
    ]


def test_a_failed_trial_is_counted_and_named_and_has_no_score(tmp_path: Path) -> None:
    search = searched(tmp_path, Objective(fails=("search-003", "search-011")), trials=16, control=0, halving=False)
    failed = {trial.name: trial.reason for trial in search.of(SEARCH) if trial.reason}
    assert failed == dict.fromkeys(("search-003", "search-011"), "the rank is above the width")
    assert len(points(search, SEARCH)) == 14
    assert sum(event["event"] == "failed" for event in search.ledger.events) == 2


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path) -> None:
    small = Space.read({RANK: {"log2": [0, 2]}, "train.batch_size": {"one_of": [1, 2]}}, (RANK, "train.batch_size"))

    class Small(Objective):
        def outcome(self, name: str, choices: Choices, share: float) -> Outcome:
            return Outcome(cost=2.0 ** choices[RANK], score=1.0)

    search = Search(small, Small(), SearchSettings(trials=30, control=9, halving=False), Ledger(tmp_path / "trials.jsonl"))
    search.run()
    assert (len(search.of(SEARCH)), len(search.of(CONTROL))) == (6, 6)
    assert sum("same_as" in event for event in search.ledger.of("rung")) == 6  # chance draws what is known already


def test_a_line_that_a_kill_cut_is_dropped_at_the_end_and_refused_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    ledger = Ledger(path)
    ledger.begin({"space": {"a": 1}, "data": "x"}, "a search")
    ledger.add("asked", trial="search-000")
    whole = path.read_text()
    path.write_text(whole + '{"event": "rung", "tri')
    assert [event["event"] for event in Ledger(path).events] == ["begun", "asked"]
    assert path.read_text() == whole
    for name, value in (("space", {"a": 2}), ("data", "y")):
        with pytest.raises(DataError, match=f"is of a search with another {name}"):
            Ledger(path).begin({"space": {"a": 1}, "data": "x"} | {name: value}, "a search")
    path.write_text(whole.replace('{"event": "asked"', '{"event"', 1))
    with pytest.raises(DataError, match="is damaged: line 2 is no event"):
        Ledger(path)


def test_sorting_takes_front_after_front_and_ties_by_their_order() -> None:
    assert front([(1, 5), (1, 5), (2, 5), (2, 6), (0, 1)]) == [4, 0, 3]
    assert ordered([(4, 1), (1, 1), (2, 2), (3, 3), (8, 2.5)]) == [1, 3, 2, 0, 4]  # the ends of a front come before its middle


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"control": -1}, {"jobs": 0}, {"seed": -1}])
def test_senseless_counts_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="give 1 or more trials and jobs"):
        SearchSettings(**wrong)

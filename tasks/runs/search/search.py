"""The search itself: configurations are proposed, tried on few steps, and the best third goes on, beside as many that chance draws."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from adalink.errors import AdalinkError, ConfigError, TerminatedError
from tasks.runs.search.space import Choices, Space, check_optuna
from tasks.runs.search.trials import Ledger

__all__ = [
    "CONTROL", "SEARCH", "Objective", "Outcome", "Point", "Search", "SearchSettings", "Trial", "first_third", "front", "front_of", "hypervolume",
    "ordered",
]  # fmt: skip


# ----------------------------------------
# Two objectives, of which less cost and more score are better.


Point = tuple[float, float]  # cost, score


def front(points: Sequence[Point]) -> list[int]:
    """The indices of the points that no other one dominates, by cost; of equal points the first."""
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not found or points[index][1] > points[found[-1]][1]:
            found.append(index)
    return found


def ordered(points: Sequence[Point]) -> list[int]:
    """All indices, by non-dominated sorting: the front, then the front of the rest; inside each those first whose neighbours are farthest (NSGA-II)."""
    left, found = list(range(len(points))), []
    while left:
        own = [left[i] for i in front([points[i] for i in left])]
        room = dict(zip(own, _room([points[i] for i in own]), strict=True))
        found += sorted(own, key=lambda i: (-room[i], i))
        left = [i for i in left if i not in room]
    return found


def first_third(points: Sequence[Point]) -> list[int]:
    """The third, rounded up, that comes first in non-dominated sorting; in the order of the points."""
    return sorted(ordered(points)[: -(-len(points) // 3)])


def _room(points: Sequence[Point]) -> list[float]:
    """The crowding distance along a front; infinite at its ends. Costs count by their logarithm: they span orders of magnitude."""
    sides = [[math.log2(1 + cost) for cost, _ in points], [score for _, score in points]]
    room = [0.0] * len(points)
    for values in sides:
        span = (max(values) - min(values)) or 1.0
        for i in range(len(values)):
            room[i] += math.inf if i in (0, len(values) - 1) else abs(values[i + 1] - values[i - 1]) / span
    return room


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The area between the front and a reference point of more cost and less score; cost as log2(1 + cost)."""
    area, edge, best = 0.0, math.log2(1 + reference[0]), reference[1]
    for cost, score in (points[i] for i in front(points)):
        if cost < reference[0] and score > best:
            area += (edge - math.log2(1 + cost)) * (score - best)
            best = score
    return area


# ----------------------------------------
# Trials.

SEARCH, CONTROL = "search", "control"
HALVING, WHOLE = (1 / 9, 1 / 3, 1.0), (1.0,)  # the rungs: shares of a run's steps
FEW_TRIES, MANY_TRIES = 5, 200  # proposals for one trial that are known already: then chance proposes; then the space is taken to be used up


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How much is tried.

    trials    configurations that the search proposes
    control   configurations that chance draws of the same space, trained likewise
    halving   thirds go on from a ninth of the steps to a third to all; else every trial is a whole run
    jobs      trainings at once; proposals know nothing of those that run beside them
    """

    trials: int = 60
    control: int = 20
    halving: bool = True
    seed: int = 0
    jobs: int = 1

    def __post_init__(self) -> None:
        """Check what an option can get wrong."""
        if self.trials < 1 or self.control < 0 or self.jobs < 1 or self.seed < 0:
            raise ConfigError(
                f"trials is {self.trials}, control {self.control}, jobs {self.jobs} and seed {self.seed}: give 1 or more trials and jobs, and 0 or more of "
                "the others"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the steps, at each rung."""
        return HALVING if self.halving else WHOLE


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a configuration costs and reached after a share of the steps."""

    cost: float
    score: float
    seconds: float = 0.0


class Objective(Protocol):
    """What trains a configuration."""

    def outcome(self, name: str, choices: Choices, share: float) -> Outcome:
        """After a share of the steps, going on from an earlier share exactly. name: the trial's.

        Raises an error of adalink's, whose sentence is the reason, where the configuration gives no score.
        """


@dataclass
class Trial:
    """A configuration: what was drawn, and what came of it by rung. reason: why it failed, or empty."""

    name: str
    number: int
    choices: Choices
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    reason: str = ""
    rungs: int = 0  # after which it was finished

    def point(self, rung: int) -> tuple[float, float]:
        """(cost, score); the cost is that of the first rung."""
        return self.outcomes[0].cost, self.outcomes[rung].score


def front_of(trials: Sequence[Trial], rung: int) -> list[Trial]:
    """Those that no other one dominates, among the trials that reached a rung; by cost."""
    reached = [trial for trial in trials if rung in trial.outcomes]
    return [reached[i] for i in front([trial.point(rung) for trial in reached])]


class Search:
    """Trials by name, as the ledger has them; `run` does what is missing. A search that was killed goes on to the same trials."""

    def __init__(self, space: Space, objective: Objective, settings: SearchSettings, ledger: Ledger) -> None:
        self.space, self.objective, self.settings, self.ledger = space, objective, settings, ledger
        self.optuna = check_optuna()
        self._study = self.optuna.create_study(directions=["minimize", "maximize"])
        self._n_known = 0  # trials of the search that it knows
        self.trials: dict[str, Trial] = {}
        for event in ledger.of("asked", "rung", "failed", "finished"):
            self._read(event)

    def _read(self, event: Mapping[str, Any]) -> None:
        name = event["trial"]
        if event["event"] == "asked":
            self.trials[name] = Trial(name=name, number=event["number"], choices=event["choices"])
        elif event["event"] == "rung":
            self.trials[name].outcomes[event["rung"]] = Outcome(cost=event["cost"], score=event["score"], seconds=event["seconds"])
        elif event["event"] == "failed":
            self.trials[name].reason = event["reason"]
        else:
            self.trials[name].rungs = event["rungs"]

    def of(self, kind: str) -> list[Trial]:
        """The trials of the search or of the control, by number."""
        return sorted((trial for trial in self.trials.values() if trial.name.startswith(kind)), key=lambda trial: trial.number)

    def run(self) -> None:
        """Everything that the settings ask for. Raises TerminatedError where a training was asked to end."""
        for kind, count in ((SEARCH, self.settings.trials), (CONTROL, self.settings.control)):
            self._first_rung(kind, count)
            going = [trial for trial in self.of(kind) if not trial.reason]
            for rung in range(1, len(self.settings.shares)):
                chosen = first_third([trial.point(rung - 1) for trial in going])
                self._finish([trial for i, trial in enumerate(going) if i not in chosen], rung)
                going = [going[i] for i in chosen]
                self._train(going, rung)
                going = [trial for trial in going if not trial.reason]
            self._finish(going, len(self.settings.shares))

    def _first_rung(self, kind: str, count: int) -> None:
        """Ask for as many configurations as run at once, and train them; each batch knows the outcomes of those before it."""
        for start in range(0, count, self.settings.jobs):
            batch = []
            for number in range(start, min(start + self.settings.jobs, count)):
                name = f"{kind}-{number:03d}"
                if name not in self.trials and not self._ask(kind, name, number):
                    break
                batch.append(self.trials[name])
            self._train(batch, 0)
            if len(batch) < min(self.settings.jobs, count - start):
                return  # every configuration of the space is known

    def _ask(self, kind: str, name: str, number: int) -> bool:
        """Write down the next configuration. One that is known is not tried again, and another one is asked for; False where there is none."""
        earlier = [trial for trial in self.of(kind) if trial.number < number]
        keys = {self.space.key(trial.choices) for trial in earlier}
        if kind == SEARCH:
            self._teach(earlier[: number - number % self.settings.jobs])
        for attempt in range(MANY_TRIES):
            choices = self._proposed(f"{self.settings.seed} {kind} {number} {attempt}", by_chance=kind == CONTROL or attempt >= FEW_TRIES)
            if self.space.key(choices) not in keys:
                self._read(self.ledger.add("asked", trial=name, number=number, choices=choices, values=self.space.values(choices), repeated=attempt))
                return True
        return False

    def _teach(self, known: Sequence[Trial]) -> None:
        """Give the sampler the outcomes of the batches before."""
        for trial in known[self._n_known :]:
            self._study.add_trial(self._frozen(trial))
            self._n_known += 1

    def _proposed(self, seed: str, by_chance: bool) -> Choices:
        """By multivariate TPE, or by chance. The sampler is new for each proposal, which depends on the seed and on what the study knows alone."""
        samplers, number = self.optuna.samplers, zlib.crc32(seed.encode())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate is marked as experimental
            self._study.sampler = samplers.RandomSampler(seed=number) if by_chance else samplers.TPESampler(multivariate=True, seed=number)
        asked = self._study.ask()
        choices = self.space.drawn(asked)
        self._study.tell(asked, state=self.optuna.trial.TrialState.FAIL)  # it is added when it is known
        return choices

    def _frozen(self, trial: Trial) -> Any:
        """A trial as Optuna knows it after the first rung; a failed one has no values."""
        if 0 not in trial.outcomes:
            return self._as_optuna(trial, state=self.optuna.trial.TrialState.FAIL)
        cost, score = trial.point(0)
        return self._as_optuna(trial, values=[math.log2(1 + cost), score])

    def _as_optuna(self, trial: Trial, **outcome: Any) -> Any:
        return self.optuna.trial.create_trial(params=dict(trial.choices), distributions=self.space.distributions(), **outcome)

    def _train(self, trials: Sequence[Trial], rung: int) -> None:
        """To a rung, those that have not reached it; the ledger has them in their order."""
        missing = [trial for trial in trials if rung not in trial.outcomes and not trial.reason]
        with ThreadPoolExecutor(self.settings.jobs) as pool:
            for trial, (outcome, more) in zip(missing, pool.map(lambda one: self._outcome(one, rung), missing), strict=True):
                about = {"trial": trial.name, "rung": rung, **more}
                if isinstance(outcome, str):
                    self._read(self.ledger.add("failed", **about, reason=outcome))
                else:
                    self._read(self.ledger.add("rung", **about, **vars(outcome)))

    def _outcome(self, trial: Trial, rung: int) -> tuple[Outcome | str, dict[str, Any]]:
        """Or the reason why there is none; and the trial of the same configuration whose outcome it is, where there is one."""
        key = self.space.key(trial.choices)
        for other in self.trials.values():
            if rung in other.outcomes and other.name != trial.name and self.space.key(other.choices) == key:
                return Outcome(cost=other.outcomes[rung].cost, score=other.outcomes[rung].score), {"same_as": other.name}
        try:
            outcome = self.objective.outcome(trial.name, trial.choices, self.settings.shares[rung])
        except TerminatedError:
            raise
        except AdalinkError as error:
            return str(error), {}
        return (outcome, {}) if math.isfinite(outcome.score) else (f"the score is {outcome.score}", {})

    def _finish(self, trials: Sequence[Trial], rungs: int) -> None:
        """Write down that trials go no further than so many rungs."""
        for trial in trials:
            if trial.rungs != rungs:
                cost, score = trial.point(rungs - 1)
                self._read(self.ledger.add("finished", trial=trial.name, rungs=rungs, cost=cost, score=score))

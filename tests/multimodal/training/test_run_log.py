from __future__ import annotations

import json
from pathlib import Path

import pytest

from adalink.errors import BudgetError
from multimodal.sample import BadSample
from multimodal.training.records import BAD_FILE, METRICS_FILE, RunLog

CAT, DOG = BadSample(key="cat", reason="truncated", detail="it ends"), BadSample(key="dog", reason="no text")


def log(folder: Path, budget: int = 9, is_main: bool = True) -> RunLog:
    return RunLog(folder, budget=budget, is_main=is_main)


def lines(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_one_line_each(tmp_path: Path) -> None:
    for step in (1, 2):
        log(tmp_path).write({"step": step, "loss": 0.5})
    assert lines(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]


def test_a_bad_sample_is_counted_once_however_often_it_is_met(tmp_path: Path) -> None:
    run = log(tmp_path)
    for _ in range(3):
        run.skip([CAT, DOG])
    run.skip([BadSample(key="7", reason="truncated", file="a.jpg")])
    assert run.bad.counts == {"truncated": 2, "no text": 1}
    assert lines(tmp_path / BAD_FILE) == [
        {"key": "cat", "reason": "truncated", "detail": "it ends"},
        {"key": "dog", "reason": "no text", "detail": ""},
        {"key": "7", "reason": "truncated", "detail": "", "file": "a.jpg"},
    ]
    again = log(tmp_path)
    again.rewind(0)
    assert again.bad.summary() == "2 truncated (cat, 7 a.jpg), 1 no text (dog)"


def test_one_sample_with_two_troubles_is_counted_for_each(tmp_path: Path) -> None:
    run = log(tmp_path)
    run.skip([CAT, BadSample(key="cat", reason="empty caption")])
    assert run.bad.counts == {"truncated": 1, "empty caption": 1}


def test_the_budget_is_checked_when_the_whole_batch_is_counted(tmp_path: Path) -> None:
    run = log(tmp_path, budget=0)
    with pytest.raises(BudgetError, match=r"2 bad samples, and at most 0 are allowed: 1 truncated \(cat\), 1 no text \(dog\)"):
        run.skip([CAT, DOG])


def test_a_resumed_run_forgets_later_steps_and_lines_that_were_cut_off_and_keeps_its_count(tmp_path: Path) -> None:
    first = log(tmp_path)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": 1.0})
    first.skip([CAT])
    for name, cut in ((METRICS_FILE, '{"step": 2, "lo'), (BAD_FILE, '{"key": "dog", "rea')):
        with (tmp_path / name).open("a") as file:
            file.write(cut)
    second = log(tmp_path, budget=1)
    second.rewind(2)
    assert lines(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    assert second.bad.counts == {"truncated": 1}
    second.skip([CAT])
    second.write({"step": 3, "loss": 2.0})
    assert len(lines(tmp_path / METRICS_FILE)) == 3
    with pytest.raises(BudgetError, match="2 bad samples"):
        second.skip([DOG])
    assert len(lines(tmp_path / BAD_FILE)) == 2


def test_a_run_that_wrote_nothing_yet_can_be_rewound(tmp_path: Path) -> None:
    log(tmp_path).rewind(0)
    assert not list(tmp_path.iterdir())


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    other = log(tmp_path, is_main=False)
    other.write({"step": 1})
    other.skip([CAT])
    other.rewind(0)
    assert not list(tmp_path.iterdir())
    assert other.bad.counts == {"truncated": 1}

"""A sweep of values, the list of runs that it leaves, and the table and page of several runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_run import RECIPES, SMALL, Done, adalink, refused, train

from adalink.errors import ConfigError
from tasks.commands.train import swept


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    out = tmp_path_factory.mktemp("runs") / "sweep"
    return out, train("captioning", out, "--train.learning_rate", "0.001,0.003", "--train.seed=1,2", "--train.log_every", "1")


RUNS = [f"learning_rate={rate},seed={seed}" for rate in ("0.001", "0.003") for seed in (1, 2)]


def test_each_value_is_trained_into_a_folder_of_its_own(sweep: tuple[Path, Done]) -> None:
    out, done = sweep
    assert done.code == 0, done
    assert sorted(path.name for path in out.iterdir()) == RUNS
    assert [json.loads((out / name / "metrics.jsonl").read_text().splitlines()[0])["rate"] for name in RUNS] == pytest.approx([0.001, 0.001, 0.003, 0.003])
    table = done.out[done.out.rindex("run  ") :].splitlines()
    assert [line.split()[0] for line in table[1:5]] == RUNS
    assert any(line.split() == ["train.learning_rate", "0.001", "0.001", "0.003", "0.003"] for line in table)
    assert any(line.split() == ["train.seed", "1", "2", "1", "2"] for line in table)
    assert table[-1] == f"report: {out / RUNS[-1] / 'comparison.html'}"


def test_the_page_holds_the_table_and_the_curves_of_all(sweep: tuple[Path, Done]) -> None:
    page = (sweep[0] / RUNS[-1] / "comparison.html").read_text()
    assert all(page.count(name) >= 4 for name in RUNS)  # in both tables and under each curve
    assert page.count('class="series3"') == 2 * page.count('role="img"') > 2
    assert "Curves of loss of" in page
    assert "train.learning_rate" in page


def test_runs_are_listed_and_compared(sweep: tuple[Path, Done], tmp_path: Path) -> None:
    out, _ = sweep
    listed = adalink("runs", out)
    assert listed.code == 0, listed
    lines = [line.split() for line in listed.out.splitlines()]
    assert [line[0] for line in lines] == ["run", *RUNS]
    assert lines[1][1:3] == ["captioning", "CIDEr"]
    done = adalink("compare", *(out / name for name in RUNS[:3]), "--json", "--report", tmp_path / "page.html")
    runs = json.loads(done.out)["runs"]
    assert [run["settings"] for run in runs] == [{"train.learning_rate": rate, "train.seed": seed} for rate, seed in ((0.001, 1), (0.001, 2), (0.003, 1))]
    assert set(runs[0]["metrics"]) >= {"CIDEr", "Bleu_4"}
    assert (tmp_path / "page.html").exists()
    same = [Path(shutil.copytree(out / RUNS[0], tmp_path / name)) for name in "abc"]
    assert "no setting differs" in adalink("compare", *same).out


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    assert "holds no finished run" in refused(adalink("runs", tmp_path))
    assert "is no folder" in refused(adalink("runs", tmp_path / "no"))
    assert "is no run folder" in refused(adalink("compare", tmp_path, tmp_path, tmp_path))


def test_one_value_that_is_a_list_or_a_text_is_no_sweep(tmp_path: Path) -> None:
    for value in (["--train.betas", "[0.9,0.99]"], ["--train.learning_rate", "0.1"], ["--captioning.template.prompt", "a, b"], ["--methods.lora", "{rank: 2, alpha: 3}"]):
        assert swept(["train", *value, "--out", "x"]) is None
    assert swept(["evaluate", "--train.learning_rate", "1,2"]) is None
    found = swept(["train", "--train.learning_rate=1e-3, 3e-3", "--out", "x"])
    assert found is not None
    assert [(arguments[1], out) for arguments, out in found.runs] == [(f"--train.learning_rate={value}", Path("x") / f"learning_rate={value}") for value in ("1e-3", "3e-3")]
    with pytest.raises(ConfigError, match="one of the values between its commas is empty"):
        swept(["train", "--train.steps", "1,,2", "--out", "x"])
    with pytest.raises(ConfigError, match="a sweep needs `out`"):
        swept(["train", "--train.steps", "1,2"])
    (tmp_path / "config.yaml").write_text("out: here\n")
    found = swept(["train", "--config", str(tmp_path / "config.yaml"), "--train.steps", "1,2"])
    assert found is not None
    assert found.runs[0][1] == Path("here") / "steps=1"


def test_a_sweep_ends_at_the_first_run_that_is_refused(tmp_path: Path) -> None:
    done = adalink("train", "--config", RECIPES["captioning"], *SMALL, "--out", tmp_path / "out", "--train.batch_size", "0,2")
    assert "batch_size" in refused(done)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True

"""`adalink data check`: every image is decoded, and what training would skip is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import adalink, refused, train
from PIL import Image


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Captions of three images, of which one is cut in its pixels."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "c.png"):
        Image.effect_noise((64, 64), 50).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"image": name, "text": f"this is {name}"}) + "\n" for name in ("a.png", "b.png", "c.png", "d.png")))
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_what_training_would_skip_is_named_with_file_and_line(table: Path, workers: int) -> None:
    done = adalink("data", "check", table, "--workers", workers, "--out", "skipped.jsonl")
    assert refused(done).startswith("2 bad samples, and at most 0 are allowed: 1 missing file (d.png), 1 truncated (b.png)")
    assert "t.jsonl, line 2: " in done.out
    assert "t.jsonl, line 4: " in done.out
    assert done.out.splitlines()[-2:] == ["2 bad samples, which training would skip; 2 images can be used", "skipped.jsonl: all 2 samples"]
    rows = [json.loads(line) for line in Path("skipped.jsonl").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["d.png", "missing file"], ["b.png", "truncated"]]


def test_the_exit_code_follows_the_budget(table: Path) -> None:
    assert refused(adalink("data", "check", table, "--workers", 0, "--bad_samples", 1)).startswith("2 bad samples, and at most 1 is allowed")
    assert adalink("data", "check", table, "--workers", 0, "--bad-samples", 2).code == 0
    table.write_text(json.dumps({"image": "a.png", "text": "whole"}) + "\n")
    done = adalink("data", "check", table, "--workers", 0)
    assert (done.code, done.out.splitlines()[-1]) == (0, "1 image can be used")


def test_a_task_needs_texts_of_its_own(table: Path) -> None:
    table.write_text(json.dumps({"image": "a.png", "text": "a caption"}) + "\n")
    assert adalink("data", "check", table, "--workers", 0, "--task", "captioning").code == 0
    assert "1 no text (a.png)" in refused(adalink("data", "check", table, "--workers", 0, "--task", "vqa"))


def test_a_training_skips_what_the_check_named(table: Path, tmp_path: Path) -> None:
    (tmp_path / "f.png").write_bytes(b"")
    table.write_text("".join(json.dumps({"image": name, "text": "a thing"}) + "\n" for name in ("a.png", "b.png", "c.png", "d.png", "f.png")))
    adalink("data", "check", table, "--workers", 0, "--out", "skipped.jsonl", "--task", "captioning")
    small = ("--data.val.scenes", "val/1", "--train.steps", "2", "--train.batch_size", "5", "--generation.max_new_tokens", "3")
    done = train("captioning", tmp_path / "run", "--data.train.scenes", "null", "--data.train.path", str(table), "--train.bad_samples", "9", small=small)
    assert done.code == 0, done
    met = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    named = [json.loads(line) for line in Path("skipped.jsonl").read_text().splitlines()]
    assert {(bad["key"], bad["reason"]) for bad in met} == {(key, reason) for key, reason, *_ in named}
    assert len(named) == 3

"""The demo as a person runs it: one command, offline, and figures that only a model which looks at the picture can reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.task import BLIND, TRAINED, UNTRAINED

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]  # only ends a hang: minutes on two free cores


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "runs"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "tasks.cli", "demo", "--out", str(out)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def figures(demo: tuple[Path, str], task: str, name: str) -> tuple[float, float, float]:
    rows = json.loads((demo[0] / task / "metrics.json").read_text())["rows"]
    return rows[UNTRAINED][name], rows[TRAINED][name], rows[BLIND][name]


def test_captions_depend_on_the_picture(demo: tuple[Path, str]) -> None:
    untrained, trained, blind = figures(demo, "captioning", "CIDEr")
    assert trained >= 3 * blind
    assert trained >= 3 * untrained


def test_answers_depend_on_the_picture(demo: tuple[Path, str]) -> None:
    untrained, trained, blind = figures(demo, "vqa", "accuracy")
    assert trained >= blind + 20
    assert trained >= untrained + 20


def test_the_tables_are_printed_and_every_file_is_there(demo: tuple[Path, str]) -> None:
    out, printed = demo
    assert sum(line.startswith(TRAINED) for line in printed.splitlines()) == 4  # after each run, and together at the end
    for task in ("captioning", "vqa"):
        assert {"adapter", "metrics.jsonl", "metrics.json", "config.yaml", "results.json", "report.html"} <= {p.name for p in (out / task).iterdir()}
        page = (out / task / "report.html").read_text()
        assert page.count("<svg") >= 3  # loss, rate, and the task's own figure
        assert page.count("data:image/") == 24


def test_a_saved_adapter_captions_and_answers_from_the_command_line(demo: tuple[Path, str], tmp_path: Path) -> None:
    from tasks.scenes.dataset import Scenes

    sample = Scenes(split="val", size=1)[0]
    picture = tmp_path / "scene.png"
    picture.write_bytes(sample.image)  # type: ignore[arg-type]
    expected = {task: json.loads((demo[0] / task / "results.json").read_text())[0] for task in ("captioning", "vqa")}

    def said(*arguments: str) -> str:
        return subprocess.run([sys.executable, "-m", "tasks.cli", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    assert said("caption", "--adapter", str(demo[0] / "captioning" / "adapter"), str(picture)) == expected["captioning"]["caption"]
    question = sample.questions[0]
    assert question.question_id == expected["vqa"]["question_id"]
    assert said("ask", "--adapter", str(demo[0] / "vqa" / "adapter"), str(picture), question.text) == expected["vqa"]["answer"]

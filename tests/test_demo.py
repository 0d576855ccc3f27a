"""The demo as a person runs it: one command, offline, and metrics that only a model which looks at the image can reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from cli_run import adalink

from tasks.cli import main
from tasks.commands.demo import RECIPES
from tasks.scenes.dataset import Scenes
from tasks.task import BLIND, TRAINED, UNTRAINED

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]  # only ends a hang: minutes on two free cores


# What the default suite trains: a quarter of the demo, which is enough for a model that looks. The demo itself is slow.
SHORT = {"data": {"train": {"scenes": "train/600"}, "val": {"scenes": "val/40"}}, "train": {"steps": 160, "epochs": None, "measure_every": 80}}


def shortened(folder: Path) -> dict[str, Path]:
    """Recipes like those of the demo, for fewer steps on fewer scenes."""
    found = {}
    for task, recipe in RECIPES.items():
        content = yaml.safe_load(recipe.read_text())
        for group, values in SHORT.items():
            content[group] |= values
        found[task] = folder / recipe.name
        found[task].write_text(yaml.safe_dump({**content, "train": {name: value for name, value in content["train"].items() if value is not None}}))
    return found


@pytest.fixture(scope="module", params=["short", pytest.param("whole", marks=pytest.mark.slow)])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder of the runs, and what was printed to stdout and stderr."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "short":
            patched.setattr("tasks.commands.demo.RECIPES", shortened(folder))
        done = adalink("demo", "--out", folder / "runs")
    assert done.code == 0, done.err[-2000:]
    return folder / "runs", done.out, done.err


def is_short(demo: tuple[Path, str, str]) -> bool:
    return (demo[0].parent / "vqa.yaml").exists()


def metrics(demo: tuple[Path, str, str], task: str, name: str) -> tuple[float, float, float]:
    rows = json.loads((demo[0] / task / "metrics.json").read_text())["rows"]
    return rows[UNTRAINED][name], rows[TRAINED][name], rows[BLIND][name]


def test_captions_depend_on_the_image(demo: tuple[Path, str, str]) -> None:
    untrained, trained, blind = metrics(demo, "captioning", "CIDEr")
    assert trained >= 3 * blind
    assert trained >= 3 * untrained


def test_answers_depend_on_the_image(demo: tuple[Path, str, str]) -> None:
    """After a short training 50 % are right, 37 % untrained and 34 % with other images."""
    untrained, trained, blind = metrics(demo, "vqa", "accuracy")
    assert trained >= blind + (8 if is_short(demo) else 20)
    assert trained >= untrained + (6 if is_short(demo) else 20)


def test_the_tables_are_printed_and_every_file_is_there(demo: tuple[Path, str, str]) -> None:
    out, printed, log = demo
    assert printed.startswith("A frozen encoder and a frozen language model")
    assert sum(line.startswith(TRAINED) for line in printed.splitlines()) == 2
    for task in ("captioning", "vqa"):
        own = [line for line in (printed + log).splitlines() if line.startswith(f"{task:10} | ")]
        assert sum(f"| {TRAINED}" in line for line in own) == 1
        assert sum(line.endswith("s left") for line in own) > (6 if is_short(demo) else 20)
        assert {"adapter", "metrics.jsonl", "metrics.json", "config.yaml", "results.json", "report.html"} <= {p.name for p in (out / task).iterdir()}
        page = (out / task / "report.html").read_text()
        assert page.count("<svg") >= 3  # loss, rate, and the task's own metric
        assert page.count("data:image/") == 24


def test_a_saved_adapter_captions_and_answers_from_the_command_line(
    demo: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = Scenes(split="val", size=1)[0]
    image = tmp_path / "scene.png"
    image.write_bytes(sample.image)  # type: ignore[arg-type]
    expected = {task: json.loads((demo[0] / task / "results.json").read_text())[0] for task in ("captioning", "vqa")}

    def answer(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out.strip()

    assert answer("caption", "--adapter", demo[0] / "captioning" / "adapter", image) == expected["captioning"]["caption"]
    question = sample.questions[0]
    assert question.question_id == expected["vqa"]["question_id"]
    assert answer("ask", "--adapter", demo[0] / "vqa" / "adapter", image, question.text) == expected["vqa"]["answer"]

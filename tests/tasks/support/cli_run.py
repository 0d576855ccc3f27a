"""The command line for tests: in this process, since importing it costs seconds, with small runs on the embedded scenes and on files."""

from __future__ import annotations

import contextlib
import io
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from shared import ROOT

from tasks.cli import main
from tasks.commands import Command, parser
from tasks.runs.search.trials import Process, TrialFailed, _reason
from tasks.scenes import encoder_folder, language_folder
from tasks.scenes.dataset import Scenes

Write = Callable[[str, object], Path]  # a document under a name, as JSON
SCENES = ROOT / "tasks" / "scenes"
RECIPES = {"captioning": SCENES / "captioning.yaml", "vqa": SCENES / "vqa.yaml"}
WIDTH: int = json.loads((language_folder() / "config.json").read_text())["hidden_size"]
FEATURE_WIDTH: int = json.loads((encoder_folder() / "config.json").read_text())["num_features"]

# The recipes may change; what the tests count on is this.
FIXED = (
    "--methods.bridge", "{kind: mlp, hidden: 128, init_scale: 1.0}", "--methods.adalink", "{rank: 16, modalities: [image, text]}", "--train.learning_rate", "0.002",
    "--train.learning_rates", "{}", "--train.betas", "[0.9, 0.999]", "--train.weight_decay", "0.01", "--train.measure_every", "0", "--captioning.captions_per_image", "3",
)  # fmt: skip
SMALL = (
    "--data.train.scenes", "train/8", "--data.val.scenes", "val/4", "--train.steps", "2", "--train.batch_size", "2",
    "--generation.max_new_tokens", "3",
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int | str | None
    out: str
    err: str


_new_parser = parser._new_parser


@cache
def parser_of(words: tuple[str, ...], command: Command) -> Any:
    """The parser of a command, made once: a tenth of a second, most of what a refused command takes."""
    return _new_parser(words, command)


def known_parser(words: Sequence[str], command: Command, **about: Any) -> Any:
    """In place of the function that makes one for each command line."""
    return _new_parser(words, command, **about) if about else parser_of(tuple(words), command)


def adalink(*arguments: object) -> Done:
    """Run a command in this process; an exception that is not one of ours comes through, as its traceback would."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(parser, "_new_parser", known_parser):
        try:
            code: int | str | None = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return Done(code, out.getvalue(), err.getvalue())


def trial_here(arguments: Sequence[str]) -> Process:
    """A trial's command in this process, where it takes a second; raises TrialFailed as one in a process of its own does."""
    try:
        done = adalink(*arguments)
    except Exception:  # in a process of its own the traceback would be printed
        done = Done(1, "", traceback.format_exc())
    if done.code:
        raise TrialFailed(_reason(int(done.code), done.err))
    return Process(1.0, 1.0)


def refused(done: Done) -> str:
    """The one sentence of a command that was refused: the last line on stderr, with exit code 2 and no traceback."""
    lines = done.err.splitlines()
    assert done.code == 2, done
    assert "Traceback" not in done.err + done.out
    assert sum(line.startswith("adalink: ") for line in lines) == 1, done.err
    assert lines[-1].startswith("adalink: ")
    assert len(lines[-1]) < 500
    return lines[-1].removeprefix("adalink: ")


def train(task: str, out: Path, *overrides: object, small: tuple[str, ...] = SMALL) -> Done:
    """A small training run on scenes."""
    return adalink("train", "--config", RECIPES[task], "--out", out, *FIXED, *small, *overrides)


def hostile(folder: Path) -> Path:
    """A working folder with a `tasks` and a `multimodal` of somebody else's, each of which ends the program."""
    for name in ("tasks", "multimodal"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise SystemExit('{name} of the working folder was imported')\n")
    return folder


@dataclass
class Files:
    """Images in a folder, with captions in COCO's format and questions in VQAv2's: change the documents, then `save`."""

    folder: Path
    n: int = 6
    captions: dict[str, Any] = field(default_factory=lambda: {"images": [], "annotations": []})
    questions: dict[str, Any] = field(default_factory=lambda: {"questions": []})
    answers: dict[str, Any] = field(default_factory=lambda: {"annotations": []})

    def __post_init__(self) -> None:
        (self.folder / "pictures").mkdir(parents=True)
        for i in range(self.n):
            sample = Scenes(split="train", size=self.n)[i]
            assert isinstance(sample.image, bytes)
            self.image(i).write_bytes(sample.image)
            self.captions["images"].append({"id": i, "file_name": f"{i}.png"})
            self.captions["annotations"] += [{"id": 10 * i + j, "image_id": i, "caption": text} for j, text in enumerate(sample.captions)]
            for question in sample.questions:
                ids = {"question_id": question.question_id, "image_id": i}
                self.questions["questions"].append({**ids, "question": question.text})
                answers = [{"answer": text, "answer_id": j} for j, text in enumerate(question.answers, start=1)]
                self.answers["annotations"].append({**ids, "answers": answers, "question_type": "", "answer_type": question.answer_type})
        self.save()

    def image(self, i: int) -> Path:
        return self.folder / "pictures" / f"{i}.png"

    def save(self) -> None:
        for name in ("captions", "questions", "answers"):
            (self.folder / f"{name}.json").write_text(json.dumps(getattr(self, name)))

    def as_data(self, split: str, task: str = "captioning") -> list[str]:
        """The options that make this the train or val data of a run."""
        given = {"scenes": "null", "images": str(self.folder / "pictures")}
        if task == "captioning":
            given["annotations"] = str(self.folder / "captions.json")
        else:
            given |= {"annotations": str(self.folder / "answers.json"), "questions": str(self.folder / "questions.json"), "image_name": "{image_id}.png"}
        return [part for name, value in given.items() for part in (f"--data.{split}.{name}", value)]

"""Help: it fits a screen, imports no library that it does not need, and its examples are command lines that the parser takes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cli_run import RECIPES, adalink, refused
from shared import ROOT

from adalink.methods import METHODS
from tasks.commands import COMMANDS, Entry
from tasks.commands.parser import parsed
from tasks.runs.config import setting_names

ENTRIES = {name: entry for name, entry in COMMANDS.items() if isinstance(entry, Entry)} | {
    f"{group} {name}": entry for group, entries in COMMANDS.items() if isinstance(entries, Mapping) for name, entry in entries.items()
}
GROUPS = [name for name, entry in COMMANDS.items() if isinstance(entry, Mapping)]
LINES, COLUMNS = 40, 100

# Libraries that take long to import.
HEAVY = ("torch", "torchvision", "transformers", "timm", "open_clip", "accelerate", "peft", "webdataset", "fastapi", "uvicorn", "jinja2", "tensorboard")
LOOK = f"""
import contextlib, io, json, sys
found = {{}}
def look(what):
    found[what] = [name for name in {(*HEAVY, "torch.distributed.fsdp", "PIL")!r} if name in sys.modules]
import adalink
look("import adalink")
import multimodal
look("import multimodal")
from tasks.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words.split())
    look(words)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """What a new process has imported after each step: those that need little first, and last a help that imports a method."""
    words = [f"{name} --help" for name in ("", *GROUPS, *ENTRIES)]
    words += [*(f"{name} --help.all" for name in ENTRIES if name != "launch"), "train --methods.lora.help"]  # accelerate writes all of launch's
    done = subprocess.run([sys.executable, "-c", LOOK, json.dumps(words)], capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_help_of_the_command_line_and_of_its_groups_imports_no_library(imported: dict[str, list[str]]) -> None:
    assert not [name for name in ("import adalink", "import multimodal", " --help", *(f"{name} --help" for name in GROUPS)) if imported[name]]


def test_help_of_a_command_imports_no_library_of_models_even_where_it_lists_every_setting(imported: dict[str, list[str]]) -> None:
    found = {words: set(names) - {"PIL"} for words, names in imported.items()}
    assert {words: names for words, names in found.items() if names} == {"train --methods.lora.help": {"torch"}}  # the control
    assert len(found) >= 2 * len(ENTRIES)


@pytest.mark.parametrize("words", ["", *GROUPS, *ENTRIES])
def test_help_fits_a_screen(words: str) -> None:
    done = adalink(*words.split(), "--help")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith(" ".join(["usage: adalink", *words.split()]))
    assert len(lines) <= LINES, len(lines)
    assert not [line for line in lines if len(line) > COLUMNS]


@pytest.mark.parametrize("words", ENTRIES)
def test_the_help_of_a_command_ends_with_examples_that_are_parsed(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run.yaml", "runs/first/config.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(RECIPES["captioning"].read_text())
    lines = list(examples(adalink(*words.split(), "--help").out))
    assert 1 <= len(lines) <= 2
    assert tuple(lines) == ENTRIES[words].load().examples
    for line in lines:
        program, *arguments = shlex.split(line.partition(" > ")[0])
        assert program == "adalink"
        if words == "launch":
            arguments = arguments[arguments.index("--") + 1 :]
        else:
            assert arguments[0] == words.split()[0]
        assert parsed(arguments)[0].run is not None


def examples(text: str) -> Iterator[str]:
    """The lines after `examples:`, which are the last."""
    yield from (line.strip() for line in text.partition("\nexamples:\n")[2].splitlines())


def test_help_all_lists_every_setting() -> None:
    text = " ".join(adalink("train", "--help.all").out.split())
    missing = [name for name in setting_names() if name.startswith(("train.", "generation.")) and f"--{name}" not in text]
    assert not missing
    assert "--train.batch_size BATCH_SIZE images in each process and micro-batch (type: int, default: 16)" in text or "in each process and micro-batch (type: int, default: 16)" in text
    assert "where the encoder needs no more; faster, and CHANGES PIXELS" in text
    assert "examples: adalink train" in text
    short = adalink("train", "--help").out
    assert "`adalink train --help.all` lists every one." in short
    assert "--train.betas" not in short
    assert "--train.batch_size N" in short
    assert "(default: 16)" in short


@pytest.mark.parametrize("words", ["train", "evaluate"])
def test_each_method_that_help_all_lists_has_a_help_of_its_own(words: str) -> None:
    listed = re.findall(r"`--((?:vision_)?methods\.\w+)\.help`", adalink(words, "--help.all").out)
    assert listed == [f"{group}.{name}" for group in ("methods", "vision_methods") for name in METHODS]
    assert "--vision_methods.lora.rank RANK" in adalink(words, "--vision_methods.lora.help").out


def test_the_options_that_help_lists_are_those_of_the_parser() -> None:
    done = adalink("train", "--task", "captioning", "--help", "--nonsense")
    assert (done.code, done.err) == (0, "")
    assert refused(adalink("train", "--nonsense", "1")).startswith("there is no setting nonsense")


def test_launch_has_a_help_of_its_own_and_all_of_accelerates() -> None:
    assert "--num_processes N" in adalink("launch", "--help").out
    assert "--dynamo_backend" in adalink("launch", "--help.all").out

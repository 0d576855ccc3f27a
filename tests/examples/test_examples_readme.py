"""What examples/README.md says is so: its table of methods, its commands, its files. (Its lines of Python: tests/adalink/test_examples_python.py.)"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from adalink import METHODS
from tasks.cli import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
README = (EXAMPLES / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    adalink ")]


def test_the_table_of_methods_has_every_method_and_no_other() -> None:
    table = README.partition("## Methods")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == sorted(METHODS)
    short = (EXAMPLES.parent / "README.md").read_text().partition("## Methods\n")[2].partition(": where each edits")[0]
    assert sorted(re.findall(r"`(\w+)`", short)) == sorted(METHODS)


def test_every_file_that_is_named_is_there_and_every_recipe_is_named() -> None:
    for name in re.findall(r"\]\(([^)]+)\)", README):
        assert (EXAMPLES / name).is_file(), name
    for path in EXAMPLES.glob("*.yaml"):
        assert f"[{path.name}]({path.name})" in README


@pytest.mark.parametrize("line", COMMANDS)
def test_every_option_that_is_shown_is_one(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line.partition("   #")[0].replace("...", ""))[1:]
    if words[0] == "launch":
        at = words.index("--")
        launched = launch_command_parser().parse_args([*words[1:at], "-m", "tasks.cli"])
        assert launched.num_processes == 8 * (launched.num_machines or 1)
        return
    names = [word for word in words if not word.startswith("-")]
    command = words[:2] if names[0] in ("score", "compare", "export", "shards") and len(names) > 1 and names[1].isalpha() else words[:1]
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    said = capsys.readouterr().out
    for option in (word.partition("=")[0].replace("--dry-run", "--dry_run") for word in words if word.startswith("--")):
        assert option in said or option.rpartition(".")[0] in said, option


def test_the_sample_of_a_shard_is_what_is_written() -> None:
    from multimodal.data.shards.record import decode_record, encode_record
    from multimodal.sample import Question, Sample

    (shown,) = re.findall(r"000042\.json +(\{.*\})", README)
    sample = Sample(key="42", image_id=42, image=b"", captions=("a dog runs.",), questions=(Question(question_id=7, text="?", answers=("yes",)),))
    written = encode_record(sample).decode()
    assert all(name in written for name in re.findall(r'"(\w+)":', shown))
    assert written.startswith('{"key": "42", "image_id": 42, "captions": ["a dog runs."], "questions": [{"question_id": 7, "text": ')
    assert decode_record(written.encode()).captions == ("a dog runs.",)

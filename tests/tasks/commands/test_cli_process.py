"""The command as a person starts it: a process, its two streams and its exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from cli_run import RECIPES, SMALL, adalink
from forked import forked
from shared import PATIENCE, ROOT


def test_the_console_script_is_what_these_tests_start() -> None:
    assert 'adalink = "adalink.__main__:entry"' in (ROOT / "pyproject.toml").read_text()


LOOK_AT_WEBDATASET = """
print("imported by us:", "webdataset" in sys.modules)
from webdataset.gopen import gopen
try:
    gopen("pipe:echo run")
    print("a pipe was opened")
except ValueError as error:
    print(error)
"""


def test_webdatasets_own_security_switch_is_on_in_the_commands_process() -> None:
    command = "import sys\nsys.argv = ['adalink', '--version']\nfrom adalink.__main__ import entry\ntry:\n    entry()\nexcept SystemExit:\n    pass\n"
    environment = {name: value for name, value in os.environ.items() if name != "WDS_SECURE"}

    def stated(code: str) -> list[str]:
        code += LOOK_AT_WEBDATASET
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout.splitlines()

    assert stated(command)[1:] == ["imported by us: False", "gopen_pipe: unsafe_gopen is False, cannot open pipe URLs"]
    assert stated("import sys") == ["imported by us: False", "a pipe was opened"]  # the control


def test_a_wrong_command_line_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path) -> None:
    """In this process: the next test sees that a process ends as `main` says."""
    done = adalink("train", "--config", RECIPES["vqa"], "--out", tmp_path / "run", "--train.learing_rate", "1")
    assert done.code == 2
    assert done.out == ""
    assert done.err == (
        "adalink: there is no setting train.learing_rate: the nearest is train.learning_rate; `adalink train --help` lists what there is\n"
    )
    assert not (tmp_path / "run").exists()


def test_an_error_after_the_models_are_loaded_is_one_line_too_and_leaves_no_folder(tmp_path: Path) -> None:
    arguments = ("train", "--config", RECIPES["vqa"], "--out", tmp_path / "run", *SMALL, "--methods.prompt", "{length: 600, init_std: 0.1}")
    process = forked(*arguments, "--train.bad_samples", "0", out=tmp_path / "out", err=tmp_path / "err")
    assert process.wait() == 2
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert out.startswith("trained: ")
    assert err.count("\n") == 1
    assert err.startswith("adalink: ")
    assert "text too long" in err
    assert not (tmp_path / "run").exists()


def test_an_interrupt_is_one_line_and_what_was_trained_can_be_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = (*SMALL, "--train.steps", "100000", "--train.checkpoint_every", "1")
    process = forked("train", "--config", RECIPES["vqa"], "--out", run, *small, out=tmp_path / "out", err=tmp_path / "err")
    give_up = time.monotonic() + PATIENCE
    while not list(run.glob("checkpoints/step_*")):
        assert time.monotonic() < give_up
        assert process.poll() is None, (tmp_path / "err").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    err = (tmp_path / "err").read_text()
    stated = re.fullmatch(r"adalink: ended by Ctrl-C after step (\d+) of 100000, which is saved in .*: go on with --resume", err.splitlines()[-1])
    assert stated, err[-2000:]
    assert "Traceback" not in err
    assert (run / "checkpoints" / f"step_{int(stated[1]):08d}").is_dir()

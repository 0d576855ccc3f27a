"""Somebody else's `tasks` or `multimodal`: an import says which file is in the way, and the command line does not mind; what it launches neither, see test_launch.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_run import hostile
from shared import PATIENCE, ROOT


def run(folder: Path, *command: str, paths: Sequence[Path] = (ROOT,)) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=folder, env=environment)


SCRIPT = """
import adalink
import tasks
assert tasks.MINE == 1
try:
    import tasks.own
except ModuleNotFoundError as error:
    assert "adalink" not in str(error), error
import multimodal.template
from tasks.runs.compose import compose
"""


@pytest.mark.parametrize("kind", ["file", "package", "before"])
def test_a_script_beside_somebodys_tasks_is_told_which_file_is_in_the_way(kind: str, tmp_path: Path) -> None:
    file = tmp_path / ("tasks/__init__.py" if kind == "package" else "tasks.py")
    file.parent.mkdir(exist_ok=True)
    file.write_text("MINE = 1\n")
    (tmp_path / "script.py").write_text(SCRIPT.replace("import adalink", "import tasks, adalink") if kind == "before" else SCRIPT)
    done = run(tmp_path, "script.py")
    last = done.stderr.strip().splitlines()[-1]
    assert "ShadowedError: tasks.runs is a module of adalink, and `import tasks` finds" in last
    assert str(file) in last
    assert last.endswith("in its place: rename that, or start the program in another folder")


@pytest.mark.slow  # test_launch.py trains in such a folder, which is first on the search path
@pytest.mark.parametrize("paths", ["own", "theirs first"])
def test_the_command_line_does_not_mind_the_working_folder(paths: str, tmp_path: Path) -> None:
    folder = hostile(tmp_path)
    done = run(folder, "-m", "adalink", "methods", paths=(ROOT,) if paths == "own" else (folder, ROOT))
    assert done.returncode == 0, done.stderr
    assert "adalink" in done.stdout


def test_the_console_script_does_not_mind_the_working_folder_on_the_search_path(tmp_path: Path) -> None:
    script = "import sys; sys.argv[1:] = ['--help']; from adalink.__main__ import entry; entry()"
    done = run(tmp_path, "-c", script, paths=(hostile(tmp_path), ROOT))
    assert done.returncode == 0, done.stderr

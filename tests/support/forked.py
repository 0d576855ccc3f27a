"""Commands as processes of their own, forked from one that has imported what they import, see forkserver.py."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from shared import PATIENCE, ROOT


class Forked:
    """A process, with the part of subprocess.Popen that tests use."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None
        self.pid, self._process = process.pid, process

    @property
    def returncode(self) -> int | None:
        """Its exit code, and minus the number of the signal that ended it, once it has ended."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code."""
        self._process.join(timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def forked(*arguments: object, out: Path, err: Path | None = None) -> Forked:
    """`adalink` with these arguments, printing into files; `err` is `out` unless given."""
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=([str(argument) for argument in arguments], out, err or out))
    process.start()
    return Forked(process)


def _run(arguments: list[str], *streams: Path) -> None:
    """Become the command, as its console script does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    multiprocessing.set_start_method("fork", force=True)  # of its own workers, as in a process that a person starts
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0)  # noqa: SIM115 (they end with the process)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["adalink", *arguments]
    code: Any = 0
    try:
        from adalink.__main__ import entry

        entry()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)

"""Commands as processes of their own, forked from one that has imported what they import, which takes each of them seconds."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from shared import PATIENCE, ROOT

IMPORTED = ("torch", "transformers", "timm", "accelerate", "uvicorn", "tasks.serve.server", "tasks.commands.train")
_numbers = itertools.count()


class Forked:
    """A process, with the part of subprocess.Popen that tests use."""

    def __init__(self, pid: int, ended: Path) -> None:
        self.pid, self._ended = pid, ended

    @property
    def returncode(self) -> int | None:
        """Its exit code, and minus the number of the signal that ended it, once it has ended."""
        return int(self._ended.read_text()) if self._ended.exists() else None

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code."""
        give_up = time.monotonic() + timeout
        while (code := self.returncode) is None:
            assert time.monotonic() < give_up
            time.sleep(0.005)
        return code

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
    parent, folder = _parent()
    ended = folder / str(next(_numbers))
    order = {"arguments": [str(argument) for argument in arguments], "out": str(out), "err": str(err or out), "ended": str(ended)}
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(json.dumps(order) + "\n")
    parent.stdin.flush()
    return Forked(int(parent.stdout.readline()), ended)


@cache
def _parent() -> tuple[subprocess.Popen[str], Path]:
    """The process that others are forked from, which ends with this one, and a folder for their exit codes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); from forked import serve_orders; serve_orders()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    return process, Path(mkdtemp())


def serve_orders() -> None:
    """Start what each line of stdin asks for, and print its process id. Between the two is a process that waits for the exit code."""
    import multimodal  # noqa: F401  (before any library of encoders)

    for name in IMPORTED:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            pid = os.fork()
            if not pid:
                _run(order)
            print(pid, flush=True)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            Path(order["ended"] + ".part").write_text(str(code))
            os.rename(order["ended"] + ".part", order["ended"])
            os._exit(0)


def _run(order: dict[str, Any]) -> None:
    """Become the command, as its console script does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0)  # noqa: SIM115 (they end with the process)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["adalink", *order["arguments"]]
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

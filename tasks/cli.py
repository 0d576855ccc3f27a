"""The command line: `adalink train --config run.yaml`, and what comes before and after it."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from tasks.commands.parser import main

__all__ = ["entry", "main"]


def entry() -> NoReturn:
    """The console script. A reader that has seen enough (`adalink methods | head`) ends it without a word, as 128 + SIGPIPE."""
    os.environ["WDS_SECURE"] = "1"  # webdataset, should anything import it, then opens no pipe and unpickles nothing
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        code = 141
    sys.exit(code)


if __name__ == "__main__":
    entry()

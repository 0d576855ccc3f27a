"""`adalink ...` and `python -m adalink ...`: the command line, safe from whatever is called `tasks` or `multimodal` in the working folder or on PYTHONPATH.

Launchers start this file by its path (`adalink launch`), or by its name (`torchrun -m adalink`).
"""

from __future__ import annotations

import os
import sys

_OWN = os.path.dirname(os.path.abspath(__file__))
# Python puts the folder of a script, or the working folder, before everything else; files there have names of other modules.
if __package__ in (None, "") and sys.path and os.path.abspath(sys.path[0]) == _OWN:
    del sys.path[0]

if "adalink" not in sys.modules:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    found = PathFinder.find_spec("adalink", [os.path.dirname(_OWN)])
    assert found is not None
    assert found.loader is not None
    sys.modules["adalink"] = module_from_spec(found)
    found.loader.exec_module(sys.modules["adalink"])

from adalink.siblings import load_siblings  # noqa: E402  (by now it is this one)

load_siblings()



def entry() -> None:
    """What the command `adalink` runs."""
    from importlib import import_module

    import_module("tasks.cli").entry()


if __name__ == "__main__":
    entry()

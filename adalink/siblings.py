"""The packages `multimodal` and `tasks` lie beside this one; their names are common, and another file may be found in their place.

Python says of a script beside a file `tasks.py` that there is no module `tasks.runs.compose`. Here the same error says which file is in the way.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from adalink.errors import AdalinkError

__all__ = ["ShadowedError", "load_siblings", "name_shadowing"]

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("multimodal", "tasks")


class ShadowedError(AdalinkError, ModuleNotFoundError):
    """A module of a sibling package was asked for, and the package's name is taken by somebody else's file."""


def load_siblings() -> None:
    """Import both packages from where they lie, whatever the search path holds before. They are found as ever where they lie elsewhere."""
    for name in SIBLINGS:
        spec = PathFinder.find_spec(name, [str(ROOT)])
        if spec is None or spec.origin is None or _is_own(sys.modules.get(name)):
            continue
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


def name_shadowing() -> None:
    """From here on, `from tasks.runs.compose import ...` says which file is in the way where `tasks` is somebody else's. Their own imports work."""
    if any(isinstance(finder, _Siblings) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Siblings())
    for name in SIBLINGS:
        module = sys.modules.get(name)
        if module is not None and not hasattr(module, "__path__"):
            module.__path__ = []


class _Siblings:
    """A finder before all others. It finds nothing by itself."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders find. Raises ShadowedError."""
        package, _, rest = name.partition(".")
        if package not in SIBLINGS:
            return None
        if rest:
            _refuse(name, sys.modules.get(package), path)
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.submodule_search_locations is None:
            spec.submodule_search_locations = []  # else Python refuses its submodules before it asks any finder
        return spec


def _refuse(name: str, package: ModuleType | None, path: Sequence[str] | None) -> None:
    """Raise ShadowedError for a module of ours that somebody else's package does not have."""
    if package is None or _is_own(package) or PathFinder.find_spec(name, path) is not None:
        return
    file = ROOT.joinpath(*name.split("."))
    if not file.with_suffix(".py").exists() and not file.is_dir():
        return
    found = getattr(package, "__file__", None) or next(iter(package.__path__), "another module")
    word = package.__name__
    raise ShadowedError(
        f"{name} is a module of adalink, and `import {word}` finds {found} in its place: rename that, or start the program in another folder", name=name
    )


def _is_own(module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().parents[1] == ROOT

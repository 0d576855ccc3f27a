"""What all tests share: where the development fixtures lie (a test that needs them skips, saying so, where they are absent), and samples of matrices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
SUPPORT = [str(folder) for folder in (ROOT, *sorted(ROOT.glob("tests/**/support")))]  # what pytest puts on the path, for processes of their own
PATIENCE = 900.0  # seconds after which something hangs: how fast a machine is must decide no test, so nothing shorter is waited for


def fixtures(folder: str) -> Path:
    """The folder of fixtures of one kind: under ADALINK_FIXTURES, by default ../shared/fixtures beside the repository."""
    return _present(fixtures_root() / folder)


def fixtures_root() -> Path:
    """Where fixtures would be, whether they are there or not: for tests that have cases of their own beside them."""
    return Path(os.environ.get("ADALINK_FIXTURES", SHARED / "fixtures"))


def shared(path: str) -> Path:
    """A file or folder of ../shared: real photographs and real frozen parts."""
    return _present(SHARED / path)


def covering(pairs: Iterable[tuple[str, str]], *, each: int = 2, shift: int = 0, hard: Sequence[str] = ()) -> list[Any]:
    """Parameters for all the pairs of a matrix, of which the default suite runs a sample; the others are slow.

    each: how many of the second kind every one of the first kind meets. A test that gives another shift takes other pairs, so that tests of
    one matrix cover it together. hard: names of the second kind that meet all of the first.
    """
    pairs = list(pairs)
    first, second = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    found = []
    for number, name in enumerate(first):
        others = [other for one, other in pairs if one == name]
        ordered = sorted(others, key=lambda other: (second.index(other) - number - shift) % len(second))
        chosen = {*ordered[:each], *hard}
        found += [pytest.param(name, other, marks=() if other in chosen else pytest.mark.slow) for other in others]
    return found


def every_other(names: Iterable[str], *, shift: int = 0, hard: Sequence[str] = ()) -> list[Any]:
    """Parameters for all the names, every second of them slow but the hard ones: a test beside it takes the others with shift 1."""
    return [pytest.param(name, marks=() if (i + shift) % 2 == 0 or name in hard else pytest.mark.slow) for i, name in enumerate(names)]


def _present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not here: development data does not travel with the repository", allow_module_level=True)
    return path

"""Where the development fixtures lie; a test that needs them skips, saying so, where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
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


def _present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not here: development data does not travel with the repository", allow_module_level=True)
    return path

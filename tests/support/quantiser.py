"""torchao, which quantises, beside the other packages: transformers imports it wherever it is installed, which costs each process seconds."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from shared import ROOT


def find_torchao() -> None:
    """Make it importable from where `make` puts it; the test is skipped where it is nowhere."""
    if importlib.util.find_spec("torchao") is None and (folder := ROOT / ".venv" / "torchao").is_dir():
        sys.path.append(str(folder))
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")

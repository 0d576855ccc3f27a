"""The small composed models of the tests of `multimodal`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "multimodal"))

from composed import FAMILIES, compose, excite

__all__ = ["FAMILIES", "compose", "excite"]

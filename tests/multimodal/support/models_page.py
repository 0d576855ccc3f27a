"""Writes the table of examples/docs/guides/models.md, or prints rows of it; see `listed_models`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[3]
    sys.path[:0] = [str(root), *(str(folder) for folder in root.glob("tests/**/support"))]
    import_module("multimodal")
    import_module("listed_models").main(sys.argv[1:])

"""torchao, which quantises, beside the other packages: transformers imports it wherever it is installed, which costs each process seconds."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from shared import ROOT


def find_torchao() -> None:
    """Make it importable from where `make` puts it; the test is skipped where it is nowhere."""
    if importlib.util.find_spec("torchao") is None and (folder := ROOT / ".venv" / "torchao").is_dir():
        sys.path.append(str(folder))
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")


def held_bytes(weight: Any) -> int:
    """The bytes of a weight, or of the tensors inside a quantised one."""
    tensor = weight.data
    if type(tensor) is torch.Tensor:
        return int(tensor.numel() * tensor.element_size())
    return sum(held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

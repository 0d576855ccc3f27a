"""Modules without their dropout, for as long as something is generated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ["without_dropout"]


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode; afterwards every part of it is in the mode that it was in.

    A new adapter is in training mode, and one that generates while it is trained would drop features at every token.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode

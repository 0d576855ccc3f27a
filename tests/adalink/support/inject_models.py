"""Small models with eP-ALM attached."""

from __future__ import annotations

from typing import Any

from tiny import INPUTS, excite
from torch import nn

from adalink import EPALM, Adapter, Anatomy, Attachment, InputSpec, Method, attach

LAYERS = 4


def method(layers: tuple[int, int] = (1, 3), mask: Any = "published", **fields: Any) -> EPALM:
    """Two taps in layers 1 and 2 of four unless told otherwise."""
    return EPALM(layers=layers, n_taps=2, connector="per_tap", mask=mask, **fields)


def attached(model: nn.Module, *methods: dict[str, Method]) -> Attachment:
    """One adapter for each set of methods, away from its start; there is a second encoder, of sound."""
    anatomy = Anatomy.read(model, {**INPUTS, "audio_taps": InputSpec(3, 7)})
    adapters = [Adapter(one, anatomy).double() for one in methods]
    for seed, adapter in enumerate(adapters):
        excite(adapter, seed + 1)
    return attach(model, *adapters, anatomy=anatomy)

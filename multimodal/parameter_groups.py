"""The optimizer: which weights it trains, how fast each, and in which form it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adalink.errors import ConfigError
from multimodal.train_settings import TrainSettings

__all__ = ["new_optimizer", "parameter_groups"]

FUSED_DEVICES = ("cpu", "cuda")


def new_optimizer(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW, as one kernel for all weights where devices and dtypes allow it. Raises as `parameter_groups`."""
    fused = all(parameter.device.type in FUSED_DEVICES and parameter.is_floating_point() for parameter in parameters.values())
    return torch.optim.AdamW(parameter_groups(parameters, settings), betas=settings.betas, weight_decay=settings.weight_decay, fused=fused)


def parameter_groups(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> list[dict[str, Any]]:
    """One group per method with a rate of its own and per kind: matrices decay, vectors do not.

    Raises ConfigError for a rate of a method that is not among the parameters.
    """
    methods = {name.split(".", 1)[0] for name in parameters}
    if unknown := sorted(set(settings.learning_rates) - methods):
        raise ConfigError(f"train.learning_rates names {', '.join(unknown)}, and this adapter's methods are {', '.join(sorted(methods))}")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = settings.learning_rates.get(name.split(".", 1)[0], settings.learning_rate)
        groups.setdefault((rate, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": group, "lr": rate, "weight_decay": settings.weight_decay if is_matrix else 0.0} for (rate, is_matrix), group in groups.items()
    ]

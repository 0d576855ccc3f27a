"""A model frozen for as long as anything is attached to it: several attachments come and go in any order, the last gives everything back."""

from __future__ import annotations

from torch import nn

__all__ = ["freeze", "give_back"]

_HELD = "_adalink_frozen"  # in the model's __dict__ while it is frozen


class _Before:
    """What the model was like before the first attachment."""

    def __init__(self, model: nn.Module) -> None:
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.modes = [(module, module.training) for module in model.modules()]
        self.n_attached = 0


def freeze(model: nn.Module) -> None:
    """requires_grad False and eval mode; what it was before is kept."""
    before = model.__dict__.setdefault(_HELD, _Before(model))
    before.n_attached += 1
    model.requires_grad_(False).eval()


def give_back(model: nn.Module) -> None:
    """One attachment fewer; with the last one flags and modes are as they were."""
    before: _Before = model.__dict__[_HELD]
    before.n_attached -= 1
    if before.n_attached:
        return
    del model.__dict__[_HELD]
    for parameter, flag in before.flags:
        parameter.requires_grad_(flag)
    for module, mode in before.modes:
        module.training = mode

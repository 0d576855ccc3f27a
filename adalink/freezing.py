"""A model frozen for as long as anything is attached to it: several attachments come and go in any order, the last gives everything back."""

from __future__ import annotations

from torch import nn

__all__ = ["freeze", "give_back"]

_HELD = "_adalink_frozen"  # in the model's __dict__ while it is frozen


class _Before:
    """What the model was like before the first attachment."""

    def __init__(self, model: nn.Module) -> None:
        # By module and name: where weights are brought when a module runs, the parameter itself is another one each time.
        self.flags = [(module, name, one.requires_grad) for module in model.modules() for name, one in module.named_parameters(recurse=False)]
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
    for module, name, flag in before.flags:
        if (parameter := module._parameters.get(name)) is not None:
            parameter.requires_grad_(flag)
    for module, mode in before.modes:
        module.training = mode

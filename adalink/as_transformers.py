"""What transformers' Trainer, and whoever else takes a model of transformers, asks of one: its forward's arguments, and a state dict of what is trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["EXTRA", "class_like", "of_base", "state_of_trained"]

_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
EXTRA = "_extra_state"  # torch's name for what a module's state dict holds beside its tensors


def of_base(name: str) -> Any:
    """A property of an adapted model: its frozen model's attribute, or an AttributeError where that has none."""
    return property(lambda self: getattr(self.base, name), doc=f"The frozen model's `{name}`.")


def class_like(wrapper: type[nn.Module], wrapped: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `wrapper` whose forward has the arguments of `wrapped`'s and its own, and which is named after both.

    Trainer reads there which columns of a data set the model takes, and which of them are labels.
    """
    if (wrapper, wrapped) in _made:
        return _made[wrapper, wrapped]
    own = inspect.signature(wrapper.forward).parameters
    theirs = inspect.signature(wrapped.forward).parameters
    named = {name: each for name, each in theirs.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    first = {name: each for name, each in own.items() if each.kind is each.POSITIONAL_OR_KEYWORD}
    keywords = {name: each.replace(kind=each.KEYWORD_ONLY, default=None) for name, each in named.items() if name not in first}
    keywords |= {name: each for name, each in own.items() if each.kind is each.KEYWORD_ONLY}
    rest = [each for each in theirs.values() if each.kind is each.VAR_KEYWORD]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper.forward(self, *args, **kwargs)

    forward.__doc__ = wrapper.forward.__doc__
    forward.__signature__ = inspect.Signature([*first.values(), *keywords.values(), *rest])  # type: ignore[attr-defined]
    name = f"Adapted{wrapped.__name__}"
    made = type(name, (wrapper,), {"forward": forward, "__doc__": wrapper.__doc__, "__module__": wrapper.__module__, "__qualname__": wrapper.__name__})
    _made[wrapper, wrapped] = made
    return made


def state_of_trained(module: nn.Module, frozen: Mapping[str, nn.Module]) -> None:
    """From now on the state dict of `module` is without those of its frozen parts (dotted name -> part), also when it is loaded.

    So a checkpoint of whatever saves `module.state_dict()` holds the adapters alone.
    """

    def left_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(tuple(f"{prefix}{part}." for part in frozen))]:
            del state[name]

    def not_wanted(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        left_out(module, state, prefix, None)  # a state dict that holds them changes no frozen part

    def not_missed(module: nn.Module, keys: Any) -> None:
        known = {f"{part}.{name}" for part, one in frozen.items() for name in one.state_dict()}
        known.add(EXTRA)  # a state dict of an earlier version has none
        keys.missing_keys[:] = [key for key in keys.missing_keys if not any(key.endswith(name) and key.removesuffix(name)[-1:] in ("", ".") for name in known)]

    module.register_state_dict_post_hook(left_out)
    module.register_load_state_dict_pre_hook(not_wanted)
    module.register_load_state_dict_post_hook(not_missed)

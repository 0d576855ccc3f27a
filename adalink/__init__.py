"""Adapt a frozen transformer at named ports, for the tokens of some domains, and leave without a trace."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adalink.moved import find_moved
from adalink.siblings import name_shadowing

if TYPE_CHECKING:
    from adalink import public
    from adalink.public import *  # noqa: F403

    __all__ = public.__all__


_WITHOUT_TORCH = {"BaseSettings": "adalink.checkpoint.precision", "Precision": "adalink.checkpoint.precision"}


def __getattr__(name: str) -> Any:
    """The public names. They are imported when the first of them is asked for, and torch with them: the command line prints its help without it."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _WITHOUT_TORCH:
        return getattr(import_module(_WITHOUT_TORCH[name]), name)
    module = import_module("adalink.public")
    globals().update({"__all__": module.__all__} | {public: getattr(module, public) for public in module.__all__})
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


name_shadowing()
find_moved()

"""Models of tests that are drawn once and copied: a copy takes half the time of a new one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
Made = TypeVar("Made")


def copied(make: Callable[P, Made]) -> Callable[P, Made]:
    """A function that seeds and draws, which then draws once for each set of arguments: a call leaves torch's random state as the first did."""

    @cache
    def first(*args: P.args, **kwargs: P.kwargs) -> tuple[Made, torch.Tensor]:
        return make(*args, **kwargs), torch.get_rng_state()

    @wraps(make)
    def again(*args: P.args, **kwargs: P.kwargs) -> Made:
        made, state = first(*args, **kwargs)  # type: ignore[arg-type]  # arguments that can be hashed
        torch.set_rng_state(state)
        return copy.deepcopy(made)

    return again

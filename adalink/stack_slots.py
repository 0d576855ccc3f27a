"""Slots that are put into the rows on the way into the stack, and taken out on the way out of it, so that what stands above never meets them.

A head that pools the first token (BERT), averages all (ModernBERT) or looks for the last (GPT-2), its labels and its loss are then as
they are without an adapter.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.reserve import Reserved

__all__ = ["PER_TOKEN", "slots_inside"]

# Values that a model takes for each token: what a slot has, and what fills a row up.
PER_TOKEN = {"attention_mask": (1, 0), "token_type_ids": (0, 0), "mm_token_type_ids": (0, 0)}
_current: ContextVar[Reserved | None] = ContextVar("reserved", default=None)


@contextlib.contextmanager
def slots_inside(model: nn.Module, anatomy: Anatomy, reserved: Reserved, arguments: Mapping[str, Tensor]) -> Iterator[None]:
    """For the calls of this thread inside the block: the stack reads the widened `arguments` (input_ids, attention_mask, ...) and gives own tokens.

    An encoder gives them where its layers end, before anything pools them; a decoder where the stack ends.
    """
    stack = model.get_submodule(anatomy.stack)
    beside = anatomy.layers[0].rpartition(".")[0].rpartition(".")[0]
    ends = [stack.get_submodule(beside), stack] if anatomy.attention == "bidirectional" and beside else [stack]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _current.get() is not reserved:  # another thread's call
            return None
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        return (), {**dict(zip(names, args, strict=False)), **kwargs, **_widened(reserved, kwargs, arguments)}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _own(reserved, output) if _current.get() is reserved else output

    token = _current.set(reserved)
    handles = [stack.register_forward_pre_hook(enter, prepend=True, with_kwargs=True), *(end.register_forward_hook(leave) for end in ends)]
    try:
        yield
    finally:
        _current.reset(token)
        for handle in handles:
            handle.remove()


def _widened(reserved: Reserved, kwargs: Mapping[str, Any], arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the stack is given for each token, with the slots in it."""
    changed = dict(arguments)
    for name, (slot, padding) in PER_TOKEN.items():
        if name not in changed and isinstance(kwargs.get(name), Tensor):
            changed[name] = reserved.widened(kwargs[name], slot, padding)
    if "position_ids" not in changed and isinstance(kwargs.get("position_ids"), Tensor):
        changed["position_ids"] = reserved.widened_positions(kwargs["position_ids"])
    return changed


def _own(reserved: Reserved, output: Any) -> Any:
    """Every [B, T + S, D] in an output without its slots."""
    if isinstance(output, Tensor):
        return reserved.own(output) if output.ndim == 3 and output.shape[1] == reserved.n_tokens + reserved.n_slots else output
    if isinstance(output, dict):  # transformers' ModelOutput
        for name, value in output.items():
            output[name] = _own(reserved, value)
        return output
    return tuple(_own(reserved, value) for value in output) if type(output) is tuple else output

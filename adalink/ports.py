"""The placements of attached adapters by their ports, checked against the model before anything is hooked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from adalink.edit import Adapter, Placement, Port
from adalink.errors import AttachError
from adalink.masks import HideKeys, check_attention
from adalink.outside import check_reach
from adalink.tokens import PREFIX

__all__ = ["by_port"]


def by_port(model: nn.Module, stack: nn.Module, adapters: Mapping[int, Adapter]) -> dict[Port, list[tuple[int, Placement]]]:
    """The placements at each port, with the row index of their adapter. Raises AttachError; changes nothing.

    What hides keys comes last, so that it stays hidden whatever another method opens; and what writes a prefix, which others would edit.
    """
    _refuse_compiled(model)
    _refuse_checkpointed(stack)
    at: dict[Port, list[tuple[int, Placement]]] = defaultdict(list)
    for index, adapter in adapters.items():
        for placement in adapter.placements:
            _check_port(stack, placement.port)
            if placement.domains == (PREFIX,) and placement.port.side == "output":
                check_reach(stack)
            if placement.port.side == "mask":
                check_attention(stack)
            at[placement.port].append((index, placement))
    return {port: sorted(placed, key=lambda item: isinstance(item[1].edit, HideKeys) or item[1].domains == (PREFIX,)) for port, placed in at.items()}


def _check_port(stack: nn.Module, port: Port) -> None:
    if port.module in dict(stack.named_modules()):
        return
    last = port.module.rsplit(".", 1)[-1]
    near = [name for name, _ in stack.named_modules() if name.endswith(last)]
    raise AttachError(
        f"port '{port.module}' is not in this model; names ending in {last}: {', '.join(near[:4]) or 'none'}"
        + (f" and {len(near) - 4} more" if len(near) > 4 else "")
    )


def _refuse_compiled(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        raise AttachError("the model is already compiled, and a compiled model never sees edits attached later: attach first, then compile")


def _refuse_checkpointed(stack: nn.Module) -> None:
    """transformers' own checkpointing: a layer that runs again knows its tokens from `context_fn` alone, which reentrant checkpointing has not."""
    for module in stack.modules():
        run = getattr(module, "_gradient_checkpointing_func", None)
        settings = getattr(run, "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and run is not None and (settings.get("use_reentrant", True) or "context_fn" not in settings):
            kind = "reentrant" if settings.get("use_reentrant", True) else "without the context_fn of an attachment"
            raise AttachError(
                f"the model's gradient checkpointing is {kind}, and layers that run again would not know their tokens: call "
                "model.gradient_checkpointing_disable() before attaching, and attachment.checkpoint_layers() after it"
            )

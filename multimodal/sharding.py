"""FSDP2: weights that are split over processes, put together where a model generates, and left whole where a training ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["take_off", "together"]


@contextlib.contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Inside the block every process holds all weights, and runs the model as often as it likes without waiting for the others."""
    shards = _shards(model)
    for shard in shards:
        # Else a layer would be split again after its first call, and the next would wait for processes that generate less.
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.set_reshard_after_forward(shard is not model, recurse=False)  # fully_shard's own default: all but the root
            shard.reshard()
            # What ran in the block in this process alone would else stand in the order in which all fetch weights in the next backward pass.
            for group in shard._get_fsdp_state()._fsdp_param_groups:
                group._post_forward_indices.clear()
                group.comm_ctx.post_forward_order.clear()


def take_off(model: nn.Module) -> None:
    """Make a model that FSDP2 split an ordinary one again, with whole parameters, no hooks, and the classes it had.

    torch has no call for it (2.13); what is undone here is what `fully_shard` does, and a test compares the result with a model that was
    never split. Does nothing to other models. Every process must call it.
    """
    shards = _shards(model)
    for shard in shards:
        shard.unshard()
    whole: dict[int, nn.Parameter] = {}  # a tied weight stays one
    for module in model.modules() if shards else ():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            new = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            module._parameters[name] = whole.setdefault(id(parameter), new)
    for shard in shards:
        state: Any = shard._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for group in state._fsdp_param_groups:
            for handles in (group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle):
                for handle in handles.values():
                    handle.remove()
    for module in shards:
        module.__class__ = type(module).__bases__[1]  # fully_shard made a class of FSDPModule and the module's own


def _shards(model: nn.Module) -> list[Any]:
    """Modules whose parameters are split."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]

"""What frozen models need while they run: counted on the meta device, tensor by tensor, so that no weights are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adalink import Adapter
from adalink.vision import attach_vision
from multimodal.blueprint import DrawnTower

__all__ = ["cache_bytes", "parameter_bytes", "saved_bytes", "seen_bytes"]


def parameter_bytes(module: nn.Module) -> int:
    """The bytes of a module's weights, a shared one counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def saved_bytes(model: Any, *, rows: int, tokens: int) -> int:
    """What autograd keeps of one forward pass of a frozen model whose input embeddings need a gradient, without the logits.

    rows, tokens  B and T of the batch; an encoder-decoder model writes as many tokens as it reads
    model         on the meta device. Attention is counted with its whole matrix of weights, which fused kernels do not keep
    """
    return _kept(lambda: model(**_call(model, rows, tokens), use_cache=False), model)


def seen_bytes(tower: DrawnTower, adapter: Adapter, *, pictures: int) -> int:
    """What autograd keeps of so many pictures in a frozen encoder that an adapter is trained in: nothing below its lowest edit.

    adapter   on the meta device, as `draw_trained` makes it. Attention is counted as in `saved_bytes`
    """
    module: Any = tower.module
    pixels = torch.empty(pictures, 3, *tower.pixels, device="meta", dtype=next(module.parameters()).dtype)
    attachment = attach_vision(module.get_submodule("model"), adapter)
    try:
        return _kept(lambda: module.last(pixels), module, adapter)
    finally:
        attachment.detach()


def _kept(call: Callable[[], object], *modules: nn.Module) -> int:
    """The bytes that autograd keeps of a call beside the modules' weights."""
    kept: dict[int, tuple[Any, int]] = {}  # the storage itself stays here, so that no other takes its address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage, storage.nbytes())
        return tensor

    own = {parameter.untyped_storage()._cdata for module in modules for parameter in module.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(size for address, (_, size) in kept.items() if address not in own)


def cache_bytes(model: Any, *, tokens: int) -> int:
    """The keys and values of one row of so many tokens, in the model's dtype (with those that a decoder keeps of its encoder)."""
    with torch.no_grad():
        cache = model(**_call(model, 1, tokens), use_cache=True).past_key_values
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if hasattr(cache, "self_attention_cache") else [cache]
    tensors = [tensor for part in parts for layer in part.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _call(model: Any, rows: int, tokens: int) -> dict[str, Any]:
    """Arguments on the meta device that need no value to be read."""
    width = model.get_input_embeddings().embedding_dim
    embeds = torch.empty(rows, tokens, width, device="meta", dtype=model.dtype, requires_grad=True)
    if model.config.is_encoder_decoder:
        return {"inputs_embeds": embeds, "decoder_input_ids": torch.zeros(rows, tokens, dtype=torch.int64, device="meta")}
    mask = torch.empty(rows, 1, tokens, tokens, device="meta", dtype=model.dtype)  # a whole one: nothing has to be derived from values
    position = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": position, "logits_to_keep": 1}

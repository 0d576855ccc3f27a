"""What an existing model says of its own tokens: which ids stand for pictures, and which side of it is adapted."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adalink.edit import Adapter
from adalink.errors import ConfigError
from adalink.tokens import ANSWER, DOMAIN_NAMES, IMAGE, PAD, TEXT

__all__ = ["NO_LABEL", "check_trains", "domains", "image_token_ids", "is_encoder_decoder", "padding_mask", "placeholder_id", "positions"]

NO_LABEL = -100  # transformers' and torch's own: not to be predicted
# The field's two spellings, for pictures and for the frames of videos.
KEYS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def image_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids that a vision-language model replaces with its picture's features; frames of videos are pictures. () where it has none.

    Read from the config, so no table of architectures is needed: LLaVA names it `image_token_index`, Qwen2-VL `image_token_id`.
    """
    config: Any = getattr(model, "config", None)
    found = {getattr(config, key, None) for key in KEYS}
    return tuple(sorted(token for token in found if isinstance(token, int)))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the ids go to an encoder, which is what the edits see; what is written then has no place among them."""
    config: Any = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def placeholder_id(model: nn.Module, image_ids: Sequence[int]) -> int:
    """The id that stands in slots until their edit writes them: the padding id, or the first one that is not a picture's."""
    config: Any = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    return next(token for token in (pad, 0, 1, 2, 3, 4) if isinstance(token, int) and token >= 0 and token not in image_ids)


def padding_mask(model: nn.Module, input_ids: Tensor, pad_id: int | None) -> Tensor:
    """int64 [B, T]: the attention mask that transformers' generation assumes where none is given: 0 at padding ids, unless they also end texts."""
    settings: Any = getattr(model, "generation_config", None)
    pad = getattr(settings, "pad_token_id", None) if pad_id is None else pad_id
    end = getattr(settings, "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    return torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()


def positions(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
    """int64 [B, T]: positions that skip padding on the left, as the model itself counts them in generation; None where it needs no telling.

    A key that has no position (a prefix) is at a distance that depends on where a row starts, so training must count as generation does.
    """
    host: Any = model
    knows = any(hasattr(module, "get_rope_index") for module in model.modules())  # it reads the mask, and a picture has two dimensions
    if knows or "position_ids" not in inspect.signature(host.forward).parameters or bool(attention_mask[:, 0].all()):
        return None
    position = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    if not hasattr(host, "prepare_inputs_for_generation"):  # a head that classifies
        return position
    # PaliGemma counts from 1 there.
    prepared = host.prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, position_ids=position, use_cache=False)
    found: Tensor = prepared.get("position_ids", position)
    return found


def domains(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, image_ids: Sequence[int]) -> Tensor:
    """int64 [B, T]: IMAGE for a picture's tokens, ANSWER for tokens with a label, TEXT for the others, PAD where the mask is 0.

    A token with a label is one that the model is to write, and what it writes itself is ANSWER too: so training and generation agree.
    """
    domain = torch.full_like(input_ids, TEXT)
    if labels is not None:
        domain = domain.masked_fill(labels != NO_LABEL, ANSWER)
    for image_id in image_ids:
        domain = domain.masked_fill(input_ids == image_id, IMAGE)
    if attention_mask is not None:
        domain = domain.masked_fill(attention_mask == 0, PAD)
    return domain


def check_trains(adapter: Adapter, image_ids: Sequence[int]) -> None:
    """Raise ConfigError where an edit is for tokens that no row can ever hold: it would train nothing, and say nothing."""
    possible = {TEXT, ANSWER, *(slot.domain for slot in adapter.slots), *((IMAGE,) if image_ids else ())}
    names = {domain: name for name, domain in DOMAIN_NAMES.items()}
    for placement in adapter.placements:
        if possible.isdisjoint(placement.domains):
            wanted = ", ".join(names.get(domain, f"domain {domain}") for domain in placement.domains)
            there = ", ".join(names.get(domain, f"domain {domain}") for domain in sorted(possible))
            advice = ": put a bridge in the same adapter, or attach to a model whose config names an image token" if IMAGE in placement.domains else ""
            raise ConfigError(f"the edit {placement.role} is for {wanted} tokens, and rows of this model with this adapter hold only {there}{advice}")

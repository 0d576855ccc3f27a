"""What an existing model says of its own tokens: which ids stand for images, and which side of it is adapted."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy, setting, token_ids
from adalink.edit import EMBEDDING, Adapter
from adalink.errors import ConfigError
from adalink.tokens import ANSWER, DOMAIN_NAMES, IMAGE, OTHER, PAD, TEXT

__all__ = [
    "NO_LABEL", "check_images_known", "check_trains", "domains", "image_token_ids", "is_encoder_decoder", "padding_mask", "placeholder_id", "positions",
    "writes_without_reading", "written_domains",
]  # fmt: skip

NO_LABEL = -100  # transformers' and torch's own: not to be predicted
# The field's two spellings, for images and for the frames of videos; and for sounds, which are neither image nor text.
KEYS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
SOUND_KEYS = ("audio_token_id", "audio_token_index")
POSITION_MASK = "image_embeds_position_mask"  # int64 [B, T], 1 at an image's tokens: KOSMOS-2 takes it in place of an id
BROUGHT = re.compile("pixel|image|video|visual|audio|patches|input_features|input_values|speech")  # arguments that hold what is not text


def image_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids that a vision-language model replaces with its image's features; frames of videos are images. () where it has none.

    Read from the config, or the config of one of its parts, so no table of architectures is needed: LLaVA names it
    `image_token_index`, Qwen2-VL `image_token_id`, Phi-4 in its vision part, Chameleon looks it up in its vocabulary.
    """
    return tuple(sorted(token_ids(getattr(model, "config", None), *KEYS)))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the ids go to an encoder, which is what the edits see; what is written then has no place among them."""
    if writes_without_reading(model):
        return False
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) or _has_second_stack(model)


def _has_second_stack(model: nn.Module) -> bool:
    """BLIP for questions: a decoder with a word embedding of its own writes the answer, and no setting of the config marks it."""
    if "decoder_input_ids" not in inspect.signature(type(model).forward).parameters:
        return False
    host: Any = model
    words = host.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding) and module.weight is not words.weight and module.weight.shape == words.weight.shape for module in model.modules()
    )


def writes_without_reading(model: nn.Module) -> bool:
    """Whether the model reads an image alone, and its words are what its decoder writes (Pix2Struct, TrOCR): the edits see those."""
    takes = inspect.signature(type(model).forward).parameters
    return "decoder_input_ids" in takes and "input_ids" not in takes


def written_domains(arguments: Mapping[str, Any]) -> Tensor:
    """int64 [B, T]: TEXT for what a decoder is given to go on from, ANSWER for what it is to write, PAD for what has no label.

    A decoder reads its labels one place later, after the token that starts them. Raises ConfigError where nothing says how many rows there are.
    """
    given, labels = arguments.get("decoder_input_ids"), arguments.get("labels")
    if isinstance(labels, Tensor):
        later = torch.where(labels[:, :-1] != NO_LABEL, ANSWER, PAD)
        return torch.cat([torch.full_like(labels[:, :1], TEXT), later], 1)
    if isinstance(given, Tensor):
        return torch.full_like(given, TEXT)
    rows = next((value for value in arguments.values() if isinstance(value, Tensor) and value.ndim > 1), None)
    if rows is None:
        raise ConfigError("this model was called without an image, labels or decoder_input_ids: pass what it is to read and what it is to write")
    return torch.full((len(rows), 1), TEXT, device=rows.device)


def placeholder_id(model: nn.Module, image_ids: Sequence[int]) -> int:
    """The id that stands in slots until their edit writes them: the padding id, or the first one that is not an image's."""
    pad = setting(getattr(model, "config", None), "pad_token_id")
    return next(token for token in (pad, 0, 1, 2, 3, 4) if isinstance(token, int) and token >= 0 and token not in image_ids)


def padding_mask(model: nn.Module, input_ids: Tensor, pad_id: int | None) -> Tensor:
    """int64 [B, T]: the attention mask that transformers' generation assumes where none is given: 0 at padding ids, unless they also end texts."""
    settings: Any = getattr(model, "generation_config", None)
    pad = getattr(settings, "pad_token_id", None) if pad_id is None else pad_id
    ends = token_ids(settings, "eos_token_id")
    return torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()


def positions(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
    """int64 [B, T]: positions that skip padding on the left, as the model itself counts them in generation; None where it needs no telling.

    A key that has no position (a prefix) is at a distance that depends on where a row starts, so training must count as generation does.
    """
    host: Any = model
    knows = any(hasattr(module, "get_rope_index") for module in model.modules())  # it reads the mask, and an image has two dimensions
    if knows or "position_ids" not in inspect.signature(host.forward).parameters or bool(attention_mask[:, 0].all()):
        return None
    position = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    if not hasattr(host, "prepare_inputs_for_generation"):  # a head that classifies
        return position
    # PaliGemma counts from 1 there.
    prepared = host.prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, position_ids=position, use_cache=False)
    found: Tensor = prepared.get("position_ids", position)
    return found


def domains(model: nn.Module, input_ids: Tensor, arguments: Mapping[str, Any], image_ids: Sequence[int]) -> tuple[Tensor, frozenset[int]]:
    """int64 [B, T]: IMAGE for an image's tokens, OTHER for a sound's, ANSWER for tokens with a label, TEXT for the others, PAD where the mask is 0.

    With it the domains that can occur, known without reading a tensor. A token with a label is one that the model is to write, and what
    it writes itself is ANSWER too: so training and generation agree.
    """
    mask, labels, is_image = (arguments.get(name) for name in ("attention_mask", "labels", POSITION_MASK))
    domain, present = torch.full_like(input_ids, TEXT), {TEXT}
    if labels is not None and labels.shape == input_ids.shape:
        domain = domain.masked_fill(labels != NO_LABEL, ANSWER)
        present.add(ANSWER)
    for kind, ids in ((IMAGE, image_ids), (OTHER, token_ids(getattr(model, "config", None), *SOUND_KEYS))):
        for token in ids:
            domain = domain.masked_fill(input_ids == token, kind)
            present.add(kind)
    if is_image is not None and is_image.shape == input_ids.shape:
        domain = domain.masked_fill(is_image != 0, IMAGE)
        present.add(IMAGE)
    if mask is not None and mask.shape == input_ids.shape:
        domain = domain.masked_fill(mask == 0, PAD)
    return domain, frozenset(present)


def check_images_known(model: nn.Module, anatomy: Anatomy, arguments: Mapping[str, Any], image_ids: Sequence[int]) -> None:
    """Raise ConfigError where a call brings an image and nothing marks its tokens among the ids: edits of text would reach them."""
    is_known = anatomy.images != "before" or image_ids or token_ids(getattr(model, "config", None), *SOUND_KEYS)
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]
    brought = [name for name in tensors if BROUGHT.search(name) and "mask" not in name]
    if brought and not is_known:
        raise ConfigError(
            f"{', '.join(brought)} was given, and the config of {type(model).__name__} names no image token, so the image's tokens look like text: "
            "set model.config.image_token_id to the id that its processor puts there, before the model is adapted"
        )


def check_trains(model: nn.Module, anatomy: Anatomy, adapter: Adapter, image_ids: Sequence[int]) -> None:
    """Raise ConfigError where an edit is for tokens that no row can ever hold: it would train nothing, and say nothing."""
    has_images = bool(image_ids) or POSITION_MASK in inspect.signature(type(model).forward).parameters
    possible = {TEXT, ANSWER, *(slot.domain for slot in adapter.slots), *((IMAGE,) if has_images else ())}
    names = {domain: name for name, domain in DOMAIN_NAMES.items()}
    for placement in adapter.placements:
        reachable = possible - ({IMAGE} if placement.port == EMBEDDING and anatomy.images == "inside" and not anatomy.merges_late else set())
        if reachable.isdisjoint(placement.domains):
            wanted = ", ".join(names.get(domain, f"domain {domain}") for domain in placement.domains)
            there = ", ".join(names.get(domain, f"domain {domain}") for domain in sorted(reachable))
            advice = f": {_advice(anatomy, has_images)}" if IMAGE in placement.domains else ""
            raise ConfigError(f"the edit {placement.role} is for {wanted} tokens, and rows of this model with this adapter hold only {there}{advice}")


def _advice(anatomy: Anatomy, has_images: bool) -> str:
    """What a user can do who wants to edit image tokens that this model does not have."""
    if anatomy.images == "across":
        return "it reads images by cross-attention, where they have no tokens, so choose edits of text"
    if anatomy.images == "inside":
        where = "after the embedding" if has_images else "where no id says which tokens they are"
        return f"it puts an image's features among the words {where}, so choose edits of text" + (", or edits inside the layers" if has_images else "")
    return (
        "a language model gets image tokens when a bridge in the same adapter brings them from a vision encoder; in a model that reads images itself, "
        "set model.config.image_token_id to the id of its image tokens before it is adapted"
    )

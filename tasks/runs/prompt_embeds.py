"""Prompts with images, or of words alone, as embeddings for an engine that serves the frozen language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from adalink import AdaptedModel
from adalink.attachment.inputs import Call
from adalink.lifecycle.export import prompt_embeds
from multimodal.batches.collate import collate, stacked
from multimodal.batches.tokenize import TextTokens
from multimodal.data.images.decode import decode_image
from multimodal.language import Language
from multimodal.model import VisionLanguageModel

__all__ = ["image_prompt_embeds", "text_prompt_embeds"]


@torch.no_grad()
def image_prompt_embeds(model: VisionLanguageModel, images: Sequence[Path | bytes], prompts: Sequence[str]) -> list[Tensor]:
    """float [T, D] for each image and prompt, worded by the active adapter's template, with its slots; no padding.

    Raises ConfigError where the adapter does more than to edit the prompt's embeddings, DataError for an image that cannot be read.
    """
    encoder, found = model.row_encoder(), []
    for image, prompt in zip(images, prompts, strict=True):
        read = model.tower.preprocess(decode_image(image))
        batch = collate([encoder.prompt(prompt, read)], [0], stacked([read]), kind="pixels", side="left", pad_id=model.language.tokenizer.pad_token_id)
        batch = batch.to(model.device)
        found.append(prompt_embeds(model.adapted, batch.ids, model.token_map(batch))[0])
    return found


@torch.no_grad()
def text_prompt_embeds(model: AdaptedModel, language: Language, prompts: Sequence[str | Sequence[int]]) -> list[Tensor]:
    """The same of prompts that are words alone, between the special tokens that the tokenizer puts around a text, after the adapter's slots.

    A special token's spelling inside a text is letters. A prompt that needs special tokens in its middle (a chat template's) is given as ids.
    """
    found, tokens = [], TextTokens(language.tokenizer)
    for prompt in prompts:
        row = tokens.whole(prompt) if isinstance(prompt, str) else list(prompt)
        ids = torch.tensor([row], device=model.device)
        call = Call.make(model.base, model.anatomy, {"input_ids": ids}, model.serving(1), model.image_ids, "left")
        found.append(prompt_embeds(model, call.arguments["input_ids"], call.token_map)[0])
    return found

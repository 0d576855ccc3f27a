"""Generation: greedy or beams, cached, from left-padded prompts; rows about one image read it once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from adalink import TokenMap
from adalink.attachment.attachment import Attachment
from adalink.attachment.recompute import may_share_prompts, needs_whole_sequence
from adalink.errors import ConfigError
from multimodal.batches.collate import Batch
from multimodal.generation.decoding import Decoding, check_room, cuts_of, last_cut, may_decode, prefill
from multimodal.generation.settings import GenerationChoice, GenerationSettings, saved_generation
from multimodal.language import Language

__all__ = ["GenerationChoice", "GenerationSettings", "generated_texts", "run_generation", "saved_generation", "written_texts"]


def written_texts(language: Language, attachment: Attachment, batch: Batch, token_map: TokenMap, settings: GenerationSettings) -> list[str]:
    """One text for each row, the fastest way that is exact for this model and these adapters. Raises TextTooLong.

    Rows about one image with one adapter read what they begin with once; a prompt is read once for all its beams; a row that has ended
    leaves the batch. An encoder reads each whole row, a slot or gate may read what follows it, some models keep no keys and values: there
    transformers' own generation runs, on rows that share nothing.
    """
    check_room(language, batch.ids.shape[1], settings)
    if settings.cache == "static":
        _check_static(language, attachment, token_map)
        with attachment.bind(token_map):
            return generated_texts(language, batch, run_generation(language, batch, settings))
    may_share = may_share_prompts(attachment, token_map)
    if settings.num_beams == 1 and may_decode(language.model, attachment, token_map):
        return _texts(language, _greedy(language, attachment, batch, token_map, settings.max_new_tokens, may_share=may_share))
    cache: Any = None
    n_first = batch.ids.shape[1] - 1
    if may_share and n_first and last_cut(cuts_of(batch), n_first) == n_first and may_decode(language.model, attachment, token_map):
        cache, _ = prefill(language, attachment, batch, token_map, n_left=1, may_share=True)
        cache.batch_repeat_interleave(settings.num_beams)
    with attachment.bind(token_map):
        ids = run_generation(language, batch, settings, use_cache=not needs_whole_sequence(attachment, token_map), cache=cache)
    return generated_texts(language, batch, ids)


def run_generation(
    language: Language,
    batch: Batch,
    settings: GenerationSettings,
    *,
    use_cache: bool = True,
    cache: Any = None,
    stopping: StoppingCriteriaList | None = None,
    processors: LogitsProcessorList | None = None,
) -> Tensor:
    """int64 [B, T']: transformers' own generation, without sampling. Call it with the token map bound. Raises TextTooLong.

    use_cache   False where a method has no exact cache (`adalink.attachment.recompute.needs_whole_sequence`); each step then reads the whole sequence
    cache       of the prompts without their last token, each row repeated for its beams
    stopping    what else ends a row
    processors  what changes the scores of the next token
    """
    model: Any = language.model
    check_room(language, batch.ids.shape[1], settings)
    ids: Tensor = _generate(
        model,
        input_ids=batch.ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        do_sample=False,
        use_cache=use_cache,
        **({"cache_implementation": "static"} if settings.cache == "static" and cache is None and use_cache else {}),
        **({} if cache is None else {"past_key_values": cache}),  # beams refuse one that is None
        stopping_criteria=stopping,
        logits_processor=processors,
        pad_token_id=language.tokenizer.pad_token_id,
        eos_token_id=list(language.end_ids),
        synced_gpus=False,  # where weights are split, transformers would else wait at each token for processes that generate other rows
    )
    return ids


def _check_static(language: Language, attachment: Attachment, token_map: TokenMap) -> None:
    """Raises ConfigError where a model has no static cache that is exact for these adapters."""
    if not may_decode(language.model, attachment, token_map):
        kind = type(language.model).__name__
        raise ConfigError(f"generation.cache is static, and {kind} with this adapter has no such cache that is exact: leave it at auto")


def _generate(model: Any, **arguments: Any) -> Tensor:
    """The model's own generation; transformers' general one where its own asks for an image (BLIP-2), which reaches the model's calls in another way."""
    for part in model.modules():
        if getattr(part, "rope_deltas", None) is not None:  # Qwen2-VL's, of the rows of its last call, perhaps on the device where the model was then
            part.rope_deltas = None
    asked = inspect.signature(type(model).generate).parameters.get("pixel_values")
    if asked is None or asked.default is not inspect.Parameter.empty:
        return model.generate(**arguments)
    model.main_input_name = "input_ids"  # of this object alone, and its class's again afterwards
    try:
        return GenerationMixin.generate(model, **arguments)
    finally:
        del model.main_input_name


def generated_texts(language: Language, batch: Batch, ids: Tensor) -> list[str]:
    """What was generated after the prompt (after the decoder's start, in an encoder-decoder model), without special tokens."""
    config: Any = language.model.config
    start = 1 if config.is_encoder_decoder else batch.ids.shape[1]
    return _texts(language, ids[:, start:].tolist())


def _texts(language: Language, ids: Sequence[Sequence[int]]) -> list[str]:
    ended = [row[: next((i for i, token in enumerate(row) if token in language.end_ids), None)] for row in ids]  # not every end token is a special one
    texts: list[str] = language.tokenizer.batch_decode(ended, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _greedy(language: Language, attachment: Attachment, batch: Batch, token_map: TokenMap, n_new: int, *, may_share: bool) -> list[list[int]]:
    """The tokens of each row, its end token among them."""
    decoding, ends = Decoding(language, attachment), language.end_ids
    texts: list[list[int]] = [[] for _ in batch.ids]
    going = list(texts)
    chosen = decoding.join(batch, token_map, may_share=may_share).argmax(-1)
    while True:
        for text, token in zip(going, chosen.tolist(), strict=True):
            text.append(token)
        left = [i for i, text in enumerate(going) if text[-1] not in ends and len(text) < n_new]
        if not left:
            return texts
        if len(left) < len(going):
            decoding.keep(left)
            going, chosen = [going[i] for i in left], chosen[left]
        chosen = decoding.step(chosen).argmax(-1)

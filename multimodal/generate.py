"""Generation: greedy or beams, cached, from left-padded prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adalink.errors import ConfigError
from multimodal.batch import Batch
from multimodal.encode import TextTooLong
from multimodal.language import Language

__all__ = ["GenerationSettings", "check_room", "generated_texts", "run_generation"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How texts are generated."""

    max_new_tokens: int = 30  # eP-ALM's captions; VQA answers end sooner by themselves
    num_beams: int = 1  # 1 is greedy; 3 in eP-ALM, 5 in most captioning papers
    length_penalty: float = 1.0  # of beams: above 1 prefers longer texts

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens} and num_beams {self.num_beams}: give 1 or more of each")


def check_room(language: Language, n_prompt: int, settings: GenerationSettings) -> None:
    """Raise TextTooLong where a prompt of so many tokens, or the text after it, has more positions than the model.

    An encoder-decoder model counts them apart. T5 has no last position, though its old configs hold an `n_positions`.
    """
    config: Any = language.model.config
    limit = getattr(config, "max_position_embeddings", None) or (None if config.is_encoder_decoder else getattr(config, "n_positions", None))
    # The last token is only ever predicted, so it is not read.
    needed = max(n_prompt, settings.max_new_tokens) if config.is_encoder_decoder else n_prompt + settings.max_new_tokens - 1
    if limit is not None and needed > limit:
        raise TextTooLong(
            f"a prompt of {n_prompt} tokens and {settings.max_new_tokens} new ones need {needed} positions, and the language model has {limit}: "
            "shorten the prompt or lower generation.max_new_tokens"
        )


def run_generation(language: Language, batch: Batch, settings: GenerationSettings, *, use_cache: bool = True) -> Tensor:
    """int64 [B, T']: transformers' own generation, without sampling. Call it with the token map bound. Raises TextTooLong.

    use_cache: False where a method has no exact cache (`adalink.recompute.needs_whole_sequence`); each step then reads the whole sequence.
    """
    model: Any = language.model
    check_room(language, int(batch.attention_mask.sum(1).max()), settings)
    ids: Tensor = model.generate(
        input_ids=batch.ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=language.tokenizer.pad_token_id,
        eos_token_id=language.tokenizer.eos_token_id,
        synced_gpus=False,  # where weights are split, transformers would else wait at each token for processes that generate other rows
    )
    return ids


def generated_texts(language: Language, batch: Batch, ids: Tensor) -> list[str]:
    """What was generated after the prompt (after the decoder's start, in an encoder-decoder model), without special tokens."""
    config: Any = language.model.config
    start = 1 if config.is_encoder_decoder else batch.ids.shape[1]
    texts: list[str] = language.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    return [text.strip() for text in texts]

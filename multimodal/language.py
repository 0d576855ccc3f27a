"""A frozen language model and its tokenizer, from a name or a local folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

from adalink import Anatomy
from adalink.anatomy import max_positions, token_ids
from adalink.checkpoint.precision import AS_SAVED, Precision, settle
from adalink.errors import ConfigError, DataError
from adalink.lifecycle.base import SLIM_FILE, read_slim
from multimodal.loading import existing_folder, freeze, loading, quiet, split_revision

__all__ = ["LANGUAGE_ADVICE", "Language", "LanguageUse", "family_of", "is_encoder_only", "load_language", "settle_tokens"]

LanguageUse = Literal["write", "read"]
"""What a language model is for: to write text, or to be read by a head that chooses an answer. Encoder-only models (BERT) can only be read."""

NOWHERE: Mapping[str, Any] = {}

LANGUAGE_ADVICE = "give a local folder in transformers format or a hub id such as 'facebook/opt-125m'"

READER_ADVICE = "an encoder-only model such as 'google-bert/bert-base-uncased', or a decoder-only one such as 'facebook/opt-125m'"

_ENCODER_ROLES = {"bos": "cls", "eos": "sep"}
_TOKENIZER_ADVICE = "put the model's tokenizer files (tokenizer.json) beside its config.json"


@dataclass(frozen=True, kw_only=True)
class Language:
    """A frozen language model with its tokenizer.

    model      decoder-only, encoder-decoder (see `model.config.is_encoder_decoder`), or an encoder-only one to be read; eval mode, no gradients
    tokenizer  has an end and a pad token, and a start token where the model has one; ids of all three are rows of the embedding
    name       what it was loaded from
    """

    model: Any  # an nn.Module of transformers; the library is untyped here
    tokenizer: Any  # likewise
    name: str

    @cached_property
    def max_positions(self) -> int | None:
        """How many tokens a row can have, slots among them; None where the model has no last position."""
        return self._limit("read")

    @cached_property
    def max_written(self) -> int | None:
        """How many tokens a decoder of an encoder-decoder model can have; None where it has no last position."""
        return self._limit("written")

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: the tokenizer's first, which ends each trained text, then all that the model's configs name (Llama 3 has three)."""
        configs = (getattr(self.model, "generation_config", None), self.model.config)
        named = next((ids for config in configs if (ids := token_ids(config, "eos_token_id"))), ())
        n_rows = self.model.get_input_embeddings().weight.shape[0]
        return tuple(dict.fromkeys(token for token in (self.tokenizer.eos_token_id, *named) if token < n_rows))

    def _limit(self, side: Literal["read", "written"]) -> int | None:
        """What the config says, or the table of learned positions where it has fewer rows: RoBERTa's first are for padding."""
        limit = max_positions(self.model.config, side)
        positions = Anatomy.read(self.model).positions
        if side == "written" or positions is None or positions.padding_row is None:
            return limit
        return limit and limit - positions.padding_row - 1

    @cached_property
    def first_position(self) -> int:
        """What an encoder-only model counts positions from: RoBERTa, from after its padding id. 0 elsewhere."""
        positions = Anatomy.read(self.model).positions if is_encoder_only(self.model.config) else None
        return 0 if positions is None or positions.padding_row is None else positions.padding_row + 1


def load_language(
    name_or_folder: str | Path, *, dtype: torch.dtype | None = None, use: LanguageUse = "write", precision: Precision = AS_SAVED,
    placing: Mapping[str, Any] = NOWHERE,
) -> Language:
    """The frozen language model of a local folder or of a hub id, `org/name` or `org/name@revision`.

    dtype      of the weights; None keeps what the files hold
    precision  how they are held, and the attention's kernel
    placing    what `from_pretrained` is given to spread them over devices (`BaseSettings.placing`)

    Raises ConfigError for a name or folder that leads to no language model for this use, DataError for damaged or missing weights.
    """
    folder = existing_folder(name_or_folder)
    if folder is not None and (folder / SLIM_FILE).is_file():
        slim = read_slim(folder)
        language = load_language(slim.base, dtype=dtype, use=use, placing=placing)
        slim.put_into(language.model)
        freeze(language.model, dtype)
        settle(language.model, precision, str(name_or_folder))
        return Language(model=language.model, tokenizer=language.tokenizer, name=str(name_or_folder))
    name, revision = (str(folder), None) if folder is not None else split_revision(str(name_or_folder))
    with loading("language model", name_or_folder, LANGUAGE_ADVICE):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    family, options = family_of(config, use, str(name_or_folder))
    with loading("language model", name_or_folder, "see that the folder holds model.safetensors"), quiet():
        options |= {**precision.loading, **placing}
        model, info = family.from_pretrained(name, config=config, revision=revision, dtype=dtype or "auto", output_loading_info=True, **options)
    if info["missing_keys"]:
        raise DataError(
            f"the weights of the language model '{name_or_folder}' are incomplete: {len(info['missing_keys'])} tensors are missing, "
            f"among them {', '.join(sorted(info['missing_keys'])[:3])}; fetch the files again"
        )
    freeze(model, dtype)
    settle(model, precision, str(name_or_folder))
    with loading("tokenizer of", name_or_folder, _TOKENIZER_ADVICE):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    settle_tokens(tokenizer, model, str(name_or_folder))
    return Language(model=model, tokenizer=tokenizer, name=str(name_or_folder))


def family_of(config: Any, use: LanguageUse, name: str) -> tuple[Any, dict[str, Any]]:
    """The class that loads a model of this configuration, and the arguments of its constructor.

    transformers also lists masked language models (BERT) as causal ones, but they write only if they were trained as decoders.
    Raises ConfigError where no such model is fit for the use.
    """
    found = f"'{name}' is of model type '{config.model_type}'"
    if is_encoder_only(config):
        if use == "read":  # without a pooler: files of a masked language model hold none
            return AutoModel, {"add_pooling_layer": False} if _takes_pooler(config) else {}
        raise ConfigError(
            f"{found}, expected one that writes text; it can choose an answer: set task: vqa and vqa.answers, or text.how: head, or {LANGUAGE_ADVICE}"
        )
    if use == "read" and config.is_encoder_decoder:
        raise ConfigError(f"{found}, which is an encoder-decoder, and a head chooses an answer from one stack: give {READER_ADVICE}")
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise ConfigError(f"{found}, expected one that writes text; {LANGUAGE_ADVICE}")
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM, {}


def is_encoder_only(config: Any) -> bool:
    """Whether a model of this configuration reads both ways and writes nothing, as BERT."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder and not getattr(config, "is_decoder", False)


def _takes_pooler(config: Any) -> bool:
    return "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters


def settle_tokens(tokenizer: Any, model: Any, name: str) -> None:
    """Gives the tokenizer its start, end and pad token, and the model the same ids. No token is added: the embedding is frozen.

    An encoder-only model starts with its CLS token and ends with its SEP token.
    A special token that the tokenizer has beyond the rows of the embedding (a pad token added for some other training) is not used.
    Raises ConfigError for a tokenizer without words, with more tokens than the model has rows, or without an end token.
    """
    n_rows = model.get_input_embeddings().weight.shape[0]
    n_words = len(tokenizer) - len(tokenizer.added_tokens_decoder)
    if n_words < 2:  # without files some tokenizers still come, with their special tokens alone
        raise ConfigError(f"the tokenizer of '{name}' knows no words, only {len(tokenizer)} special tokens; {_TOKENIZER_ADVICE}")
    if tokenizer.vocab_size > n_rows:
        raise ConfigError(
            f"the tokenizer of '{name}' knows {tokenizer.vocab_size} tokens, expected at most {n_rows}, the rows of the model's embedding; "
            f"put the tokenizer that belongs to this model beside it"
        )
    for role in ("bos", "eos", "pad"):
        token = getattr(tokenizer, f"{role}_token_id")
        if token is None and role in _ENCODER_ROLES and is_encoder_only(model.config):
            token = getattr(tokenizer, f"{_ENCODER_ROLES[role]}_token_id")
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token) if token is not None else None)
        if token is None or token >= n_rows:
            token = _configured(model, f"{role}_token_id", n_rows)
            setattr(tokenizer, f"{role}_token", None if token is None else tokenizer.convert_ids_to_tokens(token))
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the language model '{name}' has no end token in its tokenizer, config.json or generation_config.json; set eos_token_id")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _configured(model: Any, key: str, n_rows: int) -> int | None:
    """An id of generation_config.json or config.json, or of the part that speaks of the words; the first where there are several."""
    for config in (getattr(model, "generation_config", None), model.config):
        if found := [token for token in token_ids(config, key) if token < n_rows]:
            return found[0]
    return None

"""A frozen vision-language model that sees already, and its processor, from a name or a local folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from adalink import Anatomy
from adalink.attachment.existing import image_token_ids
from adalink.checkpoint.precision import UNCHANGED, WITH_ENCODER, BaseSettings, Precision, settle
from adalink.edit import execution_device
from adalink.errors import ConfigError, DataError
from multimodal.existing.words import Processor
from multimodal.language import Language, settle_tokens
from multimodal.loading import existing_folder, freeze, loading, quiet, split_revision

__all__ = ["MODEL_ADVICE", "example_of", "is_existing", "load_existing", "precision_of"]

MODEL_ADVICE = "give a local folder in transformers format or a hub id such as 'HuggingFaceTB/SmolVLM-256M-Instruct'"


def load_existing(
    model: str | Path | nn.Module, processor: Any = None, *, dtype: torch.dtype | None = None, weights: bool = True,
    base: BaseSettings = UNCHANGED,
) -> tuple[Language, Any]:
    """The frozen model with its tokenizer, and its processor.

    model      a local folder, a hub id, `org/name` or `org/name@revision`, or the model itself; then its processor is given too
    dtype      of the weights; None keeps what the files hold
    base       how they are held; the language model's dtype and attention are the whole model's
    weights    False: the model is on the meta device, made of its config alone

    Raises ConfigError for a name that leads to no vision-language model, and where the processor is absent or another model's; DataError for
    damaged or missing weights.
    """
    if isinstance(model, nn.Module):
        if processor is None:
            raise ConfigError(f"a {type(model).__name__} was given without its processor: give both, as transformers' AutoProcessor loads it")
        name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
        freeze(model, dtype)
    else:
        name = str(model)
        model, processor = _loaded(model, dtype, weights, base)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ConfigError(f"the processor of '{name}' is a {type(processor).__name__}, expected one that takes images and texts: {_PROCESSOR_ADVICE}")
    _check_image_token(model, name)
    settle_tokens(processor.tokenizer, model, name)
    return Language(model=model, tokenizer=processor.tokenizer, name=name), processor


def is_existing(name_or_folder: str | Path) -> bool:
    """Whether a local folder or a hub id is of a model that reads images and writes text. Raises ConfigError where it is of no model."""
    return type(_config(name_or_folder, "model")) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def example_of(language: Language, processor: Any, image: Image.Image) -> dict[str, Any]:
    """The arguments of a call about one image and a word, with `input_ids` int64 [1, T], on the model's device and in its precision."""
    marks = Processor(processor, image_token_ids(language.model), ()).marks(1)
    device, dtype = execution_device(language.model, ""), next(language.model.parameters()).dtype
    found = processor(text=[marks + "a"], images=[image], return_tensors="pt")
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in found.items()}


_PROCESSOR_ADVICE = "put the model's processor files (processor_config.json, preprocessor_config.json, tokenizer.json) beside its config.json"


def _config(name_or_folder: str | Path, what: str = "vision-language model") -> Any:
    folder = existing_folder(name_or_folder)
    name, revision = (str(folder), None) if folder is not None else split_revision(str(name_or_folder))
    with loading(what, name_or_folder, MODEL_ADVICE):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def _loaded(name_or_folder: str | Path, dtype: torch.dtype | None, weights: bool, base: BaseSettings) -> tuple[Any, Any]:
    folder = existing_folder(name_or_folder)
    name, revision = (str(folder), None) if folder is not None else split_revision(str(name_or_folder))
    config = _config(name_or_folder)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ConfigError(
            f"'{name_or_folder}' is of model type '{config.model_type}', expected a model that reads images and writes text; for a language model give "
            "`encoder` and `language_model`"
        )
    with loading("processor of", name_or_folder, _PROCESSOR_ADVICE):
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    if not weights:
        with loading("vision-language model", name_or_folder, "see that its config.json is whole"), quiet(), torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, dtype=dtype or config.dtype or torch.float32).eval().requires_grad_(False), processor
    with loading("vision-language model", name_or_folder, "see that the folder holds model.safetensors"), quiet():
        options: dict[str, Any] = {"revision": revision, "dtype": dtype or "auto", **base.language_model.loading, **base.placing}
        model, info = AutoModelForImageTextToText.from_pretrained(name, config=config, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise DataError(
            f"the weights of the vision-language model '{name_or_folder}' are incomplete: {len(info['missing_keys'])} tensors are missing, "
            f"among them {', '.join(sorted(info['missing_keys'])[:3])}; fetch the files again"
        )
    freeze(model, dtype)
    _settle(model, base, str(name_or_folder))
    return model, processor


def _settle(model: nn.Module, base: BaseSettings, name: str) -> None:
    """Cast the whole model, and quantise the linears of its language model, of what stands before that, or of both. Raises ConfigError."""
    both, is_chosen = precision_of(model, base, name)
    own, encoder = base.language_model, base.encoder
    known_as = str(own) + (f"{WITH_ENCODER}{encoder.quantiser}" if encoder.quantiser else "")
    settle(model, both, name, linears=is_chosen, known_as=known_as)


def precision_of(model: nn.Module, base: BaseSettings, name: str) -> tuple[Precision, Callable[[str], bool]]:
    """The precision of a model that sees already, and which of its linears are quantised, by their dotted names.

    Raises ConfigError for settings that one model cannot have.
    """
    own, encoder = base.language_model, base.encoder
    if encoder.dtype not in ("auto", own.dtype) or encoder.attention != "auto":
        raise ConfigError(f"base.encoder was given for '{name}', a model that sees already, which has one dtype and one attention: set base.language_model's")
    if own.quantiser and encoder.quantiser and own.quantiser != encoder.quantiser:
        raise ConfigError(f"base quantises '{name}' in {own.quantiser} and its encoder in {encoder.quantiser}: give one of them for both, or one alone")
    anatomy = Anatomy.read(model)
    stack = f"{anatomy.stack}." if anatomy.stack else ""
    kinds = {True: own.quantiser, False: encoder.quantiser}
    both = replace(own, quantise=own.quantiser or encoder.quantiser or "none")  # type: ignore[arg-type]  # one of its values
    return both, lambda path: bool(kinds[path.startswith(stack)])


def _check_image_token(model: Any, name: str) -> None:
    """Raise ConfigError where no id stands for an image, or it is none of the embedding's rows and the model does not see to that itself."""
    ids = image_token_ids(model)
    if not ids:
        raise ConfigError(f"the config of '{name}' names no image token, so an image's tokens look like text: set image_token_id in its config.json")

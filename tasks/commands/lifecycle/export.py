"""`adalink export ...`: adapters for programs that know nothing of adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adalink.errors import ConfigError
from adalink.files import new_folder
from tasks.commands import Command

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from torch import Tensor

    from adalink import Adapter, FrozenPart, Method
    from adalink.checkpoint.folder import AdapterConfig
    from multimodal.language import Language

__all__ = ["EMBEDDING_LORA", "EMBEDS", "FOLDED", "MERGED", "export_embedding_lora", "export_embeds", "export_folded", "export_merged"]

EMBEDS_FILE, PROMPTS_FILE = "inputs_embeds.safetensors", "prompts.json"


def export_folded(*, adapter: Path, out: Path, language_model: str | None = None, untied: bool = False) -> None:
    """Write the language model with a text-only AdaLink in its embedding table.

    Args:
        adapter: The adapter folder; AdaLink on text with scope all, and no other method.
        out: A new or empty folder, in the format of transformers.
        language_model: Where the language model is, if not where the adapter says.
        untied: Give an output head that is the embedding table a table of its own first. The file grows by that table.
    """
    from adalink import AdaptedModel
    from adalink.lifecycle.export import check_foldable, fold_embedding, untie

    config = AdaptedModel.read_config(adapter)
    check_foldable(config.methods)
    with new_folder(out) as folder:
        language, loaded, processor = _loaded(adapter, config, language_model)
        if untied:
            untie(language.model)
        fold_embedding(language.model, loaded)
        _save(language, processor, folder)
    print(f"wrote {out}: {language.name} with the adapter {adapter} in its embedding table")


def export_merged(*, adapter: Path, out: Path, language_model: str | None = None, model: str | None = None) -> None:
    """Write the frozen model with a LoRA for all tokens added to its weights.

    Args:
        adapter: The adapter folder; LoRA alone, with groups for every token.
        out: A new or empty folder, in the format of transformers.
        language_model: Where the language model is, if not where the adapter says.
        model: Where the model that reads images itself is, if not where the adapter says.
    """
    from adalink import AdaptedModel
    from adalink.lifecycle.export import check_mergeable, merge_linears

    config = AdaptedModel.read_config(adapter)
    check_mergeable(config.methods)
    with new_folder(out) as folder:
        language, loaded, processor = _loaded(adapter, config, model or language_model)
        merge_linears(language.model, loaded)
        _save(language, processor, folder)
    print(f"wrote {out}: {language.name} with the adapter {adapter} in its weights")


def export_embedding_lora(*, adapter: Path, out: Path, model: str | None = None) -> None:
    """Write a text-only AdaLink as a LoRA of the word embedding, in the folder format of peft.

    Raises ConfigError where the adapter does more than that.

    Args:
        adapter: The adapter folder; AdaLink on text with scope all, and no other method.
        out: A new or empty folder, for adapter_config.json and adapter_model.safetensors.
        model: Where the frozen model is, if not where the adapter says; a language model, or one that reads images itself.
    """
    from adalink import AdaptedModel
    from adalink.lifecycle.export import check_embedding_lora, write_embedding_lora
    from multimodal.encoders.bound_parts import test_image
    from multimodal.existing.load import example_of

    config = AdaptedModel.read_config(adapter)
    check_embedding_lora(config.methods)
    if config.modules_to_save:
        raise ConfigError(
            f"the adapter in {adapter} has a trained copy of {', '.join(config.modules_to_save)}, which a LoRA of the word embedding cannot hold: export "
            "one without"
        )
    with new_folder(out) as folder:
        language, loaded, processor = _loaded(adapter, config, model)
        example = None if processor is None else example_of(language, processor, test_image())
        lora = write_embedding_lora(language.model, loaded, folder, example)
    (rank, vocabulary), width = lora.a.shape, len(lora.b)
    size = lora.a.element_size() * rank * (vocabulary + width) / 2**20
    print(f"wrote {out}: a LoRA of rank {rank} on {lora.module} of {language.name}, from the adapter {adapter}")
    print(f"A has a column for each token: {rank} x {vocabulary:,} numbers, and {width:,} x {rank} in B: {size:,.1f} MiB")


def export_embeds(
    *,
    adapter: Path,
    out: Path,
    images: list[Path] | None = None,
    prompts: Path | None = None,
    encoder: str | None = None,
    language_model: str | None = None,
    model: str | None = None,
) -> None:
    """Write the embeddings of prompts as the frozen language model reads them, for an engine that accepts them.

    Raises ConfigError where the adapter does more than that, and where images and prompts do not match.

    Args:
        adapter: The adapter folder; methods that edit prompts at the embedding only, such as AdaLink with scope prompt.
        out: A new or empty folder, for inputs_embeds.safetensors (float [T, D] for each prompt, by its number) and prompts.json.
        images: One image for each prompt, where the adapter reads images.
        prompts: A text file, one prompt a line; none for captions.
        encoder: Where the encoder is, if not where the adapter says.
        language_model: Where the language model is, if not where the adapter says.
        model: Where the model that reads images itself is, if not where the adapter says.
    """
    from adalink import AdaptedModel
    from multimodal.language import load_language
    from tasks.data.files import read_lines
    from tasks.runs.compose import found_part, load_adapted
    from tasks.runs.prompt_embeds import image_prompt_embeds, text_prompt_embeds

    config, images = AdaptedModel.read_config(adapter), images or []
    texts = read_lines(prompts, "prompt") if prompts is not None else [""] * len(images)
    has_images = "task" in config.task and "prompt" in config.task
    if not texts:
        raise ConfigError("there is nothing to export: give --images, --prompts, or both")
    if (len(images) != len(texts)) if has_images else bool(images):
        wanted = f"{len(texts)}, one for each prompt" if has_images else "none, since this adapter reads no images"
        raise ConfigError(f"{len(images)} images were given and {len(texts)} prompts: give {wanted}")
    with new_folder(out) as folder:
        if has_images:
            seeing, _ = load_adapted(adapter, encoder=encoder, language_model=language_model, model=model)
            embeds = image_prompt_embeds(seeing, images, texts)
            parts: Mapping[str, FrozenPart] = seeing.adapted.parts
        else:
            language = load_language(found_part(language_model or config.base["language_model"].name))
            adapted = AdaptedModel.from_pretrained(language.model, adapter)
            embeds, parts = text_prompt_embeds(adapted, language, texts), adapted.parts
        _write_embeds(folder, embeds, texts, images, parts)
    print(f"wrote {out}: {len(embeds)} prompts of {min(map(len, embeds))} to {max(map(len, embeds))} embeddings each")


def _write_embeds(folder: Path, embeds: Sequence[Tensor], texts: Sequence[str], images: Sequence[Path], parts: Mapping[str, FrozenPart]) -> None:
    from safetensors.torch import save_file

    save_file({str(i): value.contiguous().cpu() for i, value in enumerate(embeds)}, folder / EMBEDS_FILE)
    rows = [
        {"tensor": str(i), "prompt": text, "picture": str(images[i]) if images else None, "tokens": len(value)}
        for i, (text, value) in enumerate(zip(texts, embeds, strict=True))
    ]
    content = {"language_model": {"name": parts["language_model"].name, "fingerprint": parts["language_model"].fingerprint}, "prompts": rows}
    (folder / PROMPTS_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _loaded(folder: Path, config: AdapterConfig, given: str | None) -> tuple[Language, Adapter, Any]:
    """The frozen model, the adapter beside it, and the processor of a model that reads images itself (None of a language model).

    Refused where the adapter was trained on another model; an encoder that no method reads does not count. Refused too where something was trained
    that the model's folder cannot hold.
    """
    from adalink import Adapter, Anatomy
    from adalink.attachment.modules_to_save import copied
    from adalink.checkpoint.fingerprint import part_of
    from adalink.checkpoint.folder import load_weights
    from multimodal.encoders.bound_parts import language_part
    from multimodal.encoders.tower import has_vision_adapter
    from multimodal.existing.connector import has_connector_methods
    from multimodal.existing.load import is_existing, load_existing
    from multimodal.language import Language, load_language
    from tasks.runs.compose import found_part

    own = {"an answer head": bool(config.task.get("answers")), "an adapted encoder": has_vision_adapter(folder)}
    own["methods on its connector"] = has_connector_methods(folder)
    if beside := [what for what, is_there in own.items() if is_there]:
        raise ConfigError(f"the adapter in {folder} has {' and '.join(beside)}, which a language model's folder cannot hold: export one without")
    name = given or config.base["language_model"].name
    found = found_part(name)
    sees = "encoder" not in config.base and is_existing(found)
    language, processor = load_existing(found) if sees else (load_language(found), None)
    here, copies = language_part(language), config.modules_to_save
    if copies:  # which are no part of what the adapter was trained on
        others = part_of(language.model, without=copies)
        here = replace(here, fingerprint=others.fingerprint, weights=others.weights)
    config.check_base({**config.base, "language_model": here}, str(folder))
    methods: Mapping[str, Method] = config.methods
    anatomy = Anatomy.read(language.model)
    adapter = Adapter(methods, anatomy, copied(language.model, anatomy, copies))
    load_weights(folder, adapter)
    return Language(model=language.model, tokenizer=language.tokenizer, name=name), adapter.eval(), processor


def _save(language: Language, processor: Any, folder: Path) -> None:
    import torch

    from multimodal.loading import quiet

    model: Any = language.model
    with quiet(), torch.no_grad():
        model.save_pretrained(folder)
        (processor or language.tokenizer).save_pretrained(folder)


FOLDED = Command.of(export_folded, "adalink export folded --adapter runs/first/adapter --out exported")
MERGED = Command.of(export_merged, "adalink export merged --adapter runs/first/adapter --out exported")
EMBEDDING_LORA = Command.of(export_embedding_lora, "adalink export embedding_lora --adapter runs/first/adapter --out for-peft")
EMBEDS = Command.of(export_embeds, "adalink export embeds --adapter runs/first/adapter --out exported --images '[photograph.jpg]'")

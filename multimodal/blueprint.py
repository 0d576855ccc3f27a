"""A composed model without its weights: shapes, sizes and the places of edits, from configurations alone.

Everything is on torch's meta device, where a model of any size costs no memory; names that are known to a library (timm, open_clip)
or lie in a folder need no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from adalink import AdaptedModel, Adapter, FrozenPart, InputSpec, Method
from adalink.errors import ConfigError
from adalink.vision import attach_vision
from adalink.vision_anatomy import read_vision
from multimodal.classify import AnswerHead, state_width
from multimodal.encoders.blueprint import draw_encoder
from multimodal.frozen import existing_folder, loading, quiet, split_revision
from multimodal.language import LANGUAGE_ADVICE, Language, LanguageUse, family_of, settle_tokens
from multimodal.trained import TrainedParts

__all__ = ["DrawnLanguage", "DrawnTower", "draw_adapter", "draw_language", "draw_tower", "draw_trained"]


@dataclass(frozen=True, kw_only=True)
class DrawnTower:
    """What a vision tower will give; fields as in VisionTower.

    pixels    height and width of the pictures
    n_blocks  how many depths the encoder shows
    n_layers  L of the pooled features: n_blocks where every block has the width and the places of the final features, else 1.
              Seen from shapes alone; an encoder that ends in a neck of the same width is taken for one whose blocks can all be pooled
    """

    module: nn.Module
    name: str
    pixels: tuple[int, int]
    n_patches: int
    width: int
    n_blocks: int
    n_layers: int
    pooled_width: int

    @property
    def inputs(self) -> dict[str, InputSpec]:
        """What the edits can read of a picture; pooled features of another width than the patches are not kept (as in VisionTower)."""
        image = {"image": InputSpec(self.n_patches, self.width)}
        return {**image, "image_taps": InputSpec(self.n_layers, self.pooled_width)} if self.pooled_width == self.width else image


@dataclass(frozen=True, kw_only=True)
class DrawnLanguage:
    """A language model on the meta device. tokenizer: None where no tokenizer lies beside its config."""

    model: Any  # an nn.Module of transformers; the library is untyped here
    tokenizer: Any
    name: str

    @property
    def language(self) -> Language:
        """The model with its tokenizer, for whoever makes rows of it."""
        return Language(model=self.model, tokenizer=self.tokenizer, name=self.name)


def draw_tower(spec: str | Path, *, layer: int = -1) -> DrawnTower:
    """The tower of an encoder without its weights. Raises ConfigError as `load_tower` does, and where the hub cannot be reached."""
    drawn = draw_encoder(spec)
    dtype = next(drawn.module.parameters()).dtype
    pixels = torch.empty(1, 3, *drawn.pixels, device="meta", dtype=dtype)
    with torch.no_grad(), loading("vision encoder", spec, "choose an encoder that turns a batch of pictures alone into patches"):
        final, blocks = drawn.encoder.last(pixels), drawn.encoder.blocks(pixels)
    if not -len(blocks) <= layer <= -1:
        raise ConfigError(f"layer={layer} is not in the encoder '{spec}', which has {len(blocks)} blocks; choose -1 (the last) to {-len(blocks)} (the first)")
    stage = final if layer == -1 else blocks[layer]
    is_column = all(block.patches.shape == final.patches.shape for block in blocks)
    return DrawnTower(
        module=drawn.module,
        name=str(spec),
        pixels=drawn.pixels,
        n_patches=stage.patches.shape[1],
        width=stage.patches.shape[2],
        n_blocks=len(blocks),
        n_layers=len(blocks) if is_column else 1,
        pooled_width=final.patches.shape[2] if is_column else stage.patches.shape[2],
    )


def draw_language(name_or_folder: str | Path, *, use: LanguageUse = "write") -> DrawnLanguage:
    """The language model of a config without its weights, in the dtype that the config names (float32 where it names none).

    Raises ConfigError as `load_language` does, and where the hub cannot be reached.
    """
    folder = existing_folder(name_or_folder)
    name, revision = (str(folder), None) if folder is not None else split_revision(str(name_or_folder))
    with loading("language model", name_or_folder, LANGUAGE_ADVICE):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    family, options = family_of(config, use, str(name_or_folder))
    with loading("language model", name_or_folder, "see that its config.json is whole"), quiet(), torch.device("meta"):
        model = family.from_config(config, dtype=config.dtype or torch.float32, **options)
    model.eval().requires_grad_(False)
    tokenizer = None
    if folder is None or any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file():
        with loading("tokenizer of", name_or_folder, "put the model's tokenizer files (tokenizer.json) beside its config.json"):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        settle_tokens(tokenizer, model, str(name_or_folder))
    return DrawnLanguage(model=model, tokenizer=tokenizer, name=str(name_or_folder))


def draw_trained(
    tower: DrawnTower, language: DrawnLanguage, methods: Mapping[str, Method], encoder_methods: Mapping[str, Method], n_answers: int
) -> TrainedParts:
    """What a model would train, with shapes and no values; refused where the real adapters would be. n_answers: 0 where texts are written."""
    edits, vision, model = draw_adapter(tower, language, methods), None, tower.module.get_submodule("model")
    with torch.device("meta"):
        head = AnswerHead([str(number) for number in range(n_answers)], state_width(language.model)) if n_answers else None
        if encoder_methods:
            vision = Adapter(encoder_methods, read_vision(model))
            attach_vision(model, vision).detach()
    return TrainedParts(edits=edits, vision=vision, head=head)


def draw_adapter(tower: DrawnTower, language: DrawnLanguage, methods: Mapping[str, Method]) -> Adapter:
    """The adapter that `add_adapter` would make, with shapes and no values; refused where the real one would be."""
    parts = {"encoder": FrozenPart(tower.name, ""), "language_model": FrozenPart(language.name, "")}
    with torch.device("meta"):
        adapted = AdaptedModel(language.model, inputs=tower.inputs, parts=parts)
        adapter = adapted.add_adapter("default", methods)
    adapted.unload()
    return adapter

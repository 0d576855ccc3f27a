"""A composed model without its weights: shapes, sizes and the places of edits, from configurations alone.

Everything is on torch's meta device, where a model of any size costs no memory; names that are known to a library (timm, open_clip)
or lie in a folder need no network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from adalink import AdaptedModel, Adapter, FrozenPart, InputSpec, Method, fingerprint
from adalink.attachment.vision import attach_vision, read_vision
from adalink.errors import ConfigError, DataError
from multimodal.encoders.load import draw_encoder
from multimodal.encoders.tower import VisionTower
from multimodal.language import LANGUAGE_ADVICE, Language, LanguageUse, family_of, settle_tokens
from multimodal.loading import existing_folder, loading, quiet, split_revision
from multimodal.loss.answer_head import AnswerHead, state_width, warp_of
from multimodal.model import TrainedParts

__all__ = [
    "DrawnLanguage", "DrawnTower", "cache_bytes", "draw_adapter", "draw_language", "draw_tower", "draw_trained",
    "language_fingerprint", "parameter_bytes", "saved_bytes", "seen_bytes", "stored_fingerprint", "tower_fingerprint",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DrawnTower:
    """What a vision tower will give; fields as in VisionTower.

    pixels    height and width of the images
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
        """What the edits can read of an image; pooled features of another width than the patches are left out (as in VisionTower)."""
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
    with torch.no_grad(), loading("vision encoder", spec, "choose an encoder that turns a batch of images alone into patches"):
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
        head = AnswerHead([str(number) for number in range(n_answers)], state_width(language.model), warp_of(methods)) if n_answers else None
        if encoder_methods:
            vision = Adapter(encoder_methods, read_vision(model))
            attach_vision(model, vision).detach()
    return TrainedParts(edits=edits, vision=vision, head=head)


def draw_adapter(tower: DrawnTower | VisionTower, language: DrawnLanguage, methods: Mapping[str, Method]) -> Adapter:
    """The adapter that `add_adapter` would make, with shapes and no values; refused where the real one would be."""
    parts = {"encoder": FrozenPart(tower.name, ""), "language_model": FrozenPart(language.name, "")}
    with torch.device("meta"):
        adapted = AdaptedModel(language.model, inputs=tower.inputs, parts=parts)
        adapter = adapted.add_adapter("default", methods)
    adapted.unload()
    return adapter


# ----------------------------------------
# What frozen models need while they run: counted on the meta device, tensor by tensor, so that no weights are needed.


def parameter_bytes(module: nn.Module) -> int:
    """The bytes of a module's weights, a shared one counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def saved_bytes(model: Any, *, rows: int, tokens: int) -> int:
    """What autograd keeps of one forward pass of a frozen model whose input embeddings need a gradient, without the logits.

    rows, tokens  B and T of the batch; an encoder-decoder model writes as many tokens as it reads
    model         on the meta device. Attention is counted with its whole matrix of weights, which fused kernels do not keep
    """
    return _retained(lambda: model(**_call(model, rows, tokens), use_cache=False), model)


def seen_bytes(tower: DrawnTower, adapter: Adapter, *, images: int) -> int:
    """What autograd keeps of so many images in a frozen encoder that an adapter is trained in: nothing below its lowest edit.

    adapter   on the meta device, as `draw_trained` makes it. Attention is counted as in `saved_bytes`
    """
    module: Any = tower.module
    pixels = torch.empty(images, 3, *tower.pixels, device="meta", dtype=next(module.parameters()).dtype)
    attachment = attach_vision(module.get_submodule("model"), adapter)
    try:
        return _retained(lambda: module.last(pixels), module, adapter)
    finally:
        attachment.detach()


def _retained(call: Callable[[], object], *modules: nn.Module) -> int:
    """The bytes that autograd keeps of a call beside the modules' weights."""
    retained: dict[int, tuple[Any, int]] = {}  # the storage itself stays here, so that no other takes its address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        retained[storage._cdata] = (storage, storage.nbytes())
        return tensor

    own = {parameter.untyped_storage()._cdata for module in modules for parameter in module.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(size for address, (_, size) in retained.items() if address not in own)


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


# ----------------------------------------
# The fingerprint of a part whose weights lie in a folder, read through the memory map: a few pages of each tensor, not the whole.


def tower_fingerprint(spec: str | Path) -> str:
    """The fingerprint of the vision tower of a folder, as an adapter stores it; empty where `spec` is a name, or it cannot be computed."""
    folder = existing_folder(spec)
    if folder is None:
        return ""
    tower = nn.Module()  # as a VisionTower holds its encoder
    tower.encoder = draw_encoder(folder).module
    return stored_fingerprint(tower, tower.get_submodule("encoder.model"), folder)


def language_fingerprint(name_or_folder: str | Path, use: LanguageUse = "write") -> str:
    """The same of a language model."""
    folder = existing_folder(name_or_folder)
    if folder is None:
        return ""
    model = draw_language(folder, use=use).model
    return stored_fingerprint(model, model, folder)


def stored_fingerprint(module: nn.Module, part: nn.Module, folder: Path) -> str:
    """The fingerprint that `module` has once the folder's weights are loaded into `part` of it; empty where it cannot be computed.

    module, part   on the meta device; the part is `module` itself or inside it, and holds the weights afterwards
    folder         with *.safetensors

    Empty where there are none, or where their names are not the module's (then only loading can say it). Raises DataError for a
    damaged file.
    """
    stored = _mapped(folder)
    own = dict(part.named_parameters())
    fitting = [names for names in _renamings(own, stored) if all(stored[names[name]].shape == wanted.shape for name, wanted in own.items())]
    if len(fitting) != 1:
        return ""
    part.load_state_dict({name: stored[fitting[0][name]].to(wanted.dtype) for name, wanted in own.items()}, strict=False, assign=True)
    tie = getattr(part, "tie_weights", None)
    if callable(tie):  # a head that is the embedding is not stored
        tie()
    return "" if any(parameter.is_meta for parameter in module.parameters()) else fingerprint(module)


def _renamings(own: Iterable[str], stored: Collection[str]) -> Iterator[dict[str, str]]:
    """Own name -> stored name, for each one word that the stored names may have before them all, and for none."""
    for word in {"", *(name.partition(".")[0] + "." for name in stored)}:
        if all(word + name in stored for name in own):
            yield {name: word + name for name in own}


def _mapped(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's files, in memory only where it is read."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise DataError(f"the weights {path} cannot be read: {error}; fetch the file again") from error
    return tensors

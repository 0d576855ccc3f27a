"""What would be built of two frozen parts and some methods: parameters, positions, memory. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from adalink import IMAGE, PERCEPT, Adapter, Anatomy, Method
from multimodal.blueprint import DrawnLanguage, DrawnTower, draw_adapter, draw_language, draw_tower
from multimodal.encode import RowEncoder
from multimodal.footprint import cache_bytes, parameter_bytes, saved_bytes
from multimodal.generate import GenerationSettings, check_room
from multimodal.parameter_groups import parameter_groups
from multimodal.stored import language_fingerprint, tower_fingerprint
from multimodal.template import Template
from multimodal.train_settings import TrainSettings
from tasks.compose import found_part
from tasks.places import places_of, slots_of

__all__ = ["Assumed", "MethodPlan", "PartPlan", "Plan", "make_plan"]

FLOAT = 4  # bytes of a trained weight, its gradient, and each of AdamW's two moments
MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """A frozen part: bytes of its weights as stored; fingerprint empty where no weights lie in a folder."""

    name: str
    kind: str
    parameters: int
    bytes: int
    dtype: str
    shape: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """A method of the adapter: where it edits, and what it trains."""

    name: str
    edits: tuple[str, ...]
    trained: int


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What the estimates of memory assume of a batch.

    rows        of a training batch: one text for each picture
    text        tokens of words in a row, prompt and answer together; the slots of the adapter come on top
    answer      tokens that are learnt, and so have logits
    generated   tokens that a row grows by while serving, in `beams` copies
    """

    rows: int
    text: int
    answer: int
    generated: int
    beams: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would be built. Memory is in bytes; activations and cache are estimates, the rest is counted.

    slots             domain -> positions that a row has for it
    tokens_per_image  positions of a row that stand for its picture
    prompt_tokens     words of an empty question's prompt; None where there is no tokenizer to count them
    """

    encoder: PartPlan
    language_model: PartPlan
    methods: tuple[MethodPlan, ...]
    slots: Mapping[str, int]
    tokens_per_image: int
    prompt_tokens: int | None
    memory_to_train: Mapping[str, int]
    memory_to_serve: Mapping[str, int]
    assumed: Assumed

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(method.trained for method in self.methods)

    @property
    def frozen(self) -> int:
        """Parameters that are not."""
        return self.encoder.parameters + self.language_model.parameters


def make_plan(
    encoder: str,
    language_model: str,
    methods: Mapping[str, Method],
    *,
    layer: int,
    template: Template,
    train: TrainSettings,
    generation: GenerationSettings,
    text_tokens: int,
) -> Plan:
    """The plan of a run; refused, in the same words, where the run would be for anything but its weights and data.

    Raises ConfigError, AttachError and DataError as `compose` and `add_adapter` do.
    """
    tower, language = draw_tower(found_part(encoder), layer=layer), draw_language(found_part(language_model))
    adapter = draw_adapter(tower, language, methods)
    parameter_groups(dict(adapter.named_parameters()), train)  # refuses a rate for a method that is not there
    assumed = Assumed(
        rows=train.batch_size,
        text=text_tokens,
        answer=text_tokens,
        generated=generation.max_new_tokens,
        beams=generation.num_beams,
    )
    n_slots = sum(slot.count for slot in adapter.slots)
    n_prompt = _prompt_tokens(template, language, adapter, generation)
    edits, counts = places_of(adapter), adapter.n_parameters()
    parts = parameter_bytes(tower.module) + parameter_bytes(language.model)
    return Plan(
        encoder=_encoder(encoder, tower),
        language_model=_language(language_model, language),
        methods=tuple(MethodPlan(name=name, edits=edits[name], trained=counts[name]) for name in adapter.methods),
        slots=slots_of(adapter.slots),
        tokens_per_image=sum(slot.count for slot in adapter.slots if slot.domain == IMAGE or slot.domain >= PERCEPT),
        prompt_tokens=n_prompt,
        memory_to_train=_to_train(language.model, parts, adapter, n_slots, assumed, train),
        memory_to_serve=_to_serve(language.model, parts, adapter, n_slots, assumed),
        assumed=assumed,
    )


def _to_train(model: Any, parts: int, adapter: Adapter, n_slots: int, assumed: Assumed, train: TrainSettings) -> dict[str, int]:
    trained, anatomy = sum(adapter.n_parameters().values()), Anatomy.read(model)
    length = n_slots + assumed.text
    activations = saved_bytes(model, rows=assumed.rows, tokens=length)
    if train.checkpointing:  # each layer's input, and one layer at a time
        n_layers = len(anatomy.layers)
        activations = activations // n_layers + n_layers * assumed.rows * length * anatomy.layer_width * model.dtype.itemsize
    logits = 2 * assumed.rows * assumed.answer * anatomy.vocabulary * FLOAT
    return {
        "frozen weights": parts,
        "trained weights": trained * FLOAT,
        "gradients": trained * FLOAT,
        "optimizer state": trained * FLOAT * MOMENTS,
        "activations, estimated": activations,
        "logits and their gradient, estimated": logits,
    }


def _to_serve(model: Any, parts: int, adapter: Adapter, n_slots: int, assumed: Assumed) -> dict[str, int]:
    return {
        "frozen weights": parts,
        "one adapter": sum(adapter.n_parameters().values()) * FLOAT,
        "cache of one row, estimated": assumed.beams * cache_bytes(model, tokens=n_slots + assumed.text + assumed.generated),
    }


def _prompt_tokens(template: Template, language: DrawnLanguage, adapter: Adapter, generation: GenerationSettings) -> int | None:
    if language.tokenizer is None:
        return None
    row = RowEncoder(template, language.language, adapter.slots).prompt("")
    check_room(language.language, len(row.ids), generation)
    return len(row.ids) - sum(slot.count for slot in adapter.slots)


def _encoder(name: str, tower: DrawnTower) -> PartPlan:
    high, wide = tower.pixels
    shape = f"{tower.n_patches} patches of width {tower.width} from {high} x {wide} pixels; {tower.n_layers} of {tower.n_blocks} blocks can be pooled"
    return _part(name, tower.module.get_submodule("model"), shape, tower_fingerprint(found_part(name)))


def _language(name: str, language: DrawnLanguage) -> PartPlan:
    anatomy = Anatomy.read(language.model)
    shape = f"{len(anatomy.layers)} layers of width {anatomy.layer_width}; {anatomy.vocabulary} embeddings of width {anatomy.width}"
    return _part(name, language.model, shape, language_fingerprint(found_part(name)))


def _part(name: str, module: nn.Module, shape: str, fingerprint: str) -> PartPlan:
    return PartPlan(
        name=name,
        kind=type(module).__name__,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        bytes=parameter_bytes(module),
        dtype=str(next(module.parameters()).dtype).removeprefix("torch."),
        shape=shape,
        fingerprint=fingerprint,
    )

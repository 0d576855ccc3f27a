"""What would be built of a model that sees already and some methods: parameters by role, tokens of an image, memory. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from adalink import AdaptedModel, Adapter, FrozenPart, Method
from adalink.attachment.existing import image_token_ids
from adalink.attachment.vision import attach_vision, read_vision
from adalink.errors import AttachError
from multimodal.existing.load import load_existing
from multimodal.existing.rows import ConversationRows
from multimodal.existing.tower import refuse_over
from multimodal.existing.words import Processor
from multimodal.generation.decoding import check_room
from multimodal.generation.settings import GenerationSettings
from multimodal.language import Language
from multimodal.loading import existing_folder
from multimodal.model import TrainedParts
from multimodal.template import Template
from multimodal.training.prepare import first_layer, parameter_groups
from multimodal.training.settings import TrainSettings
from tasks.planning.meta import parameter_bytes, stored_fingerprint
from tasks.planning.plan import Assumed, MethodPlan, PartPlan, Plan, language_shape, places_in, slots_of, to_serve, to_train
from tasks.runs.config import Parts

__all__ = ["DrawnModel", "draw_model", "make_existing_plan"]


@dataclass(frozen=True, kw_only=True)
class DrawnModel:
    """A model that sees already on the meta device.

    adapted    the model, ready for adapters
    tower      of the images; None where the model names none
    connector  the modules between the tower and the language model
    """

    adapted: AdaptedModel
    language: Language
    processor: Processor
    tower: nn.Module | None
    connector: tuple[nn.Module, ...]

    def role_lines(self) -> list[str]:
        """Which methods act on which part, for a reader."""
        lines = [f"  language model: `methods`; {language_shape(self.adapted.anatomy)}"]
        if self.tower is not None:
            try:
                read_vision(self.tower)
                lines.append(f"  tower: `vision_methods`; {type(self.tower).__name__}")
            except AttachError as error:
                lines.append(f"  tower: no method; {error}")
        return lines + [f"  connector: no method; {type(module).__name__}" for module in self.connector]


def draw_model(parts: Parts) -> DrawnModel:
    """The model of a config and its processor, without weights. Raises ConfigError as `load_existing` does, and for a budget it cannot keep."""
    assert parts.model is not None
    language, real = load_existing(parts.model, weights=False)
    model = language.model
    processor = Processor(real, image_token_ids(model), (), parts.image_tokens)
    refuse_over(processor, language.name)
    with torch.device("meta"):
        adapted = AdaptedModel(model, parts={"language_model": FrozenPart(language.name, "")})
    found = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else None
    tower = found if isinstance(found, nn.Module) and found is not model else None
    return DrawnModel(adapted=adapted, language=language, processor=processor, tower=tower, connector=_connector(model, tower))


def _connector(model: Any, tower: nn.Module | None) -> tuple[nn.Module, ...]:
    """The largest modules that lie neither in the tower nor in the language model."""
    known = [tower, model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    others = {id(parameter) for module in known if module is not None for parameter in module.parameters()}
    found: list[nn.Module] = []
    for module in model.modules():
        own = [id(parameter) for parameter in module.parameters()]
        if own and others.isdisjoint(own):
            found.append(module)
            others.update(own)
    return tuple(found)


def make_existing_plan(
    parts: Parts,
    methods: Mapping[str, Method],
    *,
    encoder_methods: Mapping[str, Method],
    template: Template,
    train: TrainSettings,
    generation: GenerationSettings,
    text_tokens: int,
    image_size: tuple[int, int],
) -> Plan:
    """The plan of a run on a model that sees already; refused, in the same words, where the run would be for anything but its weights and data.

    image_size: width and height of the image whose tokens are counted, by the model's own processor. Raises as `draw_model` and `add_adapter`.
    """
    drawn = draw_model(parts)
    model, trained = drawn.language.model, _trained(drawn, methods, encoder_methods)
    parameter_groups(trained.parameters(), train)  # refuses a rate for a method that is not there
    if train.states_gib:
        first_layer(drawn.adapted.anatomy, trained.edits, trained.head)  # refuses edits that are too low
    image = drawn.processor.prepare([Image.new("RGB", image_size)])
    row = ConversationRows(template, drawn.language, drawn.processor, None, trained.edits.slots).prompt("", image)
    check_room(drawn.language, len(row.ids), generation)
    n_slots = sum(slot.count for slot in trained.edits.slots)
    assumed = Assumed(rows=train.batch_size, text=text_tokens, answer=text_tokens, generated=generation.max_new_tokens, beams=generation.num_beams)
    weights, other = parameter_bytes(model), n_slots + image.n_vectors
    tower, connector, language = _parts(drawn)
    return Plan(
        encoder=tower,
        language_model=language,
        connector=connector,
        methods=tuple(MethodPlan(name=name, edits=places_in(trained).get(name, ()), trained=count) for name, count in trained.counts().items()),
        slots={**slots_of(trained.edits.slots), "image": image.n_vectors},
        tokens_per_image=image.n_vectors,
        image_size=" x ".join(map(str, image_size)),
        prompt_tokens=len(row.ids) - other,
        memory_to_train=to_train(model, weights, trained, other, assumed, train),
        memory_to_serve=to_serve(model, weights, trained, other, assumed),
        assumed=assumed,
    )


def _trained(drawn: DrawnModel, methods: Mapping[str, Method], encoder_methods: Mapping[str, Method]) -> TrainedParts:
    vision = None
    with torch.device("meta"):
        edits = drawn.adapted.add_adapter("default", methods)
        if encoder_methods and drawn.tower is not None:
            vision = Adapter(encoder_methods, read_vision(drawn.tower))
            attach_vision(drawn.tower, vision).detach()
    drawn.adapted.unload()
    return TrainedParts(edits=edits, vision=vision)


def _parts(drawn: DrawnModel) -> tuple[PartPlan, PartPlan | None, PartPlan]:
    """Tower, connector and language model; the fingerprint is the whole model's, as an adapter's folder has it."""
    model, name, folder = drawn.language.model, drawn.language.name, existing_folder(drawn.language.name)
    tower = [] if drawn.tower is None else [drawn.tower]
    seeing = {id(parameter) for module in (*tower, *drawn.connector) for parameter in module.parameters()}
    words = [parameter for parameter in model.parameters() if id(parameter) not in seeing]
    known = ""
    if folder is not None:
        stored: nn.Module = load_existing(name, weights=False)[0].model
        known = stored_fingerprint(stored, stored, folder)
    connector = _part(name, drawn.connector, [p for module in drawn.connector for p in module.parameters()]) if drawn.connector else None
    language = _part(name, [model.get_decoder()], words, language_shape(drawn.adapted.anatomy), known)
    return _part(name, tower, [p for module in tower for p in module.parameters()]), connector, language


def _part(name: str, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter], shape: str = "", fingerprint: str = "") -> PartPlan:
    return PartPlan(
        name=name,
        kind=" and ".join(type(module).__name__ for module in modules) or "none of its own",
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        dtype=str(parameters[0].dtype if parameters else torch.float32).removeprefix("torch."),
        shape=shape,
        fingerprint=fingerprint,
    )

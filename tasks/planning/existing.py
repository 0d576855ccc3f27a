"""What would be built of a model that sees already and some methods: parameters by role, tokens of an image, memory. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn

from adalink import AdaptedModel, Adapter, FrozenPart, Method
from adalink.attachment.existing import image_token_ids
from adalink.attachment.vision import attach_vision, read_vision
from adalink.errors import AttachError
from multimodal.existing.connector import connector_linears, connector_modules, no_connector, no_linear, placed_methods, tower_of
from multimodal.existing.connector_choice import ConnectorChoice
from multimodal.existing.load import load_existing
from multimodal.existing.rows import ConversationRows
from multimodal.existing.tower import refuse_over
from multimodal.existing.words import Processor
from multimodal.generation.decoding import check_room
from multimodal.generation.settings import GenerationSettings
from multimodal.language import Language
from multimodal.loading import existing_folder
from multimodal.model import TrainedParts
from multimodal.sample import counted
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
    connector  the dotted names of the modules between the tower's layers and the words
    """

    adapted: AdaptedModel
    language: Language
    processor: Processor
    tower: nn.Module | None
    connector: tuple[str, ...]

    def role_lines(self) -> list[str]:
        """Which methods act on which part, for a reader."""
        lines = [f"  language model: `methods`; {language_shape(self.adapted.anatomy)}"]
        if self.tower is not None:
            try:
                read_vision(self.tower)
                lines.append(f"  tower: `vision_methods`; {type(self.tower).__name__}")
            except AttachError as error:
                lines.append(f"  tower: no method; {error}")
        if self.connector:
            linears = [name.partition(".")[2] for name in connector_linears(self.adapted.base, self.connector)]
            how = f"{counted(len(linears), 'linear')} for `connector_methods`: {', '.join(linears)}" if linears else "no linear for `connector_methods`"
            lines.append(f"  connector: `connector: trained`; {how}; {_kinds(self.connector_modules)}")
        return lines

    @property
    def connector_modules(self) -> list[nn.Module]:
        """The modules of the connector."""
        return [self.adapted.base.get_submodule(name) for name in self.connector]


def draw_model(parts: Parts) -> DrawnModel:
    """The model of a config and its processor, without weights. Raises ConfigError as `load_existing` does, and for a budget it cannot keep."""
    assert parts.model is not None
    language, real = load_existing(parts.model, weights=False)
    model = language.model
    processor = Processor(real, image_token_ids(model), (), parts.image_tokens)
    refuse_over(processor, language.name)
    with torch.device("meta"):
        adapted = AdaptedModel(model, parts={"language_model": FrozenPart(language.name, "")})
    tower = tower_of(model)
    connector = () if tower is None else connector_modules(model, tower)
    return DrawnModel(adapted=adapted, language=language, processor=processor, tower=tower, connector=connector)


def make_existing_plan(
    parts: Parts,
    methods: Mapping[str, Method],
    *,
    encoder_methods: Mapping[str, Method],
    connector: ConnectorChoice,
    connector_methods: Mapping[str, Method],
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
    model, trained = drawn.language.model, _trained(drawn, methods, encoder_methods, connector, connector_methods)
    parameter_groups(trained.parameters(), train)  # refuses a rate for a method that is not there
    if train.states_gib:
        first_layer(drawn.adapted.anatomy, trained.edits, trained.head)  # refuses edits that are too low
    image = drawn.processor.prepare([Image.new("RGB", image_size)])
    row = ConversationRows(template, drawn.language, drawn.processor, None, trained.edits.slots).prompt("", image)
    check_room(drawn.language, len(row.ids), generation)
    n_slots = sum(slot.count for slot in trained.edits.slots)
    assumed = Assumed(rows=train.batch_size, text=text_tokens, answer=text_tokens, generated=generation.max_new_tokens, beams=generation.num_beams)
    weights, other = parameter_bytes(model), n_slots + image.n_vectors
    tower, between, language = _parts(drawn)
    return Plan(
        encoder=tower,
        language_model=language,
        connector=between,
        methods=tuple(MethodPlan(name=name, edits=places_in(trained).get(name, ()), trained=count) for name, count in trained.counts().items()),
        slots={**slots_of(trained.edits.slots), "image": image.n_vectors},
        tokens_per_image=image.n_vectors,
        image_size=" x ".join(map(str, image_size)),
        prompt_tokens=len(row.ids) - other,
        memory_to_train=to_train(model, weights, trained, other, assumed, train),
        memory_to_serve=to_serve(model, weights, trained, other, assumed),
        assumed=assumed,
    )


def _trained(
    drawn: DrawnModel,
    methods: Mapping[str, Method],
    encoder_methods: Mapping[str, Method],
    connector: ConnectorChoice,
    connector_methods: Mapping[str, Method],
) -> TrainedParts:
    vision, on_connector, base = None, None, drawn.adapted.base
    if (connector == "trained" or connector_methods) and not drawn.connector:
        raise no_connector(base, drawn.language.name)
    with torch.device("meta"):
        edits = drawn.adapted.add_adapter("default", methods, modules_to_save=drawn.connector if connector == "trained" else ())
        if connector_methods:
            linears = connector_linears(base, drawn.connector)
            if not linears:
                raise no_linear(base, drawn.connector, drawn.language.name)
            on_connector = placed_methods(base, linears, connector_methods)
        if encoder_methods and drawn.tower is not None:
            vision = Adapter(encoder_methods, read_vision(drawn.tower))
            attach_vision(drawn.tower, vision).detach()
    drawn.adapted.unload()
    return TrainedParts(edits=edits, vision=vision, connector=on_connector)


def _parts(drawn: DrawnModel) -> tuple[PartPlan, PartPlan | None, PartPlan]:
    """Tower, connector and language model; the fingerprint is the whole model's, as an adapter's folder has it."""
    model, name, folder = drawn.language.model, drawn.language.name, existing_folder(drawn.language.name)
    tower = [] if drawn.tower is None else [drawn.tower]
    between = [parameter for module in drawn.connector_modules for parameter in module.parameters()]
    inside = {id(parameter) for parameter in between}  # of the tower, where the connector is a part of it
    seeing = {id(parameter) for module in tower for parameter in module.parameters()} | inside
    words = [parameter for parameter in model.parameters() if id(parameter) not in seeing]
    known = ""
    if folder is not None:
        stored: nn.Module = load_existing(name, weights=False)[0].model
        known = stored_fingerprint(stored, stored, folder)
    connector = _part(name, drawn.connector_modules, between) if drawn.connector else None
    language = _part(name, [model.get_decoder()], words, language_shape(drawn.adapted.anatomy), known)
    return _part(name, tower, [one for module in tower for one in module.parameters() if id(one) not in inside]), connector, language


def _kinds(modules: Sequence[nn.Module]) -> str:
    return " and ".join(dict.fromkeys(type(module).__name__ for module in modules))


def _part(name: str, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter], shape: str = "", fingerprint: str = "") -> PartPlan:
    return PartPlan(
        name=name,
        kind=_kinds(modules) or "none of its own",
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        dtype=str(parameters[0].dtype if parameters else torch.float32).removeprefix("torch."),
        shape=shape,
        fingerprint=fingerprint,
    )

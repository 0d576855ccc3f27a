"""What would be built of a model that sees already and some methods: parameters by role, tokens of an image, memory. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from adalink import AdaptedModel, Adapter, FrozenPart, Method
from adalink.attachment.existing import image_token_ids
from adalink.attachment.vision import attach_vision, read_vision
from adalink.checkpoint.precision import BaseSettings, Precision
from adalink.errors import AttachError
from multimodal.existing.connector import connector_linears, connector_modules, no_connector, no_linear, placed_methods, tower_of
from multimodal.existing.connector_choice import ConnectorChoice
from multimodal.existing.load import load_existing, precision_of
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
from tasks.planning.meta import stored_fingerprint
from tasks.planning.plan import Assumed, MethodPlan, PartPlan, Plan, language_shape, places_in, slots_of, to_serve, to_train
from tasks.planning.precisions import bytes_by_precision, cast_as, gathered_bytes, per_card, weight_bytes
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
    cast_as(model, precision_of(model, parts.base, language.name)[0])
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
    cards: int = 1,
) -> Plan:
    """The plan of a run on a model that sees already; refused, in the same words, where the run would be for anything but its weights and data.

    image_size: width and height of the image whose tokens are counted, by the model's own processor. cards: that train together.
    Raises as `draw_model` and `add_adapter`.
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
    precision, is_chosen = precision_of(model, parts.base, drawn.language.name)
    sizes = weight_bytes(model, precision.quantiser, drawn.language.name, is_chosen)
    weights, other = sum(sizes.values()), n_slots + image.n_vectors
    training = to_train(model, weights, trained, other, assumed, train)
    can_split = trained.vision is None and trained.connector is None and connector == "frozen" and not precision.quantiser
    tower, between, language = _parts(drawn, parts.base, sizes)
    return Plan(
        encoder=tower,
        language_model=language,
        connector=between,
        methods=tuple(MethodPlan(name=name, edits=places_in(trained).get(name, ()), trained=count) for name, count in trained.counts().items()),
        slots={**slots_of(trained.edits.slots), "image": image.n_vectors},
        tokens_per_image=image.n_vectors,
        image_size=" x ".join(map(str, image_size)),
        prompt_tokens=len(row.ids) - other,
        memory_to_train=training,
        memory_to_serve=to_serve(model, weights, trained, other, assumed),
        assumed=assumed,
        cards=cards,
        memory_per_card=per_card(training, cards, gathered_bytes(model, weights), can_split=can_split),
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


def _parts(drawn: DrawnModel, base: BaseSettings, sizes: Mapping[str, int]) -> tuple[PartPlan, PartPlan | None, PartPlan]:
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
    part = partial(_part, name, model, sizes)
    connector = part(drawn.connector_modules, between, base.encoder) if drawn.connector else None
    language = part([model.get_decoder()], words, base.language_model, language_shape(drawn.adapted.anatomy), known)
    return part(tower, [one for module in tower for one in module.parameters() if id(one) not in inside], base.encoder), connector, language


def _kinds(modules: Sequence[nn.Module]) -> str:
    return " and ".join(dict.fromkeys(type(module).__name__ for module in modules))


def _part(
    name: str, model: Any, sizes: Mapping[str, int], modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter], precision: Precision,
    shape: str = "", fingerprint: str = "",
) -> PartPlan:  # fmt: skip
    inside = {id(parameter) for parameter in parameters}
    names = [path for path, parameter in model.named_parameters() if id(parameter) in inside]
    dtype = str(parameters[0].dtype if parameters else torch.float32).removeprefix("torch.")
    return PartPlan(
        name=name,
        kind=_kinds(modules) or "none of its own",
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(sizes[path] for path in names),
        dtype=f"{dtype} {precision.quantiser}".strip(),
        shape=shape,
        fingerprint=fingerprint,
        in_memory=bytes_by_precision(model, names),
    )

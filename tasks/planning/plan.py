"""What would be built of two frozen parts and some methods: parameters, positions, memory. Nothing is loaded."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from adalink import IMAGE, PERCEPT, Adapter, Anatomy, Method, Placement, Slots
from adalink.checkpoint.precision import UNCHANGED, BaseSettings, Precision
from adalink.tokens import DOMAIN_NAMES, N_DOMAINS
from multimodal.batches.tokenize import RowEncoder
from multimodal.generation.decoding import check_room
from multimodal.generation.settings import GenerationSettings
from multimodal.loss.language_loss import targets_at_once
from multimodal.model import TrainedParts
from multimodal.template import Template
from multimodal.training.prepare import first_layer, parameter_groups
from multimodal.training.settings import TrainSettings
from tasks.planning.meta import (
    DrawnLanguage,
    DrawnTower,
    cache_bytes,
    draw_language,
    draw_tower,
    draw_trained,
    language_fingerprint,
    saved_bytes,
    seen_bytes,
    tower_fingerprint,
)
from tasks.planning.precisions import bytes_by_precision, cast_as, gathered_bytes, per_card, weight_bytes
from tasks.runs.compose import found_part

__all__ = [
    "Assumed", "MethodPlan", "PartPlan", "Plan", "domain_names", "language_shape", "make_plan", "places_in", "places_of", "plan_as_json",
    "plan_as_text", "slots_of", "to_serve", "to_train",
]  # fmt: skip


# ----------------------------------------
# Where the edits of an adapter go, in words.


# Sides of a port where what is edited is not a hidden state, as a reader would call it.
_SIDES = {"mask": "attention mask", "position": "position ids", "vectors": "position vectors", "cache": "cache", "distances": "distance biases",
          "reader": "decoder's mask", "returned": "output", "foreseen": "input"}  # fmt: skip


def places_of(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """Method -> its places, each as `output of layers.0..11.self_attn.q_proj, for image`: one line for the same module of many layers."""
    return {name: _placed([one for one in adapter.placements if one.role.split(".", 1)[0] == name]) for name in adapter.methods}


def slots_of(slots: Sequence[Slots]) -> dict[str, int]:
    """Domain -> how many positions of a row are reserved for it."""
    counts: dict[str, int] = {}
    for slot in slots:
        counts[domain_names((slot.domain,))] = counts.get(domain_names((slot.domain,)), 0) + slot.count
    return counts


def domain_names(domains: Sequence[int]) -> str:
    """`text, answer`; a domain without a name is its number, and all of them are every token."""
    if set(domains) == set(range(N_DOMAINS)):
        return "every token"
    names = {number: name for name, number in DOMAIN_NAMES.items()}
    return ", ".join(names.get(domain, str(domain)) for domain in domains)


def _placed(placements: Sequence[Placement]) -> tuple[str, ...]:
    layers: dict[tuple[str, str], list[int]] = {}
    for one in placements:
        pattern = re.sub(r"\b\d+\b", "*", one.port.module)
        side = _SIDES.get(one.port.side, one.port.side)
        found = layers.setdefault((f"{side} of {pattern}" if pattern else side, domain_names(one.domains)), [])
        found += [int(number) for number in re.findall(r"\b\d+\b", one.port.module)[:1]]
    return tuple(f"{where.replace('*', _listed(numbers), 1)}, for {domains}" for (where, domains), numbers in layers.items())


def _listed(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> `0..2,5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


FLOAT = 4  # bytes of a trained weight, its gradient, and each of AdamW's two moments
MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """A frozen part; fingerprint empty where no weights lie in a folder.

    bytes      of its weights in memory, as `base` holds them
    dtype      `bfloat16`, or `bfloat16 nf4` where its linear layers are quantised
    in_memory  precision -> bytes, for those that it could have
    """

    name: str
    kind: str
    parameters: int
    bytes: int
    dtype: str
    shape: str
    fingerprint: str
    in_memory: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """A method of the adapter: where it edits, and what it trains."""

    name: str
    edits: tuple[str, ...]
    trained: int


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What the estimates of memory assume of a batch.

    rows        of a training batch: one text for each image
    text        tokens of words in a row, prompt and answer together; the slots of the adapter come on top
    answer      tokens that are targets of the loss, and so have logits
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

    encoder           of a model that sees already its tower
    connector         of such a model, where it has one of its own
    image_size        of such a model: the image whose tokens are counted, as `640 x 480`
    slots             domain -> positions that a row has for it
    tokens_per_image  positions of a row that stand for its image
    prompt_tokens     words of an empty question's prompt; None where there is no tokenizer to count them
    cards             that train together
    memory_per_card   `DDP` and `FSDP2` -> bytes on each of several cards; FSDP2 is absent where it refuses this training
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
    connector: PartPlan | None = None
    image_size: str = ""
    cards: int = 1
    memory_per_card: Mapping[str, int] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(method.trained for method in self.methods)

    @property
    def frozen(self) -> int:
        """Parameters that are not."""
        return sum(part.parameters for part in (self.encoder, self.connector, self.language_model) if part is not None)


def make_plan(
    encoder: str,
    language_model: str,
    methods: Mapping[str, Method],
    *,
    encoder_methods: Mapping[str, Method],
    n_answers: int,
    layer: int,
    template: Template,
    train: TrainSettings,
    generation: GenerationSettings,
    text_tokens: int,
    base: BaseSettings = UNCHANGED,
    cards: int = 1,
) -> Plan:
    """The plan of a run; refused, in the same words, where the run would be for anything but its weights and data.

    n_answers: how many a head chooses among, if the training data has as many; 0 where texts are written. cards: that train together.
    Raises ConfigError, AttachError and DataError as `compose` and `add_adapter` do.
    """
    tower = draw_tower(found_part(encoder), layer=layer)
    language = draw_language(found_part(language_model), use="read" if n_answers else "write")
    cast_as(tower.module, base.encoder)
    cast_as(language.model, base.language_model)
    trained = draw_trained(tower, language, methods, encoder_methods, n_answers)
    adapter = trained.edits
    parameter_groups(trained.parameters(), train)  # refuses a rate for a method that is not there
    if train.states_gib:
        first_layer(Anatomy.read(language.model), adapter, trained.head)  # refuses edits that are too low
    assumed = Assumed(
        rows=train.batch_size,
        text=text_tokens,
        answer=text_tokens,
        generated=generation.max_new_tokens,
        beams=generation.num_beams,
    )
    n_slots = sum(slot.count for slot in adapter.slots)
    n_prompt = _prompt_tokens(template, language, trained, generation)
    seeing, words = _encoder(encoder, tower, base.encoder), _language(language_model, language, n_answers, base.language_model)
    parts = seeing.bytes + words.bytes
    seen = 0 if trained.vision is None else seen_bytes(tower, trained.vision, images=assumed.rows)
    training = to_train(language.model, parts, trained, n_slots, assumed, train, seen=seen)
    can_split = trained.vision is None and trained.head is None and not base.encoder.quantiser and not base.language_model.quantiser
    return Plan(
        encoder=seeing,
        language_model=words,
        methods=tuple(MethodPlan(name=name, edits=places_in(trained).get(name, ()), trained=count) for name, count in trained.counts().items()),
        slots=slots_of(adapter.slots),
        tokens_per_image=sum(slot.count for slot in adapter.slots if slot.domain == IMAGE or (slot.domain >= PERCEPT and slot.place == "start")),
        prompt_tokens=n_prompt,
        memory_to_train=training,
        memory_to_serve=to_serve(language.model, parts, trained, n_slots, assumed),
        assumed=assumed,
        cards=cards,
        memory_per_card=per_card(training, cards, gathered_bytes(language.model, parts), can_split=can_split),
    )


def places_in(trained: TrainedParts) -> dict[str, tuple[str, ...]]:
    """Method, as `TrainedParts.counts` names it -> its places."""
    seen = {} if trained.vision is None else {f"vision.{name}": edits for name, edits in places_of(trained.vision).items()}
    head = {} if trained.head is None else {"head": (f"last layer's state of one token of a row, to {len(trained.head.answers):,} answers",)}
    return {**places_of(trained.edits), **seen, **head}


def to_train(
    model: Any, parts: int, parts_trained: TrainedParts, n_slots: int, assumed: Assumed, train: TrainSettings, *, seen: int = 0
) -> dict[str, int]:
    """The memory of a training by what takes it, in bytes. parts: bytes of the frozen weights; seen: activations of the images in an adapted encoder."""
    trained, anatomy = sum(parts_trained.counts().values()), Anatomy.read(model)
    length = n_slots + assumed.text
    activations = saved_bytes(model, rows=assumed.rows, tokens=length)
    if train.checkpointing:  # each layer's input, and one layer at a time
        n_layers = len(anatomy.layers)
        activations = activations // n_layers + n_layers * assumed.rows * length * anatomy.layer_width * model.dtype.itemsize
    head = parts_trained.head
    at_once = min(assumed.rows * assumed.answer, targets_at_once(anatomy.vocabulary))
    logits = (at_once * anatomy.vocabulary if head is None else 2 * assumed.rows * len(head.answers)) * FLOAT
    return {
        "frozen weights": parts,
        "trained weights": trained * FLOAT,
        "gradients": trained * FLOAT,
        "optimizer state": trained * FLOAT * MOMENTS,
        "activations, estimated": activations,
        **({"activations of the encoder, estimated": seen} if seen else {}),
        "logits held at once, estimated": logits,
        **({"cached states of texts, at most": int(train.states_gib * 2**30)} if train.states_gib else {}),
    }


def to_serve(model: Any, parts: int, trained: TrainedParts, n_slots: int, assumed: Assumed) -> dict[str, int]:
    """The memory of serving by what takes it, in bytes."""
    return {
        "frozen weights": parts,
        "one adapter": sum(trained.counts().values()) * FLOAT,
        "cache of one row, estimated": 0
        if trained.head is not None  # it chooses, and writes nothing
        else assumed.beams * cache_bytes(model, tokens=n_slots + assumed.text + assumed.generated),
    }


def _prompt_tokens(template: Template, language: DrawnLanguage, trained: TrainedParts, generation: GenerationSettings) -> int | None:
    if language.tokenizer is None:
        return None
    row = RowEncoder(template, language.language, trained.edits.slots).prompt("")
    if trained.head is None:
        check_room(language.language, len(row.ids), generation)
    return len(row.ids) - sum(slot.count for slot in trained.edits.slots)


def _encoder(name: str, tower: DrawnTower, precision: Precision) -> PartPlan:
    high, wide = tower.pixels
    shape = f"{tower.n_patches} patches of width {tower.width} from {high} x {wide} pixels; {tower.n_layers} of {tower.n_blocks} blocks can be pooled"
    return _part(name, tower.module.get_submodule("model"), shape, tower_fingerprint(found_part(name)), precision)


def _language(name: str, language: DrawnLanguage, n_answers: int, precision: Precision) -> PartPlan:
    known = language_fingerprint(found_part(name), "read" if n_answers else "write")
    return _part(name, language.model, language_shape(Anatomy.read(language.model)), known, precision)


def language_shape(anatomy: Anatomy) -> str:
    """Layers and embeddings of a language model, for a reader."""
    return f"{len(anatomy.layers)} layers of width {anatomy.layer_width}; {anatomy.vocabulary} embeddings of width {anatomy.width}"


def _part(name: str, module: nn.Module, shape: str, fingerprint: str, precision: Precision) -> PartPlan:
    return PartPlan(
        name=name,
        kind=type(module).__name__,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        bytes=sum(weight_bytes(module, precision.quantiser, name).values()),
        dtype=f"{str(next(module.parameters()).dtype).removeprefix('torch.')} {precision.quantiser}".strip(),
        shape=shape,
        fingerprint=fingerprint,
        in_memory=bytes_by_precision(module),
    )


# ----------------------------------------
# A plan on the screen, and as JSON.


UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def plan_as_text(plan: Plan) -> str:
    """The plan for a reader: parts, methods, positions, memory."""
    share = 100 * plan.trained / (plan.trained + plan.frozen)
    slots = ", ".join(f"{n} {domain}" for domain, n in plan.slots.items()) or "none"
    words = "not counted (no tokenizer beside the config)" if plan.prompt_tokens is None else f"{plan.prompt_tokens} words of an empty question"
    assumed = plan.assumed
    lines = [
        *_part_lines("tower" if plan.image_size else "encoder", plan.encoder),
        *(_part_lines("connector", plan.connector) if plan.connector else []),
        *_part_lines("language model", plan.language_model),
        f"{'methods':<15} {len(plan.methods)}",
        *(line for method in plan.methods for line in (f"  {method.name:<13} {method.trained:,} trained", *(f"    {edit}" for edit in method.edits))),
        f"{'trained':<15} {plan.trained:,} of {plan.trained + plan.frozen:,} parameters ({share:.4f} %)",
        f"{'tokens':<15} {plan.tokens_per_image} per image{f' of {plan.image_size}' * bool(plan.image_size)}; slots of a row: {slots}; prompt: {words}",
        *_memory("to train", plan.memory_to_train, f"{assumed.rows} rows of {sum(plan.slots.values()) + assumed.text} tokens"),
        *_cards(plan),
        *_memory("to serve", plan.memory_to_serve, f"{assumed.generated} generated tokens, {assumed.beams} beam{'s' * (assumed.beams > 1)}"),
    ]
    return "\n".join(lines)


def plan_as_json(plan: Plan) -> str:
    """The plan as JSON, with the sums."""
    return json.dumps({**dataclasses.asdict(plan), "trained": plan.trained, "frozen": plan.frozen}, indent=2)


def size(n_bytes: int) -> str:
    """`4.2 GiB`; whole bytes below one KiB."""
    value, unit = float(n_bytes), UNITS[0]
    for unit in UNITS:
        if value < 1024 or unit == UNITS[-1]:
            break
        value /= 1024
    return f"{n_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


def _cards(plan: Plan) -> list[str]:
    ways = [f"{way} {size(n)}" for way, n in plan.memory_per_card.items()]
    refused = "" if "FSDP2" in plan.memory_per_card else " (FSDP2 refuses this training)"
    return [f"  on each of {plan.cards} cards: about {', '.join(ways)}{refused}"] if ways else []


def _part_lines(role: str, part: PartPlan) -> list[str]:
    indent = " " * 16
    unknown = "not known: no weights here, or names that only loading resolves"
    in_memory = f"{indent}in memory: {', '.join(f'{precision} {size(n)}' for precision, n in part.in_memory.items())}"
    if not part.shape:  # a part of a part
        return [f"{role:<15} {part.kind}, {part.parameters:,} frozen parameters in {part.dtype} ({size(part.bytes)})", in_memory]
    return [
        f"{role:<15} {part.name}: {part.kind}, {part.parameters:,} frozen parameters in {part.dtype} ({size(part.bytes)})",
        indent + part.shape,
        in_memory,
        f"{indent}fingerprint {part.fingerprint or unknown}",
    ]


def _memory(what: str, parts: Mapping[str, int], assumed: str) -> list[str]:
    lines = [f"  {name:<38} {size(n):>10}" for name, n in parts.items()]
    return [f"{'memory ' + what:<15} about {size(sum(parts.values()))} ({assumed})", *lines]

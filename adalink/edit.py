"""Edits, where they are placed, and the adapter that holds them.

Every method answers three questions: where in depth (a port), where in the sequence (domains), and what (an edit).
"""

from __future__ import annotations

import contextlib
import hashlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.errors import AttachError, ConfigError
from adalink.tokens import DOMAIN_NAMES, N_DOMAINS, PERCEPT, PREFIX, Tokens

__all__ = [
    "COPIES", "EMBEDDING", "SLOT_PLACES", "Adapter", "Compact", "Edit", "FixedLinear", "Joint", "Method", "Placement", "Port",
    "ReadsFrozen", "SlotPlace", "Slots", "Written", "execution_device", "joins", "read_frozen", "tied_names", "weight_of",
]  # fmt: skip


# ----------------------------------------
# Frozen models whose parts lie elsewhere: on several devices, or in memory or on disk until they run (accelerate's `device_map`).


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The values of a parameter, by its dotted name: from where the model's own loader keeps them, if the parameter itself is empty.

    One that is split over processes is gathered: each of them asks for it.

    Raises AttachError where nothing keeps them.
    """
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        value = parameter.detach()
        return value.full_tensor() if hasattr(value, "full_tensor") else value  # a DTensor's
    path = name.split(".")
    for depth in reversed(range(len(path))):
        inside = ".".join(path[depth:])
        for hook in _hooks(model.get_submodule(".".join(path[:depth]))):
            with contextlib.suppress(KeyError, TypeError, AttributeError):  # not of this hook, or a hook without weights
                found: Tensor = hook.weights_map[inside]
                return found.detach()
    raise AttachError(
        f"the weight {name} of {type(model).__name__} is on the meta device and nothing says where its values are: "
        "load the model with from_pretrained (device_map may offload it), or give its weights a device"
    )


def execution_device(model: nn.Module, name: str, *, has_values: bool = True) -> torch.device:
    """Where a module computes, by its dotted name: where its weights are, or are brought when it runs; that of what is around it where it has none.

    has_values   False where all parameters are known to be on the meta device: then none of them is looked at
    """
    path = name.split(".") if name else []
    for depth in reversed(range(len(path) + 1)):
        module = model.get_submodule(".".join(path[:depth]))
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return _device(hook.execution_device)
        if has_values and (parameter := next((one for one in module.parameters() if not one.is_meta), None)) is not None:
            return parameter.device
    return next((one.device for one in model.parameters()), torch.device("cpu"))  # of a plan: nothing has values


def tied_names(model: nn.Module) -> frozenset[str]:
    """Parameters that are another one under a second name; parameters that lie elsewhere do not show it themselves."""
    return frozenset(getattr(model, "all_tied_weights_keys", None) or {}) if any(parameter.is_meta for parameter in model.parameters()) else frozenset()


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module; several stand in one."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def _device(device: int | str | torch.device) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


# ----------------------------------------
# A matrix that is drawn once for all adapters, and never trained.


class FixedLinear(nn.Module):
    """x W^T + b, where W [R, D] is drawn from a seed that its key gives, whatever the run's seed is, and b is 0 (None without a bias).

    Both are buffers: a folder holds them, no optimizer does, and adapters of one key have the same.
    std: of the normal draw; None: torch's own uniform one for linears, within 1 / sqrt(D).
    """

    def __init__(self, key: str, width: int, rank: int, *, bias: bool = False, std: float | None = None) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Any  # a tensor, or None; as in nn.Linear, whose type leaves the None out
        self.register_buffer("weight", torch.empty(rank, width))
        self.register_buffer("bias", torch.zeros(rank) if bias else None)
        if self.weight.is_meta:
            return
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{key}.{rank}.{width}".encode()).digest()[:7], "big"))
        drawn = torch.empty(rank, width, device="cpu", dtype=torch.float32)
        drawn = drawn.normal_(0, std, generator=generator) if std else drawn.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        self.weight.copy_(drawn)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Port(NamedTuple):
    """A named place in the frozen stack, or in the decoder that reads it. `module` is relative to the one that `of` names.

    embedding   the word embeddings, before any position embedding; also where embeddings are passed in as `inputs_embeds`
    input       the first argument of the module
    output      what the module returns (the first element of a tuple)
    mask        the attention mask that reaches the module (adalink.attachment.slots)
    position    the position ids that reach the module (adalink.attachment.slots)
    vectors     the position vectors that the module gives
    cache       what the module finds in the cache (adalink.attachment.recompute)
    returned    as output, and x is what the module returns too
    foreseen    as input, and x is what the module would return for it: a norm's input, changed by what reads the norm's output
    distances   what attention adds to its scores for the distance between two tokens (adalink.attachment.slots)
    reader      the mask of the decoder that reads the stack's output; the module's name is empty
    detached    as input, which the edit reads and does not change; the module is given it without its gradient (adalink.attachment.beside)
    beside      what the module was called with and what it returned; the edit changes nothing (adalink.attachment.beside)
    """

    module: str
    side: Literal[
        "embedding", "input", "output", "mask", "position", "vectors", "cache", "returned", "foreseen", "distances", "reader",
        "detached", "beside",
    ]  # fmt: skip
    of: Literal["stack", "reader"] = "stack"

    def path(self, anatomy: Anatomy) -> str:
        """The dotted name, in the model, of the port's module."""
        root = anatomy.reader if "reader" in (self.of, self.side) else anatomy.stack
        return ".".join(filter(None, (root, self.module or (anatomy.embedding if self.side == "embedding" else ""))))


EMBEDDING = Port("", "embedding")
COPIES = "modules_to_save"  # peft's word for them


class Edit(Protocol):
    """Two or three lines of math that know nothing of domains, rows, beams or caches. An edit is an nn.Module."""

    def __call__(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        """h: the value at the port [B, T, D]; x: the input of the port's module [B, T, D_in] (h itself elsewhere) -> [B, T, D]."""


@runtime_checkable
class Joint(Protocol):
    """An edit that is made at once with others of its kind, each for tokens of its own, in one pass over h.

    What the plain edits give one after the other, up to rounding, without h as each of them leaves it.
    """

    def joins(self, other: object) -> bool:
        """Whether the other is of the same kind. An edit that does not join itself is made alone."""

    def joint(self, edits: Sequence[Any], h: Tensor, tokens: Tokens, x: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """h [B, T, D] after `edits`, of which this is the first. shares: float [B, T, 1] each, 1 at the tokens of the edit and 0 elsewhere.

        No token is of two edits. h may be in another dtype than x, which is in that of the edits.
        """


def joins(edit: object, other: object) -> bool:
    """Whether two edits can be made at once."""
    return isinstance(edit, Joint) and edit.joins(other)


@runtime_checkable
class ReadsFrozen(Protocol):
    """An edit, or a part of one, that computes with the weights of the frozen module at its port."""

    def read_frozen(self, module: nn.Module, name: str) -> None:
        """Take the module when it is attached. name: its path in the stack. Raises AttachError where its weights cannot be used."""


def read_frozen(placement: Placement, module: nn.Module) -> None:
    """Give the frozen module at a placement's port to the parts of its edit that read it. Raises AttachError."""
    for part in placement.edit.modules():
        if isinstance(part, ReadsFrozen):
            part.read_frozen(module, placement.port.module)


SlotPlace = Literal["start", "before_text", "after_text"]
SLOT_PLACES = typing.get_args(SlotPlace)


@dataclass(frozen=True)
class Slots:
    """Positions that a method reserves in every row it serves (image slots: where the template says).

    start        before everything else, images too
    before_text  after the images, before the words that follow them
    after_text   after the prompt, before the answer

    Slots of one domain at several places have the ordinals that they have in the row.
    """

    domain: int
    count: int
    place: SlotPlace = "start"


@dataclass(frozen=True)
class Placement:
    """An edit at a port, for the tokens of some domains. `role` names its tensors in a checkpoint, whatever the host calls its modules.

    shared   role -> module that several edits of the method use and none of them owns
    group    what a wrapper (a gate) gives one of to all edits of a group; empty: the edit is a group of its own
    reads_row  whether what the edit does to a token depends on the other tokens of its row (a gate): then each text needs a row of its own
    whole_call  whether the edit needs every row and token of the call, also rows that others serve, since it takes up what another left for it
    """

    role: str
    port: Port
    edit: nn.Module
    domains: tuple[int, ...]
    shared: Mapping[str, nn.Module] = field(default_factory=dict)
    group: str = ""
    reads_row: bool = False
    whole_call: bool = False


class Method(Protocol):
    """A published method: a frozen dataclass whose fields are its settings."""

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """The positions that the method reserves."""

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """New edits, and where they go."""


class Written(NamedTuple):
    """A method as a folder has it: `tensors`, by their whole names, are those of a new adapter in which `method` has the same name.

    few   most entries of the tensors are those of an adapter before training (start), or zero (zero): the folder has the others alone
    """

    method: Method
    tensors: Mapping[str, Tensor]
    few: Literal["no", "zero", "start"] = "no"


@runtime_checkable
class Compact(Protocol):
    """A method that a folder has in another form than training: without what training has closed, for instance."""

    def written(self, name: str, adapter: Adapter) -> Written | None:
        """What a folder has of the adapter's method of this name; None where it has nothing. Edits computed from it are those of the adapter, to rounding."""


class Adapter(nn.Module):
    """The edits of one or more methods. Its state dict is the whole checkpoint.

    Methods that fill slots are placed first, whatever their order, so that others edit what they filled: AdaLink edits the
    projected image, not the placeholder. Slots of a prefix come first in a row, since every token reads them, and those of
    percepts before a prompt's. Tensors are named METHOD.ROLE.TENSOR, for instance `adalink.image.down.weight`.

    copies   trained copies of the frozen model's modules, by their dotted names; their tensors are named `modules_to_save.classifier.weight`
    """

    def __init__(self, methods: Mapping[str, Method], anatomy: Anatomy, copies: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        if not methods and not copies:
            raise ConfigError("an adapter needs at least one method, got none: give for instance AdaLink(rank=16, modalities=('text',))")
        if COPIES in methods:
            raise ConfigError(f"a method is called {COPIES!r}, which names the trained copies of modules: give it another name")
        self.methods, self.anatomy = dict(methods), anatomy
        reserved = {name: method.slots(anatomy) for name, method in methods.items()}
        self.slots = tuple(sorted((slot for slots in reserved.values() for slot in slots), key=_place_in_row))
        _check_slots(reserved)
        order = sorted(methods, key=lambda name: not reserved[name])
        self.placements = tuple(
            replace(placed, role=f"{name}.{placed.role}", shared={f"{name}.{role}": module for role, module in placed.shared.items()})
            for name in order
            for placed in methods[name].place(anatomy)
        )
        for placement in self.placements:
            for role, module in {**placement.shared, placement.role: placement.edit}.items():
                _register(self, role.split("."), module)
        self.copies = dict(copies or {})
        for path, module in self.copies.items():
            _register(self, [COPIES, *path.split(".")], module)

    def beside(self, model: nn.Module, anatomy: Anatomy) -> Adapter:
        """Each edit where the module of its port computes; what several edits share, beside the first of them."""
        placed: set[int] = set()
        has_values = any(not parameter.is_meta for parameter in model.parameters())
        for placement in self.placements:
            device = execution_device(model, placement.port.path(anatomy), has_values=has_values)
            for module in (placement.edit, *placement.shared.values()):
                if id(module) not in placed:
                    placed.update(map(id, module.modules()))
                    module.to(device)
        for path, copy in self.copies.items():
            copy.to(execution_device(model, path, has_values=has_values))
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a folder stores of it, by name: trained parameters, a shared one once, and buffers that never change.

        Not buffers that a module makes of its settings, such as the frequencies of rotary positions.
        """
        made = {f"{path}.{name}".lstrip(".") for path, module in self.named_modules() for name in module._non_persistent_buffers_set}
        return {**dict(self.named_parameters()), **{name: buffer for name, buffer in self.named_buffers() if name not in made}}

    def fix(self, method: str) -> None:
        """Make the parameters of a method buffers: a folder holds them as before, and no optimizer does."""
        for module in self.get_submodule(method).modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())

    @property
    def chooses(self) -> bool:
        """Whether a method of the adapter scores the answers of a list, so that it writes nothing."""
        return any(getattr(method, "chooses", False) for method in self.methods.values())

    def n_parameters(self) -> dict[str, int]:
        """Trained parameters of each method and of the copies, a shared one counted once."""
        counts = dict.fromkeys([*self.methods, *([COPIES] if self.copies else [])], 0)
        for name, parameter in self.named_parameters():
            counts[name.split(".", 1)[0]] += parameter.numel()
        return counts


def _place_in_row(slot: Slots) -> tuple[int, int]:
    """At each place prefixes first, then percepts, then the rest in the order of the methods."""
    return SLOT_PLACES.index(slot.place), 0 if slot.domain == PREFIX else 1 if slot.domain >= PERCEPT else 2


def _check_slots(reserved: Mapping[str, tuple[Slots, ...]]) -> None:
    taken: dict[int, str] = {}
    for name, slots in reserved.items():
        for domain in dict.fromkeys(slot.domain for slot in slots):
            if domain in taken:
                known = {number: word for word, number in DOMAIN_NAMES.items()}
                free = ", ".join(str(number) for number in range(PERCEPT, N_DOMAINS) if number not in taken)
                raise ConfigError(
                    f"{taken[domain]} and {name} reserve slots of the same domain, {domain} ({known.get(domain, 'free')}): keep one of them, "
                    f"or give one a slot of its own where it has that setting; free are {free}"
                )
            taken[domain] = name


def _register(parent: nn.Module, path: list[str], edit: nn.Module) -> None:
    """Hang the edit at its role, through plain containers, so that the state dict reads as the roles do."""
    for part in path[:-1]:
        if part not in dict(parent.named_children()):
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    if dict(parent.named_children()).get(path[-1], edit) is not edit:
        raise ConfigError(f"two edits of one adapter are called {'.'.join(path)}: give each its own role")
    parent.add_module(path[-1], edit)

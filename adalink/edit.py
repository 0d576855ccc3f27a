"""Edits, where they are placed, and the adapter that holds them.

Every method answers three questions: where in depth (a port), where in the sequence (domains), and what (an edit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.errors import ConfigError
from adalink.offloaded import execution_device
from adalink.tokens import DOMAIN_NAMES, N_DOMAINS, PERCEPT, PREFIX, Tokens

__all__ = ["COPIES", "EMBEDDING", "Adapter", "Edit", "Method", "Placement", "Port", "Slots"]


class Port(NamedTuple):
    """A named place in the frozen stack. `module` is relative to the stack.

    embedding   the word embeddings, before any position embedding; also where embeddings are passed in as `inputs_embeds`
    input       the first argument of the module
    output      what the module returns (the first element of a tuple)
    mask        the attention mask that reaches the module (adalink.masks)
    position    the position ids that reach the module (adalink.positions)
    vectors     the position vectors that the module gives
    cache       what the module finds in the cache (adalink.recompute)
    returned    as output, and x is what the module returns too
    foreseen    as input, and x is what the module would return for it: a norm's input, changed by what reads the norm's output
    distances   what attention adds to its scores for the distance between two tokens (adalink.outside)
    reader      the mask of the decoder that reads the stack's output; the module's name is empty
    """

    module: str
    side: Literal["embedding", "input", "output", "mask", "position", "vectors", "cache", "returned", "foreseen", "distances", "reader"]


EMBEDDING = Port("", "embedding")
COPIES = "modules_to_save"  # peft's word for them


class Edit(Protocol):
    """Two or three lines of math that know nothing of domains, rows, beams or caches. An edit is an nn.Module."""

    def __call__(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        """h: the value at the port [B, T, D]; x: the input of the port's module [B, T, D_in] (h itself elsewhere) -> [B, T, D]."""


@dataclass(frozen=True)
class Slots:
    """Positions that a method reserves at the start of every row it serves (image slots: where the template says)."""

    domain: int
    count: int


@dataclass(frozen=True)
class Placement:
    """An edit at a port, for the tokens of some domains. `role` names its tensors in a checkpoint, whatever the host calls its modules.

    shared   role -> module that several edits of the method use and none of them owns
    group    what a wrapper (a gate) gives one of to all edits of a group; empty: the edit is a group of its own
    reads_row  whether what the edit does to a token depends on the other tokens of its row (a gate): then each text needs a row of its own
    """

    role: str
    port: Port
    edit: nn.Module
    domains: tuple[int, ...]
    shared: Mapping[str, nn.Module] = field(default_factory=dict)
    group: str = ""
    reads_row: bool = False


class Method(Protocol):
    """A published method: a frozen dataclass whose fields are its settings."""

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """The positions that the method reserves."""

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """New edits, and where they go."""


class Adapter(nn.Module):
    """The edits of one or more methods. Its state dict is the whole checkpoint.

    Methods that fill slots are placed first, whatever their order, so that others edit what they filled: AdaLink edits the
    projected picture, not the placeholder. Slots of a prefix come first in a row, since every token reads them, and those of
    percepts before a prompt's. Tensors are named METHOD.ROLE.TENSOR, for instance `adalink.image.down.weight`.

    copies   trained copies of the frozen model's modules, by their dotted names; their tensors are named `modules_to_save.classifier.weight`
    """

    def __init__(self, methods: Mapping[str, Method], anatomy: Anatomy, copies: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        if not methods:
            raise ConfigError("an adapter needs at least one method, got none: give for instance AdaLink(rank=16, modalities=('text',))")
        if COPIES in methods:
            raise ConfigError(f"a method is called {COPIES!r}, which names the trained copies of modules: give it another name")
        self.methods = dict(methods)
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
        for placement in self.placements:
            stack = anatomy.reader if placement.port.side == "reader" else f"{anatomy.stack}.{placement.port.module or anatomy.embedding}".lstrip(".")
            device = execution_device(model, stack or "")
            for module in (placement.edit, *placement.shared.values()):
                if id(module) not in placed:
                    placed.update(map(id, module.modules()))
                    module.to(device)
        for path, copy in self.copies.items():
            copy.to(execution_device(model, path))
        return self

    def n_parameters(self) -> dict[str, int]:
        """Trained parameters of each method and of the copies, a shared one counted once."""
        counts = dict.fromkeys([*self.methods, *([COPIES] if self.copies else [])], 0)
        for name, parameter in self.named_parameters():
            counts[name.split(".", 1)[0]] += parameter.numel()
        return counts


def _place_in_row(slot: Slots) -> int:
    """Prefixes first, then percepts, then the rest in the order of the methods."""
    if slot.domain == PREFIX:
        return 0
    return 1 if slot.domain >= PERCEPT else 2


def _check_slots(reserved: Mapping[str, tuple[Slots, ...]]) -> None:
    taken: dict[int, str] = {}
    for name, slots in reserved.items():
        for domain in (slot.domain for slot in slots):
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

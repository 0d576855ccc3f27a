"""UniPELT (arXiv 2110.07577): a bottleneck adapter, a prefix and, in its larger variant, LoRA at once, each behind gates of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import Edit, Joint, Method, Placement, Port, Slots, joins
from adalink.errors import AttachError, ConfigError
from adalink.methods.bottleneck import Bottleneck
from adalink.methods.lora import LoRA
from adalink.methods.prefix import Prefix
from adalink.tokens import ANSWER, PAD, PERCEPT, PREFIX, PROMPT, Tokens

__all__ = ["Gate", "Gated", "UniPELT", "Writes"]


# ----------------------------------------
# UniPELT's gate (arXiv 2110.07577): how much of a method's change is applied, one number for each row and submodule, read from the row.
#
#     h' = h + G (edit(h) - h)          G = mean over t of sigmoid(w . x_t + b);  w ~ N(0, 0.02), b = 0


NOT_EDITS = ("mask", "position", "vectors", "cache", "distances", "reader", "detached", "beside")  # ports where nothing is there to be mixed
NOT_OF_THE_PROMPT = (PAD, ANSWER, PREFIX, PROMPT, PERCEPT)  # the rest is question and image


@runtime_checkable
class Writes(Protocol):
    """An edit that writes what was not there: gated off, it leaves `off(h)`, not h."""

    def off(self, h: Tensor) -> Tensor:
        """h [B, T, D] as it would be with nothing written."""


class Gate(nn.Module):
    """float [B, 1, 1]: the mean, over tokens, of a sigmoid of each token's vector."""

    def __init__(self, width: int, mean: Literal["prompt", "sequence"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(1))
        self.mean = mean

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self.mean == "prompt" and not tokens.has_prompt:
            return tokens.of_prompt(self, "a gate over the prompt")
        unknown = NOT_OF_THE_PROMPT if self.mean == "prompt" else (PREFIX,)
        counts = ~tokens.among(unknown)  # [B, T, 1]
        opened = torch.sigmoid(nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias))
        n = counts.sum(1, keepdim=True)
        value = torch.where(n > 0, (opened * counts).sum(1, keepdim=True) / n.clamp(min=1), torch.sigmoid(self.bias))
        if self.mean == "prompt" and tokens.retained is not None:
            tokens.retained[self] = value
        return value


class GatedEdit(nn.Module):
    """The wrapped edit, as far as the gate is open. The gate reads what the edit reads."""

    def __init__(self, edit: Edit, gate: Gate) -> None:
        super().__init__()
        self.edit = edit
        self.gates = (gate,)  # not a child: edits of one group share it

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        base = self.edit.off(h) if isinstance(self.edit, Writes) else h
        value = self.edit(h, tokens, x)
        return torch.lerp(base.to(value.dtype), value, self.gates[0](x, tokens).to(value.dtype))

    def joins(self, other: object) -> bool:
        """As the wrapped edits do."""
        return isinstance(other, GatedEdit) and joins(self.edit, other.edit)

    def joint(self, edits: Sequence[GatedEdit], h: Tensor, tokens: Tokens, x: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """A gate is a share of the whole row. See `adalink.edit.Joint`."""
        assert isinstance(self.edit, Joint)
        gated = [share * edit.gates[0](x, tokens).to(share.dtype) for edit, share in zip(edits, shares, strict=True)]
        return self.edit.joint([edit.edit for edit in edits], h, tokens, x, gated)


@dataclass(frozen=True, kw_only=True)
class Gated:
    """A gate around each submodule of a method: LoRA, prefix, bottleneck, or any other.

    LoRA's own scale stays: with alpha = r it is 1, and the gate takes its place, as published. A prefix of a layer has one gate for
    its keys and values.

    mean    prompt     over the tokens of image and question, never the answer, slots or padding; read once with the prompt and stored beside
                       its cache. Causal, so that cached and whole decoding agree, and a row does not depend on its neighbours' padding. A
                       row that has none of these is gated by the bias alone. The prompt must be read in one call.
            sequence   as published: over all tokens of the call, padding included, a prefix not. Right for an encoder. On a decoder later
                       tokens reach earlier ones, and a cached step, which sees one token, differs from the whole sequence.
    """

    inner: Method
    mean: Literal["prompt", "sequence"] = "prompt"

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if not dataclasses.is_dataclass(self.inner) or not hasattr(self.inner, "place"):
            raise ConfigError(f"Gated wraps a method, got {self.inner!r}: give for instance Bottleneck(width=48)")
        if isinstance(self.inner, Gated):
            raise ConfigError("Gated wraps a method that is already gated: gate it once")
        if hasattr(self.inner, "schedule"):
            raise ConfigError(f"Gated wraps {type(self.inner).__name__}, which has a schedule that would not be called: give a method without one")
        if self.mean not in ("prompt", "sequence"):
            raise ConfigError(f"the gate's mean is over {self.mean!r}: give prompt or sequence")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """The wrapped method's."""
        return self.inner.slots(anatomy)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """The wrapped method's, each edit with its group's gate. Raises AttachError where there is nothing to gate."""
        gates: dict[str, Gate] = {}
        placed = [self._gated(placement, gates, anatomy) for placement in self.inner.place(anatomy)]
        if not gates:
            raise AttachError(f"{type(self.inner).__name__} edits no hidden state of this model, so there is nothing to gate: attach it without Gated")
        return placed

    def _gated(self, placement: Placement, gates: dict[str, Gate], anatomy: Anatomy) -> Placement:
        if placement.port.side in NOT_EDITS:
            return placement
        role = f"gates.{placement.group or placement.role}"
        gate = gates.setdefault(role, Gate(_width_read(anatomy, placement.port), self.mean))
        edit: Any = placement.edit
        return dataclasses.replace(placement, edit=GatedEdit(edit, gate), reads_row=True, shared={**placement.shared, role: gate})


def _width_read(anatomy: Anatomy, port: Port) -> int:
    """How wide the tokens are that an edit at this port reads."""
    if port.side == "embedding":
        return anatomy.width
    return next((linear.n_in for linear in anatomy.linears if linear.name == port.module), anatomy.layer_width)


SEQUENCE = ("text", "answer", "image", "prompt")  # not the prefix's slots, which are no part of the sequence


@dataclass(frozen=True, kw_only=True)
class UniPELT:
    """The published compositions, AP and APL, as one method. Tensors are named after their part: adapter, prefix, lora.

    Each part is one of this package's methods, so that any other mixture is a dict of them:

        {"adapter": Gated(inner=Bottleneck(width=48)), "prefix": Gated(inner=Prefix(length=10, form="mlp", init_std=0.02))}

    LoRA is on queries and values, with separate gates that take the place of alpha / R.
    """

    variant: Literal["AP", "APL"]  # APL is the larger, with LoRA
    bottleneck: int = 48  # R of the adapter, as published
    prefix_length: int = 10  # P, as published
    prefix_hidden: int = 512  # of the network that makes the prefix, as published
    prefix_form: Literal["mlp", "table"] = "mlp"  # table: what is left of the network once it is trained
    prefix_init_std: float = 0.02
    lora_rank: int = 8  # R of LoRA, as published
    mean: Literal["prompt", "sequence"] = "prompt"  # of the gates; sequence is the published one, see Gated

    def __post_init__(self) -> None:
        """Check what a config file can get wrong, each part by its own rules."""
        if self.variant not in ("AP", "APL"):
            raise ConfigError(f"UniPELT's variant is {self.variant!r}: give AP (adapter and prefix) or APL (LoRA too)")
        self.parts()

    def parts(self) -> dict[str, Gated]:
        """The methods that it is made of, by the names of their tensors."""
        prefix = Prefix(length=self.prefix_length, form=self.prefix_form, init_std=self.prefix_init_std, hidden=self.prefix_hidden)
        parts = {"adapter": Gated(inner=Bottleneck(width=self.bottleneck), mean=self.mean), "prefix": Gated(inner=prefix, mean=self.mean)}
        if self.variant == "APL":
            lora = LoRA(groups={"all": SEQUENCE}, rank=self.lora_rank, alpha=float(self.lora_rank), targets=("query", "value"))
            parts["lora"] = Gated(inner=lora, mean=self.mean)
        return parts

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """The prefix's."""
        return tuple(slot for part in self.parts().values() for slot in part.slots(anatomy))

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """Everything that its parts place."""
        return [
            replace(placed, role=f"{name}.{placed.role}", shared={f"{name}.{role}": module for role, module in placed.shared.items()})
            for name, part in self.parts().items()
            for placed in part.place(anatomy)
        ]

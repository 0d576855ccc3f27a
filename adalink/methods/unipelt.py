"""UniPELT (arXiv 2110.07577): a bottleneck adapter, a prefix and, in its larger variant, LoRA at once, each behind gates of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from adalink.anatomy import Anatomy
from adalink.edit import Placement, Slots
from adalink.errors import ConfigError
from adalink.methods.bottleneck import Bottleneck
from adalink.methods.gated import Gated
from adalink.methods.lora import LoRA
from adalink.methods.prefix import Prefix

__all__ = ["UniPELT"]

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

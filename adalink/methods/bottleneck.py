"""The bottleneck adapter (Houlsby et al., Pfeiffer et al.; as in UniPELT, arXiv 2110.07577): after each layer's feed-forward network.

    h' = h + up(relu(down(x)))          down: R x D, up: D x R, both with bias
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import Placement, Port, Slots
from adalink.errors import ConfigError, check_tuples
from adalink.methods.targets import added, layers_left
from adalink.tokens import ANSWER, IMAGE, N_DOMAINS, PROMPT, TEXT, Tokens

__all__ = ["SEQUENCE", "Bottleneck"]

SEQUENCE = (TEXT, ANSWER, IMAGE, PROMPT)  # the tokens of the sequence: not a prefix, which is no part of it, nor an injected percept


class Adapted(nn.Module):
    """h + up(relu(down(x))). Both projections start at N(0, 0.02), biases at 0. Parameters: 2 D R + D + R."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return h + self.up(nn.functional.relu(self.down(x)))

    def joins(self, other: object) -> bool:
        """Whatever its width."""
        return isinstance(other, Adapted)

    def joint(self, edits: Sequence[Adapted], h: Tensor, tokens: Tokens, x: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """Shares are taken where a token has R numbers, not D. See `adalink.edit.Joint`."""
        middle = [nn.functional.relu(edit.down(x)) * share for edit, share in zip(edits, shares, strict=True)]
        rows = [edit.up.weight.T for edit in edits] + [edit.up.bias[None] for edit in edits]
        return added(h, [*middle, *shares], rows)


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """One adapter for each layer that is not excluded, after its feed-forward network only.

    Where a layer ends with a norm (post-LN: BERT, OPT-350M), the adapter reads the norm's output and its change is added before that norm,
    which then runs on the changed sum: LN(h + change(LN(h))). Elsewhere (pre-LN: GPT-2, OPT, Llama, T5) it reads the layer's un-normalised
    output, and its change is added there. Both are where the published code and AdapterHub's put it.
    """

    width: int  # R; 48 in UniPELT
    domains: tuple[int, ...] = SEQUENCE
    exclude_layers: tuple[int, ...] = ()  # layers that are left alone, counted from 0

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "the bottleneck's")
        if self.width < 1:
            raise ConfigError(f"the bottleneck's width is {self.width}: give 1 or more (48 was published)")
        if not self.domains or not all(0 <= domain < N_DOMAINS for domain in self.domains):
            raise ConfigError(f"the bottleneck's domains are {list(self.domains)}: give one or more of 0 to {N_DOMAINS - 1}")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None: it edits tokens that are there."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One adapter for each layer. Raises AttachError where an excluded one is not there, or none is left."""
        ports = [Port(norm, "foreseen") for norm in anatomy.closing] or [Port(layer, "returned") for layer in anatomy.layers]
        left = layers_left(anatomy, self.exclude_layers)
        return [Placement(str(i), ports[i], Adapted(anatomy.layer_width, self.width), self.domains) for i in left]

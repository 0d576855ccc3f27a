"""eP-ALM (arXiv 2303.11403): what a frozen encoder perceives, block by block, written into one slot of a window of decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from adalink.anatomy import Anatomy, InputSpec
from adalink.attachment.recompute import Recomputed, WholeSequence
from adalink.attachment.slots import HideKeys, ReadAll, without_positions
from adalink.edit import Placement, Port, Slots
from adalink.errors import AttachError, ConfigError, check_tuples
from adalink.tokens import N_DOMAINS, PERCEPT, Tokens

__all__ = ["EPALM", "Tap"]


class Tap(nn.Module):
    """Writes one of the encoder's pooled features, projected, whatever the slot held.

    source  name of an input [B, L, Dv], one vector for each block of the encoder
    block   which of them, counted from the end
    """

    def __init__(self, source: str, block: int, project: nn.Linear) -> None:
        super().__init__()
        self.source, self.block, self.project = source, block, project

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        if self.source not in tokens.inputs:
            raise ConfigError(
                f"eP-ALM reads the input {self.source!r}, and the token map has {', '.join(tokens.inputs) or 'none'}: "
                "give it the pooled features [B, L, D] of every block of the encoder"
            )
        value: Tensor = self.project(tokens.inputs[self.source][:, self.block].to(h.dtype))
        return tokens.given(value[:, None])


@dataclass(frozen=True, kw_only=True)
class EPALM:
    """Perceptual tokens injected into the layers [start, end) of a frozen language model.

    One slot at the beginning of the row. Below the window its key is hidden; before layer l of the window it is overwritten with
    tap min((l - start) // step, n_taps - 1) of the last `n_taps` blocks, where step = max((end - start) // n_taps, 1): shallow tap
    to shallow layer. After the window it evolves freely. A connector is a linear with bias and torch's default start; no norm.

    mask    causal      nothing reads a later token, the slot included. The safe choice, and exact with any cache.
            published   the released code: the slot reads everything after it, later text and padding too. A layer at or after `end` then
                        reads a slot that saw the future, so a small share of each next token leaks into its own prediction (up to 0.05 in
                        logits where only the last layer is left out), and a padded row differs from the same row alone: the trained
                        weights depend on the longest row of each batch, so other numbers of processes, batches or accumulation steps
                        give other weights from the same images, which training reports in its log. With the last layer in the window nothing
                        reads what the slot saw, and both masks give the same text. With a cache the slot's
                        keys are made anew at each step where only the last layer reads it (exact); where several do, generation reads the
                        whole sequence at each step. In an encoder (T5), where all is read anyway, the two are one.

    The slot takes no position, as released: the text after it starts at 0. On a learned table (OPT, GPT-2) it gets no position
    vector; on rotations (Llama, Qwen2) it is not rotated; where distances alone count (T5) there is nothing to do. Explicit
    position ids are those that count every token, as transformers makes them; the slot is taken out of the count here.
    """

    layers: tuple[int, int]  # start and end; negative ones count from the end: (-13, -1) is 19 to 30 of 32, as published
    n_taps: int  # 6 in every published run, of 12 or 24 blocks
    connector: Literal["shared", "per_tap"]  # shared: ePALM_pt-L, one linear for all taps
    mask: Literal["causal", "published"] = "causal"
    source: str = "image_taps"  # the input it reads: [B, L, Dv], pooled features of every block of an encoder of any modality
    slot: int = PERCEPT  # the slot's domain; a second encoder's takes another of 6 to 15

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "eP-ALM's")
        if len(self.layers) != 2 or not all(isinstance(layer, int) for layer in self.layers):
            raise ConfigError(f"eP-ALM's layers are {list(self.layers)}: give the first layer and the one after the last, for instance [19, 31]")
        if self.n_taps < 1:
            raise ConfigError(f"eP-ALM's n_taps is {self.n_taps}: give 1 or more (6 were published)")
        if self.connector not in ("shared", "per_tap"):
            raise ConfigError(f"eP-ALM's connector is {self.connector!r}: give shared or per_tap")
        if self.mask not in ("causal", "published"):
            raise ConfigError(f"eP-ALM's mask is {self.mask!r}: give causal or published")
        if not PERCEPT <= self.slot < N_DOMAINS:
            raise ConfigError(f"eP-ALM's slot is {self.slot}: give {PERCEPT}, or {PERCEPT + 1} to {N_DOMAINS - 1} for a second encoder's")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """One slot, whatever the number of taps."""
        return (Slots(self.slot, 1),)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """A tap at the input of each layer of the window, the masks around it, and no position."""
        start, end = self._window(anatomy)
        source = self._source(anatomy)
        slot = (self.slot,)
        used = [min((layer - start) // max((end - start) // self.n_taps, 1), self.n_taps - 1) for layer in range(start, end)]
        shared = nn.Linear(source.width, _width(anatomy, start))
        linears = {tap: shared if self.connector == "shared" else nn.Linear(source.width, shared.out_features) for tap in dict.fromkeys(used)}
        taps = {tap: Tap(self.source, tap - self.n_taps, linear) for tap, linear in linears.items()}
        hide = HideKeys()
        return [
            *(Placement(f"tap{tap}", Port(layer, "input"), taps[tap], slot) for tap, layer in zip(used, anatomy.layers[start:end], strict=True)),
            *(Placement("hidden", Port(layer, "mask"), hide, slot) for layer in anatomy.layers[:start]),
            *(self._published(anatomy, end) if self.mask == "published" else ()),
            *without_positions(anatomy, slot),
        ]

    def _published(self, anatomy: Anatomy, end: int) -> list[Placement]:
        """From the window's last layer on the slot reads everything; before it, what it reads is overwritten and reaches nobody."""
        slot, layers, read = (self.slot,), anatomy.layers, ReadAll()
        if anatomy.attention == "bidirectional":
            return []
        placed = [Placement("reads_all", Port(layer, "mask"), read, slot) for layer in layers[end - 1 :]]
        if end == len(layers):
            return placed
        last_alone = end == len(layers) - 1
        return [*placed, Placement("cache", Port(layers[end], "cache"), Recomputed(layers[end - 1]) if last_alone else WholeSequence(), slot)]

    def _window(self, anatomy: Anatomy) -> tuple[int, int]:
        """The window as layers counted from 0. Raises AttachError where the model has no such layers."""
        n = len(anatomy.layers)
        start, end = (layer + n if layer < 0 else layer for layer in self.layers)
        if not 0 <= start < end <= n:
            raise AttachError(
                f"eP-ALM's layers {list(self.layers)} are outside this model, which has {n}: give 0 <= start < end <= {n}, "
                f"or numbers from -{n} to -1 that count from the end"
            )
        return start, end

    def _source(self, anatomy: Anatomy) -> InputSpec:
        """The input that the taps are read from. Raises AttachError where it is missing or has too few blocks."""
        if self.source not in anatomy.inputs:
            raise AttachError(
                f"eP-ALM reads the input {self.source!r}, and this model has {', '.join(anatomy.inputs) or 'none'}: compose it with an encoder "
                "whose blocks can all be pooled, or name one of these"
            )
        source = anatomy.inputs[self.source]
        if source.count < self.n_taps:
            raise AttachError(
                f"eP-ALM taps the last {self.n_taps} blocks of {self.source!r}, which has {source.count} that can be pooled: "
                f"give n_taps of 1 to {source.count}, or another encoder"
            )
        return source


def _width(anatomy: Anatomy, layer: int) -> int:
    """D inside the layers, which is not that of the embedding everywhere (OPT-350M): what the layer's first linear reads."""
    return next(linear.n_in for linear in anatomy.linears if linear.name.startswith(anatomy.layers[layer] + "."))

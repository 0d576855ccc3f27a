"""Prefix tuning (Li and Liang, arXiv 2101.00190): trained keys and values before those of the tokens, in every layer.

    attention(Q, [P_K ; K], [P_V ; V])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy, Part, Projections
from adalink.attachment.slots import HideKeys, virtual_tokens
from adalink.edit import Placement, Port, Slots
from adalink.errors import AttachError, ConfigError, check_tuples
from adalink.methods.targets import layers_left
from adalink.tokens import PREFIX, Tokens

__all__ = ["Prefix"]


class Direct(nn.Module):
    """[P, features]: the keys and values of all layers, side by side. sizes: how many features each of them has."""

    def __init__(self, length: int, sizes: Sequence[int], std: float) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.table = nn.Parameter(torch.randn(length, sum(sizes)) * std)

    def pieces(self) -> tuple[Any, ...]:
        """The weights of each of them, cut once: the gradient of a piece that is cut alone is as large as that of all."""
        return self.table.split(self.sizes, 1)

    def forward(self, piece: Any) -> Tensor:
        """[P, n]."""
        found: Tensor = piece
        return found


class Reparametrised(nn.Module):
    """The same from one small network for all layers: embed [P, D] -> Linear(D, hidden) -> tanh -> Linear(hidden, features)."""

    def __init__(self, length: int, width: int, hidden: int, sizes: Sequence[int], std: float) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.embed = nn.Parameter(torch.randn(length, width) * std)
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, sum(sizes))

    def pieces(self) -> tuple[Any, ...]:
        """See `Direct`."""
        return tuple(zip(self.up.weight.split(self.sizes), self.up.bias.split(self.sizes), strict=True))

    def forward(self, piece: Any) -> Tensor:
        """[P, n]."""
        return nn.functional.linear(torch.tanh(self.down(self.embed)), *piece)


class WriteRows(nn.Module):
    """Writes some features of a slot: those of its ordinal in a table. Other features of h stay.

    spans   (first feature of h, which piece of the table, how many features), in order
    """

    def __init__(self, table: Direct | Reparametrised, spans: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        self.tables = (table,)  # not a child: all layers share it
        self.spans = spans

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        table = self.tables[0]
        pieces = tokens.once((table,), table.pieces)
        rows = [tokens.looked_up(table(pieces[piece])) for _, piece, _ in self.spans]
        return self._written(h.to(rows[0].dtype), rows)

    def off(self, h: Tensor) -> Tensor:
        """Zeros: a closed gate leaves keys and values of nothing, as published, and not those of a placeholder."""
        return self._written(h, [torch.zeros_like(h[..., start : start + n]) for start, _, n in self.spans])

    def _written(self, h: Tensor, rows: list[Tensor]) -> Tensor:
        parts, done = [], 0
        for (start, _, n), row in zip(self.spans, rows, strict=True):
            parts += [h[..., done:start], row]
            done = start + n
        return rows[0] if rows[0].shape == h.shape else torch.cat([*parts, h[..., done:]], -1)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """`length` slots at the start of a row whose keys and values are trained, layer by layer. Every token of the row reads them.

    The result equals the published concatenation exactly: the slots have no position (text starts at 0; a key at position 0 is not
    rotated, so it can be written before the rotation), no distance to any token (T5), and no decoder reads what an encoder makes of them.
    Grouped-query models have narrower keys, and so a narrower prefix. A rotary embedding that also scales (YaRN) scales the prefix with it.
    A model with a sliding window is refused: beyond it a prefix would not be seen.

    form    mlp     embed [P, D] -> Linear(D, hidden) -> tanh -> Linear(hidden, 2 layers D_kv), shared by all layers: how it is trained
            table   the keys and values themselves: what is left of the network once it is trained, and all that serving needs

    The features of the i-th layer that is not excluded are chunk 2i, its keys, and chunk 2i + 1, its values. In an excluded layer no token
    reads the slots.
    """

    length: int  # P; 10 in UniPELT
    form: Literal["mlp", "table"]
    init_std: float = 0.02  # of the embeddings, or of the table; the usual start of word embeddings
    hidden: int = 512  # of the mlp; 512 in UniPELT
    exclude_layers: tuple[int, ...] = ()  # layers that are left alone, counted from 0

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "the prefix's")
        if self.length < 1:
            raise ConfigError(f"the prefix's length is {self.length}: give 1 or more (10 was published)")
        if self.form not in ("mlp", "table"):
            raise ConfigError(f"the prefix's form is {self.form!r}: give mlp or table")
        if self.init_std < 0:
            raise ConfigError(f"the prefix's init_std is {self.init_std}: give 0 or more")
        if self.hidden < 1:
            raise ConfigError(f"the prefix's hidden width is {self.hidden}: give 1 or more (512 was published)")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """One slot for each vector."""
        return (Slots(PREFIX, self.length),)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """Keys and values of each layer, and nothing that counts the slots.

        Raises AttachError where keys cannot be written, an excluded layer is not there, or none is left.
        """
        _check(anatomy)
        left = layers_left(anatomy, self.exclude_layers)
        sizes = [part.stop - part.start for i in left for part in (anatomy.projections[i].key, anatomy.projections[i].value)]
        table = (
            Direct(self.length, sizes, self.init_std)
            if self.form == "table"
            else Reparametrised(self.length, anatomy.layer_width, self.hidden, sizes, self.init_std)
        )
        layers = [_layer(i, anatomy.projections[i], 2 * order, table) for order, i in enumerate(left)]
        hide = HideKeys()
        return [
            *(placement for layer in layers for placement in layer),
            *(Placement("hidden", Port(layer, "mask"), hide, (PREFIX,)) for i, layer in enumerate(anatomy.layers) if i not in left),
            *virtual_tokens(anatomy, (PREFIX,)),
        ]


def _layer(i: int, one: Projections, first: int, table: Direct | Reparametrised) -> list[Placement]:
    """One edit where one linear makes keys and values, else two; they are of one group. first: the piece of the keys."""

    def written(role: str, part: Part, spans: tuple[tuple[int, int, int], ...]) -> Placement:
        return Placement(f"{i}.{role}", Port(part.linear, "output"), WriteRows(table, spans), (PREFIX,), shared={"shared": table}, group=str(i))

    key, value = (one.key.start, first, one.key.stop - one.key.start), (one.value.start, first + 1, one.value.stop - one.value.start)
    if one.key.linear == one.value.linear:
        return [written("key_value", one.key, tuple(sorted((key, value))))]
    return [written("key", one.key, (key,)), written("value", one.value, (value,))]


def _check(anatomy: Anatomy) -> None:
    names = sorted({linear.name.rsplit(".", 1)[-1] for linear in anatomy.linears})
    if not anatomy.projections:
        raise AttachError(
            f"a prefix writes keys and values, and this model's linears ({', '.join(names)}) do not say which make them: "
            "expected q_proj, k_proj, v_proj, or query, key, value, or q, k, v, or one c_attn"
        )
    if any(one.key_norm for one in anatomy.projections):
        raise AttachError("this model normalises its keys after their linear, so a prefix written there would be changed: use Prompt, or another model")

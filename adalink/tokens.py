"""What every token of a batch is: its domain, its ordinal, and the adapter that serves its row.

A domain is a small integer. A method that adds tokens reserves SLOTS, ordinary positions with a domain of their own, so image,
prompt, prefix and percept tokens are one and the same thing, and the sequence has one length from the embedding to the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from adalink.errors import AttachError, ConfigError

__all__ = [
    "ANSWER", "AUTO", "BASE_NAME", "BASE_ROW", "DOMAIN_NAMES", "IMAGE", "OTHER", "PAD", "PERCEPT", "PREFIX", "PROMPT", "TEXT", "TokenMap", "Tokens", "counted",
    "is_autocast", "uploaded", "without_autocast",
]  # fmt: skip

PAD = -1  # no domain: no edit touches a padding token
TEXT = 0  # text of the prompt: instruction, question, special tokens
ANSWER = 1  # text the model is asked to write, in training and in generation alike
IMAGE = 2  # slots that a bridge fills, or the image tokens of an existing model
PROMPT = 3  # slots of soft prompts
PREFIX = 4  # slots of prefix tuning, written in each layer's keys and values
PERCEPT = 5  # the slot of injected encoder features (eP-ALM)
N_DOMAINS = 16  # 6..14 are free for other modalities
OTHER = 15  # what is neither text nor image in an existing model: the tokens of a sound

DOMAIN_NAMES = {"text": TEXT, "answer": ANSWER, "image": IMAGE, "prompt": PROMPT, "prefix": PREFIX, "percept": PERCEPT}
BASE_ROW = -1  # a row that no adapter serves
BASE_NAME = "__base__"  # the same, as the field writes it
AUTO = "auto"  # a row whose adapter a router chooses
T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """The tokens of one forward call, as the edits see them.

    domain     int64 [B, T]    what each token is
    ordinal    int64 [B, T]    how many tokens of the same domain precede it in its row
    row        int64 [B]       index of the adapter that serves the row, BASE_ROW for none
    position   int64 [T]       index of each token in its sequence; [B, T] where it differs from row to row
    keys       int64 [B, K]    domain of every key that attention may see, PAD where the cache is still empty
    present    the domains that can occur in this call, known without reading a tensor
    inputs     name -> [B, ...], what the edits read beside the hidden states; empty once the prompt is over
    entry      int64 [B, K]    which entry of `inputs` each key's token reads; None where all of a row read the row's
    """

    domain: Tensor
    ordinal: Tensor
    row: Tensor
    position: Tensor
    keys: Tensor
    present: frozenset[int]
    inputs: Mapping[str, Tensor]
    memo: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)  # of once()
    # What an edit leaves for others of the same call: a TokenDropout which tokens keep their change, a ladder its state.
    drawn: dict[nn.Module, Any] = field(default_factory=dict, repr=False)
    serving: frozenset[int] | None = None  # the adapters that serve a row, known without reading a tensor; None where it is not known
    has_prompt: bool = False  # whether the call holds the whole prompt
    # What an edit keeps of the prompt for the calls after it; lives as long as their cache. None where no such call follows.
    retained: dict[nn.Module, Tensor] | None = None
    n_before: int = 0  # tokens of earlier calls, which a cache holds
    end: int = 0  # how long the sequence is with this call's tokens; keys after it are not written yet
    # Adapter -> int64 [n], the rows that it serves, where several adapters serve the call's rows; empty where one does, or it is not known.
    rows_of: Mapping[int, Tensor] = field(default_factory=dict)
    parts: dict[int, Tokens] = field(default_factory=dict, repr=False)  # memo of of()
    elsewhere: dict[torch.device, Tokens] = field(default_factory=dict, repr=False)  # memo of on()
    # The tokens of the whole call and int64 [B, T], where these are among them, after at(): what is drawn for a token is drawn once.
    origin: tuple[Tokens, Tensor] | None = None
    entry: Tensor | None = None
    weights: Tensor | None = None  # as in TokenMap

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` gives, made once for all edits of the call. It must save nothing for a backward pass: layers that run again do not make it again."""
        key = (*key, torch.is_grad_enabled())
        if key not in self.memo:
            self.memo[key] = make()
        found: T = self.memo[key]
        return found

    def among(self, domains: tuple[int, ...]) -> Tensor:
        """bool [B, T, 1]: the tokens in one of `domains`, whichever adapter serves their row."""
        return self.once((domains,), lambda: torch.stack([self.domain == domain for domain in domains]).any(0)[..., None])

    def select(self, domains: tuple[int, ...], adapter: int) -> Tensor:
        """bool [B, T, 1]: the tokens in one of `domains`, on rows served by `adapter`."""
        return self.once((domains, adapter), lambda: self.among(domains) & (self.row == adapter)[:, None, None])

    def share(self, domains: tuple[int, ...], adapter: int, dtype: torch.dtype) -> Tensor:
        """float [B, T, 1]: 1 at the tokens that `select` gives, 0 elsewhere."""
        return self.once((domains, adapter, dtype), lambda: self.select(domains, adapter).to(dtype))

    def looked_up(self, table: Tensor) -> Tensor:
        """[B, T, D]: of a table [P, D] the row of each token's ordinal; zeros for ordinals of P and more.

        A product, so that the gradient of a row is a product too, and not a sum that goes over every token of the batch in turn.
        """
        n, dtype = len(table), table.dtype
        is_row = self.once((n, dtype), lambda: (self.ordinal[..., None] == torch.arange(n, device=self.ordinal.device)).to(dtype))
        with without_autocast(table.device):
            return is_row @ table

    def given(self, values: Tensor) -> Tensor:
        """float [B, T, D]: of `values` [B, N, D], made of an input, the one with each token's ordinal; [B, 1, D] is the same for every token.

        Tokens of other domains get one too, whatever their ordinal: they are not selected.
        """
        index = self.ordinal.clamp(max=values.shape[1] - 1)
        if self.entry is None:
            return values.expand(-1, index.shape[1], -1) if values.shape[1] == 1 else torch.take_along_dim(values, index[..., None], dim=1)
        entry = self.entry.gather(1, self.position.expand(len(self.row), -1))
        return values.flatten(0, 1)[entry * values.shape[1] + index]

    def of(self, adapter: int) -> Tokens:
        """The tokens of the rows that one adapter of several serves: its edits are then not run on the others' rows."""
        if adapter not in self.parts:
            rows = self.rows_of[adapter]
            position = self.position if self.position.ndim == 1 else self.position[rows]
            inputs = self.inputs if self.entry is not None else {name: value[rows] for name, value in self.inputs.items()}
            self.parts[adapter] = replace(
                self, domain=self.domain[rows], ordinal=self.ordinal[rows], row=self.row[rows], position=position, keys=self.keys[rows], inputs=inputs,
                entry=None if self.entry is None else self.entry[rows], weights=None if self.weights is None else self.weights[rows],
                memo={}, drawn={}, serving=frozenset({adapter}), rows_of={}, parts={}, elsewhere={},
                origin=None if self.origin is None else (self.origin[0].of(adapter), self.origin[1][rows]),
            )  # fmt: skip
        return self.parts[adapter]

    def on(self, device: torch.device) -> Tokens:
        """The same tokens on the device of a layer that lies elsewhere than the first; moved once for all of a call's edits there."""
        if self.domain.device == device:
            return self
        if device not in self.elsewhere:
            names = ("domain", "ordinal", "row", "position", "keys", "entry", "weights")
            moved = {name: value.to(device) for name in names if (value := getattr(self, name)) is not None}
            self.elsewhere[device] = replace(
                self, **moved, inputs={name: value.to(device) for name, value in self.inputs.items()}, memo={}, parts={}, elsewhere={},
                rows_of={adapter: rows.to(device) for adapter, rows in self.rows_of.items()},
                origin=None if self.origin is None else (self.origin[0].on(device), self.origin[1].to(device)),
            )  # fmt: skip
        return self.elsewhere[device]

    def of_prompt(self, module: nn.Module, what: str) -> Tensor:
        """[B, ...]: what a module found when it read the whole prompt, in a call after it. With beams made since, a prompt's rows are repeated.

        Raises AttachError where no prompt is known.
        """
        value = (self.retained or {}).get(module)
        if value is None or len(self.row) % len(value):
            found = "a cache of which no prompt is known, or a part of a prompt" if value is None else f"{len(self.row)} rows after a prompt of {len(value)}"
            raise AttachError(
                f"{what} is read once, from the whole prompt, and this call holds {found}: "
                "give the model the prompt in one call, and go on with the cache that this call returned"
            )
        return value if len(value) == len(self.row) else value.repeat_interleave(len(self.row) // len(value), 0)

    def at(self, place: Tensor) -> Tokens:
        """The tokens at these places of the call, int64 [B, M], in this order; one may come twice."""
        domain, ordinal = (torch.take_along_dim(value, place, 1) for value in (self.domain, self.ordinal))
        position = torch.take_along_dim(self.position.expand_as(self.domain), place, 1)
        return replace(self, domain=domain, ordinal=ordinal, position=position, memo={}, drawn={}, parts={}, elsewhere={}, origin=(self, place))


class Host(Protocol):
    """What a frozen model is given with a batch's tokens: an existing vision-language model's image vectors and positions."""

    @property
    def learns(self) -> bool:
        """Whether a gradient reaches what it holds."""

    def cut(self, rows: Tensor, length: int) -> Host:
        """Of some rows the first tokens."""

    def after(self, rows: Tensor | None = None) -> Host:
        """Of some rows (all, where none are named) what is needed once prompts are over."""

    def beside(self, other: Any) -> Host:
        """The rows of two batches whose prompts are over."""


@dataclass(frozen=True)
class TokenMap:
    """What a batch of prompts is made of; immutable, so nothing has to be advanced, reordered or undone.

    domain     int64 [B, T]    PAD for padding
    row        int64 [B]       which adapter serves the row
    inputs     name -> [B, ...], for instance `image`: the features [B, N, Dv] of the images
    generated  domain of every token after the prompt
    present    the domains that can occur in the prompt; an edit for any other is not run
    serving    the adapters that occur in `row`; an edit of any other is not run. None: every attached one is
    entry      int64 [B, T]    which entry of `inputs` a token reads, where a row holds the tokens of several, one after the other: each has
                               slots of its own, whose ordinals start anew. None: inputs have one entry for each row
    host       what the frozen model itself is given with these tokens beside their ids, for whoever calls it; edits do not see it
    indices    `row`, as the host knows it: then nobody waits for the device to find an adapter's rows. None: it is not known there
    weights    float [B, K]: where several adapters serve a row together (`adalink.attachment.mixture`), how much each does; of an adapter that has
               several tasks (`adalink.methods.budgets.hyper`), 1 at the row's. None: no row is such
    segment    int64 [B, T]: where a row holds several texts after what they share (0), which of them a token belongs to, from 1: the ordinals of each
               go on from what is shared. None: every row is one text
    """

    domain: Tensor
    row: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    generated: int = ANSWER
    present: frozenset[int] = frozenset(range(N_DOMAINS))
    serving: frozenset[int] | None = None
    entry: Tensor | None = None
    host: Host | None = None
    indices: tuple[int, ...] | None = None
    weights: Tensor | None = None
    segment: Tensor | None = None
    # int64 [B, T]: how many tokens of the same domain precede each token in its row. [5, 5, 0, 5] -> [0, 1, 0, 2]
    ordinal: Tensor = field(init=False, repr=False)
    # int64 [B, 1]: tokens of the generated domain inside the prompt; the first generated token's ordinal
    n_generated_before: Tensor = field(init=False, repr=False)
    rows_of: Mapping[int, Tensor] = field(init=False, repr=False)  # see Tokens

    def __post_init__(self) -> None:
        """Check the shapes and count the ordinals once, where the map is made: a compiled model only reads them."""
        if self.domain.ndim != 2 or self.row.shape != self.domain.shape[:1]:
            raise ConfigError(
                f"a token map needs domain [B, T] and row [B], got {tuple(self.domain.shape)} and {tuple(self.row.shape)}: "
                "give one row index for each row of domain"
            )
        if self.indices is not None and len(self.indices) != len(self.row):
            raise ConfigError(f"a token map has {len(self.row)} rows, and indices for {len(self.indices)}: give one for each row, or None")
        if self.entry is not None and self.entry.shape != self.domain.shape:
            raise ConfigError(f"a token map's entry is {tuple(self.entry.shape)} with domain {tuple(self.domain.shape)}: give one for each token")
        wrong = {name: tuple(value.shape) for name, value in self.inputs.items() if value.shape[:1] != self.row.shape}
        if wrong and self.entry is None:
            raise ConfigError(f"inputs {wrong} do not have the token map's {self.row.shape[0]} rows: give one entry for each row")
        slot = self.domain + 1
        entry, segment = (None if value is None else value[..., None] for value in (self.entry, self.segment))
        counts = counted(nn.functional.one_hot(slot, N_DOMAINS + 1), entry, segment)
        object.__setattr__(self, "ordinal", counts.gather(2, slot[..., None])[..., 0] - 1)
        object.__setattr__(self, "n_generated_before", (self.domain == self.generated).sum(1, keepdim=True))
        several = self.serving if self.serving is not None and len(self.serving) > 1 else ()
        object.__setattr__(self, "rows_of", {adapter: self._rows_of(adapter) for adapter in several})

    def cut(self, rows: Tensor, length: int, present: frozenset[int]) -> TokenMap:
        """The map of some rows, int64 [b], of which the first tokens alone are read. present: the domains that occur there."""
        inputs = self.inputs if self.entry is not None else {name: value[rows] for name, value in self.inputs.items()}
        entry = None if self.entry is None else self.entry[rows, :length]
        host = None if self.host is None else self.host.cut(rows, length)
        domain, row, weights = self.domain[rows, :length], self.row[rows], None if self.weights is None else self.weights[rows]
        segment = None if self.segment is None else self.segment[rows, :length]
        return replace(
            self, domain=domain, row=row, inputs=inputs, present=present, entry=entry, host=host, indices=None, weights=weights, segment=segment
        )

    def window(self, batch: int, start: int, length: int, visible: int) -> Tokens:
        """Tokens [start, start + length) of `batch` rows, with `visible` keys; rows are repeated for beams.

        Pure: the same arguments give the same tokens, so cached decoding, beams and chunked prefill need no bookkeeping.
        Raises ConfigError where the rows of the call are no multiple of the map's.
        """
        n_rows, prompt = self.domain.shape
        if batch % n_rows:
            raise ConfigError(
                f"the model was called with {batch} rows but {n_rows} are bound: bind a token map made for this batch (beams multiply its rows)"
            )
        beams, end = batch // n_rows, start + length
        n_new = max(end - prompt, 0)
        new = torch.arange(n_new, device=self.domain.device)
        domain = torch.cat([self.domain, self.domain.new_full((n_rows, n_new), self.generated)], 1)[:, :end]
        ordinal = torch.cat([self.ordinal, self.n_generated_before + new], 1)[:, :end]

        def repeated(value: Tensor) -> Tensor:
            return value if beams == 1 else value.repeat_interleave(beams, 0)

        in_prompt = start < prompt
        return Tokens(
            domain=repeated(domain[:, start:]),
            ordinal=repeated(ordinal[:, start:]),
            row=repeated(self.row),
            position=torch.arange(start, end, device=domain.device),
            keys=repeated(nn.functional.pad(domain, (0, visible - end), value=PAD)),
            present=(self.present if in_prompt else frozenset()) | (frozenset({self.generated}) if n_new else frozenset()),
            inputs={name: value if self.entry is not None else repeated(value) for name, value in self.inputs.items()} if in_prompt else {},
            serving=self.serving,
            has_prompt=start == 0 and end >= prompt,
            n_before=start,
            end=end,
            rows_of={adapter: _beams_of(rows, beams) for adapter, rows in self.rows_of.items()},
            entry=None if self.entry is None else repeated(self._entries(visible)),
            weights=None if self.weights is None else repeated(self.weights),
        )

    def first_of(self, domain: int, batch: int, end: int, visible: int) -> Tokens:
        """The first token of `domain` in each row, alone: what a second look at it sees when the sequence is `end` tokens long.

        Its place differs from row to row. A row without such a token gets one of no domain, which nothing edits.
        """
        whole = self.window(batch, 0, end, visible)
        is_it = (whole.domain == domain) & (whole.ordinal == 0)
        return Tokens(
            domain=torch.where(is_it.any(1, keepdim=True), domain, PAD),
            ordinal=torch.zeros_like(whole.domain[:, :1]),
            row=whole.row,
            position=is_it.long().argmax(1, keepdim=True),
            keys=whole.keys,
            present=frozenset({domain}),
            inputs=whole.inputs,
            serving=self.serving,
            end=end,
            entry=whole.entry,
        )

    def _rows_of(self, adapter: int) -> Tensor:
        """int64 [n]: the rows that an adapter serves."""
        if self.indices is None:
            return (self.row == adapter).nonzero()[:, 0]
        return uploaded([row for row, index in enumerate(self.indices) if index == adapter], self.row.device)

    def _entries(self, visible: int) -> Tensor:
        """int64 [B, visible]: what comes after the prompt goes on with its last entry."""
        assert self.entry is not None
        n_new = max(visible - self.entry.shape[1], 0)
        return torch.cat([self.entry, self.entry[:, -1:].expand(-1, n_new)], 1)[:, :visible]


def counted(is_one: Tensor, entry: Tensor | None = None, segment: Tensor | None = None) -> Tensor:
    """int64 [B, T, ...]: how many tokens are one, up to each and itself among them; counted anew where `entry` changes along the row.

    [1, 0, 1, 1] with entries [4, 4, 4, 5] -> [1, 1, 2, 1]. Of a segment above 0, those of segment 0 count, and no other's:
    [1, 1, 1, 1] with segments [0, 1, 1, 2] -> [1, 2, 3, 2].
    """
    counts = is_one.long().cumsum(1)

    def before_last(begins: Tensor) -> Tensor:
        """How many are one before the last of these places, up to each token. A row without any loses nothing."""
        return torch.where(begins, counts - is_one.long(), 0).cummax(1).values

    begins = torch.zeros_like(is_one, dtype=torch.bool) if entry is None else entry != entry.roll(1, 1)
    if segment is None:
        return counts if entry is None else counts - before_last(begins)
    changes = begins | (segment != segment.roll(1, 1))
    is_first = changes & (segment > 0) & (begins | (segment.roll(1, 1) == 0))  # the first text after what is shared
    other_texts = torch.where(segment > 0, before_last(changes) - before_last(is_first), 0)
    return counts - before_last(begins) - other_texts


def _beams_of(rows: Tensor, beams: int) -> Tensor:
    """int64 [n * beams]: the rows [0, 2] with 2 beams are [0, 1, 4, 5]."""
    return rows if beams == 1 else (rows[:, None] * beams + torch.arange(beams, device=rows.device)).flatten()


def uploaded(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64, of numbers that the host knows. The host does not wait for what a GPU still has to do, as `torch.tensor(values, device=device)` does."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int64, device=device)
    return torch.tensor(values, dtype=torch.int64).pin_memory().to(device, non_blocking=True)


def is_autocast(device: torch.device) -> bool:
    """Whether products on the device are made in another dtype than that of what is multiplied."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, products are made in the dtype of what is multiplied: a token's row of a table is that row, to its last digit."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else contextlib.nullcontext()

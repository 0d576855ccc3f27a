"""The input of a layer of a frozen language model, cached for each text: below the lowest edit it depends on the text's tokens alone.

Beside a ladder the outputs of all layers do, where nothing that is trained stands before them.

A text is run alone, in a call of its own shape: its cached states are the same bits whatever batch it comes in, in whatever row,
before or after a resume. Texts of a packed row are cached one by one, so that they may come in other rows together.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adalink import BASE_ROW, IMAGE, PAD, AdaptedModel, TokenMap
from adalink.errors import ConfigError
from multimodal.batches.collate import Batch, collate
from multimodal.batches.prefix_sharing import calls_of
from multimodal.batches.tokenize import Row

__all__ = ["LayersBelow", "LayersBeside", "LowerStates"]


# ----------------------------------------
# Running an adapted model up to a layer, and starting it there: the layers below hand on what they are given, and hidden states are put in.


class _Arrived(Exception):
    """What enters the layer; nothing after it is needed."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class LayersBelow:
    """The layers before number `first` of an adapted model's stack, counted from 0; there is at least one."""

    def __init__(self, adapted: AdaptedModel, first: int) -> None:
        stack, names = adapted.attachment.stack, adapted.anatomy.layers
        self.adapted, self.first = adapted, first
        self._below, self._layer = [stack.get_submodule(name) for name in names[:first]], stack.get_submodule(names[first])
        self._n_beside: int | None = None  # as `_n_beside` gives it

    @property
    def note(self) -> str:
        """What runs once."""
        return f"the first {self.first} of {len(self.adapted.anatomy.layers)} layers"

    def run(self, batch: Batch, token_map: TokenMap) -> Tensor:
        """float [B, T, D]: what the layers below make of whole rows."""
        handles = [
            self._below[-1].register_forward_hook(self._look),
            self._layer.register_forward_pre_hook(_arrived, prepend=True, with_kwargs=True),  # before the adapter's own edits
        ]
        return _states(self.adapted, batch, token_map, handles)

    @contextlib.contextmanager
    def left_out(self, states: Tensor) -> Iterator[None]:
        """Where the model is called on rows whose states are these. `run` was called before."""

        def put(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        handle = self._layer.register_forward_pre_hook(put, prepend=True, with_kwargs=True)
        try:
            with _skipped(self._below, self._n_beside, {}):
                yield
        finally:
            handle.remove()

    def _look(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._n_beside = _n_beside(output)


class LayersBeside:
    """All layers of an adapted model's stack, where nothing acts inside them and a ladder reads some of them: they give what they gave before.

    read: numbers of the layers whose outputs are cached, in order
    """

    def __init__(self, adapted: AdaptedModel, read: Sequence[int]) -> None:
        stack, names = adapted.attachment.stack, adapted.anatomy.layers
        self.adapted, self.read = adapted, tuple(read)
        self._layers = [stack.get_submodule(name) for name in names]
        self._n_beside: int | None = None

    @property
    def note(self) -> str:
        """What runs once."""
        return f"the {len(self._layers)} layers"

    def run(self, batch: Batch, token_map: TokenMap) -> Tensor:
        """float [B, T, n D]: what the layers that are read make of whole rows, side by side. An image is hidden from them, so none is brought."""
        found: list[Tensor] = []

        def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._n_beside = _n_beside(output)
            found.append(output[0] if isinstance(output, tuple) else output)
            if len(found) == len(self.read):
                raise _Arrived(torch.cat(found, -1))

        handles = [self._layers[i].register_forward_hook(note) for i in self.read]
        return _states(self.adapted, batch, replace(token_map, present=token_map.present - {IMAGE}), handles)

    def left_out(self, states: Tensor) -> AbstractContextManager[None]:
        """Where the model is called on rows whose states are these. `run` was called before."""
        return _skipped(self._layers, self._n_beside, dict(zip(self.read, states.chunk(len(self.read), -1), strict=True)))


@torch.no_grad()
def _states(adapted: AdaptedModel, batch: Batch, token_map: TokenMap, handles: Sequence[RemovableHandle]) -> Tensor:
    """What these hooks of the stack arrive at, when the model runs on whole rows; they are taken off after that."""
    (call,) = calls_of(adapted, batch, token_map)
    try:
        with call.bound(adapted):
            adapted.base(**call.arguments)
    except _Arrived as found:
        return found.states
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError("the stack ran without its layers")


@contextlib.contextmanager
def _skipped(layers: Sequence[nn.Module], n_beside: int | None, given: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, layers give these states by their number, and the others what they are given, with as many further values as they return."""

    def gives(states: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        h = states if states is not None else args[0] if args else kwargs["hidden_states"]
        return h if n_beside is None else (h, *[None] * n_beside)

    own = [vars(layer).get("forward") for layer in layers]  # where layers are checkpointed
    for number, layer in enumerate(layers):
        layer.forward = partial(gives, given.get(number))
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _n_beside(output: Any) -> int | None:
    """The values that a layer returns beside the hidden states; None where it returns those alone."""
    return len(output) - 1 if isinstance(output, tuple) else None


def _arrived(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Arrived(args[0] if args else kwargs["hidden_states"])


# A text is padded to a multiple of it: matrix products of fewer tokens take another way on a CPU, and round otherwise than in a batch.
TOKENS = 16
# How many texts a call has: always so many, the last repeated, since a product's shape decides how it is rounded. A GPU is idle with one.
AT_ONCE = {"cpu": 1}
AT_ONCE_ELSEWHERE = 16


@dataclass(frozen=True)
class _Text:
    """A text of a batch: what its states depend on, its places in the flattened batch, and how many of the first of them hold states already."""

    key: bytes
    places: np.ndarray[Any, Any]
    n_written: int


class LowerStates:
    """The input of a layer, or what a ladder reads of all layers, cached for each text that one adapter was given.

    row          the adapter's index in token maps, BASE_ROW for none
    most         bytes of the cache; texts beyond them are run at each reading
    n_images     of the data, to check after the first batch whether the cache can hold their texts; 0: no check
    positions    how many the model has; None without a limit
    """

    def __init__(self, below: LayersBelow | LayersBeside, row: int, *, most: float, n_images: int = 0, positions: int | None = None) -> None:
        self.below, self.row, self.most, self.n_images, self.positions = below, row, most, n_images, positions
        self.n_bytes, self.is_full = 0, False
        self._retained: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        """How many texts are cached."""
        return len(self._retained)

    @property
    def note(self) -> str:
        """A line for the log."""
        return f"{self.below.note} run once for each text, as long as its states fit into {self.most / 2**30:.2g} GiB"

    def left_out(self, batch: Batch, token_map: TokenMap) -> AbstractContextManager[None]:
        """Where the model is called on this batch, and the layers below are left out. Raises as `of`."""
        return self.below.left_out(self.of(batch, token_map))

    def of(self, batch: Batch, token_map: TokenMap) -> Tensor:
        """float [B, T, D]: what enters the layer; zeros at padding, which nothing reads.

        Raises ConfigError for a batch that another adapter serves, and where the texts, by the first batch, need more memory than there is.
        """
        if set(token_map.row.tolist()) != {self.row}:
            raise ConfigError("the states of texts are cached for the adapter that was active, and the batch is served by another: cache them for each adapter")
        tokens = torch.stack([batch.ids, batch.domain, batch.position]).cpu().numpy()
        texts = list(_texts(tokens, *(None if value is None else value.cpu().numpy() for value in (batch.segment, batch.token_image))))
        states = self._states(dict.fromkeys(text.key for text in texts), batch.ids.device)
        n_rows, length = batch.ids.shape
        found = torch.cat([states[text.key][text.n_written :] for text in texts])
        whole = found.new_zeros(n_rows * length, found.shape[1])
        whole[torch.from_numpy(np.concatenate([text.places[text.n_written :] for text in texts]))] = found
        if self.n_images:
            self._check_room(sum(state.nbytes for state in states.values()), int((batch.image if batch.token_image is None else batch.token_image).max()) + 1)
        return whole.view(n_rows, length, -1).to(batch.ids.device, non_blocking=True)

    def _states(self, keys: dict[bytes, None], device: torch.device) -> dict[bytes, Tensor]:
        """[T, D] of each text, on the CPU."""
        states = {key: self._retained[key] for key in keys if key in self._retained}
        by_length: dict[int, list[bytes]] = {}
        for key in keys:
            if key not in states:
                by_length.setdefault(self._padded(len(_tokens_of(key)[0])), []).append(key)
        n = AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE)
        for length, new in by_length.items():
            for start in range(0, len(new), n):
                group = new[start : start + n]
                read = self._run([*group, *[group[-1]] * (n - len(group))], length, device)
                states |= {key: state[: len(_tokens_of(key)[0])].clone() for key, state in zip(group, read, strict=False)}
        for key, state in states.items():
            self._keep(key, state)
        return states

    def _run(self, keys: Sequence[bytes], length: int, device: torch.device) -> Tensor:
        rows = []
        for ids, domain, position in map(_tokens_of, keys):
            n_more = length - len(ids)
            rows.append(Row((*ids, *[0] * n_more), (*domain, *[PAD] * n_more), position=(*position, *[0] * n_more)))
        batch = collate(rows, [0] * len(rows), torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0).to(device)
        own = TokenMap(batch.domain, torch.full_like(batch.image, self.row), serving=frozenset({self.row}) - {BASE_ROW})
        return self.below.run(batch, own).cpu()

    def _keep(self, key: bytes, state: Tensor) -> None:
        if key in self._retained:
            return
        if self.n_bytes + state.nbytes > self.most:
            if self.most and not self.is_full:
                print(f"train.states_gib is full with the states of {len(self):,} texts: others are run at each reading", file=sys.stderr)
            self.is_full = True
            return
        self._retained[key] = state
        self.n_bytes += state.nbytes

    def _padded(self, length: int) -> int:
        padded = -(-length // TOKENS) * TOKENS
        return padded if self.positions is None else max(length, min(padded, self.positions))

    def _check_room(self, n_bytes: int, n_images: int) -> None:
        needed, self.n_images = n_bytes / n_images * self.n_images, 0
        if needed > self.most:
            raise ConfigError(
                f"the states of the texts take about {needed / 2**30:.2g} GiB in each process, estimated from the first batch, and train.states_gib is "
                f"{self.most / 2**30:.2g}: give as much, or 0 to cache none"
            )


def _tokens_of(key: bytes) -> tuple[list[int], list[int], list[int]]:
    """Ids, domains and positions."""
    ids, domain, position = np.frombuffer(key, dtype=np.int64).reshape(3, -1).tolist()
    return ids, domain, position


def _texts(tokens: np.ndarray[Any, Any], segment: np.ndarray[Any, Any] | None, token_image: np.ndarray[Any, Any] | None) -> Iterator[_Text]:
    """The texts of a batch, each with what it shares with others. tokens: int64 [3, B, T], ids, domains, positions; the others as in Batch.

    A row with the segments [0 0 1 2] holds two texts, at [0 1 2] and at [0 1 3]; the second shares two tokens.
    """
    n_rows, length = tokens.shape[1:]
    for b in range(n_rows):
        real = np.flatnonzero(tokens[1, b] != PAD)
        images = np.zeros_like(real) if token_image is None else token_image[b, real]
        segments = np.zeros_like(real) if segment is None else segment[b, real]
        for one in dict.fromkeys(images.tolist()):
            places, own = real[images == one], segments[images == one]
            n_written = 0
            for number in [number for number in dict.fromkeys(own.tolist()) if number] or [0]:
                at = places[(own == 0) | (own == number)]
                yield _Text(np.ascontiguousarray(tokens[:, b, at]).tobytes(), b * length + at, n_written)
                n_written = int((own == 0).sum())

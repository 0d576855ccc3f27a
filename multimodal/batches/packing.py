"""How the texts about one image share it: in one row, by a cache that each comes after, or not at all.

An image of 256 tokens with five captions of twelve costs 316 tokens instead of 1,340. Loss and gradients equal those of separate rows.

    packed     one row: a 4D mask decides which tokens a text may see, and positions restart after what the texts share
    forked     what the texts share is read once, and each text is a short row after its keys and values (multimodal.data.loader.prefix_sharing)
    separate   one whole row for each text

Where nothing that is trained reads or writes what comes first (adapters on text only), that is read without gradient, and what follows is
packed or forked after it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch import nn

from adalink import ANSWER, AdaptedModel, Adapter
from multimodal.batches.collate import FLEX
from multimodal.batches.prefix_sharing import forks_exactly, gates_of, may_fork, may_pack, mixes_texts, packs_exactly, trained_domains
from multimodal.batches.tokenize import Row
from multimodal.language import Language

__all__ = [
    "Arrange", "Composed", "Ways", "arrangement", "arrangement_of", "fork_rows", "joined_rows", "pack_rows", "row_limit",
    "separate_rows", "ways_of",
]  # fmt: skip


Arrange = Callable[[Sequence[Row]], Sequence[Row]]
"""From the rows of one sample to the rows that are trained on."""

NOTHING: frozenset[int] = frozenset()
BESIDE = ("vector", "kind", "block", "rope")  # what rows of an existing model hold for each token beside its id


@dataclass(frozen=True)
class Ways:
    """How the texts about an image may share it in one model.

    packs, forks   "texts": any; "answers": those that differ in nothing else (their prompt reads itself both ways); "": none
    reads_prompts  whether a prompt's tokens read later ones of it, so that no part of it can be read alone
    """

    packs: Literal["texts", "answers", ""]
    forks: Literal["texts", "answers", ""]
    reads_prompts: bool = False


class Composed(Protocol):
    """A composed model, as far as its batches ask it: a `multimodal.model.VisionLanguageModel`."""

    @property
    def tower(self) -> Any:
        """What makes features of images."""

    language: Language
    adapted: AdaptedModel

    @property
    def head(self) -> nn.Module | None:
        """What chooses an answer, where the model has such a head."""

    @property
    def changes_features(self) -> bool:
        """Whether what encodes images is trained."""

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""

    @property
    def ways(self) -> Ways | None:
        """How its rows may share an image, where that was found out by a trial."""

    def row_encoder(self, adapter: str | None = None) -> Any:
        """Texts to rows as the model reads them."""


def ways_of(model: Any) -> Ways:
    """Those of a language model, by its family."""
    return Ways(packs="texts" if may_pack(model) else "", forks="texts" if may_fork(model) else "")


def arrangement(
    model: Any, adapter: Adapter | None = None, prompt: Row | None = None, weights: Literal["whole", "split"] = "whole", ways: Ways | None = None
) -> tuple[Arrange, str]:
    """How this language model's rows are arranged for an adapter, and a line for the log that says so.

    prompt    a row as it begins; it shows whether any token comes before the trained ones
    weights   split over processes (FSDP2), which must then call the model equally often, whatever their rows: once
    ways      found out by a trial of this model; None: known by its family
    """
    ways = ways_of(model) if ways is None else ways
    if adapter is not None and mixes_texts(adapter):
        return separate_rows, (
            "one row per text: a slot of the adapter reads later tokens, or a gate the row, and would read every text of a packed row; "
            "padding is read too, so the trained weights depend on which rows share a batch, and so on the number of processes"
        )
    is_gated = adapter is not None and bool(gates_of(adapter))
    kind = model.config.model_type
    packs, forks = ways.packs == "texts", ways.forks == "texts" and not is_gated and weights == "whole"
    trained = NOTHING if adapter is None else trained_domains(adapter)
    may_freeze = forks and not ways.reads_prompts and adapter is not None and not any(parameter.requires_grad for parameter in model.parameters())
    frozen = _untouched(prompt.domain, trained) if prompt is not None and may_freeze else 0
    if prompt is not None and 2 * frozen >= len(prompt.ids):
        how = "the texts of an image packed" if packs else "each text"
        note = f"nothing trained reads or writes the first {frozen} of a prompt's {len(prompt.ids)} tokens: read without gradient, and {how} after them"
        return partial(pack_rows, trained=trained) if packs else partial(fork_rows, trained=trained), note
    if ways.packs == "answers":
        return pack_answers, f"one row per image whose texts differ in their answers alone: in {kind} an image reads the question"
    if ways.forks == "answers" and not ways.packs and weights == "whole" and not is_gated:
        return fork_answers, f"one row per text; those of one prompt come after it, which is read once: {kind} reads it both ways"
    if packs and is_gated:
        return pack_answers, "one row per image whose texts differ in their answers alone: the adapter's gates read the prompt"
    if packs:
        return pack_rows, "one row per image: its texts share it"
    if forks:
        return fork_rows, f"one row per text, after what the texts of an image share, which is read once: {kind} is not known to take a packed row"
    why = "a gate of the adapter reads the prompt, and " if is_gated else "the model's weights are split over processes, and " if weights == "split" else ""
    return separate_rows, f"one row per text: {why}{kind} can share {'no row' if why else 'neither row nor cache'}"


def arrangement_of(model: Composed, weights: Literal["whole", "split"] = "whole") -> tuple[Arrange, str]:
    """The same for a composed model and its active adapter."""
    # Images of a trained encoder need a gradient.
    prompt = model.row_encoder().prompt("?", getattr(model.tower, "small", None)) if not model.changes_features else None
    base = model.language.model
    ways = model.ways or ways_of(base)
    if ways.packs and base.config.get_text_config()._attn_implementation == FLEX and not packs_exactly(model.adapted):  # a kernel made for this machine
        ways = replace(ways, packs="")
    arrange, note = arrangement(base, model.adapted.active_adapter(), prompt, weights, ways)
    if model.ways is not None or arrange in (pack_rows, pack_answers, separate_rows) or forks_exactly(model.adapted):
        return arrange, note
    kind = model.language.model.config.model_type
    return separate_rows, f"one row per text: {kind} was tried with a cache of what texts share, and reads them otherwise after it"


def separate_rows(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows as they are."""
    return rows


def fork_rows(rows: Sequence[Row], trained: frozenset[int] = NOTHING) -> Sequence[Row]:
    """The rows, each with what they have in common as its prefix, up to the first token of a domain in `trained`.

    [a b c], [a b d] -> the same with prefixes of 2.
    """
    n = min(_shared(rows), min(len(row.ids) for row in rows) - 1, _untouched(rows[0].domain, trained))
    return [replace(row, shared_prefix=n) for row in rows]


def pack_rows(rows: Sequence[Row], trained: frozenset[int] = NOTHING) -> Sequence[Row]:
    """One row that holds the common prefix of the rows once, and then what is left of each.

    [a b c], [a b d] with sources on b -> [a b c d], segments [0 0 1 2], positions [0 1 2 2].

    trained: what comes before a token of these domains can be read alone, and is the row's prefix; without any, the row has none
    """
    shared_prefix = fork_rows(rows, trained)[0].shared_prefix if trained else 0
    if len(rows) == 1:
        return [replace(rows[0], shared_prefix=shared_prefix)]
    shared = _shared(rows)
    ids, domain, segment, position = list(rows[0].ids[:shared]), list(rows[0].domain[:shared]), [0] * shared, list(range(shared))
    beside: dict[str, list[Any]] = {name: list(getattr(rows[0], name)[:shared]) for name in BESIDE}
    source: list[int] = []
    for number, row in enumerate(rows, start=1):
        offset = len(ids) - shared
        for name, values in beside.items():
            values += getattr(row, name)[shared:]
        source += [s if s < shared else s + offset for s in row.source]
        ids += row.ids[shared:]
        domain += row.domain[shared:]
        segment += [number] * (len(row.ids) - shared)
        position += range(shared, len(row.ids))
    target = tuple(t for row in rows for t in row.target)
    weight = tuple(w for row in rows for w in row.weights) if any(row.weight for row in rows) else ()
    packed = Row(tuple(ids), tuple(domain), tuple(source), target, segment=tuple(segment), position=tuple(position), weight=weight)
    whole: dict[str, Any] = {name: tuple(values) for name, values in beside.items()}
    return [replace(packed, shared_prefix=shared_prefix, **whole)]


def pack_answers(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows packed where nothing but answers is left of each; else the rows."""
    shared = _shared(rows)
    return pack_rows(rows) if all(domain == ANSWER for row in rows for domain in row.domain[shared:]) else rows


def fork_answers(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows with what they have in common as their prefix, where nothing but answers is left of each; else the rows."""
    n = fork_rows(rows)[0].shared_prefix
    return fork_rows(rows) if all(domain == ANSWER for row in rows for domain in row.domain[n:]) else rows


def _untouched(domain: Sequence[int], trained: frozenset[int]) -> int:
    """How many tokens come before the first of a domain in `trained`."""
    return next((i for i, one in enumerate(domain) if one in trained), len(domain))


def _shared(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with."""
    shortest = min(len(row.ids) for row in rows)
    first = rows[0]
    for i in range(shortest):
        if any((row.ids[i], row.domain[i], row.vector[i : i + 1]) != (first.ids[i], first.domain[i], first.vector[i : i + 1]) for row in rows):
            return i
    return shortest


# ----------------------------------------
# Several images in one row: packed rows, one after the other, so that next to no padding is left.
#
# Each token knows its image: a text reads what its own image's texts share, and itself. Loss and gradients equal those of rows apart.


TRIED = 4  # numbers of bins that fit, the smallest first: more bins hardly ever leave less padding


def row_limit(arrange: Arrange, note: str, row_tokens: int, positions: int | None) -> tuple[int, str]:
    """How many tokens a row of several images may have, 0 for one image a row; and `note`, the line for the log, with that.

    row_tokens   what is asked for, 0 for nothing
    positions    how many the language model has; None where it has no limit
    """
    if not row_tokens:
        return 0, note
    if arrange is not pack_rows:
        return 0, f"{note}; train.row_tokens puts no other image into a row: only texts that are packed, in one call and without gates, can share it"
    limit = min(row_tokens, positions or row_tokens)
    return limit, f"{note}, and images come one after the other in rows of up to {limit} tokens"


def joined_rows(rows: Sequence[Row], image: Sequence[int], limit: int) -> tuple[list[Row], list[int]]:
    """Rows of one or several of these, each of at most `limit` tokens or as long as the longest; and the image that each begins with.

    [7 8] about image 0, [5] about 1, [6] about 2, limit 2 -> [7 8] and [5 6], positions [0 1] and [0 0], images [0 0] and [1 2].
    A row that is longer than the limit has no other beside it, and sets the length that the others are padded to, so they may fill it.
    Which rows come together depends on their lengths and order alone.
    """
    lengths = [len(row.ids) for row in rows]
    bins = _bins(lengths, max(limit, *lengths))
    if len(bins) == len(rows):
        return list(rows), list(image)
    return [_joined([(image[i], rows[i]) for i in one]) for one in bins], [image[one[0]] for one in bins]


def _bins(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """The rows of each bin, none of more than `limit` tokens, with as little padding as was found, and then as few bins."""
    least = -(-sum(lengths) // limit)
    # Twice as many are always enough: a row that does not fit into the emptiest bin would need all of them to be more than half full.
    found = (_spread(lengths, n) for n in range(least, min(2 * least, len(lengths)) + 1))
    fitting = islice(((longest, bins) for longest, bins in found if longest <= limit), TRIED)
    return min(fitting, key=lambda one: (one[0] * len(one[1]), len(one[1])))[1]


def _spread(lengths: Sequence[int], n: int) -> tuple[int, list[list[int]]]:
    """The tokens of the fullest and the rows of each of n bins: the longest row first, each into the emptiest bin."""
    heap = [(0, number) for number in range(n)]
    bins: list[list[int]] = [[] for _ in range(n)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, number = heap[0]
        heapq.heapreplace(heap, (tokens + lengths[i], number))
        bins[number].append(i)
    return max(heap)[0], bins


def _joined(parts: Sequence[tuple[int, Row]]) -> Row:
    """The rows of some images, one after the other."""
    joined = Row((), ())
    for number, row in parts:
        n, start = len(row.ids), len(joined.ids)
        joined = replace(
            joined,
            ids=joined.ids + row.ids,
            domain=joined.domain + row.domain,
            source=joined.source + tuple(source + start for source in row.source),
            target=joined.target + row.target,
            weight=joined.weights + row.weights if joined.weight or row.weight else (),
            segment=joined.segment + (row.segment or (0,) * n),
            position=joined.position + (row.position or tuple(range(n))),
            token_image=joined.token_image + (number,) * n,
            **{name: getattr(joined, name) + getattr(row, name) for name in BESIDE},
        )
    return joined

"""Several pictures in one row: packed rows, one after the other, so that next to no padding is left.

Each token knows its picture: a text reads what its own picture's texts share, and itself. Loss and gradients equal those of rows apart.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from multimodal.encode import Row
from multimodal.packing import Arrange, pack_rows

__all__ = ["joined_rows", "row_limit"]

TRIED = 4  # numbers of bins that fit, the smallest first: more bins hardly ever leave less padding


def row_limit(arrange: Arrange, told: str, row_tokens: int, positions: int | None) -> tuple[int, str]:
    """How many tokens a row of several pictures may have, 0 for one picture a row; and `told`, the line for the log, with that.

    row_tokens   what is asked for, 0 for nothing
    positions    how many the language model has; None where it has no limit
    """
    if not row_tokens:
        return 0, told
    if arrange is not pack_rows:
        return 0, f"{told}; train.row_tokens puts no other picture into a row: only texts that are packed, in one call and without gates, can share it"
    limit = min(row_tokens, positions or row_tokens)
    return limit, f"{told}, and pictures come one after the other in rows of up to {limit} tokens"


def joined_rows(rows: Sequence[Row], image: Sequence[int], limit: int) -> tuple[list[Row], list[int]]:
    """Rows of one or several of these, each of at most `limit` tokens or as long as the longest; and the picture that each begins with.

    [7 8] about picture 0, [5] about 1, [6] about 2, limit 2 -> [7 8] and [5 6], positions [0 1] and [0 0], pictures [0 0] and [1 2].
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
    """The rows of some pictures, one after the other."""
    joined = Row((), ())
    for number, row in parts:
        n, start = len(row.ids), len(joined.ids)
        joined = replace(
            joined,
            ids=joined.ids + row.ids,
            domain=joined.domain + row.domain,
            source=joined.source + tuple(source + start for source in row.source),
            target=joined.target + row.target,
            segment=joined.segment + (row.segment or (0,) * n),
            position=joined.position + (row.position or tuple(range(n))),
            picture=joined.picture + (number,) * n,
        )
    return joined

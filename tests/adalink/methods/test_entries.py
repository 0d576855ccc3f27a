"""Tokens of several inputs in one row: each is given what its own input holds, as if it had a row to itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adalink import IMAGE, PAD, PROMPT, TEXT, TokenMap
from adalink.errors import ConfigError
from adalink.tokens import counted

PARTS = st.lists(st.lists(st.sampled_from([TEXT, IMAGE, PROMPT]), min_size=1, max_size=5), min_size=1, max_size=5)
ADAPTER = torch.tensor([0])


def values(n: int) -> Tensor:
    """[n, 3, 2]: of n inputs, for three ordinals; all different."""
    return torch.arange(n * 6.0).reshape(n, 3, 2)


def joined(parts: list[list[int]], split: int) -> tuple[TokenMap, list[tuple[int, int]]]:
    """Parts before `split` in the first row, the others in the second; and where each begins."""
    rows = [parts[:split], parts[split:]] if 0 < split < len(parts) else [parts]
    length = max(sum(map(len, row)) for row in rows)
    domain, entry = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.int64)
    places: list[tuple[int, int]] = []
    for b, row in enumerate(rows):
        start = 0
        for part in row:
            domain[b, start : start + len(part)], entry[b, start : start + len(part)] = torch.tensor(part), len(places)
            places.append((b, start))
            start += len(part)
    inputs = {"image": values(len(parts))}
    return TokenMap(domain, torch.arange(len(rows)), inputs, entry=entry, serving=frozenset(range(len(rows)))), places


@given(PARTS, st.integers(0, 4))
def test_parts_of_a_row_are_given_what_they_are_in_rows_of_their_own(parts: list[list[int]], split: int) -> None:
    token_map, places = joined(parts, split)
    n, length = token_map.domain.shape
    whole = token_map.window(n, 0, length, length)
    for i, ((b, start), part) in enumerate(zip(places, parts, strict=True)):
        alone = TokenMap(torch.tensor([part]), ADAPTER, {"image": values(len(parts))[i : i + 1]}).window(1, 0, len(part), len(part))
        of_row = whole.of(b) if len(token_map.rows_of) > 1 else whole
        for tokens, row in ((whole, b), (of_row, b if of_row is whole else 0)):
            here = slice(start, start + len(part))
            assert torch.equal(tokens.ordinal[row, here], alone.ordinal[0])
            assert torch.equal(tokens.given(tokens.inputs["image"])[row, here], alone.given(alone.inputs["image"])[0])
            assert torch.equal(tokens.given(tokens.inputs["image"][:, :1])[row, here], alone.given(alone.inputs["image"][:, :1])[0])


@given(PARTS, st.integers(0, 4), st.integers(1, 3), st.integers(0, 6), st.integers(1, 4), st.integers(0, 3))
def test_parts_of_a_call_and_beams_are_given_the_same(parts: list[list[int]], split: int, beams: int, start: int, length: int, empty: int) -> None:
    """What comes after the prompt belongs to a row's last part, and a cache may be longer than what is written."""
    token_map, _ = joined(parts, split)
    (n, prompt), end = token_map.domain.shape, start + length
    whole = token_map.window(n, 0, max(end, prompt), max(end, prompt))
    one = token_map.window(n * beams, start, length, end + empty)
    assert one.entry is not None
    assert whole.entry is not None
    assert one.entry.shape == one.keys.shape
    assert torch.equal(one.entry[:, :end], whole.entry[:, :end].repeat_interleave(beams, 0))
    assert torch.equal(one.given(values(len(parts))), whole.given(values(len(parts)))[:, start:end].repeat_interleave(beams, 0))
    assert all(torch.equal(value, token_map.inputs[name]) for name, value in one.inputs.items())


def test_the_example_of_counting_anew() -> None:
    assert counted(torch.tensor([[1, 0, 1, 1]]), torch.tensor([[4, 4, 4, 5]])).tolist() == [[1, 1, 2, 1]]
    assert counted(torch.tensor([[1, 0, 1, 1]])).tolist() == [[1, 1, 2, 3]]


def test_a_map_with_another_number_of_entries_than_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a token map's entry is \(1, 2\) with domain \(1, 3\): give one for each token"):
        TokenMap(torch.zeros(1, 3, dtype=torch.int64), ADAPTER, entry=torch.zeros(1, 2, dtype=torch.int64))

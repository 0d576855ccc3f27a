"""What each token of a call is, from the map alone: the same for whole, chunked, cached and beam calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adalink import ANSWER, BASE_ROW, IMAGE, PAD, PROMPT, TEXT, TokenMap
from adalink.errors import ConfigError

DOMAINS = st.sampled_from([PAD, TEXT, ANSWER, IMAGE, PROMPT])


@st.composite
def maps(draw: st.DrawFn) -> TokenMap:
    n_rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    domain = torch.tensor(draw(st.lists(st.lists(DOMAINS, min_size=length, max_size=length), min_size=n_rows, max_size=n_rows)))
    row = torch.tensor(draw(st.lists(st.integers(BASE_ROW, 2), min_size=n_rows, max_size=n_rows)))
    return TokenMap(domain, row, {"image": torch.arange(n_rows * 2.0).reshape(n_rows, 2)}, generated=draw(st.sampled_from([ANSWER, TEXT])))


def sequence(token_map: TokenMap, n_new: int) -> Tensor:
    """[B, T + n_new]: the domains of the whole sequence."""
    return torch.cat([token_map.domain, torch.full((len(token_map.row), n_new), token_map.generated)], 1)


@given(maps(), st.integers(0, 5))
def test_a_whole_call_sees_the_map_and_after_it_generated_tokens(token_map: TokenMap, n_new: int) -> None:
    length = token_map.domain.shape[1] + n_new
    tokens = token_map.window(len(token_map.row), 0, length, length)
    assert torch.equal(tokens.domain, sequence(token_map, n_new))
    assert torch.equal(tokens.keys, tokens.domain)
    assert tokens.position.tolist() == list(range(length))
    for domains, ordinals in zip(tokens.domain.tolist(), tokens.ordinal.tolist(), strict=True):
        assert ordinals == [domains[:i].count(domain) for i, domain in enumerate(domains)]


@given(maps(), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_chunks_laid_together_are_the_whole(token_map: TokenMap, lengths: list[int]) -> None:
    n = sum(lengths)
    whole = token_map.window(len(token_map.row), 0, n, n)
    start, chunks = 0, []
    for length in lengths:
        chunks.append(token_map.window(len(token_map.row), start, length, start + length))
        start += length
    for name in ("domain", "ordinal"):
        assert torch.equal(torch.cat([getattr(chunk, name) for chunk in chunks], 1), getattr(whole, name))
    assert torch.equal(torch.cat([chunk.position for chunk in chunks]), whole.position)
    assert torch.equal(chunks[-1].keys, whole.keys)


@given(maps(), st.integers(1, 3), st.integers(0, 6), st.integers(1, 3), st.integers(0, 4))
def test_beams_repeat_their_rows(token_map: TokenMap, beams: int, start: int, length: int, empty: int) -> None:
    n = len(token_map.row)
    visible = start + length + empty
    one, many = token_map.window(n, start, length, visible), token_map.window(n * beams, start, length, visible)
    for name in ("domain", "ordinal", "row", "keys"):
        assert torch.equal(getattr(many, name), getattr(one, name).repeat_interleave(beams, 0))
    assert many.inputs.keys() == one.inputs.keys()
    assert all(torch.equal(many.inputs[name], one.inputs[name].repeat_interleave(beams, 0)) for name in one.inputs)
    assert many.present == one.present
    assert (one.keys[:, start + length :] == PAD).all()  # a static cache that is not yet full
    assert one.keys.shape == (n, visible)


@given(maps(), st.integers(0, 9), st.integers(1, 4))
def test_inputs_are_there_as_long_as_the_prompt_is_read(token_map: TokenMap, start: int, length: int) -> None:
    tokens = token_map.window(len(token_map.row), start, length, start + length)
    assert bool(tokens.inputs) == (start < token_map.domain.shape[1])
    assert set(tokens.domain.unique().tolist()) - {PAD} <= tokens.present


@given(maps(), st.sets(st.sampled_from([TEXT, ANSWER, IMAGE, PROMPT]), min_size=1), st.integers(0, 2))
def test_an_edit_is_selected_where_domain_and_row_are_its_own(token_map: TokenMap, domains: set[int], adapter: int) -> None:
    n, length = token_map.domain.shape
    tokens = token_map.window(n, 0, length, length)
    mask = tokens.select(tuple(domains), adapter)
    assert (mask.shape, mask.dtype) == ((n, length, 1), torch.bool)
    expected = [[row == adapter and domain in domains for domain in line] for line, row in zip(token_map.domain.tolist(), token_map.row.tolist(), strict=True)]
    assert mask[..., 0].tolist() == expected
    assert tokens.select(tuple(domains), adapter) is mask  # asked for at every layer, computed once


def test_the_example_of_the_docstring() -> None:
    assert TokenMap(torch.tensor([[5, 5, 0, 5]]), torch.tensor([0])).ordinal.tolist() == [[0, 1, 0, 2]]


def test_generated_tokens_are_counted_on_from_those_of_their_domain_in_the_prompt() -> None:
    token_map = TokenMap(torch.tensor([[TEXT, ANSWER, TEXT, ANSWER]]), torch.tensor([0]))
    assert token_map.window(1, 4, 2, 6).ordinal.tolist() == [[2, 3]]


def test_only_domains_that_can_occur_are_present() -> None:
    token_map = TokenMap(torch.tensor([[TEXT, TEXT]]), torch.tensor([0]), present=frozenset({TEXT}))
    assert token_map.window(1, 0, 2, 2).present == {TEXT}
    assert token_map.window(1, 0, 3, 3).present == {TEXT, ANSWER}
    assert token_map.window(1, 2, 1, 3).present == {ANSWER}


def test_a_map_of_other_shapes_is_refused() -> None:
    domain, row = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"needs domain \[B, T\] and row \[B\], got \(2, 3\) and \(3,\)"):
        TokenMap(domain, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"got \(3,\) and \(2,\)"):
        TokenMap(domain[0], row)
    with pytest.raises(ConfigError, match=r"inputs \{'image': \(5, 4\)\} do not have the token map's 2 rows"):
        TokenMap(domain, row, {"image": torch.zeros(5, 4)})


def test_a_call_with_rows_that_are_not_a_multiple_is_refused() -> None:
    token_map = TokenMap(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"the model was called with 3 rows but 2 are bound: bind a token map made for this batch"):
        token_map.window(3, 0, 3, 3)


@given(maps(), st.integers(1, 3), st.integers(0, 4), st.integers(0, 3), st.sampled_from([TEXT, PROMPT]))
def test_the_first_token_of_a_domain_alone_is_what_it_was_in_its_row(token_map: TokenMap, beams: int, n_new: int, empty: int, domain: int) -> None:
    n, length = token_map.domain.shape
    end = length + n_new
    one = token_map.first_of(domain, n * beams, end, end + empty)
    whole = token_map.window(n * beams, 0, end, end + empty)
    assert torch.equal(one.keys, whole.keys)
    assert (one.n_before, one.end, one.present) == (0, end, frozenset({domain}))
    for b, line in enumerate(whole.domain.tolist()):
        assert one.domain[b].item() == (domain if domain in line else PAD)
        if domain in line:
            assert one.position[b].item() == line.index(domain)


def test_a_call_knows_how_much_came_before() -> None:
    tokens = TokenMap(torch.tensor([[TEXT, TEXT]]), torch.tensor([0])).window(1, 1, 3, 9)
    assert (tokens.n_before, tokens.end) == (1, 4)


def test_tokens_at_some_places_are_those_tokens() -> None:
    token_map = TokenMap(torch.tensor([[IMAGE, IMAGE, TEXT, TEXT], [TEXT, PAD, IMAGE, IMAGE]]), torch.tensor([0, 1]), serving=frozenset({0, 1}))
    tokens = token_map.window(2, 0, 4, 4)
    picked = tokens.at(torch.tensor([[3, 1, 1], [0, 3, 1]]))
    assert picked.domain.tolist() == [[TEXT, IMAGE, IMAGE], [TEXT, IMAGE, PAD]]
    assert picked.ordinal.tolist() == [[1, 1, 1], [0, 1, 0]]
    assert picked.position.tolist() == [[3, 1, 1], [0, 3, 1]]
    assert torch.equal(picked.keys, tokens.keys)
    assert picked.select((IMAGE,), 0)[..., 0].tolist() == [[False, True, True], [False] * 3]
    assert picked.of(1).position.tolist() == [[0, 3, 1]]
    assert picked.of(1).origin is not None
    assert picked.of(1).origin[0] is tokens.of(1)  # type: ignore[index]


def test_a_table_is_looked_up_as_by_an_index_and_its_gradient_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    domain = torch.randint(-1, 6, (3, 40), generator=generator)
    tokens = TokenMap(domain, torch.zeros(3, dtype=torch.int64)).window(3, 0, 40, 40)
    table = torch.randn(4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    found, expected = tokens.looked_up(table), table[tokens.ordinal.clamp(max=3)]
    is_slot = (tokens.ordinal < 4)[..., None]
    assert torch.equal(found, expected * is_slot)
    weight = torch.randn(3, 40, 5, dtype=torch.float64, generator=generator)
    ours, by_index = (torch.autograd.grad((value * is_slot * weight).sum(), table)[0] for value in (found, expected))
    torch.testing.assert_close(ours, by_index, rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokens.looked_up(table.float()), found.float())  # a row is that row, whatever else is computed in

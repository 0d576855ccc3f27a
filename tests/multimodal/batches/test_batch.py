"""Rows to tensors and back."""

from __future__ import annotations

import torch
from composed import patches
from hypothesis import given
from hypothesis import strategies as st

from adalink import ANSWER, IMAGE, PAD, TEXT
from multimodal.batches.collate import NO_TARGET, Batch, collate
from multimodal.batches.tokenize import Row

SHORT = Row((7, 8), (IMAGE, TEXT), (1,), (9,))
LONG = Row((7, 8, 9, 4), (IMAGE, TEXT, ANSWER, ANSWER), (1, 2, 3), (9, 4, 2))


def test_rows_to_learn_are_padded_on_the_right() -> None:
    batch = collate([SHORT, LONG], [0, 0], patches(1), kind="patches", side="right", pad_id=5)
    assert batch.ids.tolist() == [[7, 8, 5, 5], [7, 8, 9, 4]]
    assert batch.domain.tolist() == [[IMAGE, TEXT, PAD, PAD], [IMAGE, TEXT, ANSWER, ANSWER]]
    assert batch.source.tolist() == [[1, 0, 0], [1, 2, 3]]
    assert batch.target.tolist() == [[9, NO_TARGET, NO_TARGET], [9, 4, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.n_targets == 4
    assert batch.decoder_ids is None
    assert batch.pixels is None
    assert {tensor.dtype for tensor in (batch.ids, batch.domain, batch.source, batch.target, batch.image, batch.attention_mask)} == {torch.int64}


def test_rows_to_generate_from_are_padded_on_the_left_and_their_sources_move_along() -> None:
    batch = collate([SHORT, LONG], [1, 0], patches(2), kind="pixels", side="left", pad_id=5, keys=["a", "b"])
    assert batch.ids.tolist() == [[5, 5, 7, 8], [7, 8, 9, 4]]
    assert batch.source.tolist() == [[3, 0, 0], [1, 2, 3]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch.image.tolist() == [1, 0]
    assert batch.keys == ("a", "b")
    assert batch.patches is None
    assert batch.pixels is not None


def test_positions_skip_padding() -> None:
    batch = collate([SHORT, LONG], [0, 0], patches(1), kind="patches", side="left", pad_id=5)
    assert batch.position[:, -2:].tolist() == [[0, 1], [2, 3]]


def test_sources_of_an_encoder_decoder_model_are_places_in_the_decoder_on_either_side() -> None:
    rows = [Row((7,), (TEXT,), (0, 1), (9, 2), (0, 9)), Row((7, 8, 8), (TEXT,) * 3, (0,), (2,), (0,))]
    for side in ("left", "right"):
        batch = collate(rows, [0, 1], patches(2), kind="patches", side=side, pad_id=5)
        assert batch.decoder_ids is not None
        assert batch.decoder_ids.tolist() == [[0, 9], [0, 5]]
        assert batch.source.tolist() == [[0, 1], [0, 0]]
        assert batch.target.tolist() == [[9, 2], [2, NO_TARGET]]


def rows() -> st.SearchStrategy[Row]:
    def row(ids: list[int], n: int) -> Row:
        source = tuple(range(min(n, len(ids))))
        return Row(tuple(ids), tuple(i % 3 for i in ids), source, tuple(ids[s] for s in source))

    return st.builds(row, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 4))


@given(st.lists(rows(), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_every_row_comes_back_out_of_its_batch(given_rows: list[Row], side: str) -> None:
    batch = collate(given_rows, range(len(given_rows)), patches(1), kind="patches", side=side, pad_id=99)  # type: ignore[arg-type]
    for i, row in enumerate(given_rows):
        real = batch.attention_mask[i].bool()
        assert tuple(batch.ids[i, real].tolist()) == row.ids
        assert tuple(batch.domain[i, real].tolist()) == row.domain
        assert batch.position[i, real].tolist() == list(range(len(row.ids)))
        assert (batch.ids[i, ~real] == 99).all()
        learned = batch.target[i] != NO_TARGET
        assert tuple(batch.target[i, learned].tolist()) == row.target
        assert tuple(batch.ids[i, batch.source[i, learned]].tolist()) == tuple(row.ids[s] for s in row.source)
        assert ((batch.source[i] >= 0) & (batch.source[i] < batch.ids.shape[1])).all()
    assert batch.n_targets == sum(len(row.target) for row in given_rows)


def test_a_batch_moves_to_a_device_whole() -> None:
    batch = collate([SHORT, LONG], [0, 0], patches(1), kind="patches", side="right", pad_id=5, keys=["a"])
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch)
    assert all(value.device.type == "meta" for value in vars(moved).values() if isinstance(value, torch.Tensor))
    assert (moved.n_targets, moved.keys) == (4, ("a",))
    assert batch.ids.device.type == "cpu"

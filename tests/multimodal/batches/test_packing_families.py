"""Texts that share their image lose what they lose alone, with the same gradients: in one row, after one cache, in every family."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from shared import every_other
from sharing import FORKED, PACKED, TEXTS, adapted, batch_of, check_equal, gradients, in_double, slots_of
from tiny_families import HARD, tiny_of

from adalink import Bridge, Ladder, Prompt
from multimodal.batches.packing import arrangement, fork_rows, pack_rows, separate_rows
from multimodal.batches.prefix_sharing import EAGER_FAMILIES, SDPA_FAMILIES, may_fork


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


@pytest.mark.parametrize("name", every_other(PACKED, shift=1, hard=HARD))
def test_packed_texts_equal_separate_ones(name: str) -> None:
    model = adapted(name)
    arrange, note = arrangement(model.base, model.active_adapter())
    assert arrange is pack_rows
    assert note == "one row per image: its texts share it"
    batch = batch_of(pack_rows, slots_of(model))
    assert batch.ids.shape[0] == len(TEXTS)
    check_equal(gradients(model, batch), gradients(model, batch_of(separate_rows, slots_of(model))))


@pytest.mark.parametrize("name", every_other(PACKED, hard=HARD))
def test_pictures_that_share_rows_equal_separate_ones(name: str) -> None:
    """Four images in two rows, one of them padded."""
    model = adapted(name)
    texts = [*TEXTS, (2, [7])]
    batch = batch_of(pack_rows, slots_of(model), texts, row_tokens=45)
    assert batch.token_image is not None
    assert [sorted(set(row.tolist())) for row in batch.token_image] == [[1, 2], [0, 3]]
    check_equal(gradients(model, batch), gradients(model, batch_of(separate_rows, slots_of(model), texts)))


@pytest.mark.parametrize("name", every_other(FORKED, hard=[*HARD, *(name for name in FORKED if name not in PACKED)]))
def test_forked_texts_equal_separate_ones(name: str) -> None:
    model = adapted(name)
    assert may_fork(model.base)
    arrange, note = arrangement(model.base, model.active_adapter())
    if name not in PACKED:
        assert arrange is fork_rows
        assert "read once" in note
    batch = batch_of(fork_rows, slots_of(model))
    assert batch.shared_prefix is not None
    assert batch.shared_prefix.is_shared
    check_equal(gradients(model, batch), gradients(model, batch_of(separate_rows, slots_of(model))))


LADDER = {"bridge": Bridge(kind="mlp"), "prompt": Prompt(length=2, init_std=0.5), "ladder": Ladder(reduction=2, output="add")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("llama", "opt", "gemma3") else pytest.mark.slow) for name in FORKED])
def test_a_network_beside_the_model_reads_shared_texts_as_the_model_does(name: str) -> None:
    model = adapted(name, LADDER)
    wanted = gradients(model, batch_of(separate_rows, slots_of(model)))
    for arrange in (pack_rows, fork_rows) if name in PACKED else (fork_rows,):
        check_equal(gradients(model, batch_of(arrange, slots_of(model))), wanted)


@pytest.mark.parametrize("texts", [[(2, [4, 6, 2]), (3, [8, 4, 2])], [(2, [5, 3]), (2, [7, 9])], [(2, [5, 3, 2])]])
def test_pictures_with_equal_numbers_of_texts_are_forked_without_an_index(texts: list[tuple[int, list[int]]]) -> None:
    model = adapted("opt")
    batch = batch_of(fork_rows, slots_of(model), texts)
    assert batch.shared_prefix is not None
    assert batch.shared_prefix.each == len(texts[0][1])
    check_equal(gradients(model, batch), gradients(model, batch_of(separate_rows, slots_of(model), texts)))


def test_every_family_of_the_lists_is_tested() -> None:
    assert {tiny_of(name, "eager").config.model_type for name in PACKED} == SDPA_FAMILIES | EAGER_FAMILIES

"""Texts that share their image lose what they lose alone, in every family of models that see already, with the same gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from existing_checks import MADE_WAYS, arranged, case, check_same, families, samples, texts_of
from sharing import in_double

from multimodal.batches.packing import fork_answers, fork_rows, pack_answers, pack_rows, separate_rows
from multimodal.data.feature_cache.encode import encode_all

PACKED = [name for name, (packs, _, _) in MADE_WAYS.items() if packs == "texts"]
FORKED = [name for name, (_, forks, _) in MADE_WAYS.items() if forks == "texts"]


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


@pytest.mark.parametrize("name", families(["qwen3_vl", "gemma3", "idefics3"]))
def test_rows_beside_each_other_equal_one_row_a_call(name: str) -> None:
    made = case(name)
    prepared, texts = made.rows()
    texts = [rows[i : i + 2] for i, rows in enumerate(texts[:2])] + [rows[-1:] for rows in texts[2:]]
    batch, found = made.gradients(prepared, arranged(texts))
    assert len(batch.ids) == sum(map(len, texts))
    check_same(found, made.one_row_a_call(prepared, texts))


@pytest.mark.parametrize("name", families(["qwen2_5_vl", "gemma3"], of=PACKED))
def test_packed_and_joined_rows_equal_separate_ones(name: str) -> None:
    made = case(name)
    prepared, texts = made.rows()
    _, wanted = made.gradients(prepared, arranged(texts))
    packed, found = made.gradients(prepared, arranged(texts, pack_rows))
    assert len(packed.ids) == len(texts)
    check_same(found, wanted)
    joined, found = made.gradients(prepared, arranged(texts, pack_rows), row_tokens=packed.ids.numel())
    assert joined.token_image is not None
    assert len(joined.ids) < len(texts)
    check_same(found, wanted)


@pytest.mark.parametrize("name", families(["gemma3", "blip2"], of=FORKED))
def test_forked_rows_equal_separate_ones(name: str) -> None:
    """With images of one size what rows share holds them; beside a text alone it ends before the first image."""
    made = case(name)
    prepared, texts = made.rows(others=False)
    _, wanted = made.gradients(prepared[:1], arranged(texts[:1]))
    batch, found = made.gradients(prepared[:1], arranged(texts[:1], fork_rows))
    assert batch.shared_prefix is not None
    assert batch.shared_prefix.length >= prepared[0].n_vectors
    check_same(found, wanted)
    prepared, texts = made.rows()
    _, wanted = made.gradients(prepared, arranged(texts))
    check_same(made.gradients(prepared, arranged(texts, fork_rows))[1], wanted)


@pytest.mark.parametrize(("name", "arrange"), [("paligemma", pack_answers), ("paligemma2", fork_answers)])
def test_prompts_that_read_themselves_share_answers_alone(name: str, arrange: object) -> None:
    made = case(name)
    prepared, texts = made.rows(others=False)
    for some in (texts, [rows[1:] for rows in texts]):
        _, wanted = made.gradients(prepared, arranged(some))
        batch, found = made.gradients(prepared, arranged(some, arrange))  # type: ignore[arg-type]
        shares = batch.segment is not None or batch.shared_prefix is not None
        assert shares == (some is not texts)
        check_same(found, wanted)


@pytest.mark.parametrize("name", families(["qwen3_vl", "blip2"]))
def test_cached_features_lose_what_images_lose(name: str) -> None:
    """In the way that the model trains by default, with edits of texts alone too: what comes before them is then read without gradient."""
    made = case(name)
    for adapter in ("image", "text"):
        made.vlm.set_adapter(adapter)
        (batch,) = made.vlm.batches(samples(), texts_of, batch_size=3)
        (cached,) = made.vlm.batches(samples(), texts_of, batch_size=3, features=encode_all(made.vlm, samples(), dtype="float32"))
        assert cached.prepared is not None
        assert all(one.vectors is not None and not one.inputs for one in cached.prepared.samples)
        wanted = made.vlm(batch)
        torch.testing.assert_close(made.vlm(cached), wanted, rtol=1e-5, atol=1e-5)
        apart = made.gradients(made.prepared, arranged(made.rows(others=False)[1], separate_rows))[1][0]
        torch.testing.assert_close(wanted.detach(), apart, rtol=1e-10, atol=1e-10)
    made.vlm.set_adapter("image")


@pytest.mark.parametrize("name", families(["qwen2_vl"]))
def test_worker_processes_make_the_same_batches(name: str) -> None:
    made = case(name)
    here, there = (list(made.vlm.batches(samples(), texts_of, batch_size=2, workers=workers)) for workers in (0, 2))
    for one, other in zip(here, there, strict=True):
        for field in ("ids", "domain", "source", "target", "vector", "kind", "block", "rope", "position", "segment"):
            torch.testing.assert_close(getattr(one, field), getattr(other, field))
        assert one.prepared is not None
        assert other.prepared is not None
        for mine, theirs in zip(one.prepared.samples, other.prepared.samples, strict=True):
            assert mine.wording == theirs.wording
            torch.testing.assert_close(dict(mine.inputs[0]), dict(theirs.inputs[0]))

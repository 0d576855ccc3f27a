"""Images that share rows are learnt from as they are apart: by every method, in the same order, with next to no padding."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Drawn, compose, excite, language, tower
from hypothesis import given
from hypothesis import strategies as st
from image_rows import BRIDGE, METHODS, NOT_SHARED
from loader_case import ENCODER, keys
from shared import covering
from sharing import TEXTS as LONG
from sharing import adapted, check_equal, graphs_of, in_double, slots_of
from sharing import batch_of as batch_of_texts
from torch import Tensor
from train_case import Stop, losses, stop_at, trained, weights

from adalink import ANSWER, EPALM, IMAGE, TEXT, Bottleneck, Bridge, Gated, Method, Prefix
from adalink.errors import ConfigError
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import arrangement, arrangement_of, joined_rows, pack_rows, row_limit, separate_rows
from multimodal.batches.tokenize import Row
from multimodal.data.loader import train_loader
from multimodal.model import VisionLanguageModel
from multimodal.sample import Sample
from multimodal.template import Template, Text

TEXTS = [Text("is it red ?", "yes"), Text("", "a big cube"), Text("", "no"), Text("is it a ball ?", "a big red ball")]
JOINED: dict[str, dict[str, Method]] = {
    **METHODS,
    "pool": {"bridge": Bridge(kind="mlp", hidden=8, pool=2), "prefix": Prefix(length=2, form="mlp", hidden=4, init_std=0.5)},
    "boundary": {"bridge": Bridge(kind="linear", boundary="learned"), "epalm": EPALM(layers=(0, 1), n_taps=2, connector="shared")},
}


def batch_of(model: VisionLanguageModel, arrange: Any, row_tokens: int) -> Batch:
    """Four images with 3, 1, 2 and 4 texts."""
    encoder = model.row_encoder()
    samples = [list(arrange([encoder.row(text) for text in TEXTS[:n]])) for n in (3, 1, 2, 4)]
    rows, image = [row for sample in samples for row in sample], [i for i, sample in enumerate(samples) for _ in sample]
    if row_tokens:
        rows, image = joined_rows(rows, image, row_tokens)
    retained = torch.randn(4, tower().n_retained, tower().width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return collate(rows, image, retained, kind="patches", side="right", pad_id=0)


def gradients(model: VisionLanguageModel, batch: Batch) -> list[Tensor]:
    loss = model(batch)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.adapted.active_adapter().parameters()))]


@pytest.mark.parametrize(("name", "family"), covering(product(JOINED, ("opt", "gpt2", "llama")), each=1))
def test_every_causal_method_learns_the_same(name: str, family: str) -> None:
    with in_double():
        part = language(family)
    model = VisionLanguageModel(tower(), part, Template(prompt="<image><bos>question: {question} answer:"))  # encodes an image, in float32
    with in_double():
        excite(model.add_adapter("a", JOINED[name]).double())
        assert arrangement(model.language.model, model.adapted.active_adapter())[0] is pack_rows
        torch.manual_seed(2)
        wanted = gradients(model, batch_of(model, separate_rows, 0))
        for row_tokens, n_rows in ((10_000, 1), (2 * len(batch_of(model, pack_rows, 0).ids[0]), 2)):
            torch.manual_seed(2)
            batch = batch_of(model, pack_rows, row_tokens)
            assert len(batch.ids) == n_rows
            check_equal(gradients(model, batch), wanted)


def test_pictures_with_one_text_each_share_rows_too() -> None:
    rows = [Row((7, 8, 9, 6)[:n], (TEXT, TEXT, TEXT, ANSWER)[:n], (n - 1,), (5,)) for n in (4, 2, 2, 1)]
    found, image = joined_rows(rows, [0, 1, 2, 3], 5)
    assert [(row.ids, row.token_image) for row in found] == [((7, 8, 9, 6, 7), (0, 0, 0, 0, 3)), ((7, 8, 7, 8), (1, 1, 2, 2))]
    assert [(row.position, row.segment, row.source) for row in found] == [((0, 1, 2, 3, 0), (0,) * 5, (3, 4)), ((0, 1, 0, 1), (0,) * 4, (1, 3))]
    assert image == [0, 1]
    batch = collate(found, image, torch.zeros(4, 1, 1), kind="patches", side="right", pad_id=0)
    assert batch.segment is not None  # nothing is packed, and yet a mask must tell the images apart
    assert batch.attention_mask.tolist() == [[1] * 5, [1] * 4 + [0]]
    assert (batch.attention(torch.float32)[1, 0, 3] == 0).tolist() == [False, False, True, True, False]


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=20)


@given(LENGTHS, st.integers(1, 200))
def test_every_row_is_there_once_and_within_the_limit(lengths: list[int], limit: int) -> None:
    rows = [Row((i + 3,) * n, (TEXT,) * n, (n - 1,), (i,)) for i, n in enumerate(lengths)]
    found, image = joined_rows(rows, list(range(len(rows))), limit)
    assert (found, image) == joined_rows(rows, list(range(len(rows))), limit)  # by lengths and order alone
    longest = max(len(row.ids) for row in found)
    assert longest <= max(limit, *lengths)
    assert sorted(target for row in found for target in row.target) == list(range(len(rows)))
    assert all(row.ids[source] == target + 3 for row in found for source, target in zip(row.source, row.target, strict=True))
    assert len(found) * longest <= len(rows) * max(lengths)
    if len(found) < len(rows):
        assert all(row.token_image == tuple(i - 3 for i in row.ids) for row in found)
        assert image == [row.token_image[0] for row in found]


def test_a_picture_longer_than_the_limit_has_a_row_of_its_own() -> None:
    rows = [Row((7,) * n, (TEXT,) * n) for n in (30, 9, 8, 7)]
    found, _ = joined_rows(rows, [0, 1, 2, 3], 5)
    assert [row.token_image for row in found] == [(0,) * 30, (1,) * 9 + (2,) * 8 + (3,) * 7]  # the others are padded to it, so they fill it
    assert joined_rows(rows[1:], [0, 1, 2], 5) == (rows[1:], [0, 1, 2])  # as they were


def test_little_padding_is_left() -> None:
    draw = random.Random(0)
    for size in (8, 32):
        share = []
        for _ in range(50):
            rows = [Row((7,) * n, (TEXT,) * n) for n in (51 + sum(draw.randint(9, 15) for _ in range(draw.randint(1, 12))) for _ in range(size))]
            found, _ = joined_rows(rows, list(range(size)), 1024)
            share.append(1 - sum(len(row.ids) for row in rows) / (len(found) * max(len(row.ids) for row in found)))
        assert sum(share) / len(share) < 0.02


def many_texts(sample: Sample, rng: random.Random) -> list[Text]:
    return [Text("", rng.choice(["a red cube", "a big ball", "no"])) for _ in range(rng.randint(1, 2))]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_samples_of_a_step_and_where_a_stream_goes_on_are_what_they_were(workers: int) -> None:
    apart, joined = (
        train_loader(Drawn(9), many_texts, ENCODER, pack_rows, tower().preprocess, steps=3, batch_size=4, seed=5, workers=workers, row_tokens=row_tokens)
        for row_tokens in (0, 500)
    )
    ones, others = list(apart), list(joined)
    assert keys(ones) == keys(others)
    assert apart.state_dict() == joined.state_dict()
    for one, other in zip(ones, others, strict=True):
        assert one.batch is not None
        assert other.batch is not None
        assert len(other.batch.ids) < len(one.batch.ids)
        assert other.batch.n_targets == one.batch.n_targets
        assert torch.equal(other.batch.pixels, one.batch.pixels)  # type: ignore[arg-type]


def test_a_run_learns_the_same_tells_so_and_goes_on_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"texts": many_texts, "checkpoint_every": 2, "measure_every": 1, "measure": lambda: {"figure": 1.0}}
    trained(tmp_path / "apart", **settings)
    capsys.readouterr()
    whole, _ = trained(tmp_path / "whole", row_tokens=200, **settings)
    limit = whole.row_encoder().max_positions
    assert limit is not None
    assert limit < 200
    assert f"one row per image: its texts share it, and images come one after the other in rows of up to {limit} tokens" in capsys.readouterr().out
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "apart"), rel=1e-6)
    with pytest.raises(Stop):
        trained(tmp_path / "stopped", row_tokens=200, **{**settings, "measure": stop_at(3)})
    resumed, _ = trained(tmp_path / "stopped", row_tokens=200, resume=True, **settings)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


KEPT = "; train.row_tokens puts no other image into a row: only texts that are packed, in one call and without gates, can share it"


def test_what_cannot_share_a_row_with_another_picture_is_left_as_it_was_and_said() -> None:
    """A cache, a beginning without gradient, gates, and slots that read later tokens."""
    text_only = compose("opt")
    text_only.add_adapter("a", {"bridge": BRIDGE, "bottleneck": Bottleneck(width=4, domains=(TEXT, ANSWER))}).get_submodule("bridge").requires_grad_(False)
    ways = [arrangement_of(text_only), arrangement(adapted("mpt", METHODS["adalink"]).base)]
    for methods in NOT_SHARED.values():
        model = compose("opt")
        model.add_adapter("a", methods)
        ways.append(arrangement_of(model))
    assert isinstance(ways[0][0], partial)
    assert len({str(arrange) for arrange, _ in ways}) == 4
    for arrange, note in ways:
        assert row_limit(arrange, note, 1024, 99) == (0, note + KEPT)
        assert row_limit(arrange, note, 0, 99) == (0, note)
    assert row_limit(pack_rows, "packed", 1024, None) == (1024, "packed, and images come one after the other in rows of up to 1024 tokens")


def test_pictures_that_a_gate_would_mix_are_refused() -> None:
    model = compose("opt")
    model.add_adapter("a", {"bridge": BRIDGE, "gated": Gated(inner=Bottleneck(width=4))}).double()
    assert IMAGE in {slot.domain for slot in model.adapted.active_adapter().slots}
    with pytest.raises(ConfigError, match=r"several images in a row, and a gate of the adapter reads the whole prompt.*collate one row for each image"):
        model(batch_of(model, pack_rows, 10_000))


def test_without_what_tells_the_pictures_apart_they_would_be_mixed() -> None:
    """The control of the mask, and of the slots."""
    model = compose("opt")
    excite(model.add_adapter("a", METHODS["adalink"]).double())
    batch = batch_of(model, pack_rows, 10_000)
    assert batch.token_image is not None
    right = model(batch)
    token_map = model.token_map(batch)
    mixed = replace(batch, token_image=torch.zeros_like(batch.token_image))
    assert not torch.allclose(model.language_loss(mixed, token_map) / batch.n_targets, right, rtol=1e-3)
    assert not torch.allclose(model.language_loss(batch, model.token_map(mixed)) / batch.n_targets, right, rtol=1e-3)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_from_rows_of_several_pictures() -> None:
    """A graph for the first shape, one for any other, and one for a single row."""
    with in_double():
        model = adapted("llama")
        batches = [
            batch_of_texts(pack_rows, slots_of(model), texts, row_tokens=row_tokens)
            for row_tokens, texts in ((45, LONG), (40, LONG[1:] * 3), (1000, LONG), (1000, LONG[:2]), (30, LONG))
        ]
        assert [len(batch.ids) for batch in batches][:4] == [2, 3, 1, 1]
        assert graphs_of(model, batches) <= 4

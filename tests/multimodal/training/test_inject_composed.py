"""eP-ALM in a composed model: the encoder's blocks feed it, texts are packed where that is exact, and generation needs no care."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from composed import FAMILIES, Drawn, compose, excite, tower
from PIL import Image
from torch import Tensor

from adalink import EPALM, PERCEPT, PROMPT, AdaLink, Bridge, Method, Prompt
from adalink.errors import ConfigError
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import arrangement as arranged_for
from multimodal.batches.packing import pack_rows, separate_rows
from multimodal.data.images.decode import decode_image
from multimodal.encoders.base import Features
from multimodal.generation.generate import GenerationSettings
from multimodal.model import VisionLanguageModel
from multimodal.template import Template, Text

TEXTS = [Text("is it red ?", "yes"), Text("", "a big cube"), Text("", "no")]


def images(n: int) -> list[Image.Image]:
    return [decode_image(Drawn(n)[i].image) for i in range(n)]


def model_with(family: str, mask: Any, layers: tuple[int, int], **others: Method) -> VisionLanguageModel:
    model = compose(family, Template(prompt="<image><bos>question: {question} answer:"))
    epalm = EPALM(layers=layers, n_taps=2, connector="per_tap", mask=mask)
    methods: dict[str, Method] = {"prompt": Prompt(length=2, init_std=0.5, positions="none"), "epalm": epalm, **others}
    adapter = model.add_adapter("a", methods).double()
    excite(adapter)
    return model


def batch_of(model: VisionLanguageModel, arrange: Any) -> Batch:
    encoder = model.row_encoder()
    rows = [list(arrange([encoder.row(text) for text in TEXTS[:n]])) for n in (3, 1, 2)]
    image = [i for i, sample in enumerate(rows) for _ in sample]
    pixels = torch.stack([model.tower.preprocess(photo) for photo in images(3)])
    return collate([row for sample in rows for row in sample], image, pixels, kind="pixels", side="right", pad_id=0)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_packed_rows_of_the_causal_mask_equal_separate_ones(family: str) -> None:
    model = model_with(family, "causal", (0, 2), adalink=AdaLink(rank=2, modalities=("text",)))
    assert arranged_for(model.language.model, model.adapted.active_adapter())[0] is pack_rows
    results: list[list[Tensor]] = []
    for arrange in (separate_rows, pack_rows):
        batch = batch_of(model, arrange)
        loss = model(batch)
        results.append([loss, *torch.autograd.grad(loss, list(model.adapted.active_adapter().parameters()))])
    assert batch.segment is not None
    for plain, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-6, atol=1e-6)  # the loss is float32
        assert plain.abs().max() > 0


def test_a_slot_that_reads_later_tokens_is_not_packed() -> None:
    model = model_with("opt", "published", (0, 1))
    arrange, note = arranged_for(model.language.model, model.adapted.active_adapter())
    assert arrange is separate_rows
    assert note.startswith("one row per text: a slot of the adapter reads later tokens")
    assert model(batch_of(model, arrange)).isfinite()
    with pytest.raises(ConfigError, match=r"the batch has several texts in a row, and a slot of the adapter reads later tokens.*train with mask='causal'"):
        model(batch_of(model, pack_rows))


@pytest.mark.parametrize(("mask", "layers", "depends"), [("causal", (0, 1), False), ("published", (0, 1), True), ("published", (1, 2), False)])
def test_what_two_processes_learn_is_what_one_does_but_with_a_slot_that_reads_padding(mask: str, layers: tuple[int, int], depends: bool) -> None:
    """Each process pads to the longest of its own rows."""
    model = model_with("opt", mask, layers)
    encoder, parameters = model.row_encoder(), list(model.adapted.active_adapter().parameters())
    rows, pixels = [encoder.row(text) for text in TEXTS], torch.stack([model.tower.preprocess(photo) for photo in images(3)])

    def gradients(*which: int) -> list[Tensor]:
        given = list(which)
        batch = collate([rows[i] for i in given], list(range(len(given))), pixels[given], kind="pixels", side="right", pad_id=0)
        return list(torch.autograd.grad(model(replace(batch, n_targets=1.0)), parameters))

    assert len(rows[0].ids) != len(rows[1].ids)
    together, apart = gradients(0, 1, 2), [sum(parts) for parts in zip(gradients(0), gradients(1, 2), strict=True)]
    difference = max(float((one - other).abs().max()) for one, other in zip(together, apart, strict=True))
    assert (difference > 1e-4) == depends
    _, note = arranged_for(model.language.model, model.adapted.active_adapter())
    assert ("and so on the number of processes" in note) == depends


@pytest.mark.parametrize(("mask", "layers"), [("causal", (0, 1)), ("published", (0, 1)), ("published", (1, 2))])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_do_not_depend_on_the_batch_nor_on_the_cache(family: str, mask: str, layers: tuple[int, int]) -> None:
    model = model_with(family, mask, layers)
    asked, displayed = ["is it red ?", "", "is it a big ball ?"], images(3)
    settings = GenerationSettings(max_new_tokens=5, num_beams=2)
    together = model.generate(displayed, asked, settings=settings)
    apart = [model.generate([photo], [question], settings=settings)[0] for photo, question in zip(displayed, asked, strict=True)]
    assert together == apart


def test_where_no_cache_is_exact_none_is_used() -> None:
    """Three layers, the slot read by two of them: it generates, and what it would with a cache is refused elsewhere."""
    model = model_with("opt", "published", (0, 1))
    seen: list[bool] = []
    decoder = model.adapted.attachment.stack
    decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs.get("past_key_values") is not None), with_kwargs=True)
    model.generate(images(1), ["is it ?"], settings=GenerationSettings(max_new_tokens=3))
    assert seen
    assert all(seen)  # two layers: the last alone reads the slot, so a cache is exact
    deep = compose("deep_opt", Template(prompt="<image><bos>{question}"))
    deep.add_adapter("a", {"epalm": EPALM(layers=(0, 1), n_taps=1, connector="shared", mask="published")}).double()
    seen.clear()
    decoder = deep.adapted.attachment.stack
    decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs.get("past_key_values") is not None), with_kwargs=True)
    deep.generate(images(1), ["is it ?"], settings=GenerationSettings(max_new_tokens=3))
    assert seen
    assert not any(seen)
    one_beam, beams = (deep.generate(images(2), ["is it ?", ""], settings=GenerationSettings(max_new_tokens=3, num_beams=n)) for n in (1, 2))
    assert one_beam != ["", ""]
    assert beams != ["", ""]


def test_the_slots_and_features_are_those_of_the_encoder() -> None:
    model = model_with("llama", "causal", (0, 2), bridge=Bridge(kind="linear"))
    batch = batch_of(model, separate_rows)
    inputs = model.token_map(batch).inputs
    assert batch.pixels is not None
    features = tower()(batch.pixels)
    assert torch.equal(inputs["image"], features.patches[batch.image])
    assert torch.equal(inputs["image_taps"], features.pooled.transpose(0, 1)[batch.image])
    assert batch.domain[0, :3].tolist() == [PERCEPT, PROMPT, PROMPT]


def test_features_of_other_widths_are_kept_apart() -> None:
    patches, pooled = torch.randn(2, 5, 4), torch.randn(3, 2, 4)
    joined = Features(patches=patches, pooled=pooled).joined
    assert torch.equal(joined[:, :5], patches)
    assert torch.equal(joined[:, 5:], pooled.transpose(0, 1))
    assert torch.equal(Features(patches=patches, pooled=torch.randn(3, 2, 6)).joined, patches)

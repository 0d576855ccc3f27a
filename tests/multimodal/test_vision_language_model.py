"""The composed model: its loss is transformers' own, its prompt holds the image, and it trains with every family."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from composed import FAMILIES, ID, Drawn, compose, excite, language, patches, tower
from PIL import Image
from torch import Tensor

from adalink import IMAGE, AdaLink, Bridge, Prompt
from adalink.errors import CheckpointError, ConfigError, DataError
from multimodal.batches.collate import NO_TARGET, Batch, collate
from multimodal.generation.generate import GenerationSettings
from multimodal.language import load_language
from multimodal.model import VisionLanguageModel
from multimodal.template import Template, Text

TEXTS = [Text("is it red ?", "yes"), Text("is it a ball ?", "a big red ball"), Text("", "no")]
METHODS = {"bridge": Bridge(kind="mlp", hidden=24), "adalink": AdaLink(rank=4, modalities=("image", "text"), activation="gelu")}


def with_adapter(family: str, seed: int = 1) -> VisionLanguageModel:
    model = compose(family)
    excite(model.add_adapter("one", METHODS).double(), seed)
    return model


def batch_of(model: VisionLanguageModel, texts: list[Text], image: list[int], side: str = "right") -> Batch:
    encoder = model.row_encoder()
    return collate([encoder.row(text) for text in texts], image, patches(2), kind="patches", side=side, pad_id=0)  # type: ignore[arg-type]


def embedded(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """The edited embeddings [B, T, D], computed with nothing but the adapter's modules."""
    adapter = model.adapted.active_adapter()
    assert batch.patches is not None
    words = model.language.model.get_input_embeddings()(batch.ids)
    projected = adapter.get_submodule("bridge.image").layers(batch.patches[batch.image])  # type: ignore[operator]
    is_image = batch.domain == IMAGE
    for i in range(len(batch.ids)):
        words[i, is_image[i]] = projected[i]
    edited = {name: adapter.get_submodule(f"adalink.{name}") for name in ("image", "text")}
    kinds = torch.where(is_image, 0, 1)
    both = torch.stack([words + edit.up(edit.act(edit.down(words))) for edit in edited.values()])  # type: ignore[operator]
    edited_words = torch.take_along_dim(both, kinds[None, ..., None], 0)[0]
    return torch.where((batch.attention_mask == 0)[..., None], words, edited_words)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_the_loss_is_that_of_transformers_on_edited_embeddings_and_labels(family: str) -> None:
    model = with_adapter(family)
    plain = copy.deepcopy(language(family).model)
    for text in TEXTS:
        batch = batch_of(model, [text], [1])
        # Labels as transformers shift them: the label at t + 1 is what the state at t predicts; a row is read one token short.
        ids = torch.cat([batch.ids, batch.target[:, -1:]], 1)
        labels = torch.full_like(ids, -100)
        for source, target in zip(batch.source[0].tolist(), batch.target[0].tolist(), strict=True):
            labels[0, source + 1] = target
        embeds = torch.cat([embedded(model, batch), plain.get_input_embeddings()(batch.target[:, -1:])], 1)
        expected = plain(inputs_embeds=embeds, labels=labels).loss
        torch.testing.assert_close(model(batch).double(), expected.double(), rtol=1e-6, atol=1e-6)
        assert not torch.isclose(plain(input_ids=ids, labels=labels).loss, expected)  # the control: the edits matter


def test_the_loss_of_t5_is_that_of_transformers() -> None:
    model = with_adapter("t5")
    plain = copy.deepcopy(language("t5").model)
    batch = batch_of(model, TEXTS, [0, 1, 0])
    expected = plain(inputs_embeds=embedded(model, batch), attention_mask=batch.attention_mask, labels=batch.target).loss
    torch.testing.assert_close(model(batch).double(), expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_batch_is_the_sum_over_its_rows_divided_by_its_targets(family: str) -> None:
    model = with_adapter(family)
    whole = batch_of(model, TEXTS, [0, 1, 0])
    alone = [batch_of(model, [text], [image]) for text, image in zip(TEXTS, (0, 1, 0), strict=True)]
    total = sum(model(batch) * batch.n_targets for batch in alone)
    torch.testing.assert_close(model(whole) * whole.n_targets, total, rtol=1e-5, atol=1e-5)
    assert whole.n_targets == int((whole.target != NO_TARGET).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_training_changes_the_adapter_and_lowers_the_loss(family: str) -> None:
    model = with_adapter(family)
    frozen = copy.deepcopy(model.language.model.state_dict())
    batch = batch_of(model, TEXTS, [0, 1, 0])
    optimizer = torch.optim.AdamW(model.adapted.active_adapter().parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in model.language.model.state_dict().items())
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad and "adapters" not in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_of_the_adapter_gets_a_gradient(family: str) -> None:
    model = with_adapter(family)
    model(batch_of(model, TEXTS, [0, 1, 0])).backward()
    grads = {name: parameter.grad for name, parameter in model.adapted.active_adapter().named_parameters()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values()), grads.keys()


def test_pixels_are_encoded_once_for_all_texts_of_a_picture() -> None:
    model = with_adapter("opt")
    encoder = model.row_encoder()
    pixels = torch.stack([tower().preprocess(Image.new("RGB", (50, 40), colour)) for colour in ("red", "blue")])
    calls: list[int] = []
    handle = tower().register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    rows = [encoder.row(text) for text in TEXTS]
    loss = model(collate(rows, [0, 0, 1], pixels, kind="pixels", side="right", pad_id=0))
    handle.remove()
    assert calls == [2]
    retained = collate(rows, [0, 0, 1], model.encode(pixels), kind="patches", side="right", pad_id=0)
    assert torch.equal(model(retained), loss)


def test_a_batch_without_a_picture_is_refused() -> None:
    model = with_adapter("opt")
    batch = batch_of(model, TEXTS, [0, 0, 0])
    with pytest.raises(ConfigError, match="holds neither pixels nor patches"):
        model(Batch(**{**vars(batch), "patches": None}))


def test_as_many_prompts_as_pictures_are_wanted() -> None:
    with pytest.raises(ConfigError, match="1 images and 2 prompts were given: give one prompt for each image"):
        with_adapter("opt").generate([Image.new("RGB", (9, 9))], ["", ""])


def test_images_come_as_images_paths_or_bytes_and_one_image_or_prompt_goes_with_all(tmp_path: Path) -> None:
    model, red = with_adapter("opt"), Image.new("RGB", (50, 40), "red")
    red.save(tmp_path / "red.png")
    file, ask = tmp_path / "red.png", "is it red ?"
    settings = GenerationSettings(max_new_tokens=6, num_beams=2)
    expected = model.generate([red], [ask], settings=settings)
    assert model.generate([file, str(file), file.read_bytes(), red], ask, settings=settings) == expected * 4
    for image in (file, str(file), file.read_bytes(), red):
        assert model.generate(image, ask, settings=settings) == expected
        assert model.generate(image, [ask, "yes"], settings=settings)[:1] == expected
    assert model.generate(file, ask, max_new_tokens=6, num_beams=2) == expected
    assert model.generate(file, ask, settings=GenerationSettings(num_beams=2), max_new_tokens=6) == expected
    assert model.generate(file) == model.generate([red], [""])
    assert model.generate([], ask) == []
    with pytest.raises(ConfigError, match="max_new_tokens is 0 and num_beams 1: give 1 or more of each"):
        model.generate(file, max_new_tokens=0)
    with pytest.raises(DataError, match=r"absent\.png"):
        model.generate(tmp_path / "absent.png")


def test_two_adapters_serve_the_rows_of_one_batch() -> None:
    model = with_adapter("opt", seed=1)
    excite(model.add_adapter("two", METHODS).double(), seed=2)
    images, prompts = [Image.new("RGB", (50, 40), "red")] * 3, ["is it red ?"] * 3
    settings = GenerationSettings(max_new_tokens=6)

    def generated(names: list[str | None]) -> list[str]:
        return model.generate(images, prompts, settings=settings, adapter_names=names)

    mixed = generated(["one", "two", None])
    assert mixed == [generated([name] * 3)[0] for name in ("one", "two", None)]
    assert len(set(mixed)) == 3  # the control


def test_a_saved_adapter_brings_its_template_and_layer(tmp_path: Path) -> None:
    from tasks.scenes import encoder_folder, language_folder

    template = Template(prompt="<image><bos>so: {question}", target=" {text}<eos>")
    model = VisionLanguageModel.compose(encoder_folder(), language_folder(), template=template, layer=-2)
    excite(model.add_adapter("one", {"bridge": Bridge(kind="linear"), "soft": Prompt(length=2, init_std=0.1)}))
    model.save_pretrained(tmp_path, task={"task": "vqa"})
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert (again.template, again.tower.layer) == (template, -2)
    assert again.adapted.task["task"] == "vqa"
    image = Image.new("RGB", (50, 40), "red")
    assert again.generate([image], ["is it red?"]) == model.generate([image], ["is it red?"])
    other = VisionLanguageModel(tower(), language("opt"), template)
    with pytest.raises(CheckpointError, match=r"was trained on the language model .*language .* but this one is tiny-opt"):
        other.load_adapter(tmp_path, "one")
    ids = torch.tensor([[1, 2]])
    assert torch.equal(model.language.model(ids).logits, load_language(language_folder()).model(ids).logits)  # called by itself it is the frozen one


def test_disabled_the_model_answers_as_the_frozen_one() -> None:
    model = with_adapter("opt")
    batch = batch_of(model, TEXTS, [0, 1, 0], side="left")
    with model.disable_adapter():
        off = model(batch)
        assert model.row_encoder().image_slots == 0
    plain = language("opt").model
    logits = plain(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.position).logits
    picked = torch.take_along_dim(logits, batch.source[..., None], 1).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(picked, batch.target.flatten(), ignore_index=-100)
    torch.testing.assert_close(off, expected, rtol=0, atol=1e-12)  # the loss is summed in another order
    assert not torch.equal(model(batch), off)


def test_names_of_words_are_what_these_tests_think() -> None:
    assert [language("opt").tokenizer.convert_ids_to_tokens(i) for i in (1, 2, ID["cube"])] == ["<s>", "</s>", "cube"]
    assert len(Drawn(3)) == 3

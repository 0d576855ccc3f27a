"""WARP on composed models: one place of a row is read, the list starts as the language model's own scores, and it learns what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composed import ID, excite, language, tokenizer
from PIL import Image
from torch import Tensor
from transformers import ElectraConfig, ElectraModel, RobertaConfig, RobertaModel

from adalink import IMAGE, PROMPT, TEXT, WARP, Bridge, Method, Prompt
from adalink.errors import ConfigError
from multimodal.batches.collate import Batch, collate
from multimodal.encoders.tower import load_tower
from multimodal.language import Language
from multimodal.loss.answer_head import answer_loss, pooled_state
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.template import Template, Text
from tasks.scenes.parts import encoder_folder

ANSWERS = ("yes", "no", "red", "cube")
PLACES = WARP(start=1, before_text=2, after_text=2, init_std=0.5)
PHOTOS = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
SCORED = [Text("is it red ?", "yes", ((2, 0.3), (0, 1.0), (1, 1.0))), Text("is it a big cube ?", "no", ((1, 0.9),)), Text("a ?", "ball", ())]


def encoder_only(family: str) -> Language:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(ID), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    kinds = {"roberta": (RobertaConfig, RobertaModel, {}), "electra": (ElectraConfig, ElectraModel, {"embedding_size": 16})}
    config, kind, more = kinds[family]
    model: Any = kind(config(**sizes, **more, max_position_embeddings=64, pad_token_id=0))
    return Language(model=model.double().eval().requires_grad_(False), tokenizer=tokenizer(), name=family)


def model_of(family: str = "opt", warp: WARP = PLACES, answers: tuple[str, ...] = ANSWERS, more: dict[str, Method] | None = None) -> VisionLanguageModel:
    spoken = encoder_only(family) if family in ("roberta", "electra") else language(family)
    model = VisionLanguageModel(load_tower(encoder_folder()), spoken, Template(prompt="<image><bos>question: {question} answer:"))
    excite(model.add_adapter("one", {"bridge": Bridge(kind="linear"), "warp": warp, **(more or {})}).double())
    if answers:
        model.add_answer_head(answers).double()
    return model


def batch_of(model: VisionLanguageModel, texts: list[Text], side: Any = "right", first: int = 0) -> Batch:
    rows = [model.row_encoder().row(text) for text in texts]
    pixels = torch.stack([model.vision_tower.preprocess(photo) for photo in PHOTOS])
    return collate(rows, [(i + first) % 2 for i in range(len(rows))], pixels, kind="pixels", side=side, pad_id=0)


def scores(model: VisionLanguageModel, batch: Batch) -> Tensor:
    assert model.head is not None
    return model.head(pooled_state(model.adapted, model.language, batch, model.token_map(batch)))


def test_a_row_has_its_slots_around_the_image_and_the_question() -> None:
    row = model_of().row_encoder().row(SCORED[0])
    kinds = [kind for i, kind in enumerate(row.domain) if i == 0 or row.domain[i - 1] != kind]
    assert kinds == [PROMPT, IMAGE, PROMPT, TEXT, PROMPT]
    assert (row.domain.count(PROMPT), row.domain[-2:], row.domain[0]) == (5, (PROMPT, PROMPT), PROMPT)


@pytest.mark.parametrize("family", ["opt", "roberta", "llama"])
def test_a_row_is_read_at_its_last_slot_whatever_pads_it(family: str) -> None:
    model = model_of(family, WARP(start=1, before_text=2, after_text=2, verbaliser="new"))
    alone = torch.cat([scores(model, batch_of(model, [text], first=i)) for i, text in enumerate(SCORED)])
    for side in ("left", "right"):
        torch.testing.assert_close(scores(model, batch_of(model, SCORED, side)), alone, rtol=0, atol=2e-6)  # the encoder's features are float32
    batch = batch_of(model, SCORED[:1])
    stack: Any = model.adapted.base.get_submodule(model.adapted.anatomy.stack)
    with model.adapted.attachment.bind(model.token_map(batch)):
        state = stack(input_ids=batch.ids, position_ids=batch.position + model.language.first_position).last_hidden_state
    assert model.head is not None
    torch.testing.assert_close(model.head(state[:, -1]), alone[:1], rtol=0, atol=2e-6)


def test_where_words_read_both_ways_and_no_slot_is_last_the_last_word_is_read() -> None:
    model = model_of("roberta", WARP(start=2, after_text=0, verbaliser="new"))
    batch = batch_of(model, SCORED[:1])
    with model.adapted.attachment.bind(model.token_map(batch)):
        state = model.language.model(input_ids=batch.ids, position_ids=batch.position + model.language.first_position).last_hidden_state
    assert model.head is not None
    assert torch.equal(scores(model, batch), model.head(state[:, -1]))


def test_it_learns_the_answer_of_most_people_and_a_question_beside_the_list_teaches_nothing() -> None:
    model = model_of()
    batch = batch_of(model, SCORED)
    logits = scores(model, batch)
    wanted = -(logits[0].log_softmax(-1)[0] + logits[1].log_softmax(-1)[1]) / 3
    torch.testing.assert_close(model(batch), wanted)
    assert model.head is not None
    outside = answer_loss(model.head, torch.ones(1, 16).double(), batch_of(model, SCORED[2:]))
    assert outside == 0
    outside.backward()
    assert model.head.linear.weight.grad is not None


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_the_list_starts_as_the_scores_that_the_language_model_gives_its_words(family: str) -> None:
    """llama's head is not its embedding table; opt's states are narrower than its layers, as the table is."""
    model = model_of(family, WARP(start=1, before_text=2, after_text=2, verbaliser="fixed", init_std=0.5))
    batch = batch_of(model, SCORED, "left")
    with model.adapted.attachment.bind(model.token_map(batch)):
        logits = model.language.model(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.position).logits[:, -1]
    own = logits[:, [ID[answer] for answer in ANSWERS]]
    assert torch.equal(scores(model, batch), own) or (scores(model, batch) - own).abs().max() < 1e-12  # a product of another shape may round otherwise
    allowed = torch.full_like(logits, -torch.inf).index_copy(1, torch.tensor([ID[answer] for answer in ANSWERS]), own)
    assert [ID[answer] for answer in model.generate_batch(batch, None)] == allowed.argmax(-1).tolist()  # type: ignore[arg-type]
    assert "head" not in {name.split(".")[0] for name in TrainedParts.of(model).parameters()}
    assert TrainedParts.of(model).counts()["head"] == 0


def test_an_answer_of_several_words_starts_as_their_mean_and_the_order_of_the_list_is_that_of_the_scores() -> None:
    model, turned = model_of(answers=("red cube", "no", "yes")), model_of(answers=("yes", "red cube", "no"))
    assert model.head is not None
    words = model.language.model.get_output_embeddings().weight
    torch.testing.assert_close(model.head.linear.weight[0], words[[ID["red"], ID["cube"]]].float().mean(0).double(), rtol=0, atol=1e-6)
    assert torch.equal(model.head.linear.weight[1], words[ID["no"]].float().double())
    torch.testing.assert_close(scores(model, batch_of(model, SCORED))[:, [2, 0, 1]], scores(turned, batch_of(turned, SCORED)), rtol=0, atol=1e-12)


def test_rows_of_two_lists_share_a_batch_and_it_comes_back_from_its_folder(tmp_path: Path) -> None:
    model = model_of()
    model.add_adapter("two", {"bridge": Bridge(kind="linear"), "warp": WARP(after_text=1, verbaliser="fixed", words="is it")})
    model.add_answer_head(("ball", "big"))
    names, asked = ["one", "two", "one"], [text.question for text in SCORED]
    together = model.generate([PHOTOS[0]] * 3, asked, adapter_names=names)
    assert together == [model.generate([PHOTOS[0]], [question], adapter_names=[name])[0] for name, question in zip(names, asked, strict=True)]
    table: Any = model.adapted.active_adapter().get_parameter("warp.soft.table")
    assert torch.equal(table[0], model.language.model.get_input_embeddings().weight[ID["is"]].float())
    model.save_pretrained(tmp_path)
    again = model_of(answers=())
    again.load_adapter(tmp_path, "two")
    assert again.head is not None
    assert model.head is not None
    assert again.head.answers == ("ball", "big")
    assert torch.equal(again.head.linear.weight, model.head.linear.weight)
    assert not list(again.head.parameters())
    assert torch.equal(scores(again, batch_of(again, SCORED)), scores(model, batch_of(model, SCORED)))


def learnt(slots: int, *, frozen: bool) -> float:
    """The share of 16 images that are named right, whose class is the sign of two numbers of a direction of the image's slots."""
    torch.manual_seed(1)
    warp = WARP(after_text=max(slots, 1), verbaliser="fixed" if frozen else "new", init_std=0.5)
    model = model_of("gpt2", warp, more={"bridge": Bridge(kind="linear", pool=1, norm="none")})
    adapter, head = model.adapted.active_adapter(), model.head
    assert head is not None
    n_patches, width = model.vision_tower.n_patches, model.vision_tower.width
    direction = torch.randn(width, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(16) % 4
    strength = torch.tensor([-3.0, -1.0, 1.0, 3.0])[labels]
    patches = (torch.randn(16, n_patches, width, generator=torch.Generator().manual_seed(2)) * 0.2 + strength[:, None, None] * direction).double()
    rows = [model.row_encoder().row(Text("is it ?", "", ((int(label), 1.0),))) for label in labels]
    batch = collate(rows, list(range(16)), patches, kind="patches", side="right", pad_id=0)
    trained = [*([adapter.get_parameter("warp.soft.table")] if slots else []), *head.parameters()]
    optimizer = torch.optim.Adam(trained, lr=3e-2) if trained else None
    for _ in range(60 if optimizer is not None else 0):
        assert optimizer is not None
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    return float((scores(model, batch).argmax(-1) == labels).double().mean())


def test_it_learns_classes_along_one_direction_of_the_image_and_a_frozen_list_alone_does_not() -> None:
    assert learnt(3, frozen=False) > 0.9
    assert learnt(0, frozen=True) < 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model_of(answers=())(batch_of(model_of(), SCORED)), "the adapter one answers from a list and writes nothing: give it the list"),
        (lambda: model_of(answers=()).generate([PHOTOS[0]], ["is it ?"]), "the adapter one answers from a list and writes nothing: give it the list"),
        (lambda: model_of(answers=("yes", "  ")), "the answer '  ' has no pieces of words with this tokenizer: leave it out of the list"),
        (lambda: model_of("electra"), "the words of ElectraModel are of width 16, and its states of width 32: give WARP's verbaliser new"),
        (lambda: model_of("t5"), "is an encoder-decoder, and a head chooses an answer from one stack"),
        (lambda: model_of(more={"prompt": Prompt(length=1)}), "warp and prompt reserve slots of the same domain"),
    ],
)
def test_what_it_refuses(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()

"""A head that chooses answers over the pooled state of a frozen language model: loss, pooling, saving, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from composed import Drawn, excite, language, tokenizer, two_texts
from PIL import Image
from safetensors.torch import load_file, save_file
from shared import covering

from adalink import AdaLink, BitFit, Bridge, LoRA, Method, Prefix, Prompt
from adalink.errors import CheckpointError, ConfigError
from multimodal.batches.collate import Batch, collate
from multimodal.encoders.tower import load_tower
from multimodal.language import Language
from multimodal.loss.answer_head import AnswerHead
from multimodal.model import VisionLanguageModel
from multimodal.template import Template, Text
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train
from tasks.scenes.parts import encoder_folder

ANSWERS = ("yes", "no", "a cube", "2")
PICTURES = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
SIZES: dict[str, Any] = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 0}
READERS: dict[str, Any] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES, max_position_embeddings=96), add_pooling_layer=False),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**SIZES, max_position_embeddings=96), add_pooling_layer=False),
    "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**SIZES, embedding_size=16, max_position_embeddings=96)),
    "distilbert": lambda: hf.DistilBertModel(hf.DistilBertConfig(vocab_size=16, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=96)),
    "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(**SIZES, max_position_embeddings=96)),
}
METHODS: dict[str, Method] = {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"))}
SCORED = [Text("is it red ?", "yes", ((0, 1.0), (1, 0.3))), Text("is it a big cube ?", "no", ((1, 0.9),)), Text("a ?", "ball", ())]


def reader(family: str) -> Language:
    torch.manual_seed(0)
    model = READERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return Language(model=model.double().eval().requires_grad_(False), tokenizer=tokenizer(), name=f"tiny-{family}")


def model_of(family: str, methods: dict[str, Method] | None = None, answers: tuple[str, ...] = ANSWERS) -> VisionLanguageModel:
    spoken = reader(family) if family in READERS else language(family)
    model = VisionLanguageModel(load_tower(encoder_folder()), spoken, Template(prompt="<bos><image>question: {question}<eos>"))
    excite(model.add_adapter("one", METHODS if methods is None else methods).double())
    if answers:
        excite(model.add_answer_head(answers).double(), seed=3)
    return model


def batch_of(model: VisionLanguageModel, texts: list[Text], side: Any = "right") -> Batch:
    rows = [model.row_encoder().row(text) for text in texts]
    pixels = torch.stack([model.tower.preprocess(photo) for photo in PICTURES])
    return collate(rows, [i % 2 for i in range(len(rows))], pixels, kind="pixels", side=side, pad_id=0)


@pytest.mark.parametrize("family", [*READERS, "opt", "gpt2", "llama"])
def test_the_loss_is_the_binary_cross_entropy_of_the_soft_scores_of_each_question(family: str) -> None:
    model = model_of(family)
    assert model.head is not None
    wanted = torch.tensor([[1.0, 0.3, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    logits = []
    for i, text in enumerate(SCORED):  # each alone, with nothing padded
        rows = [model.row_encoder().prompt(text.question)]
        alone = collate(rows, [0], model.tower.preprocess(PICTURES[i % 2])[None], kind="pixels", side="right", pad_id=0)
        stack = model.adapted.base.get_submodule(model.adapted.anatomy.stack)
        with model.adapted.attachment.bind(model.token_map(alone)):
            state = stack(input_ids=alone.ids, position_ids=alone.position + model.language.first_position).last_hidden_state
        place = 0 if family in READERS else -1  # CLS, or the last token
        logits.append(state[0, place] @ model.head.linear.weight.T + model.head.linear.bias)
    chances = torch.stack(logits).sigmoid()
    expected = -(wanted * chances.log() + (1 - wanted) * (1 - chances).log()).sum() / 3
    for side in ("left", "right"):
        torch.testing.assert_close(model(batch_of(model, SCORED, side)), expected, rtol=1e-6, atol=1e-6)  # the encoder's features are float32
    assert model.generate([PICTURES[0], PICTURES[1], PICTURES[0]], [text.question for text in SCORED]) == [ANSWERS[int(c.argmax())] for c in chances]


THROUGH_THE_HEAD: dict[str, Method] = {
    "lora": LoRA(groups={"all": ("image", "text")}, rank=2, alpha=4), "bitfit": BitFit(groups={"all": ("image", "text")}), "prompt": Prompt(length=2, init_std=0.5),
    "prefix": Prefix(length=2, init_std=0.5, form="table"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "family"), covering(product(THROUGH_THE_HEAD, ("bert", "roberta", "opt")), each=1))
def test_every_method_is_trained_through_the_head_and_frozen_weights_stay(method: str, family: str) -> None:
    model = model_of(family, {"bridge": Bridge(kind="linear"), "method": THROUGH_THE_HEAD[method]})
    frozen = copy.deepcopy(model.language.model.state_dict())
    assert model.head is not None
    trained = [*model.adapted.active_adapter().parameters(), *model.head.parameters()]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(5):
        loss = model(batch_of(model, SCORED))
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.head.parameters())
        assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.adapted.active_adapter().parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[name], value) for name, value in model.language.model.state_dict().items())


def test_a_row_is_as_long_as_the_positions_that_the_model_has() -> None:
    taken = {}
    for family in ("bert", "roberta"):
        model = model_of(family)
        taken[family] = model.row_encoder().max_positions
        assert taken[family] is not None
        longest = " ".join(["red"] * (taken[family] - len(model.row_encoder().prompt("").ids)))
        model(batch_of(model, [Text(longest, None, ())]))
        with pytest.raises(Exception, match=r"a text needs \d+ tokens with its image, and the language model has"):
            model.row_encoder().prompt(longest + " red")
    assert taken == {"bert": 96, "roberta": 95}  # RoBERTa counts from after its padding id, which is 0 here


def test_head_and_answers_come_back_with_the_adapter(tmp_path: Path) -> None:
    model = model_of("roberta")
    assert model.head is not None
    for part in (model.adapted.active_adapter(), model.head):
        part.float().double()  # what a new adapter holds of them
    model.save_pretrained(tmp_path)
    again = model_of("roberta", {"bridge": Bridge(kind="linear")}, answers=())
    again.load_adapter(tmp_path, "two").double()
    assert again.head is not None
    again.head.double()
    assert again.head.answers == ANSWERS
    assert torch.equal(again(batch_of(again, SCORED)), model(batch_of(model, SCORED)))
    again.delete_adapter("two")
    assert (again.head, list(again.heads)) == (None, [])


def test_rows_of_two_heads_share_a_batch_and_rows_that_write_do_not() -> None:
    model = model_of("opt")
    excite(model.add_adapter("two", METHODS).double(), seed=5)
    excite(model.add_answer_head(("red", "blue", "green")).double(), seed=6)
    excite(model.add_adapter("three", METHODS).double(), seed=7)
    asked = ["is it red ?", "is it a cube ?"]
    mixed = model.generate(PICTURES, asked, adapter_names=["one", "two"])
    assert mixed == [model.generate(PICTURES[:1], asked[:1], adapter_names=["one"])[0], model.generate(PICTURES[1:], asked[1:], adapter_names=["two"])[0]]
    assert mixed[0] in ANSWERS
    assert mixed[1] in ("red", "blue", "green")
    with pytest.raises(ConfigError, match="1 of 2 rows write their answer, and the others' adapters choose it: ask them apart"):
        model.generate(PICTURES, asked, adapter_names=["one", "three"])


def test_texts_and_batches_that_only_say_what_to_write_are_refused() -> None:
    model = model_of("bert")
    with pytest.raises(ConfigError, match="a head chooses this model's answers, and the text says only what to write: give it scores"):
        model.row_encoder().row(Text("is it red ?", "yes"))
    with pytest.raises(ConfigError, match="a head chooses this model's answers, and the batch holds texts to write"):
        model(replace(batch_of(model, SCORED), score=None))


def test_answers_are_given_once_each_and_one_stack_reads_them() -> None:
    for answers in ((), ("yes", "yes")):
        with pytest.raises(ConfigError, match=r"a head was given \d answers, \d of them different: give one or more, each once"):
            AnswerHead(answers, 4)
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is an encoder-decoder, and a head chooses an answer from one stack: give an encoder-only"):
        model_of("t5")


DAMAGE: dict[str, tuple[Any, str]] = {
    "no answers": (lambda folder: (folder / "answers.json").unlink(), "chooses its answers, and they cannot be read"),
    "cut weights": (lambda folder: (folder / "answer_head.safetensors").write_bytes(b"cut"), "chooses its answers, and they cannot be read"),
    "other answers": (lambda folder: (folder / "answers.json").write_text('["yes", "no"]'), "holds 2 entries, expected 4 different answers"),
    "no list": (lambda folder: (folder / "answers.json").write_text('{"yes": 0}'), "holds a dict, expected 4 different answers"),
    "other weights": (
        lambda folder: save_file({"linear.weight": load_file(folder / "answer_head.safetensors")["linear.weight"]}, folder / "answer_head.safetensors"),
        r"holds \{'linear.weight': \(4, 32\)\}, and a head of 4 answers on this model is",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_whose_head_does_not_fit_is_one_sentence_and_nothing_is_loaded(name: str, tmp_path: Path) -> None:
    model_of("bert").save_pretrained(tmp_path)
    damage, sentence = DAMAGE[name]
    damage(tmp_path)
    again = model_of("bert", answers=())
    with pytest.raises(CheckpointError, match=sentence):
        again.load_adapter(tmp_path, "two")
    assert (list(again.adapted.adapters), list(again.heads)) == (["one"], [])


def test_fsdp2_does_not_train_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: True))
    with pytest.raises(ConfigError, match="FSDP2 trains the language model's adapter alone, and this model has an answer head too: train it with DDP"):
        train(model_of("bert"), Drawn(4), two_texts, TrainSettings(steps=1, batch_size=2), folder=tmp_path)

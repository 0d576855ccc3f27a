"""Classes chosen by their words, and models without an encoder: scores against the reference, packed or not, alone or beside other rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from composed import excite, language
from PIL import Image
from safetensors.torch import load_file
from shared import fixtures, shared
from tokenizers import Tokenizer, models, pre_tokenizers

from adalink import EPALM, AdaLink, Bridge, LoRA, Prompt
from adalink.errors import AttachError, ConfigError
from multimodal.batches.packing import pack_rows
from multimodal.batches.tokenize import Row
from multimodal.encoders.tower import NoTower
from multimodal.language import Language, load_language
from multimodal.loss.answer_head import LabelWords, word_scores
from multimodal.model import VisionLanguageModel
from multimodal.sample import Question, Sample
from multimodal.template import Template, Text, TextTemplate

TEXTS = TextTemplate(prompt="<bos>{text} it was", target=" {text}")


def reference() -> Any:
    return json.loads((fixtures("text_tasks") / "words_dev.json").read_text())


def without_encoder(spoken: Language, template: TextTemplate = TEXTS) -> VisionLanguageModel:
    return VisionLanguageModel(None, spoken, template)


def text_model(family: str, methods: Any = None) -> VisionLanguageModel:
    model = without_encoder(language(family))
    excite(model.add_adapter("one", methods or {"lora": LoRA(rank=2)}).double())
    return model


@pytest.mark.parametrize("part", ["stories260k_llama_hf", "captions_opt_3m"])
def test_words_of_real_models_are_scored_as_the_reference_scores_them(part: str) -> None:
    spoken = load_language(shared(f"parts/{part}"), dtype=torch.float64)
    cases = [case for case in reference()["real"] if case["part"] == part]
    assert len(cases) == 6
    for prompt, labels in {(case["template"], tuple(case["labels"])) for case in cases}:
        own = [case for case in cases if case["template"] == prompt]
        model = without_encoder(spoken, TextTemplate(prompt=prompt, target="{text}"))
        rows = [model.row_encoder().prompt(case["text"]) for case in own]
        assert [list(row.ids) for row in rows] == [case["prompt_ids"] for case in own]
        assert [list(model.row_encoder().target_ids(label)) for label in labels] == own[0]["label_ids"]
        for packed in (True, False):
            for by in ("sum", "mean"):
                found = word_scores(model, rows, LabelWords(words=labels, by=by), None, packed=packed)  # type: ignore[arg-type]
                assert torch.allclose(found, torch.tensor([case[by] for case in own], dtype=torch.float64), atol=2e-6 if "llama" in part else 1e-9, rtol=0)
                assert found.argmax(1).tolist() == [case[f"chosen_by_{by}"] for case in own]
        alone = torch.cat([word_scores(model, [row], LabelWords(words=labels), None) for row in rows])
        assert torch.allclose(alone, word_scores(model, rows, LabelWords(words=labels), None), atol=1e-9, rtol=0)


def numbered_words(count: int) -> Any:
    """A tokenizer of the words t0, t1, ..., whose ids are their numbers."""
    tokenizer = Tokenizer(models.WordLevel({f"t{number}": number for number in range(count)}, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0")


def spelled(ids: list[int]) -> str:
    return " ".join(f"t{number}" for number in ids)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_words_of_tiny_models_are_scored_as_the_reference_scores_them(kind: str) -> None:
    tiny = reference()["tiny"]
    weights = load_file(fixtures("text_tasks") / "words_dev.safetensors")
    classes: dict[str, Any] = {"llama": (hf.LlamaConfig, hf.LlamaForCausalLM), "t5": (hf.T5Config, hf.T5ForConditionalGeneration)}
    config, made = classes[kind]
    real = made(config(**tiny[f"{kind}_config"])).double().eval().requires_grad_(False)
    real.load_state_dict({name.removeprefix(f"{kind}."): tensor.double() for name, tensor in weights.items() if name.startswith(f"{kind}.")}, strict=False)
    model = without_encoder(Language(model=real, tokenizer=numbered_words(61), name=kind), TextTemplate(prompt="<bos>{text}"))
    for case in (one for one in tiny["cases"] if one["model"] == kind):
        words = tuple(map(spelled, case["label_ids"]))
        prompt, other = (model.row_encoder().prompt(spelled([*case["prompt_ids"], *more])) for more in ([], [9, 8, 7]))
        assert list(prompt.ids) == case["prompt_ids"]
        for packed in (True, False):
            for by in ("sum", "mean"):
                labels = LabelWords(words=words, by=by)  # type: ignore[arg-type]
                for rows in ([prompt], [other, prompt]):  # alone, and padded beside a longer row
                    found = word_scores(model, rows, labels, None, packed=packed)[-1]
                    assert torch.allclose(found, torch.tensor(case[by], dtype=torch.float64), atol=1e-9, rtol=0)
                    assert int(found.argmax()) == case[f"chosen_by_{by}"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_packed_words_equal_rows_of_their_own_with_an_adapter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, labels = text_model(family), LabelWords(words=("ball", "red ball", "a cube"))
    rows = [model.row_encoder().prompt(text) for text in ("a red ball", "is it on a cube ?")]
    made: list[int] = []
    monkeypatch.setattr("multimodal.loss.answer_head.collate", lambda flat, *rest, **named: made.append(len(flat)) or collate_of(flat, *rest, **named))
    from multimodal.batches.collate import collate as collate_of

    both = [word_scores(model, rows, labels, "one", packed=packed) for packed in (True, False)]
    assert torch.allclose(both[0], both[1], atol=1e-10, rtol=0)
    assert made == [6 if family == "t5" else 2, 6]  # T5 reads no packed row
    assert not torch.allclose(both[0], word_scores(model, rows, labels, None), atol=1e-3)
    model.label_words["one"] = labels
    wanted = [labels.words[number] for number in both[1].argmax(1).tolist()]
    assert model.generate(prompts=["a red ball", "is it on a cube ?"]) == wanted


def test_a_model_without_an_encoder_is_as_it_was_when_its_adapter_is_gone() -> None:
    model = text_model("llama", {"adalink": AdaLink(rank=2, modalities=("text",)), "prompt": Prompt(length=2)})
    assert isinstance(model.tower, NoTower)
    samples = [Sample(key=str(n), image_id=n, media=None, questions=(Question(question_id=n, text="a red ball", answers=("ball",)),)) for n in range(3)]
    (batch,) = model.batches(samples, lambda sample, rng: [Text(sample.questions[0].text, "ball")], batch_size=3)
    ids = batch.ids[:, 2:]
    before = {name: tensor.clone() for name, tensor in model.language.model.state_dict().items()}
    with model.disable_adapter():
        wanted = model.language.model(input_ids=ids).logits
    model(batch).backward()
    assert all(parameter.grad is not None for parameter in model.adapted.active_adapter().parameters())
    model.delete_adapter("one")
    assert torch.equal(model.language.model(input_ids=ids).logits, wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.language.model.state_dict().items())
    fresh = language("llama").model
    assert torch.equal(fresh(input_ids=ids).logits, wanted)


def test_what_needs_an_image_is_refused_by_name() -> None:
    model = without_encoder(language("llama"))
    with pytest.raises(ConfigError, match="a bridge needs an encoder's features, and this model has none"):
        model.add_adapter("one", Bridge(kind="linear"))
    with pytest.raises(AttachError, match="eP-ALM reads the input 'image_taps', and this model has none"):
        model.add_adapter("one", EPALM(layers=(0, 1), n_taps=1, connector="shared"))
    model.add_adapter("one", LoRA(rank=2))
    with pytest.raises(ConfigError, match="methods for the encoder were given, and this model has none"):
        model.add_vision_adapter({"lora": LoRA(rank=2)})
    with pytest.raises(ConfigError, match="this model has no encoder, and an image was given"):
        model.generate(Image.new("RGB", (8, 8)), "a red ball")
    with pytest.raises(ConfigError, match="no encoder fills <image>: give a TextTemplate"):
        VisionLanguageModel(None, language("llama"), Template(prompt="<image>{question}"))


def test_an_adapter_with_label_words_is_loaded_with_them(tmp_path: Path) -> None:
    model = text_model("llama")
    model.label_words["one"] = LabelWords(words=("ball", "cube"), by="mean")
    wanted = model.generate(prompts=["a red ball", ("is it", "on it")])
    model.save_pretrained(tmp_path / "adapter")
    again = without_encoder(language("llama"))
    again.load_adapter(tmp_path / "adapter", "two")
    assert again.label_words["two"] == model.label_words["one"]
    assert again.template_of("two") == TEXTS
    assert again.generate(prompts=["a red ball", ("is it", "on it")]) == wanted
    with pytest.raises(ConfigError, match="1 of 2 rows write their answer, and the others' adapters choose a word: ask them apart"):
        again.generate(prompts=["a", "b"], adapter_names=["two", "__base__"])
    again.delete_adapter("two")
    assert again.label_words == {}


@pytest.mark.parametrize("words", [(), ("yes",), ("yes", "yes")])
def test_fewer_than_two_label_words_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="give two or more, each once"):
        LabelWords(words=words)


def test_a_label_that_is_no_token_is_refused() -> None:
    model = text_model("llama")
    with pytest.raises(ConfigError, match=r"the label word 'zebra' has no token of its own in this model's vocabulary: give another word in text.labels"):
        word_scores(model, [model.row_encoder().prompt("a")], LabelWords(words=("ball", "zebra")), "one")


def test_ten_of_the_references_choices_depend_on_sum_or_mean() -> None:
    """The control: where sums and means chose alike everywhere, the tests above would not tell them apart."""
    cases = [*reference()["real"], *reference()["tiny"]["cases"]]
    assert sum(case["chosen_by_sum"] != case["chosen_by_mean"] for case in cases) == 10
    assert len(pack_rows([Row((1, 2), (1, 2)), Row((1, 3), (1, 2))])) == 1

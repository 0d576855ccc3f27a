"""`adalink export`: what is written gives, in transformers alone, what the model with its adapter gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import adalink, refused
from existing_families import MADE
from existing_models import existing
from peft import PeftModel
from safetensors.torch import load_file
from tiny_llava import save_llava
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from adalink import AdaLink, AdaptedModel, Bridge, LoRA, Method, Prompt, TokenMap
from adalink.errors import ConfigError
from adalink.lifecycle.export import check_prompt_only, prompt_embeds
from multimodal.batches.tokenize import TextTokens
from multimodal.data.images.decode import decode_image
from multimodal.encoders.bound_parts import test_image as blocks
from multimodal.existing.inputs import HostInputs
from multimodal.existing.load import example_of
from multimodal.language import Language, load_language
from multimodal.model import VisionLanguageModel
from multimodal.template import Template
from tasks.captioning import Captioning
from tasks.commands.lifecycle.export import EMBEDS_FILE, PROMPTS_FILE
from tasks.runs.compose import compose
from tasks.scenes.dataset import Scenes
from tasks.scenes.parts import language_folder

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # what merging would do; peft merges nothing here
WORDS = AdaLink(rank=4, modalities=("text",))
EVERYWHERE = LoRA(groups={"all": ("all",)}, rank=4, alpha=8.0)
QUESTION = "a red"


def excite(module: torch.nn.Module) -> None:
    """Far enough from the start to change what is said, not so far that nothing else counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def saved(folder: Path, method: Method) -> tuple[Language, AdaptedModel]:
    """The embedded language model with an excited adapter, which is saved in `folder`."""
    language = load_language(language_folder())
    model = AdaptedModel(language.model)
    excite(model.add_adapter("default", {"method": method}))
    model.save_pretrained(folder)
    return language, model


@torch.no_grad()
def outputs(model: Any, given: dict[str, Any]) -> torch.Tensor:
    return model(**given).logits  # type: ignore[no-any-return]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("command", "method"), [("folded", WORDS), ("merged", EVERYWHERE)])
def test_an_exported_folder_loads_in_transformers_with_equal_logits(command: str, method: Method, tmp_path: Path) -> None:
    language, model = saved(tmp_path / "adapter", method)
    untied = ("--untied", "true") if command == "folded" and language.model.config.tie_word_embeddings else ()
    done = adalink("export", command, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out", *untied)
    assert done.code == 0, done.err
    ids = torch.tensor([language.tokenizer(QUESTION)["input_ids"] * 3])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(plain, ids), logits(model, ids), atol=1e-4, rtol=0)
    with model.disable_adapter():
        assert not torch.allclose(logits(plain, ids), logits(model, ids), atol=1e-2)  # the control: it is not the frozen model
    assert load_language(tmp_path / "out").tokenizer("a")["input_ids"] == language.tokenizer("a")["input_ids"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_tied_model_is_exported_only_where_it_is_untied(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(language_folder(), folder)
    language = load_language(folder)
    language.model.config.tie_word_embeddings = True
    language.model.tie_weights()
    language.model.save_pretrained(folder)
    tied = load_language(folder)
    assert tied.model.get_output_embeddings().weight is tied.model.get_input_embeddings().weight
    model = AdaptedModel(tied.model)
    excite(model.add_adapter("default", {"method": WORDS}))
    model.save_pretrained(tmp_path / "adapter")
    command = ("export", "folded", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "untie them first, which stores the table twice" in refused(adalink(*command))
    assert not (tmp_path / "out").exists()
    assert adalink(*command, "--untied", "true").code == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(plain, ids), logits(model, ids), atol=1e-4, rtol=0)


def test_a_lora_of_the_word_embedding_is_one_in_peft(tmp_path: Path) -> None:
    language, model = saved(tmp_path / "adapter", AdaLink(rank=4, modalities=("text",), activation="gelu", bias=True))
    done = adalink("export", "embedding_lora", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    vocabulary, width = model.anatomy.vocabulary, model.anatomy.width
    assert f"a LoRA of rank 5 on {model.anatomy.stack}.{model.anatomy.embedding} of " in done.out
    assert f"A has a column for each token: 5 x {vocabulary:,} numbers, and {width:,} x 5 in B" in done.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    ids = torch.tensor([language.tokenizer(QUESTION)["input_ids"] * 3])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(language_folder()), tmp_path / "out").eval()
    assert torch.allclose(logits(theirs, ids), logits(model, ids), atol=1e-5, rtol=0)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert theirs.generate(input_ids=ids, **settings).tolist() == model.generate(ids, **settings).tolist()
    with model.disable_adapter():
        assert not torch.allclose(logits(theirs, ids), logits(model, ids), atol=1e-2)  # the control


@pytest.mark.slow
@pytest.mark.parametrize("family", MADE)
def test_every_family_that_reads_images_has_the_lora(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, processor = MADE[family]()
    excite(made)
    made.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    model = AdaptedModel(base)
    excite(model.add_adapter("default", AdaLink(rank=4, modalities=("text",), activation="relu", bias=True)))
    model.eval().save_pretrained(tmp_path / "adapter")
    assert adalink("export", "embedding_lora", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out").code == 0
    given = example_of(Language(model=base, tokenizer=processor.tokenizer, name=family), processor, blocks())
    expected = outputs(model, given)
    model.unload()
    raw = outputs(base, given)
    assert torch.allclose(outputs(PeftModel.from_pretrained(base, tmp_path / "out").eval(), given), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(raw, expected, atol=1e-2)  # the control


@pytest.mark.parametrize("command", ["embedding_lora", "merged"])
def test_the_same_of_a_model_that_reads_images_itself(command: str, tmp_path: Path) -> None:
    save_llava(tmp_path / "base", std=0.2)
    model = AdaptedModel(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"))
    excite(model.add_adapter("default", EVERYWHERE if command == "merged" else AdaLink(rank=4, modalities=("text",), activation="gelu", bias=True)))
    model.eval().save_pretrained(tmp_path / "adapter")
    done = adalink("export", command, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    whole = tmp_path / ("out" if command == "merged" else "base")
    base = AutoModelForImageTextToText.from_pretrained(whole).eval()
    plain = base if command == "merged" else PeftModel.from_pretrained(base, tmp_path / "out").eval()
    given = AutoProcessor.from_pretrained(whole)(text=["<image>what color is it?"], images=[blocks()], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(plain(**given).logits, model(**given).logits, atol=1e-4, rtol=0)
        with model.disable_adapter():
            assert not torch.allclose(plain(**given).logits, model(**given).logits, atol=1e-2)  # the control


@pytest.mark.parametrize("method", [AdaLink(rank=4, modalities=("text",), scope="prompt"), Prompt(length=3, init_std=0.5)], ids=["adalink", "prompt"])
def test_embeddings_of_words_generate_the_adapters_ids_in_transformers_alone(method: Method, tmp_path: Path) -> None:
    language, model = saved(tmp_path / "adapter", method)
    prompts = ["a red", "question: is there a\u2028circle? answer:", "the</s>"]  # Unicode's line boundary ends no line
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    done = adalink("export", "embeds", "--adapter", tmp_path / "adapter", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    embeds, stated = load_file(tmp_path / "out" / EMBEDS_FILE), json.loads((tmp_path / "out" / PROMPTS_FILE).read_text())
    plain = AutoModelForCausalLM.from_pretrained(language_folder()).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": language.tokenizer.pad_token_id}
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([TextTokens(language.tokenizer).whole(prompt)])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
        value = embeds[str(i)][None]
        own = plain.generate(inputs_embeds=value, attention_mask=torch.ones(value.shape[:2], dtype=torch.int64), **settings)[0]
        assert own.tolist() == expected.tolist()
        assert stated["prompts"][i] == {"tensor": str(i), "prompt": prompt, "picture": None, "tokens": value.shape[1]}
    assert stated["language_model"]["fingerprint"] == model.parts["language_model"].fingerprint


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VisionLanguageModel, list[Path]]:
    """A composed captioning model whose adapter edits prompts alone, its folder, and two images."""
    folder = tmp_path_factory.mktemp("seeing")
    images = []
    for i in range(2):
        image = Scenes(split="val", size=2)[i].image
        assert isinstance(image, bytes)
        images.append(folder / f"{i}.png")
        images[-1].write_bytes(image)
    model = compose("scenes:encoder", "scenes:language", template=Template(prompt="<image><bos>"))
    excite(model.add_adapter("default", {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"), scope="prompt")}))
    model.save_pretrained(folder / "adapter", task={"task": Captioning().name})
    return folder / "adapter", model, images


def test_embeddings_of_pictures_generate_the_adapters_captions_in_transformers_alone(
    seeing: tuple[Path, VisionLanguageModel, list[Path]], tmp_path: Path
) -> None:
    adapter, model, images = seeing
    done = adalink("export", "embeds", "--adapter", adapter, "--images", json.dumps([str(p) for p in images]), "--out", tmp_path / "out")
    assert done.code == 0, done.err
    expected = model.generate([decode_image(path) for path in images], ["", ""])
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(language_folder()).eval(), model.language.tokenizer
    embeds = load_file(tmp_path / "out" / EMBEDS_FILE)
    for i, text in enumerate(expected):
        value = embeds[str(i)][None]
        ids = plain.generate(
            inputs_embeds=value, attention_mask=torch.ones(value.shape[:2], dtype=torch.int64), max_new_tokens=30, do_sample=False,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == text
    assert not torch.equal(embeds["0"], embeds["1"])  # the control: the image is in them


def test_embeddings_of_a_model_that_reads_images_itself(seeing: tuple[Path, VisionLanguageModel, list[Path]], tmp_path: Path) -> None:
    save_llava(tmp_path / "base", std=0.2)
    model, images = VisionLanguageModel.from_model(tmp_path / "base", template=Template(prompt="<image>{question}", target="{text}")), seeing[2]
    excite(model.add_adapter("default", AdaLink(rank=4, modalities=("image", "text"), scope="prompt")))
    model.save_pretrained(tmp_path / "adapter", task={"task": Captioning().name})
    prompts = ["what color is it?", "how many circles?"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    given = ("--images", json.dumps([str(path) for path in images]), "--prompts", tmp_path / "prompts.txt")
    done = adalink("export", "embeds", "--adapter", tmp_path / "adapter", *given, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    plain, tokenizer = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval(), model.language.tokenizer
    embeds = load_file(tmp_path / "out" / EMBEDS_FILE)
    for i, prompt in enumerate(prompts):
        value = embeds[str(i)][None]
        ids = plain.generate(inputs_embeds=value, attention_mask=torch.ones(value.shape[:2], dtype=torch.int64), max_new_tokens=6, do_sample=False)
        assert [tokenizer.decode(ids[0], skip_special_tokens=True).strip()] == model.generate(images[i], prompt, max_new_tokens=6)
    with model.disable_adapter():  # the control
        assert model.generate(images[:2], prompts, max_new_tokens=6) != model.generate(images[:2], prompts, max_new_tokens=6, adapter_names=["default"] * 2)


MADE_OF_IMAGES = {
    "position_ids": ("qwen2_vl", {"position_ids": torch.zeros(3, 1, 3, dtype=torch.int64)}),
    "attention_mask": ("gemma3", {"token_type_ids": torch.ones(1, 3, dtype=torch.int64)}),
}


@pytest.mark.parametrize("more", MADE_OF_IMAGES)
def test_embeddings_cannot_carry_what_a_model_makes_beside_them(more: str) -> None:
    family, given = MADE_OF_IMAGES[more]
    model = AdaptedModel(existing(family))
    model.add_adapter("default", AdaLink(rank=2, modalities=("text",), scope="prompt")).double()
    model.base.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, **given}), with_kwargs=True)  # as a batch with images does
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ConfigError, match=f"this model makes {more} of a prompt's images beside its embeddings"):
        prompt_embeds(model, ids, TokenMap(torch.zeros_like(ids), model.rows(1), host=HostInputs()))


def test_what_embeddings_cannot_carry_is_refused(tmp_path: Path) -> None:
    for method, expected in (
        (WORDS, "also edits what is generated (text, answer), which an engine that is given prompt embeddings reads raw: train AdaLink with scope 'prompt'"),
        (EVERYWHERE, "which prompt embeddings cannot carry: export adapters of the embedding alone"),
    ):
        _, model = saved(tmp_path / type(method).__name__, method)
        with pytest.raises(ConfigError, match="prompt embeddings"):
            check_prompt_only(model.base, model.active_adapter())
        (tmp_path / "prompts.txt").write_text("a")
        command = ("export", "embeds", "--adapter", tmp_path / type(method).__name__, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
        assert expected in refused(adalink(*command))
        assert not (tmp_path / "out").exists()


def test_bad_arguments_of_an_export_are_one_sentence(seeing: tuple[Path, VisionLanguageModel, list[Path]], tmp_path: Path) -> None:
    adapter, _, images = seeing
    saved(tmp_path / "words", WORDS)
    saved(tmp_path / "prompts", AdaLink(rank=4, modalities=("text",), scope="prompt"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "no.png").write_bytes(b"no image")
    out = ("--out", tmp_path / "out")
    one = json.dumps([str(images[0])])
    for arguments, expected in (
        (("folded", "--adapter", tmp_path / "nothing", *out), "nothing is no adapter folder"),
        (("folded", "--adapter", adapter, *out), "an adapter that is one AdaLink alone can be folded, and this one has Bridge, AdaLink"),
        (("merged", "--adapter", tmp_path / "words", *out), "an adapter that is one LoRA alone can be merged, and this one has AdaLink"),
        (("folded", "--adapter", tmp_path / "words", "--out", tmp_path / "taken"), "taken is there already: give another --out, or remove it"),
        (("folded", "--adapter", tmp_path / "words", "--out", tmp_path / "two.txt" / "x"), "cannot be made: Not a directory"),
        (("folded", "--adapter", tmp_path / "words", *out, "--language_model", "no-such-lm"), "cannot load the model 'no-such-lm'"),
        (("embedding_lora", "--adapter", adapter, *out), "written as a LoRA of the word embedding, and this one has Bridge, AdaLink"),
        (("embedding_lora", "--adapter", tmp_path / "prompts", *out), "this AdaLink has the modalities text and scope 'prompt'"),
        (("embedding_lora", "--adapter", tmp_path / "words", *out, "--model", "no-such-lm"), "cannot load the model 'no-such-lm'"),
        (("embedding_lora", "--adapter", tmp_path / "words", "--out", tmp_path / "taken"), "taken is there already: give another --out, or remove it"),
        (("embeds", "--adapter", adapter, *out), "there is nothing to export: give --images, --prompts, or both"),
        (("embeds", "--adapter", adapter, *out, "--prompts", tmp_path / "two.txt", "--images", one), "1 images were given and 2 prompts: give 2, one for each"),
        (("embeds", "--adapter", tmp_path / "words", *out, "--prompts", tmp_path / "two.txt", "--images", one), "give none, since this adapter reads no images"),
        (("embeds", "--adapter", tmp_path / "words", *out, "--prompts", tmp_path / "none.txt"), "none.txt cannot be read"),
        (("embeds", "--adapter", tmp_path / "words", *out, "--prompts", tmp_path / "latin.txt"), "give a text file in UTF-8, one prompt a line"),
        (("embeds", "--adapter", adapter, *out, "--images", json.dumps([str(tmp_path / "no.png")])), "no.png"),
    ):
        assert expected in refused(adalink("export", *arguments))
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("command", "part"), [("folded", "--language_model"), ("embedding_lora", "--model")])
def test_an_adapter_of_another_model_is_not_exported(command: str, part: str, tmp_path: Path) -> None:
    saved(tmp_path / "adapter", WORDS)
    other = load_language(language_folder())
    with torch.no_grad():
        other.model.get_input_embeddings().weight.add_(1.0)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    stated = refused(adalink("export", command, "--adapter", tmp_path / "adapter", part, tmp_path / "other", "--out", tmp_path / "out"))
    assert "was trained on the language model" in stated
    assert not (tmp_path / "out").exists()

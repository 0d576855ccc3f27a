"""AdaLink on text as a LoRA of the word embedding, through the peft library itself: equal logits, equal greedy ids, and a reason where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from existing_models import CONFIGS, IMAGE_ID, batch, existing
from image_text_models import chameleon
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, excite, tiny
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM

from adalink import AdaLink, AdaptedModel, Adapter, Anatomy, Bridge, LoRA, Method, get_adalink_model
from adalink.errors import AttachError, ConfigError
from adalink.lifecycle.export import check_embedding_lora, embedding_lora, write_embedding_lora
from adalink.methods.adalink import Bottleneck

TEXT = AdaLink(rank=3, modalities=("text",), activation="gelu", bias=True)
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # what merging would do; nothing is merged here
IDS = torch.randint(3, 58, (2, 7), generator=torch.Generator().manual_seed(4))


def gemma() -> Any:
    """Its embedding multiplies by the root of its width; its head is the same table."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = GemmaForCausalLM(GemmaConfig(vocab_size=VOCABULARY, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    return model.double().eval()


def host(family: str) -> Any:
    return gemma() if family == "gemma" else existing(family) if family in CONFIGS else tiny(family)


def inputs(family: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    found = batch(family) if family in CONFIGS else {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}


def adapted(family: str, method: Method = TEXT, dtype: torch.dtype = torch.float64) -> AdaptedModel:
    model = get_adalink_model(host(family).to(dtype), method).to(dtype)
    excite(model.active_adapter())
    return model.eval()


@torch.no_grad()
def answers(model: Any, given: dict[str, Any]) -> tuple[Tensor, list[list[int]]]:
    """Logits at the tokens that are no padding, and greedy ids."""
    ids = model.generate(**given, max_new_tokens=4, do_sample=False)
    return model(**given).logits[given["attention_mask"] != 0], ids.tolist()


def through_peft(family: str, folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return PeftModel.from_pretrained(host(family).to(dtype), folder, autocast_adapter_dtype=False).eval()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma", "llava", "qwen2_vl", "gemma3", "blip2_opt"])
def test_peft_gives_the_adapters_logits_and_ids(family: str, tmp_path: Path) -> None:
    """Heads are tied in opt, gpt2, gemma and gemma3; embeddings are scaled in gemma and gemma3; blip2_opt does not run on words alone."""
    model, given = adapted(family), inputs(family)
    expected, ids = answers(model, given)
    lora = write_embedding_lora(model.base, model.active_adapter(), tmp_path, given if family == "blip2_opt" else None)
    assert lora.a.shape == (4, model.anatomy.vocabulary)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (4, [model.anatomy.embedding.rpartition(".")[2]])
    logits, ids_there = answers(through_peft(family, tmp_path), given)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    assert ids_there == ids
    raw, _ = answers(host(family), given)
    assert not torch.allclose(raw, expected, atol=1e-3)  # the control: the adapter does something


@pytest.mark.parametrize(("family", "method"), [("llama", TEXT), ("gemma", TEXT), ("llava", AdaLink(rank=3, modalities=("text",)))])
def test_float32_is_equal_to_rounding(family: str, method: Method, tmp_path: Path) -> None:
    model, given = adapted(family, method, torch.float32), inputs(family, torch.float32)
    expected, ids = answers(model, given)
    write_embedding_lora(model.base, model.active_adapter(), tmp_path)
    logits, ids_there = answers(through_peft(family, tmp_path, torch.float32), given)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert ids_there == ids


def test_a_bias_is_the_row_of_ones(tmp_path: Path) -> None:
    model, given = adapted("llama"), inputs("llama")
    expected, _ = answers(model, given)
    write_embedding_lora(model.base, model.active_adapter(), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    (name,) = [name for name in stored if name.endswith("lora_embedding_A")]
    assert stored[name][-1].tolist() == [1.0] * VOCABULARY
    stored[name][-1] = 0
    save_file(stored, tmp_path / "adapter_model.safetensors")
    without, _ = answers(through_peft("llama", tmp_path), given)
    assert not torch.allclose(without, expected, atol=1e-3)


def test_image_tokens_have_columns_of_zeros() -> None:
    model = adapted("llava")
    lora = embedding_lora(model.base, model.active_adapter())
    assert (lora.a != 0).any(0).tolist() == [token != IMAGE_ID for token in range(VOCABULARY)]


NO_LORA: list[tuple[dict[str, Method], str]] = [
    ({"bridge": Bridge(kind="linear"), "a": TEXT}, "that is one AdaLink alone can be written as a LoRA of the word embedding, and this one has Bridge, AdaLink"),
    ({"a": LoRA(rank=2)}, "and this one has LoRA"),
    ({"a": AdaLink(rank=2, modalities=("text", "image"))}, "this AdaLink has the modalities text, image and scope 'all'"),
    ({"a": AdaLink(rank=2, modalities=("text",), scope="prompt")}, "in the prompt and in the answer, and never an image; this AdaLink has the modalities text and scope 'prompt'"),
]


@pytest.mark.parametrize(("methods", "expected"), NO_LORA, ids=["bridge", "lora", "image", "prompt"])
def test_edits_that_do_not_go_by_the_id_alone_are_refused(methods: dict[str, Method], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_embedding_lora(methods)


def refused(model: nn.Module, error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        embedding_lora(model, Adapter({"a": TEXT}, Anatomy.read(model)))


def test_models_whose_table_serves_more_than_edited_words_are_refused() -> None:
    refused(tiny("t5"), ConfigError, "this is an encoder-decoder model")
    refused(chameleon(), ConfigError, "this model looks its images up in the table of its words")


def test_a_model_that_does_not_run_on_words_alone_needs_an_example() -> None:
    refused(existing("blip2_opt"), AttachError, r"ended with TypeError \(a model that does not run on words alone needs an example of its inputs\)")


def test_an_embedding_that_is_more_than_scaled_rows_is_refused() -> None:
    model = tiny("llama")
    model.get_input_embeddings().max_norm = 1.0  # type: ignore[operator]
    refused(model, AttachError, "the word embedding is a Embedding that does more than to look up rows and to multiply them by its embed_scale")


def test_embeddings_that_change_before_they_are_edited_are_refused() -> None:
    """A model with images whose words' embeddings are multiplied on their way to the layers, where edits read them."""
    model = existing("llava")
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "inputs_embeds": 2 * kwargs["inputs_embeds"]}), with_kwargs=True
    )
    refused(model, AttachError, "LlavaForConditionalGeneration, since it changes the embeddings of words between the look-up and the edit")


def test_nothing_is_left_on_the_model(tmp_path: Path) -> None:
    model, given = adapted("llama"), inputs("llama")
    expected, _ = answers(model, given)
    write_embedding_lora(model.base, model.active_adapter(), tmp_path)
    after, _ = answers(model, given)
    assert torch.equal(after, expected)
    bottleneck = model.active_adapter().placements[0].edit
    assert isinstance(bottleneck, Bottleneck)
    assert not bottleneck._forward_pre_hooks

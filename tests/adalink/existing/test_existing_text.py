"""One line on a text-only model loaded through its Auto class; what a model cannot serve is refused with what would have worked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from existing_models import IMAGE_ID, batch, existing
from tiny import DECODERS, FAMILIES, excite, tiny
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BartConfig,
    CLIPConfig,
    CLIPModel,
    GemmaConfig,
    GitConfig,
    MllamaConfig,
)

from adalink import AdaLink, AdaptedModel, Prompt, get_adalink_model
from adalink.attachment.existing import domains, image_token_ids, is_encoder_decoder, padding_mask, placeholder_id
from adalink.errors import AttachError, ConfigError

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BART = BartConfig(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
TEXT = AdaLink(rank=4, modalities=("text",))


def auto(family: str) -> Any:
    """A text-only model through the class that users load it with."""
    torch.manual_seed(0)
    config = {"gemma": GEMMA, "bart": BART}.get(family) or tiny(family).config
    model: Any = (AutoModelForSeq2SeqLM if family in ("t5", "bart") else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def inputs(labelled: bool = False) -> dict[str, Any]:
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, **({"labels": ids.masked_fill(mask == 0, -100)} if labelled else {})}


@pytest.mark.parametrize("method", [TEXT, Prompt(length=3, init_std=0.5)], ids=["adalink", "prompt"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma", "bart"])
def test_one_line_trains_and_generates(family: str, method: Any) -> None:
    model = get_adalink_model(auto(family), method)
    excite(model.active_adapter().double())
    weights = {name: value.clone() for name, value in model.base.state_dict().items()}
    optimizer = torch.optim.AdamW(model.active_adapter().parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**inputs(labelled=True)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(weights[name], value) for name, value in model.base.state_dict().items())
    for beams in (1, 3):
        cached, uncached = (
            model.generate(**inputs(), max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams, use_cache=use) for use in (True, False)
        )
        assert torch.equal(cached, uncached)


def test_gemma_is_edited_after_its_embeddings_are_scaled() -> None:
    model = get_adalink_model(auto("gemma"), TEXT)
    excite(model.active_adapter().double())
    seen: list[Tensor] = []
    stack: Any = model.attachment.stack
    stack.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = inputs()["input_ids"][1:]
    model(ids)
    words: Any = stack.get_input_embeddings()
    scaled = words(ids)  # outside the stack's call nothing is edited
    torch.testing.assert_close(scaled, words.weight[ids] * 32**0.5, rtol=1e-6, atol=0)  # its factor is kept in float32
    torch.testing.assert_close(seen[0], model.active_adapter().placements[0].edit(scaled, None, scaled), rtol=0, atol=1e-12)


def test_image_ids_are_read_by_either_name_and_none_where_there_are_none() -> None:
    assert image_token_ids(existing("llava")) == (IMAGE_ID,)  # image_token_index
    assert image_token_ids(existing("qwen2_vl")) == (60, IMAGE_ID)  # and a video's frames
    assert image_token_ids(tiny("llama")) == ()
    assert image_token_ids(nn.Linear(1, 1)) == ()


def test_domains_by_example() -> None:
    ids, mask = torch.tensor([[0, 63, 5, 6, 63, 7]]), torch.tensor([[0, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 6, 63, 7]])
    domain, present = domains(tiny("llama"), ids, {"attention_mask": mask, "labels": labels}, (63,))
    assert domain.tolist() == [[-1, 2, 0, 1, 2, 1]]
    assert present == {0, 1, 2}
    domain, present = domains(tiny("llama"), ids, {}, ())
    assert domain.tolist() == [[0] * 6]
    assert present == {0}
    told_by_a_mask = {"image_embeds_position_mask": torch.tensor([[0, 0, 1, 1, 0, 0]])}
    assert domains(tiny("llama"), ids, told_by_a_mask, ())[0].tolist() == [[0, 0, 2, 2, 0, 0]]


def test_the_id_in_slots_is_padding_or_one_that_is_no_picture() -> None:
    assert placeholder_id(tiny("llama"), ()) == 0
    assert placeholder_id(tiny("llama"), (0, 1)) == 2
    assert placeholder_id(nn.Linear(1, 1), ()) == 0


def test_the_mask_that_generation_assumes() -> None:
    model, ids = tiny("llama"), torch.tensor([[0, 5, 0, 7]])
    assert padding_mask(model, ids, None).tolist() == [[0, 1, 0, 1]]
    assert padding_mask(model, ids, 5).tolist() == [[1, 0, 1, 1]]
    model.generation_config.eos_token_id = [0, 3]
    assert padding_mask(model, ids, None).tolist() == [[1, 1, 1, 1]]
    assert is_encoder_decoder(tiny("t5"))
    assert not any(is_encoder_decoder(tiny(family)) for family in DECODERS)


def test_image_weights_that_nothing_would_train_are_refused() -> None:
    message = (
        "the edit adalink.image is for image tokens, and rows of this model with this adapter hold only text, answer: a language model gets image tokens when "
        "a bridge in the same adapter brings them from a vision encoder; in a model that reads images itself, set model.config.image_token_id to the id"
    )
    model = AdaptedModel(tiny("llama"))
    for modalities in (("image",), ("text", "image")):
        with pytest.raises(ConfigError, match=message):
            model.add_adapter("one", {"adalink": AdaLink(rank=4, modalities=modalities)})  # type: ignore[arg-type]
    assert not model.adapters
    get_adalink_model(existing("llava"), AdaLink(rank=4, modalities=("image",)))  # control


def test_a_model_with_pictures_needs_the_ids_that_say_where_they_are() -> None:
    model = get_adalink_model(existing("llava"), AdaLink(rank=4, modalities=("image",)))
    given = batch("llava")
    base: Any = model.base
    embeds = base.get_input_embeddings()(given["input_ids"])
    with pytest.raises(ConfigError, match=r"the domains of this model's tokens are unknown without input_ids \(embeddings do not mark which of them are an image's\): pass input_ids"):
        model(inputs_embeds=embeds, attention_mask=given["attention_mask"])
    with pytest.raises(ConfigError, match="tokens are unknown without input_ids"):
        model.generate(pixel_values=given["pixel_values"])
    text = get_adalink_model(tiny("llama"), TEXT)
    with pytest.raises(ConfigError, match="the domains of this model's tokens are unknown without input_ids: pass input_ids"):
        text(attention_mask=given["attention_mask"])


def test_models_that_cannot_be_served_are_refused_at_attach() -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    two_towers = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 64}, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=8))
    with pytest.raises(AttachError, match="CLIPModel has no word embedding: expected a transformers model whose get_input_embeddings"):
        get_adalink_model(two_towers, TEXT)
    mllama = MllamaConfig(
        text_config={**SIZES, "num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "image_size": 8,
                       "patch_size": 4, "intermediate_layers_indices": [0], "vision_output_dim": 32},
    )  # fmt: skip
    with pytest.raises(AttachError, match=r"the layers model.language_model.layers of MllamaForConditionalGeneration are of several kinds \(MllamaCross.*such as LLaVA or Qwen2-VL"):
        get_adalink_model(AutoModelForImageTextToText.from_config(mllama), TEXT)
    git = AutoModelForImageTextToText.from_config(GitConfig(**SIZES, vision_config={**small, "image_size": 8, "patch_size": 4}))
    message = r"the edit adalink\.image is for image tokens, .* hold only text, answer: it puts an image's features among the words where no id says which"
    with pytest.raises(ConfigError, match=message):
        get_adalink_model(git, AdaLink(rank=4, modalities=("image",)))  # its images have no tokens among the ids


def test_a_target_of_the_vision_tower_is_refused_with_the_language_models_names() -> None:
    anatomy = AdaptedModel(existing("llava")).anatomy
    with pytest.raises(AttachError, match=r"no linear of this model is named fc1; its linears are named .*q_proj"):
        anatomy.linears_named(("fc1",))  # CLIP's own; the stack is the language model
    assert all("vision" not in linear.name for linear in anatomy.linears)
    assert (anatomy.width, anatomy.vocabulary) == (32, 64)
    assert SimpleNamespace(**vars(anatomy)).stack == "model.language_model"

"""Where a model keeps its parts, read from structure: decoders, encoders, encoder-decoders, and models that already see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tiny import tiny
from torch import Tensor, nn

from adalink import IMAGE, TEXT, AdaLink, AdaptedModel, Anatomy, InputSpec, TokenMap
from adalink.errors import AttachError

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION: dict[str, Any] = {**{name: SIZES[name] for name in SIZES if name != "vocab_size"}, "image_size": 32, "patch_size": 16}
LLAMA = {"gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
OPT = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
# family -> stack, embedding, first layer, final norm, names of the linears
FOUND = {
    "llama": ("model", "embed_tokens", "layers.0", "norm", LLAMA),
    "qwen2": ("model", "embed_tokens", "layers.0", "norm", LLAMA),
    "opt": ("model.decoder", "embed_tokens", "layers.0", "final_layer_norm", OPT),
    "gpt2": ("transformer", "wte", "h.0", "ln_f", {"c_attn", "c_proj", "c_fc"}),
    "t5": ("encoder", "embed_tokens", "block.0", "final_layer_norm", {"q", "k", "v", "o", "wi", "wo"}),
}


def llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION).to_dict(), text_config=hf.LlamaConfig(**SIZES, num_key_value_heads=2).to_dict(), image_token_index=63
    )
    torch.manual_seed(0)
    return hf.LlavaForConditionalGeneration(config).double().eval()


@pytest.mark.parametrize("family", FOUND)
def test_the_parts_of_each_family(family: str) -> None:
    anatomy = Anatomy.read(tiny(family))
    stack, embedding, layer, norm, linears = FOUND[family]
    assert (anatomy.stack, anatomy.embedding, anatomy.layers[0], anatomy.final_norm) == (stack, embedding, layer, norm)
    assert len(anatomy.layers) == 2
    assert {linear.name.rsplit(".", 1)[-1] for linear in anatomy.linears} == linears
    assert (anatomy.width, anatomy.vocabulary) == (32, 64)


def test_every_name_leads_to_what_it_says() -> None:
    for family in FOUND:
        model = tiny(family)
        anatomy = Anatomy.read(model)
        stack = model.get_submodule(anatomy.stack)
        assert stack.get_submodule(anatomy.embedding).weight.shape == (64, 32)
        for linear in anatomy.linears:
            module = stack.get_submodule(linear.name)
            assert sorted(module.weight.shape) == sorted((linear.n_in, linear.n_out))
            assert linear.has_bias == (module.bias is not None)


def test_conv1d_of_gpt2_is_a_linear_the_right_way_round() -> None:
    (found,) = [linear for linear in Anatomy.read(tiny("gpt2")).linears if linear.name == "h.0.attn.c_attn"]
    assert (found.n_in, found.n_out) == (32, 96)


def test_an_embedding_narrower_than_the_layers_gives_the_width() -> None:
    config = hf.OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False)
    anatomy = Anatomy.read(hf.OPTForCausalLM(config))
    assert (anatomy.width, anatomy.final_norm) == (16, None)  # OPT-350M has neither a final norm


def test_a_bert_like_encoder_is_read_and_adapted() -> None:
    torch.manual_seed(0)
    model = hf.BertForMaskedLM(hf.BertConfig(**SIZES)).double().eval()
    anatomy = Anatomy.read(model)
    assert (anatomy.stack, anatomy.embedding, anatomy.layers) == ("bert", "embeddings.word_embeddings", ("encoder.layer.0", "encoder.layer.1"))
    assert anatomy.final_norm is None
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    adapted = AdaptedModel(model)
    adapter = adapted.add_adapter("one", {"adalink": AdaLink(rank=2, modalities=("text",))}).double()
    assert torch.equal(adapted(ids).logits, expected)
    nn.init.normal_(adapter.get_parameter("adalink.text.up.weight"))
    assert not torch.equal(adapted(ids).logits, expected)


def test_a_model_that_already_sees_is_adapted_in_its_language_part() -> None:
    model = llava()
    anatomy = Anatomy.read(model)
    assert (anatomy.stack, anatomy.embedding, anatomy.layers) == ("model.language_model", "embed_tokens", ("layers.0", "layers.1"))
    assert {linear.name.rsplit(".", 1)[-1] for linear in anatomy.linears} == LLAMA
    adapted = AdaptedModel(model)
    adapter = adapted.add_adapter("one", {"adalink": AdaLink(rank=2, modalities=("image", "text"))}).double()
    for kind in ("image", "text"):
        nn.init.normal_(adapter.get_parameter(f"adalink.{kind}.up.weight"))
    ids = torch.tensor([[5, 63, 63, 63, 63, 6, 7]])
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    domain = torch.where(ids == 63, IMAGE, TEXT)
    entering: list[Tensor] = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    adapted(ids, token_map=TokenMap(domain, adapted.rows(1)), pixel_values=pixels)
    with adapted.disable_adapter():
        adapted(ids, token_map=TokenMap(domain, adapted.rows(1)), pixel_values=pixels)
    edited, plain = entering
    image, text = (adapter.get_submodule(f"adalink.{kind}") for kind in ("image", "text"))
    expected = torch.where((domain == IMAGE)[..., None], plain + image.up(image.down(plain)), plain + text.up(text.down(plain)))  # type: ignore[operator]
    assert torch.equal(edited, expected)


@pytest.mark.parametrize(
    ("config", "stack", "norm"),
    [
        (hf.GPTNeoXConfig(**SIZES), "gpt_neox", "final_layer_norm"),
        (hf.PhiConfig(**SIZES), "model", "final_layernorm"),
        (hf.MistralConfig(**SIZES, num_key_value_heads=2), "model", "norm"),
        (hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "transformer", "ln_f"),
        (hf.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4), "transformer", "norm_f"),
        (hf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=1, eos_token_id=2), "transformer", "ln_f"),
    ],
    ids=lambda value: value.model_type if isinstance(value, hf.PretrainedConfig) else None,
)
def test_families_that_nobody_listed_are_read_too(config: Any, stack: str, norm: str) -> None:
    anatomy = Anatomy.read(hf.AutoModelForCausalLM.from_config(config))
    assert (anatomy.stack, anatomy.final_norm, len(anatomy.layers)) == (stack, norm, 2)


def bart() -> Any:
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=64, d_model=32, **sizes))


def test_the_first_stack_of_an_encoder_decoder_model_is_its_encoder() -> None:
    anatomy = Anatomy.read(bart())
    assert (anatomy.stack, anatomy.embedding, anatomy.layers) == ("model.encoder", "embed_tokens", ("layers.0", "layers.1"))


def test_the_norm_of_the_embedding_is_no_final_norm() -> None:
    assert Anatomy.read(bart()).final_norm is None


def test_a_model_of_two_towers_is_refused_in_a_sentence() -> None:
    text = {**SIZES, "bos_token_id": 1, "eos_token_id": 2}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION))
    with pytest.raises(AttachError, match="CLIPModel has no word embedding"):
        Anatomy.read(model)


def test_models_without_words_or_layers_are_refused() -> None:
    vit = hf.ViTModel(hf.ViTConfig(**{name: SIZES[name] for name in SIZES if name != "vocab_size"}))
    with pytest.raises(AttachError, match=r"ViTModel has no word embedding: expected a transformers model whose get_input_embeddings\(\) gives"):
        Anatomy.read(vit)
    with pytest.raises(AttachError, match="Linear has no word embedding"):
        Anatomy.read(nn.Linear(2, 2))

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

        def get_input_embeddings(self) -> nn.Module:
            return self.words

    with pytest.raises(AttachError, match="Flat has no list of transformer layers beside its word embedding: this structure is not supported"):
        Anatomy.read(Flat())


def test_linears_are_matched_by_the_last_part_of_their_name() -> None:
    anatomy = Anatomy.read(tiny("llama"))
    found = anatomy.linears_named(("q_proj", "down_proj"))
    assert [linear.name for linear in found] == [
        "layers.0.self_attn.q_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj",
    ]  # fmt: skip
    for wrong in ("proj", "qq_proj", "self_attn.q_proj"):
        with pytest.raises(AttachError, match=rf"no linear of this model is named {wrong}; its linears are named down_proj, gate_proj, k_proj,"):
            anatomy.linears_named((wrong, "q_proj"))


def test_inputs_are_kept() -> None:
    inputs = {"image": InputSpec(36, 128)}
    assert Anatomy.read(tiny("opt"), inputs).inputs == inputs

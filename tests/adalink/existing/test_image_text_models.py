"""Of every image-text model: edits sit in the language model's layers, and reach the tokens that they are for, or one sentence refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from image_text_models import IMAGE_ID, MODELS, WORDS, made, row
from tiny import excite
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adalink import AdaLink, AdaptedModel, Anatomy, LoRA, Prompt, get_adalink_model
from adalink.anatomy import text_config
from adalink.attachment.existing import POSITION_MASK, image_token_ids, is_encoder_decoder
from adalink.errors import AdalinkError, AttachError, ConfigError

LISTED = {
    kind: name
    for listed in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES,
        getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),
    )
    for kind, name in listed.items()
}
# A few of each way: an image's tokens by id, in a part's config, by cross-attention, among the words; a tower of another vocabulary; several stacks.
SAMPLE = (
    "blip", "evolla", "florence2", "fuyu", "gemma3n", "git", "idefics", "kosmos-2", "llava", "phi4_multimodal", "pix2struct", "qwen2_vl", "t5gemma2", "udop",
)  # fmt: skip
TOWERS = ("vision", "image", "visual", "protein", "audio", "speech", "qformer", "resampler", "tower")
READS_IMAGES = ("vision", "image_", "vqmodel", "perceiver", "patch")
KEYS_AND_VALUES = ("key", "value", "k_proj", "v_proj")
EMU = {"<image>": 60, **{f"<|visual token {i:06d}|>": 10 + i for i in range(32)}, "<|extra_200|>": 50}
TIMM = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4}}
# What some configs lack by default.
SETTINGS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "chameleon": {"vocabulary_map": WORDS},
    "emu3": {"vocabulary_map": EMU},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "perception_lm": {"vision_config": TIMM},
}
TEXT_LORA = LoRA(groups={"text": ("text",)}, rank=4, alpha=8)
RUN = tuple(name for name in MODELS if name != "llava_of_no_id")
REFUSED_INSIDE = ("git", "vilt")  # an image's features stand among the words, and no id says where


def skeleton(kind: str) -> Any:
    """A model of a listed class in its default size, without weights; None where its config has no complete default."""
    try:
        with torch.device("meta"):
            return getattr(hf, LISTED[kind])(CONFIG_MAPPING[kind](**SETTINGS.get(kind, {})))
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def check_the_stack(kind: str) -> None:
    model = skeleton(kind)
    if model is None:
        pytest.skip(f"the config of {kind} has no complete default")
    try:
        anatomy = Anatomy.read(model)
    except AttachError:
        return  # one sentence
    path = f"{anatomy.stack}.{anatomy.layers[0]}"
    assert not any(word in path.lower() for word in TOWERS), path
    config = text_config(model.config)
    assert len(anatomy.layers) == config.num_hidden_layers
    assert anatomy.width == model.get_input_embeddings().embedding_dim
    stack = model.get_submodule(anatomy.stack)
    assert all(linear.name in dict(stack.named_modules()) and linear.name.startswith(anatomy.layers[0].rpartition(".")[0]) for linear in anatomy.linears)


@pytest.mark.parametrize("kind", SAMPLE)
def test_the_layers_are_the_language_models(kind: str) -> None:
    check_the_stack(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(LISTED) - set(SAMPLE)))
def test_the_layers_of_every_listed_class_are_the_language_models(kind: str) -> None:
    check_the_stack(kind)


class Seen:
    """What modules give in the calls of a model."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.values: dict[str, list[Tensor]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: self.take(name, output))

    def take(self, name: str, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
        self.values[name].append(value.detach().clone())


def moved(name: str, n_words: int, method: Any) -> tuple[Tensor, list[str]]:
    """bool [T], the tokens whose queries in the first layer an edit moves; and the modules of what reads the image that it moves."""
    adapted = get_adalink_model(made(name), method)
    anatomy = adapted.anatomy
    query = anatomy.projections[0].query.linear if anatomy.projections else anatomy.linears[0].name
    first = f"{anatomy.stack}.{query}"
    linears = [path for path, child in adapted.base.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    images = [path for path in linears if any(word in path for word in READS_IMAGES) or (path.startswith(anatomy.stack) and "cross" in path and path.endswith(KEYS_AND_VALUES))]
    _, arguments = row(name, n_words)
    seen = Seen(adapted.base, [first, *images])  # after the adapter, whose hooks then run before these
    torch.manual_seed(2)  # ViLT draws the order of its patches
    with adapted.disable_adapter(), torch.no_grad():
        adapted(**arguments)
    plain = {path: list(values) for path, values in seen.values.items()}
    for values in seen.values.values():
        values.clear()
    excite(adapted.active_adapter())
    torch.manual_seed(2)
    with torch.no_grad():
        adapted(**arguments)
    changed = [path for path in images if any(not torch.equal(a, b) for a, b in zip(plain[path], seen.values[path], strict=True))]
    assert any(plain[path] for path in images)  # an image was read
    return (plain[first][0] != seen.values[first][0]).flatten(0, -2).any(-1), changed


def is_image(name: str, n_words: int) -> Tensor:
    return row(name, n_words)[0][0] == IMAGE_ID


# Rows of 5 words are as long as an image's features in these models: shapes then fit by chance.
@pytest.mark.parametrize("n_words", [5, 6])
@pytest.mark.parametrize("method", [AdaLink(rank=4, modalities=("text",)), TEXT_LORA], ids=["adalink", "lora"])
@pytest.mark.parametrize("name", RUN)
def test_edits_of_text_reach_text_alone(name: str, method: Any, n_words: int) -> None:
    if name in REFUSED_INSIDE and method is TEXT_LORA:
        with pytest.raises(AttachError, match=r"tokens, and the rows of the call have 1 x [56]: the model puts an image's features among the words"):
            moved(name, n_words, method)
        return
    tokens, others = moved(name, n_words, method)
    assert not others
    if name in REFUSED_INSIDE:  # layers have the image's tokens too, before the words or after them
        assert tokens.sum() == n_words
        return
    assert torch.equal(tokens, ~is_image(name, n_words))


@pytest.mark.parametrize("name", ["chameleon", "kosmos2", "florence2", "fuyu", "llava"])
def test_edits_of_images_reach_their_tokens_alone(name: str) -> None:
    methods: list[Any] = [LoRA(groups={"image": ("image",)}, rank=4, alpha=8), *([] if name == "kosmos2" else [AdaLink(rank=4, modalities=("image",))])]
    for method in methods:
        tokens, others = moved(name, 5, method)
        assert tokens.any()
        assert not (tokens & ~is_image(name, 5)).any()  # Chameleon gives some image tokens the zero vector of its padding, which LoRA leaves
        assert not others


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("git", "it puts an image's features among the words where no id says which tokens they are, so choose edits of text"),
        ("kosmos2", "it puts an image's features among the words after the embedding, so choose edits of text, or edits inside the layers"),
        ("blip", "it reads images by cross-attention, where they have no tokens, so choose edits of text"),
        ("idefics", "it reads images by cross-attention, where they have no tokens, so choose edits of text"),
        ("llava_of_no_id", "in a model that reads images itself, set model.config.image_token_id to the id of its image tokens before it is adapted"),
    ],
)
def test_image_tokens_that_a_model_does_not_have_are_refused_with_what_is_possible(name: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=rf"the edit adalink\.image is for image tokens, and rows of this model with this adapter hold only text, answer: .*{advice}"):
        get_adalink_model(made(name), AdaLink(rank=4, modalities=("image",)))


def test_an_image_whose_tokens_nothing_tells_is_refused_and_the_advice_works() -> None:
    _, arguments = row("llava_of_no_id", 5)
    model = get_adalink_model(made("llava_of_no_id"), TEXT_LORA)
    with pytest.raises(ConfigError, match=r"pixel_values was given, and the config of Llava.* names no image token.*: set model.config.image_token_id to the id"):
        model(**arguments)
    model(input_ids=torch.tensor([[1, 5, 6]]))  # words alone
    frozen = made("llava_of_no_id")
    frozen.config.image_token_id = IMAGE_ID
    get_adalink_model(frozen, TEXT_LORA)(**arguments)


def test_ids_are_read_wherever_a_config_keeps_them() -> None:
    assert image_token_ids(made("chameleon")) == (IMAGE_ID,)  # looked up in its vocabulary
    phi = hf.Phi4MultimodalConfig()
    assert image_token_ids(with_config(phi)) == (phi.vision_config.image_token_id,)
    assert image_token_ids(with_config(hf.Qwen2_5OmniThinkerConfig(image_token_index=7, video_token_index=5))) == (5, 7)


def with_config(config: Any) -> nn.Module:
    model = nn.Linear(1, 1)
    model.config = config  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("name", ["git", "blip", "idefics", "chameleon", "fuyu", "trocr_like", "pix2struct"])
def test_generation_goes_on_with_the_edits(name: str) -> None:
    model = get_adalink_model(made(name), AdaLink(rank=4, modalities=("text",)))
    _, arguments = row(name, 5)
    arguments.pop("labels", None)
    settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    plain = made(name).generate(**arguments, **settings)
    assert torch.equal(model.generate(**arguments, **settings), plain)
    excite(model.active_adapter(), 3)
    with model.disable_adapter():
        assert torch.equal(model.generate(**arguments, **settings), plain)
    assert model.generate(**arguments, **settings).shape == plain.shape


@pytest.mark.parametrize("name", ["blip", "blip_vqa", "idefics", "trocr_like", "pix2struct", "chameleon"])
def test_a_step_of_training_moves_the_adapter_alone(name: str) -> None:
    model = get_adalink_model(made(name), TEXT_LORA)
    ids, arguments = row(name, 5)
    weights = {key: value.clone() for key, value in model.base.state_dict().items()}
    excite(model.active_adapter())
    model(**{"labels": ids, **arguments}).loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.active_adapter().parameters())
    assert all(torch.equal(weights[key], value) for key, value in model.base.state_dict().items())


def test_labels_of_a_second_stack_are_not_taken_for_the_rows() -> None:
    assert is_encoder_decoder(made("blip_vqa"))  # which its config does not tell
    assert not is_encoder_decoder(made("blip"))
    assert not is_encoder_decoder(made("trocr_like"))  # the edits see what its decoder writes


def test_slots_in_what_a_decoder_writes_are_refused() -> None:
    model = get_adalink_model(made("trocr_like"), Prompt(length=2, init_std=0.5))
    with pytest.raises(ConfigError, match="puts slots into its rows, and this model's rows are what it writes itself: use an adapter without slots"):
        model(**row("trocr_like", 5)[1])
    plain = get_adalink_model(made("trocr_like"), TEXT_LORA)
    with pytest.raises(ConfigError, match="called without an image, labels or decoder_input_ids: pass what it is to read"):
        plain()


def test_a_row_may_be_told_by_a_mask() -> None:
    model = AdaptedModel(made("kosmos2"))
    _, arguments = row("kosmos2", 5)
    assert POSITION_MASK in arguments
    with pytest.raises(AdalinkError, match="hold only text, answer"):
        model.add_adapter("one", {"adalink": AdaLink(rank=2, modalities=("image",))})

"""Every class that AutoModelForImageTextToText lists: what the texts about an image may share in it, tried on a tiny model of it, or why it is refused.

    python tests/multimodal/support/models_page.py                # writes the table of the docs' page: two minutes
    python tests/multimodal/support/models_page.py llava fuyu     # prints rows of some model types, and why one was not tried

Families with a processor in `existing_families` are tried with it. The others are made from their default configs, with every size made small, and
a stand-in for a processor, which writes as many image tokens as the model's `get_image_features` gives vectors.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from existing_families import MADE, made, tokenizer_of
from sharing import in_double
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as LISTED

from adalink.attachment.existing import image_token_ids
from adalink.errors import AdalinkError, ConfigError
from multimodal.existing.inputs import VectorForm
from multimodal.existing.tower import features_owner
from multimodal.model import VisionLanguageModel
from multimodal.template import Template

PAGE = Path(__file__).resolve().parents[3] / "examples" / "docs" / "guides" / "models.md"
FAMILY = {"llava": "llava", "mistral3": "mistral3", "blip-2": "blip2", **{name: name for name in MADE}}
MOST = 30_000_000  # parameters of a model that counts as tiny
VOCABULARY, FIRST_TOKEN = 512, 440  # special tokens come last
SIDE = 32
SMALL: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "dim", "width", "projection_dim", "out_hidden_size", "encoder_hidden_size", "projector_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size", "mlp_dim", "shared_expert_intermediate_size", "projector_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "query_pre_attn_scalar", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input"), 16),
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "image_size": SIDE, "patch_size": 8, "n_group": 1, "topk_group": 1, "scale_factor": 2,
    "max_position_embeddings": 1024, "spatial_merge_size": 2, "temporal_patch_size": 2, "mm_tokens_per_image": 4, "num_query_tokens": 4, "sliding_window": 64,
    "num_position_embeddings": 64, "n_shared_experts": 1, "linear_num_heads": 4, "linear_head_dim": 8, "moe_k": 2, "num_kv_shared_layers": 0, "vision_output_dim": 32, "projector_output_dim": 32,
}  # fmt: skip
# Towers of timm, and quantisers, in place of large default ones.
TIMM: Mapping[str, Any] = {"model_type": "timm_wrapper", "num_labels": 0, "do_pooling": False}
PLAIN_TOWER = {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": SIDE, "patch_size": 8}}
CONVOLUTIONS = {"architecture": "test_resnet", "model_args": {"output_stride": 8}}
QUANTISED: Mapping[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}
# The words for quantised images, which no text holds.
CHAMELEON = {"<image>": FIRST_TOKEN, **{f"IMGIMG{a}{b}Z": 450 + 4 * i + j for i, a in enumerate("ABCD") for j, b in enumerate("ABCD")}}
EMU = {"<image>": FIRST_TOKEN, "<|extra_200|>": 449, **{f"<|visual token {i:06d}|>": 450 + i for i in range(16)}}
# What some configs lack by default.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "qwen2_5_omni_thinker": {"vision_start_token_id": 400}, "qwen3_omni_moe_thinker": {"vision_start_token_id": 400},
    "gemma4": {"vision_config": {}}, "gemma4_unified": {"vision_config": {"patch_size": 8, "pooling_kernel_size": 1, "mm_embed_dim": 32, "output_proj_dims": 32}}, "vipllava": {"vision_feature_layers": [-1] * 5},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}}, "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "perception_lm": {"vision_config": {**TIMM, **PLAIN_TOWER}}, "fast_vlm": {"vision_config": {**TIMM, **CONVOLUTIONS}},
    "gemma3n": {"vision_config": CONVOLUTIONS, "vision_soft_tokens_per_image": 16},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "janus": {"vq_config": {**QUANTISED, "num_embeddings": 16, "image_token_embed_dim": 32}},
    "chameleon": {"vocabulary_map": CHAMELEON, "vq_config": {**QUANTISED, "num_embeddings": 16, "resolution": SIDE}},
    "emu3": {"vocabulary_map": EMU, "vq_config": {**QUANTISED, "codebook_size": 16, "attn_resolutions": []}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2", "spatial_target_layers": [0, 1, 0, 1]},
    **{kind: {"image_token_id": 400, "video_token_id": 401} for kind in ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")},
    "qwen4_exp": {"text_config": {
        "head_dim": 8, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4,
    }},
    "cohere_compass": {"text_config": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
    }}},
    "molmo2": {"text_config": {"additional_vocab_size": 0}},
}  # fmt: skip
# What is set when every size has been made small.
AFTERWARDS: Mapping[str, Mapping[str, Any]] = {
    "llama4": {"vision_config.intermediate_size": 128, "vision_config.projector_input_dim": 32},
    "fast_vlm": {"vision_config.hidden_size": 96}, "gemma3n": {"vision_config.hidden_size": 96},
    "kimi_k25": {"projection_hidden_size": 32},
    "molmo2": {"image_patch_id": FIRST_TOKEN + 20, "adapter_config.text_hidden_size": 32, "adapter_config.vision_feature_layer": [-1, -1], "vision_config.num_position_embeddings": 16},
    "muse_glimmer": {"out_hidden_size": 128}, "muse_spark": {"out_hidden_size": 128},
    "unlimited_ocr": {"vision_config.sam_config.output_channels": 32, "vision_config.sam_config.downsample_channels": [32, 32]},
    "nemotron_h_omni": {"image_token_id": 400, "video_token_id": 401, "vision_hidden_size": 32, "vision_config.patch_dim": 192},
    "minimax_m3_vl": {"merged_hidden_size": 128, "text_config.rotary_dim": 8, "text_config.index_head_dim": 8},
    "deepseek_vl_hybrid": {"high_res_vision_config.output_channels": 32, "high_res_vision_config.global_attn_indexes": [0]},
    "diffusion_gemma": {"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 48},
    "deepseek_ocr2": {"vision_config.sam_config.output_channels": 32, "vision_config.sam_config.downsample_channels": [32, 32], "text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2},
    "dots3_note": {"audio_config.adapter_input_size": 32, "audio_config.adapter_out_dim": 32, "vision_config.adapter_in_dim": 32, "vision_config.adapter_out_dim": 32},
    "inkling2": {"vision_config.text_hidden_size": 32},
    "step3p7": {"text_config.sliding_window": 64},
    "hunyuan_vl": {"vision_config.out_hidden_size": 32, "vision_config.text_hidden_size": 32},
}  # fmt: skip


# ----------------------------------------
# Tiny models of default configs.


def _configs(config: Any) -> Iterator[Any]:
    """A config and those of its parts."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, hf.PreTrainedConfig):
            yield from _configs(value)


def shrunk(kind: str) -> Any:
    """The default config of a model type with every size made small."""
    whole = copy.deepcopy(CONFIG_MAPPING[kind](**SETTINGS.get(kind, {})))
    ids: dict[int, int] = {}
    for config in _configs(whole):
        for name, value in list(vars(config).items()):
            if isinstance(value, bool) or value is None:
                continue
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
                usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
                setattr(config, name, usual[name] if name in usual else ids.setdefault(value, FIRST_TOKEN + len(ids)))
            elif name == "eos_token_id":
                config.eos_token_id = 2
            elif name in SMALL and isinstance(value, (int, float)):
                setattr(config, name, SMALL[name])
            elif name in ("image_size", "patch_size") and isinstance(value, (list, tuple)):
                setattr(config, name, [SMALL[name]] * len(value))
        _fit(config, "get_rope_index" in inspect.getsource(inspect.getmodule(getattr(hf, LISTED[kind]))))  # type: ignore[arg-type]
    for path, value in AFTERWARDS.get(kind, {}).items():
        *parts, name = path.split(".")
        setattr(reduce(getattr, parts, whole), name, value)
    return whole


def _fit(config: Any, has_rope: bool) -> None:
    """Experts one by one, lists with an entry for each layer, and rotations with one for each part of a head."""
    layers = getattr(config, "num_hidden_layers", 2)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list) and len(kinds) > layers:
            distinct = list(dict.fromkeys(kinds))[:layers] if name.endswith("types") else kinds[:layers]
            setattr(config, name, (distinct * layers)[:layers])
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        if getattr(config, name, None):
            setattr(config, name, [1])
    config._experts_implementation = "eager"
    if vars(config).get("kv_lora_rank") and "num_attention_heads" in vars(config):
        config.num_key_value_heads = vars(config)["num_attention_heads"]
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and has_rope and hasattr(config, "num_hidden_layers"):
        n = int(8 * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [1, 1, n - 2] if n > 2 else [1, 1, 0]
    if getattr(config, "image_grid_pinpoints", None):
        config.image_grid_pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]


def tiny(kind: str) -> Any:
    """The model in float64; raises what its class raises, and ValueError where it is no small one."""
    config, listed = shrunk(kind), getattr(hf, LISTED[kind])
    with torch.device("meta"):
        n = sum(parameter.numel() for parameter in listed(copy.deepcopy(config)).parameters())
    if n > MOST:
        raise ValueError(f"its config has sizes of its own: {n / 1e6:,.0f} million parameters")
    torch.manual_seed(0)
    model = listed(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


# ----------------------------------------
# A stand-in for a processor.


@cache
def _tokenizer() -> Any:
    words = tokenizer_of([])
    words.add_special_tokens({"additional_special_tokens": [f"<extra_{i}>" for i in range(len(words), VOCABULARY)]})
    return words


class StandIn:
    """Writes as many image tokens as the model gives vectors, between the tokens that begin and end an image where the config names them."""

    chat_template = None

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], n: int) -> None:
        self.tokenizer, self.image_processor = _tokenizer(), self
        ids = image_token_ids(model)
        config = model.config
        own = next((value for name in ("image_token_id", "image_token_index") if isinstance(value := getattr(config, name, None), int)), ids[0])
        before, after = (next((value for name in names if isinstance(value := getattr(config, name, None), int)), None) for names in _AROUND)
        self.image_ids, self.inputs = ids, inputs
        self.image_token = self._spelled(own)
        self.wording = self._spelled(before) + self.image_token * n + self._spelled(after)

    def _spelled(self, token: int | None) -> str:
        return "" if token is None else str(self.tokenizer.convert_ids_to_tokens(token))

    def _merge_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        return {"images_kwargs": {}}

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Mapping[str, Tensor], list[str]]:
        return self.inputs, [self.wording] * len(images)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        if text is None:
            return self.inputs
        _, wordings = self._process_images(images or [])
        pieces = text[0].split(self.image_token)
        whole = pieces[0] + "".join(wording + piece for wording, piece in zip(wordings, pieces[1:], strict=True))
        ids = self.tokenizer(whole)["input_ids"]
        kinds = [int(id in self.image_ids) for id in ids]
        return {"input_ids": [ids], "token_type_ids": [kinds], "mm_token_type_ids": [kinds]}


_AROUND = (
    ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"),
    ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"),
)


def _candidates(model: Any) -> Iterator[dict[str, Tensor]]:
    """What a tower may read of an image of 32 x 32: pixels, tiles, or patches in rows with their grid."""
    torch.manual_seed(3)
    takes = inspect.signature(features_owner(model, "").get_image_features).parameters
    names = [name for name in ("pixel_values", "pixel_values_images") if name in takes]
    pixels, sizes = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64), torch.tensor([[SIDE, SIDE]])
    sides = {name: value for name, value in {"image_sizes": sizes}.items() if name in takes}
    for name in names:
        yield from ({name: value, **more} for needed, value, more in _less_usual(pixels) if needed in takes)
        yield {name: pixels, **sides}
        yield {name: pixels[:, None], **sides, **({"pixel_attention_mask": torch.ones(1, 1, SIDE, SIDE, dtype=torch.bool)} if "pixel_attention_mask" in takes else {})}
        yield {name: pixels[:, None].expand(-1, 3, -1, -1, -1), **sides}
        for depth in (1, 2):
            patches = torch.randn(16, 3 * depth * 64, dtype=torch.float64)
            if "image_grid_thw" in takes:
                merges = {"image_merge_sizes": torch.tensor([2])} if "image_merge_sizes" in takes else {}
                yield {name: patches, "image_grid_thw": torch.tensor([[1, 4, 4]]), **merges}
                yield {name: patches.unflatten(1, (3, depth * 8, 8))[:, :, :8], "image_grid_thw": torch.tensor([[1, 4, 4]]), **merges}
                yield {name: patches.reshape(-1, 16, 16, 3)[:4], "image_grid_thw": torch.tensor([[1, 2, 2]]), **merges}
            if "spatial_shapes" in takes:
                yield {name: patches[None], "spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64)}
        if "image_position_ids" in takes:
            n = 2 * int(getattr(model.config.vision_config, "pooling_kernel_size", 2))
            places = torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="xy"), -1).flatten(0, 1)
            yield {name: torch.rand(1, n * n, 3 * 64, dtype=torch.float64), "image_position_ids": places[None]}


def _less_usual(pixels: Tensor) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """An argument that some tower takes, the pixels that it then reads, and all that comes with them."""
    patches = torch.nn.functional.unfold(pixels, 8, stride=8).mT  # [1, 16, 192]
    grid = torch.tensor([[4, 4]])
    yield "target_sizes", patches.reshape(1, 16, 3, 8, 8).permute(0, 2, 3, 1, 4).reshape(1, 3, 8, 128), {"target_sizes": grid}
    quarters = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    yield "image_token_pooling", patches, {"image_token_pooling": quarters, "image_grids": torch.tensor([[2, 2, 0, 0]])}
    yield "high_res_pixel_values", pixels, {"high_res_pixel_values": pixels}
    yield "pixel_attention_mask", pixels[:, None], {"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    yield "image_grid_hw", patches[0], {"image_grid_hw": grid}
    yield "pixel_values", patches, {}  # Fuyu


def stand_in(model: Any) -> StandIn:
    """A processor for a model, found out by what its tower takes. Raises ValueError where it takes nothing that is tried."""
    why = "no argument of get_image_features holds pixels"
    for inputs in _candidates(model):
        try:
            with torch.no_grad():
                output = features_owner(model, "").get_image_features(**inputs, return_dict=True)
                n = len(VectorForm.of(output).vectors(output))
        except ConfigError:
            raise
        except Exception as error:
            why = f"its tower takes none of the inputs that were made up: {_first_line(error)}"
            continue
        return StandIn(model, inputs, n)
    raise ValueError(why)


def _runs(model: Any, processor: StandIn) -> None:
    """The model's own call with the image; raises what it raises, and ConfigError where it does not score the text's tokens."""
    given = processor(images=[None], text=[processor.image_token + "a red square"])
    takes = inspect.signature(type(model).forward).parameters
    ids = torch.tensor(given["input_ids"])
    kinds = {name: torch.tensor(given[name]) for name in ("token_type_ids", "mm_token_type_ids") if name in takes}
    with torch.no_grad():
        scores = model(input_ids=ids, attention_mask=torch.ones_like(ids), **kinds, **processor.inputs).logits
    if scores.shape[1] != ids.shape[1]:
        raise ConfigError("its scores are of other tokens than the text's")  # a diffusion model's canvas


def _needs_more(model: Any) -> bool:
    """Whether its own call needs more than a text and an image: a decoder's ids (T5Gemma 2), the state of a robot (pi0)."""
    takes = inspect.signature(type(model).forward).parameters.values()
    needed = {one.name for one in takes if one.default is inspect.Parameter.empty and one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return bool(model.config.is_encoder_decoder or needed - {"self", "input_ids", "pixel_values"})


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:110]


# ----------------------------------------
# The table.

NOTES = {"images": "the tokens of one image read each other", "prompts": "a prompt reads itself both ways, so texts of one prompt share it", "": ""}


class NotTried(Exception):
    """Nothing is known of a class, and why."""


def found(kind: str) -> tuple[str, str]:
    """How the texts about an image share it, and a note: why not, or what else is to be known. Raises NotTried."""
    tried = "with its processor" if kind in FAMILY else ""
    with in_double():
        try:
            model, processor = made(FAMILY[kind]) if tried else _made_up(kind)
            vlm = VisionLanguageModel.from_model(model, processor, template=Template(prompt="<image>{question}"))
        except AdalinkError as error:
            return "refused", _short(str(error))
    assert vlm.ways is not None
    how = "packed" if vlm.ways.packs else "forked" if vlm.ways.forks else "apart"
    return how, "; ".join(part for part in (NOTES[vlm.tower.blocks], tried) if part)


def _made_up(kind: str) -> tuple[Any, Any]:
    """A tiny model and a stand-in for its processor. Raises NotTried, and AdalinkError where the class alone decides."""
    with _or_not_tried("no tiny model could be made of its default config"), torch.device("meta"):
        skeleton = getattr(hf, LISTED[kind])(shrunk(kind))
    owner = features_owner(skeleton, LISTED[kind])
    if asks := [name for name in inspect.signature(owner.get_image_features).parameters if name.endswith("input_ids")]:
        raise ConfigError(f"the image's vectors depend on its {asks[0]} too")
    with _or_not_tried("no tiny model could be made of its default config"):
        model = tiny(kind)
    with _or_not_tried("what its tower reads could not be made up"):
        processor = stand_in(model)
    if not _needs_more(model):
        with _or_not_tried("its own call did not take what was made up"):
            _runs(model, processor)
    return model, processor


@contextlib.contextmanager
def _or_not_tried(why: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        raise NotTried(f"its class needs {error.name}, which is not installed") from error
    except Exception as error:
        raise NotTried(why) from error


def _short(sentence: str) -> str:
    """A refusal without the model's name and the advice."""
    if "have neither" in sentence:
        return "no field of its image features holds a vector for each image token"
    if "which cannot be given" in sentence:
        return "it cannot be given an image that was encoded before"
    return re.sub(r"^'\w+', an? \w+, ", "it ", re.split(": adapt it with|: expected", sentence)[0])


def row(kind: str) -> str:
    """A line of the table."""
    try:
        how, note = found(kind)
    except NotTried as error:
        how, note = "not tried", str(error)
    return f"| `{LISTED[kind]}` | {kind} | {how} | {note.replace('|', '/')} |"


def page(rows: Iterable[str]) -> str:
    """The page with these rows in the place of its own."""
    text = PAGE.read_text()
    return text[: text.index(HEAD)] + HEAD + "".join(f"{one}\n" for one in rows)


def rows_of_page() -> list[str]:
    """The rows that the page has."""
    return PAGE.read_text().partition(HEAD)[2].splitlines()


HEAD = "| class | model type | texts about an image | |\n|---|---|---|---|\n"


def main(kinds: Sequence[str]) -> None:
    """Write the page's table, or print the rows of some model types and why one was not tried."""
    if not kinds:
        PAGE.write_text(page(map(row, LISTED)))
    for kind in kinds:
        print(row(kind))
        try:
            with in_double():
                found(kind)
        except NotTried as error:
            print("   ", _first_line(error.__cause__ or error))

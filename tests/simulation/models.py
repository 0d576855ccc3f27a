"""Small models for the simulated GPU: random weights, of the size of the embedded tokenizer, in float32 or the dtype that is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from existing_families import MADE
from PIL import Image

from adalink import EPALM, IA3, AdaLink, BitFit, Bottleneck, Bridge, Gated, HiRA, LoRA, Method, Prefix, Prompt, UniPELT
from multimodal.batches.collate import Batch, collate, stacked
from multimodal.batches.packing import Arrange, arrangement_of, joined_rows, separate_rows
from multimodal.encoders.tower import load_tower
from multimodal.language import Language, load_language, settle_tokens
from multimodal.loading import freeze
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.template import Template, Text
from tasks.scenes.parts import encoder_folder, language_folder

__all__ = ["METHODS", "batch_of", "composed", "existing", "images", "language", "questions", "scratch", "with_adapted_encoder", "with_connectors"]

IDS: dict[str, Any] = {"vocab_size": 505, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
MODELS: Mapping[str, Callable[[], Any]] = {
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256, **IDS)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256, **IDS)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **IDS)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **IDS)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=16, **EAGER, **IDS)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0, **IDS)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=256, vocab_size=505, pad_token_id=1), False),
}

BRIDGE: Mapping[str, Method] = {"bridge": Bridge(kind="mlp", hidden=16)}
METHODS: Mapping[str, Mapping[str, Method]] = {
    "adalink": {**BRIDGE, "adalink": AdaLink(rank=4, modalities=("image", "text"))},
    "text": {**BRIDGE, "adalink": AdaLink(rank=4, modalities=("text",))},
    "lora": {
        **BRIDGE, "lora": LoRA(groups={"image": ("image",), "text": ("text",)}, rank=2, alpha=4, targets=("query", "value"), dropout=0.1),
    },
    "prefix": {**BRIDGE, "prefix": Prefix(length=2, form="mlp", init_std=0.5, hidden=8)},
    "prompt": {**BRIDGE, "prompt": Prompt(length=3, init_std=0.5, positions="none")},
    "ia3": {**BRIDGE, "ia3": IA3(groups={"all": ("image", "text")}), "hira": HiRA(rank=2, targets=("value",)), "bitfit": BitFit(groups={"all": ("all",)}, force_bias=True)},
    "bottleneck": {**BRIDGE, "bottleneck": Bottleneck(width=4)},
    "unipelt": {**BRIDGE, "unipelt": UniPELT(variant="APL", bottleneck=4, prefix_length=2, prefix_hidden=6, lora_rank=2)},
    "gated": {**BRIDGE, "gated": Gated(inner=AdaLink(rank=4, modalities=("text", "image")))},
    "epalm": {"epalm": EPALM(layers=(1, 3), n_taps=2, connector="shared")},
    "epalm_published": {"epalm": EPALM(layers=(0, 2), n_taps=2, connector="shared", mask="published")},
}  # fmt: skip
TEXTS = (("is it red?", "yes"), ("how many large balls are there?", "two"), ("is it red?", "no, blue"))


def language(family: str, dtype: torch.dtype = torch.float32) -> Language:
    """A frozen language model; `scenes` is the embedded one (Llama with tied embeddings)."""
    embedded = load_language(language_folder(), dtype=dtype)
    if family == "scenes":
        return embedded
    torch.manual_seed(0)
    model = MODELS[family]()
    freeze(model, dtype)
    settle_tokens(embedded.tokenizer, model, family)
    return Language(model=model, tokenizer=embedded.tokenizer, name=family)


def composed(family: str, dtype: torch.dtype = torch.float32, /, prompt: str = "<image><bos>question: {question} answer:", **adapters: str) -> VisionLanguageModel:
    """The embedded encoder before a language model, with adapters: their names, and the kinds of their methods."""
    model = VisionLanguageModel(load_tower(encoder_folder(), dtype=dtype), language(family, dtype), Template(prompt=prompt))
    return _with_adapters(model, adapters)


def existing(family: str, dtype: torch.dtype = torch.float32, /, **adapters: str) -> VisionLanguageModel:
    """A model that sees already."""
    torch.manual_seed(0)
    model, processor = MADE[family]()
    return _with_adapters(VisionLanguageModel.from_model(model.to(dtype).eval(), processor, template=Template(prompt="<image>{question}", target="{text}")), adapters)


def with_connectors(family: str, dtype: torch.dtype = torch.float32, /, *, trains: str = "copy") -> VisionLanguageModel:
    """A model that sees already with three adapters: the frozen connector, a trained copy of it, and LoRA on its linears."""
    model, lora = existing(family, dtype, frozen="lora"), {"lora": LoRA(rank=2, alpha=4, dropout=0.1)}
    model.add_adapter("copy", lora, connector="trained")
    model.add_adapter("low_rank", lora, connector_methods=lora)
    with torch.no_grad():
        for name in ("copy", "low_rank"):
            model.set_adapter(name)
            for parameter in TrainedParts.of(model).parameters().values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.set_adapter(trains)
    return model


def with_adapted_encoder() -> VisionLanguageModel:
    """A plain vision transformer of timm with adapters of its own, before OPT."""
    import timm
    from timm.models import save_for_hf

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes), folder, model_args=sizes, safe_serialization=True)
        tower = load_tower(folder)
    model = VisionLanguageModel(tower, language("opt"), Template(prompt="<image><bos>question: {question} answer:"))
    lora = LoRA(groups={"image": ("image",)}, rank=2, alpha=4)
    _with_adapters(model, {"a": "adalink"})
    model.add_vision_adapter({"lora": lora, "prompt": Prompt(length=2, init_std=0.5), "adalink": AdaLink(rank=2, modalities=("image",))})
    return model


def _with_adapters(model: VisionLanguageModel, adapters: Mapping[str, str]) -> VisionLanguageModel:
    """Adapters whose weights are moved from their start, where many methods change nothing."""
    for name, kind in adapters.items():
        methods = {role: one for role, one in METHODS[kind].items() if role != "bridge" or "encoder" in model.adapted.parts}
        adapter = model.add_adapter(name, methods)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def images(n: int) -> list[Image.Image]:
    """Images of different sizes."""
    return [Image.new("RGB", (50 + i, 40), (40 * i % 256, 80, 200 - 10 * i)) for i in range(n)]


def batch_of(model: VisionLanguageModel, n: int = 3, *, row_tokens: int = 0, arrange: Arrange | None = None) -> Batch:
    """A training batch as the loader makes it: images with one to three texts, arranged as the model allows, or by `arrange`."""
    encoder = model.row_encoder()
    arrange = arrange or (separate_rows if model.head is not None else arrangement_of(model)[0])
    scores = None if model.head is None else ((0, 1.0), (1, 0.3))
    read = [model.tower.preprocess(image) for image in images(n)]
    arranged = [arrange([encoder.row(Text(*text, scores), read[i]) for text in TEXTS[: 1 + i % 3]]) for i in range(n)]
    rows, about = [row for one in arranged for row in one], [i for i, one in enumerate(arranged) for _ in one]
    if row_tokens:
        rows, about = joined_rows(rows, about, row_tokens)
    return collate(rows, about, stacked(read), kind="pixels", side="right", pad_id=model.language.tokenizer.pad_token_id)


def questions(n: int) -> Sequence[str]:
    """Questions of different lengths."""
    asked = ("is it red?", "how many large balls are there?", "is it?", "red?")
    return [asked[i % len(asked)] for i in range(n)]


def scratch() -> Path:
    """A new folder, which goes with the process."""
    return Path(tempfile.mkdtemp(prefix="simulated"))

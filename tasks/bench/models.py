"""Composed models on drawn features: an image of any number of image tokens, and texts of a given length about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedTokenizerFast

from adalink import Bridge, LoRA, Method, Prompt
from adalink.checkpoint.precision import Precision, settle
from adalink.errors import ConfigError
from adalink.methods.lora import LowRank
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import Arrange, arrangement
from multimodal.batches.tokenize import Row
from multimodal.encoders.base import Loaded, Preprocess, Stage
from multimodal.encoders.tower import VisionTower
from multimodal.language import Language, settle_tokens
from multimodal.model import VisionLanguageModel
from multimodal.template import Template, Text
from multimodal.training.prepare import CompiledModel

__all__ = [
    "ALPHA", "FEATURE_WIDTH", "IGNORED", "LLAMA_1B", "LLAMA_60M", "LLAMA_8B", "OPT_125M", "SIZES", "TINY_LLAMA", "TINY_OPT", "Bench", "Case", "Machine",
    "Shape", "Sizes", "Step", "Taught", "Work", "arrange_of", "as_batch", "check_peft", "composed", "copied_lora", "drawn_tower", "encoded", "language",
    "learn", "new_optimizer", "our_model", "our_step", "their_step",
]  # fmt: skip


# ----------------------------------------
# Language models by their sizes, with drawn weights: speed does not depend on the values of weights.


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's name in the tables, and its configuration."""

    name: str
    config: Any  # a configuration of transformers, which is untyped here


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the models are, in which dtype, whether their forward pass is compiled, and how many threads of a processor they may use.

    quantiser   int8 or nf4, of the frozen linear layers; empty for none
    attention   as transformers names it
    has_liger   whether the peer runs Liger-Kernel's RMSNorm, rotary embedding, SwiGLU and loss
    """

    device: torch.device
    dtype: torch.dtype
    is_compiled: bool = False
    n_threads: int = 1
    quantiser: str = ""
    attention: str = "sdpa"
    has_liger: bool = False


# 57 million parameters, grouped-query attention.
LLAMA_60M = Shape(
    name="llama60",
    config=LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1664, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=2048, tie_word_embeddings=True, **_IDS,
    ),
)  # fmt: skip
OPT_125M = Shape(name="opt125", config=OPTConfig(dropout=0.0, **_IDS))
# The sizes of Llama 3.2 1B.
LLAMA_1B = Shape(
    name="llama1b",
    config=LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192, tie_word_embeddings=True, **_IDS,
    ),
)  # fmt: skip
# Those of Llama 3.1 8B.
LLAMA_8B = Shape(
    name="llama8b",
    config=LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192, tie_word_embeddings=False, **_IDS,
    ),
)  # fmt: skip
TINY_LLAMA = Shape(
    name="tiny llama",
    config=LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, **_IDS,
    ),
)  # fmt: skip
TINY_OPT = Shape(
    name="tiny opt",
    config=OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
        dropout=0.0, **_IDS,
    ),
)  # fmt: skip


def language(shape: Shape, machine: Machine) -> Language:
    """A frozen language model of a shape, the same weights each time, with a tokenizer of words `w0`, `w1`, ... for every id."""
    torch.manual_seed(0)
    with machine.device:
        model: Any = AutoModelForCausalLM.from_config(shape.config, dtype=machine.dtype, attn_implementation=machine.attention)
    model.eval().requires_grad_(False)
    if machine.quantiser:
        settle(model, Precision(quantise=machine.quantiser), shape.name)  # type: ignore[arg-type]  # one of its values
    words = {word: number for number, word in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), shape.config.vocab_size)}
    split = Tokenizer(WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    settle_tokens(tokenizer, model, shape.name)
    return Language(model=model, tokenizer=tokenizer, name=shape.name)


PAD_ID = 0
FEATURE_WIDTH = 768  # of ViT-B
TEMPLATE = Template(prompt="<image><bos>{question}", target=" {text}<eos>")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one training step learns from: images with their texts.

    n_patches        image tokens of an image
    n_texts          texts about it
    n_prompt         tokens of a text that are read and not trained on, the start token among them
    n_target         tokens that are targets of the loss, the end token among them
    n_images       images of a step
    """

    n_patches: int
    n_texts: int = 5
    n_prompt: int = 1
    n_target: int = 12
    n_images: int = 1

    def texts(self, vocabulary: int) -> list[list[Text]]:
        """The texts of each image, drawn: words of ids that stand for themselves."""
        draw = Random(0)

        def words(n: int) -> str:
            return " ".join(f"w{draw.randrange(4, vocabulary)}" for _ in range(n))

        return [[Text(words(self.n_prompt - 1), words(self.n_target - 1)) for _ in range(self.n_texts)] for _ in range(self.n_images)]

    def features(self, machine: Machine, width: int = FEATURE_WIDTH) -> Tensor:
        """[images, n_patches, width], drawn."""
        drawn = torch.randn(self.n_images, self.n_patches, width, generator=torch.Generator().manual_seed(0))
        return drawn.to(machine.device, machine.dtype)


class _Drawn(nn.Module):
    """An encoder that gives so many patches and costs nothing: features are cached, so it is asked for their sizes alone."""

    def __init__(self, n_patches: int) -> None:
        super().__init__()
        self.patches = nn.Parameter(torch.randn(n_patches, FEATURE_WIDTH))

    def whole(self, pixels: Tensor) -> object:
        return self.last(pixels)

    def blocks(self, pixels: Tensor) -> tuple[Stage, ...]:
        return (self.last(pixels),)

    def last(self, pixels: Tensor) -> Stage:
        return Stage(patches=self.patches.expand(len(pixels), -1, -1))


def _no_pixels(image: Image.Image) -> Tensor:
    return torch.zeros(3, 2, 2)


def drawn_tower(n_patches: int) -> VisionTower:
    """A tower of so many patches that are never computed."""
    return VisionTower(Loaded(encoder=_Drawn(n_patches), preprocess=Preprocess(transform=_no_pixels)), name="drawn")


def composed(shape: Shape, machine: Machine, tower: VisionTower, methods: Mapping[str, Method]) -> VisionLanguageModel:
    """A model with one adapter, the same weights each time. A machine that compiles does so after the adapter is attached."""
    torch.manual_seed(0)
    model = VisionLanguageModel(tower, language(shape, machine), TEMPLATE).to(machine.device)
    model.add_adapter("bench", methods)
    if machine.is_compiled:
        model.language_loss.call = CompiledModel(model.adapted)
    return model


def encoded(model: VisionLanguageModel, work: Work) -> Sequence[Sequence[Row]]:
    """The rows of each image."""
    encoder, vocabulary = model.row_encoder(), model.language.model.config.vocab_size
    return [[encoder.row(text) for text in texts] for texts in work.texts(vocabulary)]


def as_batch(rows: Sequence[Sequence[Row]], features: Tensor, arrange: Arrange) -> Batch:
    """The batch of a training step, as the loader makes it."""
    arranged = [arrange(of_one) for of_one in rows]
    image = [number for number, of_one in enumerate(arranged) for _ in of_one]
    return collate([row for of_one in arranged for row in of_one], image, features, kind="patches", side="right", pad_id=PAD_ID)


# ----------------------------------------
# What is measured, in three sizes: `usual` is what the targets speak of, `billion` is for a GPU, `tiny` takes seconds and shows nothing.


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step, and how many times as fast and as small it should be as the peer's. None: nothing is aimed at.

    A step reads about as many image tokens whatever the size of an image: four of 50, or one of 197 or 256.
    """

    work: Work
    faster: float | None = None
    smaller: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The language models and steps of a run of the command.

    encoders   timm names (image size) and the steps with their features; faster: against encoding each row's image
    """

    models: tuple[Shape, ...]
    captions: tuple[Case, ...]
    questions: tuple[Case, ...]
    text_only: tuple[Case, ...]
    encoders: tuple[tuple[str, int, Case], ...]
    n_records: int = 8000
    n_images: int = 120
    n_answers: int = 50_000
    n_captions: int = 5000
    growth_models: tuple[Shape, ...] = ()
    growth_patches: tuple[int, ...] = (50, 128, 256, 576)
    growth_texts: tuple[int, ...] = (1, 2, 5, 10)
    growth_ranks: tuple[int, ...] = (8, 64, 256)


def _usual(models: tuple[Shape, ...], smallest: tuple[Shape, ...]) -> Sizes:
    question = {"n_prompt": 8, "n_target": 3}
    return Sizes(
        models=models,
        captions=(
            Case(work=Work(n_patches=50, n_images=4), faster=3, smaller=4),
            Case(work=Work(n_patches=197), faster=4, smaller=5),
            Case(work=Work(n_patches=256), faster=5, smaller=7),
        ),
        questions=(
            Case(work=Work(n_patches=50, n_images=4, **question), faster=3.5),
            Case(work=Work(n_patches=256, **question), faster=5),
        ),
        text_only=(Case(work=Work(n_patches=256), faster=7),),
        encoders=(
            ("vit_base_patch32_224", 224, Case(work=Work(n_patches=49, n_images=4), faster=3.8)),
            ("vit_small_patch14_dinov2", 224, Case(work=Work(n_patches=256), faster=5.5)),
        ),
        growth_models=smallest,
    )


SIZES = {
    "tiny": Sizes(
        models=(TINY_LLAMA, TINY_OPT),
        captions=(Case(work=Work(n_patches=9)),),
        questions=(Case(work=Work(n_patches=9, n_prompt=8, n_target=3, n_images=2)),),
        text_only=(Case(work=Work(n_patches=9)),),
        encoders=(("test_vit", 160, Case(work=Work(n_patches=100))),),
        n_records=64,
        n_images=8,
        n_answers=200,
        n_captions=20,
        growth_models=(TINY_LLAMA,),
        growth_patches=(5, 9),
        growth_texts=(1, 3),
        growth_ranks=(2, 4),
    ),
    "usual": _usual((LLAMA_60M, OPT_125M), (LLAMA_60M, OPT_125M)),
    "billion": _usual((LLAMA_1B,), (LLAMA_60M, OPT_125M, LLAMA_1B)),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One run of the command."""

    sizes: Sizes
    machine: Machine = field(default_factory=lambda: Machine(device=torch.device("cpu"), dtype=torch.float32))
    repetitions: int = 5


# ----------------------------------------
# The two sides of a training step on one language model: adalink's, and the usual one row per text through HF peft.
#
# Both train a linear visual prefix and the same method with the same weights, take AdamW, and give the loss of their step.


Taught = Literal["lora", "prompt", "text lora"]
"""lora: rank 8 on q and v; prompt: 20 soft tokens; text lora: LoRA on text alone, behind a projection that is trained already."""

Step = Callable[[], float]
ALPHA, N_PROMPT = 16, 20
IGNORED = -100


def check_peft() -> None:
    """Raises ConfigError where the peer is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ConfigError("the peer of these measurements, peft, is not installed: pip install 'adalink[bench]'") from None


def our_model(shape: Shape, machine: Machine, tower: VisionTower, taught: Taught, rank: int = 8) -> VisionLanguageModel:
    """The composed model; its adapter is away from its start, but for text alone, where the two sides agree at the start alone."""
    groups = {"text": ("text",)} if taught == "text lora" else {"all": ("all",)}
    method: Method = (
        Prompt(length=N_PROMPT, init_std=0.02)
        if taught == "prompt"
        else LoRA(groups=groups, rank=rank, alpha=ALPHA, targets=("q_proj", "v_proj"))
    )
    model = composed(shape, machine, tower, {"bridge": Bridge(kind="linear", norm="none"), taught.split()[-1]: method})
    adapter = model.adapted.active_adapter()
    if taught == "text lora":
        for name, parameter in adapter.named_parameters():
            parameter.requires_grad_(not name.startswith("bridge."))
        return model
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def our_step(model: VisionLanguageModel, work: Work, features: Callable[[], Tensor]) -> Step:
    """A step of the composed model on cached features: rows are arranged and collated in it, as the loader does."""
    rows, arrange = encoded(model, work), arrange_of(model)
    optimizer = new_optimizer(model.adapted.active_adapter().parameters())

    def step() -> float:
        batch = as_batch(rows, features(), arrange).to(model.device)
        return learn(model(batch), optimizer)

    return step


def arrange_of(model: VisionLanguageModel) -> Arrange:
    """How training arranges the rows of an image."""
    return arrangement(model.language.model, model.adapted.active_adapter(), model.row_encoder().prompt("w4"))[0]


def their_step(
    ours: VisionLanguageModel, shape: Shape, machine: Machine, work: Work, features: Callable[[], Tensor], taught: Taught, rank: int = 8
) -> Step:
    """A step of a peft model with the weights of `ours`: one row per text, logits of every token.

    features: [rows, N, Dv], those of each row's image.
    """
    base: Any = language(shape, machine).model
    if machine.has_liger:
        _apply_liger(base)
    embed, model = base.get_input_embeddings(), _peft(base, taught, rank)
    projection = nn.Linear(ours.vision_tower.width, embed.embedding_dim, device=machine.device)
    _same_weights(ours, model, projection, taught)
    projection.requires_grad_(taught != "text lora")
    if machine.is_compiled:
        model = torch.compile(model)
    n_read = work.n_prompt + work.n_target - 1
    rows = [row for of_one in encoded(ours, work) for row in of_one]
    ids = torch.tensor([[*row.ids[-n_read:], row.target[-1]] for row in rows], device=machine.device)
    labels = torch.full((len(ids), work.n_patches + ids.shape[1]), IGNORED, device=machine.device)
    labels[:, -work.n_target :] = ids[:, -work.n_target :]
    mask = torch.ones_like(labels)
    optimizer = new_optimizer([parameter for part in (model, projection) for parameter in part.parameters() if parameter.requires_grad])

    def step() -> float:
        embeds = torch.cat([projection(features().to(projection.weight.dtype)).to(embed.weight.dtype), embed(ids)], 1)
        return learn(model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss, optimizer)

    return step


def _apply_liger(base: Any) -> None:
    """Liger-Kernel's fused functions, as its users have them; without them it computes all logits unless the model is in training mode."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # an extra, for GPUs

    _apply_liger_kernel_to_instance(model=base)
    base.train()  # the frozen shapes have no dropout


def _peft(base: Any, taught: Taught, rank: int) -> Any:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model  # an extra

    if taught == "prompt":
        return get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N_PROMPT))
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"]))


@torch.no_grad()
def _same_weights(ours: VisionLanguageModel, theirs: Any, projection: nn.Linear, taught: Taught) -> None:
    """Copies the adapter's weights into the peft model and the projection."""
    adapter = ours.adapted.active_adapter()
    found = dict(adapter.named_parameters())
    projection.weight.copy_(found["bridge.image.layers.1.weight"])
    projection.bias.copy_(found["bridge.image.layers.1.bias"])
    if taught == "prompt":
        theirs.prompt_encoder["default"].embedding.weight.copy_(found["prompt.soft.table"])
        return
    copied_lora(ours, theirs)


@torch.no_grad()
def copied_lora(ours: VisionLanguageModel, theirs: Any) -> None:
    """Copy the weights of the adapter's low-rank pairs into the peft model."""
    for placement in ours.adapted.active_adapter().placements:
        if isinstance(placement.edit, LowRank):
            layer = theirs.get_submodule(f"base_model.model.{ours.adapted.anatomy.stack}.{placement.port.module}")
            layer.lora_A["default"].weight.copy_(placement.edit.down.weight)
            layer.lora_B["default"].weight.copy_(placement.edit.up.weight)


def new_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """What both sides train with."""
    return torch.optim.AdamW([parameter for parameter in parameters if parameter.requires_grad], lr=1e-4)


def learn(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """A step down the loss, which comes back."""
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())

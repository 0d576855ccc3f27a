"""Rows of questions about two images, for adapters of every method; and what transformers writes for each row alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from composed import tower

from adalink import EPALM, IA3, AdaLink, BitFit, Bottleneck, Bridge, Gated, Ladder, LoRA, Method, Prefix, Prompt, UniPELT
from multimodal.batches.collate import Batch, collate
from multimodal.generation.generate import GenerationSettings, generated_texts, run_generation
from multimodal.model import VisionLanguageModel

QUESTIONS = ("is it red ?", "is it a big red ball ?", "is it ?", "", "is it a cube ?")
BRIDGE = Bridge(kind="linear")
METHODS: dict[str, dict[str, Method]] = {
    "adalink": {"bridge": Bridge(kind="mlp", hidden=8), "adalink": AdaLink(rank=4, modalities=("image", "text"))},
    "prompt": {"bridge": BRIDGE, "prompt": Prompt(length=3, init_std=0.5), "adalink": AdaLink(rank=2, modalities=("text",))},
    "prefix": {"bridge": BRIDGE, "prefix": Prefix(length=2, form="table", init_std=0.5)},
    "lora": {"bridge": BRIDGE, "lora": LoRA(groups={"image": ("image",), "text": ("text",)}, rank=2, alpha=4)},
    "ia3_bitfit": {"bridge": BRIDGE, "ia3": IA3(groups={"all": ("image", "text")}), "bitfit": BitFit(groups={"all": ("all",)}, force_bias=True)},
    "bottleneck": {"bridge": BRIDGE, "bottleneck": Bottleneck(width=4)},
    "ladder": {"bridge": BRIDGE, "ladder": Ladder(reduction=2, rungs=(1,), output="add")},
    "epalm": {"epalm": EPALM(layers=(0, 2), n_taps=2, connector="per_tap"), "prompt": Prompt(length=2, init_std=0.5, positions="none")},
}
NOT_SHARED: dict[str, dict[str, Method]] = {
    "epalm_late": {"epalm": EPALM(layers=(0, 1), n_taps=2, connector="shared", mask="published")},
    "gated": {"bridge": BRIDGE, "gated": Gated(inner=AdaLink(rank=4, modalities=("text", "image")))},
    "unipelt": {"bridge": BRIDGE, "unipelt": UniPELT(variant="APL", bottleneck=4, prefix_length=2, prefix_hidden=6, lora_rank=2)},
}


@contextlib.contextmanager
def tokens_read(model: VisionLanguageModel) -> Iterator[list[int]]:
    """How many tokens each call of the language model inside the block had."""
    calls: list[int] = []
    stack = model.adapted.attachment.stack
    handle = stack.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args[0] if args else kwargs["input_ids"]).numel()), with_kwargs=True)
    yield calls
    handle.remove()


def asked(model: VisionLanguageModel, names: list[str], about: list[int], which: list[int]) -> Batch:
    """Rows of some adapters, each about one of two images."""
    rows = [model.row_encoder(name).prompt(QUESTIONS[i]) for name, i in zip(names, which, strict=True)]
    retained = torch.randn(2, tower().n_retained, tower().width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return collate(rows, about, retained, kind="patches", side="left", pad_id=0)


def alone(model: VisionLanguageModel, names: list[str], about: list[int], which: list[int], settings: GenerationSettings, *, use_cache: bool = True) -> list[str]:
    """What transformers writes for each row in a batch of its own, without anything that is shared."""
    texts = []
    for name, photo, i in zip(names, about, which, strict=True):
        batch = asked(model, [name], [photo], [i])
        with torch.no_grad(), model.adapted.attachment.bind(model.token_map(batch, [name])):
            texts += generated_texts(model.language, batch, run_generation(model.language, batch, settings, use_cache=use_cache))
    return texts

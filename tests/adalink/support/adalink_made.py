"""Cases in the form of fixtures/adalink with other settings: images and text, other families, ranks that differ; embeddings edited in plain operations."""

from __future__ import annotations

from typing import Any

import torch
from adalink_case import Case
from double import InDouble, rounded_frequencies
from hosts import host
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

WIDTH, VOCABULARY, PICTURE, N_PATCHES, IMAGE_TOKEN = 32, 90, 12, 3, 77
GROUPED = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 40, "tie_word_embeddings": False},
    "opt": {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40},
    "llama": GROUPED | {"tie_word_embeddings": False},
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "t5": {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "made_gpt2_pictures_before": {"kind": "gpt2"},
    "made_opt_pictures_before_of_the_models_width": {"kind": "opt", "projector": ()},
    "made_llama_pictures_among_text": {"kind": "llama", "among": True, "projector": ("projector.weight",), "ranks": {"image": 6, "text": 2}},
    "made_qwen2_pictures_before_through_two_linears": {"kind": "qwen2", "projector": ("projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias")},
    "made_t5_pictures_before": {"kind": "t5", "ranks": {"image": 1, "text": 5}},
    "made_t5_text": {"kind": "t5", "modalities": ("text",)},
    "made_opt_pictures_and_embeddings_of_the_models_width": {"kind": "opt", "projector": (), "embeds": True},
    "made_llama_text": {"kind": "llama", "modalities": ("text",)},
    "made_llama_text_rounded_frequencies": {"kind": "llama", "modalities": ("text",), "frequencies": "rounded"},
    "made_llama_text_stored_frequencies": {"kind": "llama", "modalities": ("text",), "frequencies": "stored"},
    "made_opt_text_left_padded": {"kind": "opt", "modalities": ("text",), "left": True},
}
VARIANTS = {
    "linear": {"activation": "identity", "bias": False}, "gelu": {"activation": "gelu", "bias": False},
    "relu_bias": {"activation": "relu", "bias": True}, "linear_bias": {"activation": "identity", "bias": True},
}  # fmt: skip
ACTIVATIONS = {"identity": lambda x: x, "gelu": nn.functional.gelu, "relu": nn.functional.relu}


def made(
    *, kind: str, modalities: tuple[str, ...] = ("image", "text"), ranks: dict[str, int] | None = None, among: bool = False, left: bool = False,
    projector: tuple[str, ...] = ("projector.weight", "projector.bias"), embeds: bool = False, frequencies: str = "exact",
) -> Case:  # fmt: skip
    """A case with random weights and the results of every variant in both scopes."""
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    with InDouble():
        maker: Any = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        state = maker.from_config(AutoConfig.for_model(kind, vocab_size=VOCABULARY, **KINDS[kind])).state_dict()
        tied = [] if kind in ("gpt2", "llama") else ["lm_head.weight"]
        weights = {f"w.{name}": normal(*value.shape) + float("norm" in name or ".ln_" in name) for name, value in state.items() if name not in [*tied, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]}  # fmt: skip
        weights |= {f"adalink.{modality}{task}.{side}.{leaf}": normal(*shape) for modality in modalities for task in ("", "_task2")
                    for side, leaf, shape in _shapes((ranks or {}).get(modality, 4))}  # fmt: skip
        if "image" in modalities:
            middle = 20
            shapes = {"projector.weight": (WIDTH, PICTURE), "projector.bias": (WIDTH,), "projector.0.weight": (middle, PICTURE), "projector.0.bias": (middle,),
                      "projector.2.weight": (WIDTH, middle), "projector.2.bias": (WIDTH,)}  # fmt: skip
            weights |= {name: normal(*shapes[name]) for name in projector}
        inputs = _inputs(generator, "image" in modalities, among, left, kind == "t5") | {"in.image_features": normal(3, N_PATCHES, PICTURE if projector else WIDTH)}
        if "image" not in modalities:
            del inputs["in.image_features"]
        if embeds:  # of the text alone, and nothing that is compared
            inputs = {"in.embeds": normal(3, 8, WIDTH)} | inputs
        if frequencies == "stored":
            head = WIDTH // GROUPED["num_attention_heads"]
            weights["w.model.rotary_emb.inv_freq"] = 1.25 / 10000 ** (torch.arange(0, head, 2) / head)
        spec = {"config": {"model": kind, "heads": 4, "tied_head": bool(tied), "image_token_id": IMAGE_TOKEN}, "variants": VARIANTS}
        return Case(spec, {name: value.detach() for name, value in (weights | inputs | _results(spec, weights, inputs, modalities, projector, frequencies)).items()})


def result_names(*, modalities: tuple[str, ...] = ("image", "text"), **settings: object) -> set[str]:
    """What the results of such a case are named, without making it: a test's parameters need no more."""
    losses = {f"{variant}.{scope}.loss" for variant in VARIANTS for scope in ("all", "prompt")}
    return losses | {"out.base.logits", "linear.mixed_tasks.logits"} | ({"linear.lookup_table"} if modalities == ("text",) else set())


def _shapes(rank: int) -> list[tuple[str, str, tuple[int, ...]]]:
    return [("down", "weight", (rank, WIDTH)), ("down", "bias", (rank,)), ("up", "weight", (WIDTH, rank)), ("up", "bias", (WIDTH,))]


def _inputs(generator: torch.Generator, has_images: bool, among: bool, left: bool, reads: bool) -> dict[str, Tensor]:
    mask = (torch.arange(8) < torch.tensor([[8], [7], [6]])).long()
    mask = mask.flip(1) if left else mask
    ids = torch.randint(3, 70, (3, 8), generator=generator) * mask
    if has_images and among:
        ids[0, :3], ids[1, 1:4], ids[2, [0, 2, 3]] = IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN
    prompt = (torch.arange(8) < 4).long().expand_as(ids) * mask
    labels = torch.where((prompt == 0) & (mask == 1), ids, -100)
    if reads:
        labels = torch.randint(3, 70, (3, 5), generator=generator)
    return {"in.input_ids": ids, "in.attention_mask": mask, "in.labels": labels, "in.prompt_mask": prompt, "in.task_ids": torch.tensor([0, 1, 0])}


def _results(spec: dict[str, Any], weights: dict[str, Tensor], inputs: dict[str, Tensor], modalities: tuple[str, ...], projector: tuple[str, ...], frequencies: str) -> dict[str, Tensor]:  # fmt: skip
    model = host(spec["config"], {name.removeprefix("w."): value for name, value in weights.items() if name.startswith("w.")})
    model.requires_grad_(False)
    if frequencies == "rounded":
        rounded_frequencies(model)
    leaves = {name: value.requires_grad_() for name, value in weights.items() if name.startswith("adalink.") or name in projector}
    ids, found = inputs["in.input_ids"], dict[str, Tensor]()
    n_before = N_PATCHES if "image" in modalities and not (ids == IMAGE_TOKEN).any() else 0

    def edited(h: Tensor, name: str, variant: str) -> Tensor:
        bias = {side: weights[f"adalink.{name}.{side}.bias"] if VARIANTS[variant]["bias"] else 0.0 for side in ("down", "up")}
        inner = ACTIVATIONS[str(VARIANTS[variant]["activation"])](h @ weights[f"adalink.{name}.down.weight"].T + bias["down"])
        return h + inner @ weights[f"adalink.{name}.up.weight"].T + bias["up"]

    def run(variant: str, scope: str, task: str) -> tuple[Tensor, Tensor, Tensor]:
        """(edited embeddings, logits, loss)."""
        text = model.get_input_embeddings()(ids)
        is_text = (inputs["in.prompt_mask" if scope == "prompt" else "in.attention_mask"].bool() & (ids != IMAGE_TOKEN))[..., None]
        h = torch.where(is_text, edited(text, f"text{task}", variant), text) if scope != "none" else text
        mask, labels = inputs["in.attention_mask"], inputs["in.labels"]
        if "image" in modalities:
            image = _projected(inputs["in.image_features"], weights)
            image = edited(image, f"image{task}", variant) if scope != "none" else image
            h = torch.cat([image, h], 1) if n_before else h.masked_scatter((ids == IMAGE_TOKEN)[..., None], image)
            mask = nn.functional.pad(mask, (n_before, 0), value=1)
        if model.config.is_encoder_decoder:
            logits = model(inputs_embeds=h, attention_mask=mask, labels=labels).logits
            return h, logits, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        logits = model(inputs_embeds=h, attention_mask=mask, use_cache=False).logits
        labels = nn.functional.pad(labels, (n_before, 0), value=-100)
        return h, logits, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    for variant in VARIANTS:
        for scope in ("all", "prompt"):
            h, logits, loss = run(variant, scope, "")
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            named = {name.removeprefix("adalink.") if len(modalities) > 1 or not name.startswith("adalink.") else name.removeprefix("adalink.text."): value
                     for name, value in zip(leaves, gradients, strict=True) if value is not None}  # fmt: skip
            found |= {f"{variant}.{scope}.{name}": value for name, value in {"inputs_embeds": h, "logits": logits, "loss": loss[None], **{f"grad.{n}": g for n, g in named.items()}}.items()}
    found["out.base.logits"] = run("linear", "none", "")[1]
    both = [run("linear", "all", task)[1] for task in ("", "_task2")]
    found["linear.mixed_tasks.logits"] = torch.stack([both[int(task)][i] for i, task in enumerate(inputs["in.task_ids"])])
    if modalities == ("text",):
        found["linear.lookup_table"] = edited(model.get_input_embeddings().weight, "text", "linear")
    return found


def _projected(features: Tensor, weights: dict[str, Tensor]) -> Tensor:
    if "projector.weight" in weights:
        return features @ weights["projector.weight"].T + weights.get("projector.bias", torch.zeros(WIDTH))
    if "projector.0.weight" not in weights:
        return features
    inner = nn.functional.gelu(features @ weights["projector.0.weight"].T + weights["projector.0.bias"])
    return inner @ weights["projector.2.weight"].T + weights["projector.2.bias"]

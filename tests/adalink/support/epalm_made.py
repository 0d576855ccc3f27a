"""Cases in the fixtures' form with other settings, computed in plain tensor operations from what eP-ALM is said to compute.

Nothing here uses transformers or the package under test.
"""

from __future__ import annotations

from typing import Any

import torch
from beams_424 import search
from epalm_case import Case
from torch import Tensor, nn

SETTINGS: dict[str, dict[str, Any]] = {
    "one_tap_per_layer": {"window": (2, 5), "n_taps": 3},
    "more_taps_than_layers": {"window": (3, 5), "n_taps": 4},
    "uneven_steps": {"window": (0, 5), "n_taps": 2, "shared": True},
    "last_layer_injected": {"window": (2, 6), "n_taps": 3, "mlp": False},
    "all_layers": {"window": (0, 6), "n_taps": 4, "mlp": False, "shared": True},
    "two_layers_after_it": {"window": (1, 4), "n_taps": 2},
    "one_layer": {"window": (4, 5), "n_taps": 1},
    "projected_in": {"window": (1, 5), "n_taps": 2, "embedding": 20, "norm_before": False},
    "no_prompt": {"window": (2, 5), "n_taps": 2, "prompt": 0},
    "long_prompt_untied": {"window": (1, 5), "n_taps": 6, "prompt": 13, "mlp": False, "tied": False},
    "longer_rows": {"window": (1, 3), "n_taps": 2, "layers": 3, "n_rows": 4},
}
WIDTH, FFN, HEADS, WORDS, POSITIONS, VISION, DEPTH, PAD, END = 32, 48, 4, 64, 64, 24, 6, 1, 2


def made(
    *, window: tuple[int, int], n_taps: int, shared: bool = False, mlp: bool = True, prompt: int = 10, embedding: int = WIDTH, norm_before: bool = True,
    tied: bool = True, layers: int = 6, n_rows: int = 3,
) -> Case:  # fmt: skip
    """A case with random weights, its logits, losses, gradients and generated ids."""
    generator = torch.Generator().manual_seed(hash((window, n_taps, prompt, embedding)) % 1000)
    start, end = window
    step = (end - start) // n_taps if end - start > n_taps else 1
    spec = {
        "opt": {
            "vocab_size": WORDS, "hidden_size": WIDTH, "ffn_dim": FFN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS, "word_embed_proj_dim": embedding, "do_layer_norm_before": norm_before, "activation": "relu",
            "layer_norm_eps": 1e-5, "tied_lm_head": tied, "final_layer_norm": norm_before,
        },
        "vit": {"depth": DEPTH, "embed_dim": VISION},
        "tokens": {"pad": PAD, "bos_eos": END},
        "layer_to_prefix_index": {str(layer): min((layer - start) // step, n_taps - 1) for layer in range(start, end)},
        "cls_blocks_used": list(range(DEPTH - n_taps, DEPTH)),
        "prompt_len": prompt, "prompt_mlp": mlp, "shared_connector": shared, "lm_loss_weight": 0.1,
        "generation": {"max_length": 16, "length_penalty": 1.0},
    }  # fmt: skip
    tensors = _weights(spec, generator) | _inputs(n_rows, generator)
    return Case(spec, tensors | _outputs(spec, tensors))


def _weights(spec: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    def normal(*shape: int, mean: float = 0.0, scale: float = 0.25) -> Tensor:
        return mean + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes, decoder = spec["opt"], "opt.model.decoder"
    narrow = sizes["word_embed_proj_dim"]
    found = {f"{decoder}.embed_tokens.weight": normal(WORDS, narrow), f"{decoder}.embed_positions.weight": normal(POSITIONS + 2, WIDTH)}
    if narrow != WIDTH:
        found |= {f"{decoder}.project_in.weight": normal(WIDTH, narrow), f"{decoder}.project_out.weight": normal(narrow, WIDTH)}
    if not sizes["tied_lm_head"]:
        found["opt.lm_head.weight"] = normal(WORDS, narrow)
    norms = [f"{decoder}.final_layer_norm"] if sizes["final_layer_norm"] else []
    for layer in range(sizes["num_hidden_layers"]):
        at = f"{decoder}.layers.{layer}"
        shapes = {**{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}, "fc1": (FFN, WIDTH), "fc2": (WIDTH, FFN)}
        for name, shape in shapes.items():
            found |= {f"{at}.{name}.weight": normal(*shape), f"{at}.{name}.bias": normal(shape[0])}
        norms += [f"{at}.self_attn_layer_norm", f"{at}.final_layer_norm"]
    for name in norms:
        found |= {f"{name}.weight": normal(WIDTH, mean=1.0), f"{name}.bias": normal(WIDTH)}
    for tap in range(1 if spec["shared_connector"] else len(spec["cls_blocks_used"])):
        found |= {f"connector.{tap}.weight": normal(WIDTH, VISION), f"connector.{tap}.bias": normal(WIDTH)}
    if spec["prompt_len"]:
        found["prompt_module.prefix_embedding.0.weight"] = normal(spec["prompt_len"], narrow, scale=1.0)
        for number in (1, 3) if spec["prompt_mlp"] else ():
            found |= {f"prompt_module.prefix_embedding.{number}.weight": normal(narrow, narrow), f"prompt_module.prefix_embedding.{number}.bias": normal(narrow)}
    return found


def _inputs(n_rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.tensor([9, 6, 7, 4][:n_rows])
    ids = torch.randint(3, WORDS, (n_rows, 9), generator=generator)
    ids[:, 0] = END
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, PAD)
    prompt = mask[:, :4] * (torch.arange(4) < (lengths - 3)[:, None])
    return {
        "in.input_ids": ids, "in.attention_mask": mask, "in.labels": torch.where(mask.bool(), ids, -100),
        "mid.vit_cls_normed": torch.randn(DEPTH, n_rows, VISION, generator=generator, dtype=torch.float64),
        "gen.prompt_ids": torch.where(prompt.bool(), ids[:, :4], PAD), "gen.prompt_attention_mask": prompt,
    }  # fmt: skip


def _outputs(spec: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {name: value.clone().requires_grad_(name.startswith(("connector.", "prompt_module."))) for name, value in tensors.items() if value.is_floating_point()}
    logits = _logits(spec, weights, tensors["in.input_ids"], tensors["in.attention_mask"], tensors["mid.vit_cls_normed"])
    n_slots = logits.shape[1] - tensors["in.input_ids"].shape[1]
    losses = nn.functional.cross_entropy(logits[:, n_slots:-1].transpose(1, 2), tensors["in.labels"][:, 1:], ignore_index=-100, reduction="none").sum(1)
    total = losses.sum() / len(losses) * spec["lm_loss_weight"]
    total.backward()  # type: ignore[no-untyped-call]
    found = {"out.logits": logits.detach(), "out.loss_per_sample": losses.detach(), "out.loss_total": total.detach().reshape(1)}
    found |= {f"grad.{name}": value.grad for name, value in weights.items() if value.grad is not None}
    for beams, what in ((1, "greedy"), (3, "beam3")):
        found[f"gen.batch.{what}"] = _generated(spec, tensors, tensors["gen.prompt_ids"], tensors["gen.prompt_attention_mask"], None, beams)
        length = int(tensors["gen.prompt_attention_mask"][1].sum())
        alone = tensors["gen.prompt_ids"][1:2, :length]
        found[f"gen.single1.{what}"] = _generated(spec, tensors, alone, torch.ones_like(alone), 1, beams)
    return found


def _generated(spec: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor, mask: Tensor, row: int | None, beams: int) -> Tensor:
    cls = tensors["mid.vit_cls_normed"] if row is None else tensors["mid.vit_cls_normed"][:, row : row + 1]

    def step(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return _logits(spec, tensors, ids, mask, cls.repeat_interleave(len(ids) // cls.shape[1], 1))[:, -1]

    settings = spec["generation"]
    return search(step, ids, mask, beams=beams, max_length=settings["max_length"], end=END, pad=PAD, penalty=settings["length_penalty"])[0]


def _logits(spec: dict[str, Any], weights: dict[str, Tensor], ids: Tensor, mask: Tensor, cls: Tensor) -> Tensor:
    """[B, 1 + S + T, V]: row 0 is the percept's; padding on the right."""
    sizes, decoder = spec["opt"], "opt.model.decoder"
    table = weights[f"{decoder}.embed_tokens.weight"]
    soft = _soft_prompt(spec, weights, len(ids))
    h = torch.cat([soft, table[ids]], 1)
    if f"{decoder}.project_in.weight" in weights:
        h = h @ weights[f"{decoder}.project_in.weight"].T
    position = weights[f"{decoder}.embed_positions.weight"][mask.cumsum(1) * mask - 1 + 2]
    h = h + nn.functional.pad(position, (0, 0, soft.shape[1], 0))
    may_be_read = torch.cat([torch.ones(len(ids), soft.shape[1], dtype=torch.bool), mask.bool()], 1)
    visible = may_be_read[:, None, :] & torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
    injected = {int(layer): tap for layer, tap in spec["layer_to_prefix_index"].items()}
    for layer in range(sizes["num_hidden_layers"]):
        if layer in injected:
            connector = 0 if spec["shared_connector"] else injected[layer]
            tapped = cls[spec["cls_blocks_used"][injected[layer]]] @ weights[f"connector.{connector}.weight"].T + weights[f"connector.{connector}.bias"]
            if layer == min(injected):
                visible = nn.functional.pad(visible, (1, 0, 1, 0), value=True)
            h = torch.cat([tapped[:, None], h if layer == min(injected) else h[:, 1:]], 1)
        h = _layer(h, visible, weights, f"{decoder}.layers.{layer}", sizes["do_layer_norm_before"])
    if sizes["final_layer_norm"]:
        h = _norm(h, weights, f"{decoder}.final_layer_norm")
    if f"{decoder}.project_out.weight" in weights:
        h = h @ weights[f"{decoder}.project_out.weight"].T
    return h @ weights.get("opt.lm_head.weight", table).T


def _soft_prompt(spec: dict[str, Any], weights: dict[str, Tensor], n_rows: int) -> Tensor:
    name = "prompt_module.prefix_embedding"
    if not spec["prompt_len"]:
        return torch.zeros(n_rows, 0, spec["opt"]["word_embed_proj_dim"], dtype=torch.float64)
    soft = weights[f"{name}.0.weight"]
    if spec["prompt_mlp"]:
        inner = torch.tanh(soft @ weights[f"{name}.1.weight"].T + weights[f"{name}.1.bias"])
        soft = inner @ weights[f"{name}.3.weight"].T + weights[f"{name}.3.bias"]
    return soft.expand(n_rows, -1, -1)


def _layer(h: Tensor, visible: Tensor, weights: dict[str, Tensor], at: str, norm_before: bool) -> Tensor:
    """One decoder layer: attention, then two linears, each with its norm before or after."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{at}.{name}.weight"].T + weights[f"{at}.{name}.bias"]

    def attention(x: Tensor) -> Tensor:
        q, k, v = (linear(x, f"self_attn.{name}_proj").unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in "qkv")
        scores = (q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).masked_fill(~visible[:, None], float("-inf"))
        return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), "self_attn.out_proj")

    def feed_forward(x: Tensor) -> Tensor:
        return linear(linear(x, "fc1").relu(), "fc2")

    for block, norm in ((attention, "self_attn_layer_norm"), (feed_forward, "final_layer_norm")):
        h = h + block(_norm(h, weights, f"{at}.{norm}")) if norm_before else _norm(h + block(h), weights, f"{at}.{norm}")
    return h


def _norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

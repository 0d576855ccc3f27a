"""The two sides of a training step on one language model: adalink's, and the usual one row per text through HF peft.

Both train a linear visual prefix and the same method with the same weights, take AdamW, and give the loss of their step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adalink import Bridge, LoRA, Method, Prompt
from adalink.errors import ConfigError
from adalink.methods.lora import LowRank
from multimodal.batches.packing import Arrange, arrangement
from multimodal.encoders.tower import VisionTower
from multimodal.model import VisionLanguageModel
from tasks.bench.models import Machine, Shape, Work, as_batch, composed, encoded, language

__all__ = ["Step", "Taught", "arrange_of", "check_peft", "our_model", "our_step", "their_step"]

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
    """A step of the composed model on kept features: rows are arranged and collated in it, as the loader does."""
    rows, arrange = encoded(model, work), arrange_of(model)
    optimizer = _optimizer(model.adapted.active_adapter().parameters())

    def step() -> float:
        batch = as_batch(rows, features(), arrange).to(model.device)
        return _learn(model(batch), optimizer)

    return step


def arrange_of(model: VisionLanguageModel) -> Arrange:
    """How training arranges the rows of a picture."""
    return arrangement(model.language.model, model.adapted.active_adapter(), model.row_encoder().prompt("w4"))[0]


def their_step(
    ours: VisionLanguageModel, shape: Shape, machine: Machine, work: Work, features: Callable[[], Tensor], taught: Taught, rank: int = 8
) -> Step:
    """A step of a peft model with the weights of `ours`: one row per text, logits of every token.

    features: [rows, N, Dv], those of each row's picture.
    """
    base: Any = language(shape, machine).model
    embed, model = base.get_input_embeddings(), _peft(base, taught, rank)
    projection = nn.Linear(ours.tower.width, embed.embedding_dim, device=machine.device)
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
    optimizer = _optimizer([parameter for part in (model, projection) for parameter in part.parameters() if parameter.requires_grad])

    def step() -> float:
        embeds = torch.cat([projection(features().to(projection.weight.dtype)).to(embed.weight.dtype), embed(ids)], 1)
        return _learn(model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss, optimizer)

    return step


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
    for placement in adapter.placements:
        if isinstance(placement.edit, LowRank):
            layer = theirs.get_submodule(f"base_model.model.{ours.adapted.anatomy.stack}.{placement.port.module}")
            layer.lora_A["default"].weight.copy_(placement.edit.down.weight)
            layer.lora_B["default"].weight.copy_(placement.edit.up.weight)


def _optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in parameters if parameter.requires_grad], lr=1e-4)


def _learn(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())

"""What activation functions give is made again in the backward pass: the same gradients bit for bit, and less that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from sharing import adapted, batch_of, gradients, in_double, slots_of
from torch import Tensor, nn

from adalink import Bridge, LoRA, Method
from multimodal.batches.packing import fork_rows, pack_rows
from multimodal.loss.language_loss import LanguageLoss

# Families, and how many tensors as wide as the feed-forward network they keep for each layer: with everything kept, and with less.
KEPT = {"llama": (3, 2), "gemma3": (3, 2), "gpt2": (4, 1), "gptj": (4, 1), "opt": (1, 0)}
LEARNT: dict[str, Method] = {"bridge": Bridge(kind="linear"), "lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=2.0, targets=("query", "value"))}


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


def wide(loss: LanguageLoss, width: int) -> tuple[list[Tensor], int]:
    """Loss and gradients, and how many different tensors of this width were kept for the backward pass."""
    model, retained = loss.adapted, set()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(value: Tensor) -> Tensor:
        if value.is_floating_point() and value.shape[-1:] == (width,):
            retained.add(value.untyped_storage().data_ptr())
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        found = gradients(model, batch_of(pack_rows, slots_of(model)), loss)
    return found, len(retained - weights)


@pytest.mark.parametrize("family", KEPT)
def test_less_is_kept_and_the_gradients_are_the_same(family: str) -> None:
    model = adapted(family, LEARNT)
    everything, less = LanguageLoss(model), LanguageLoss(model)
    everything.activations.forwards.clear()
    width = {"gpt2": 128, "gptj": 128, "opt": 64}.get(family, 48)
    (wanted, before), (found, after) = wide(everything, width), wide(less, width)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    n_layers = 2
    assert (before, after) == tuple(n_layers * n for n in KEPT[family])
    assert not any("forward" in vars(module) for module in model.modules())


def test_forked_texts_keep_less_too() -> None:
    model = adapted("llama")
    everything = LanguageLoss(model)
    everything.activations.forwards.clear()
    batch = batch_of(fork_rows, slots_of(model))
    for one, other in zip(gradients(model, batch), gradients(model, batch, everything), strict=True):
        assert torch.equal(one, other)


class Swapped(nn.Module):
    """The names of Llama's feed-forward network, and another use of them."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        for name, child in like.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))  # type: ignore[no-any-return, operator]


def test_a_network_that_only_has_the_names_is_left_as_it_is() -> None:
    model = adapted("llama", LEARNT)
    for layer in model.base.model.layers:
        layer.mlp = Swapped(layer.mlp)
    loss = LanguageLoss(model)
    assert not loss.activations.forwards
    whole = LanguageLoss(model)
    whole.call = partial(model.base)
    batch = batch_of(pack_rows)
    for one, other in zip(gradients(model, batch, loss), gradients(model, batch, whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_checkpointed_layers_are_left_as_they_are() -> None:
    model = adapted("opt", LEARNT)
    loss = LanguageLoss(model)
    wanted = gradients(model, batch_of(pack_rows), loss)
    model.attachment.checkpoint_layers()
    for one, other in zip(gradients(model, batch_of(pack_rows), loss), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    for family in ("gpt2",):
        model = adapted(family, LEARNT)
        model.attachment.checkpoint_layers()
        with LanguageLoss(model).activations.made_again():
            assert sum("forward" in vars(module) for module in model.modules()) == 2  # the layers

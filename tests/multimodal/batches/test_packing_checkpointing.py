"""Activations that are made again in the backward pass: the same loss and gradients, however the texts share their image."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sharing import adapted, batch_of, gradients, slots_of

from adalink import AdaLink, Bridge
from multimodal.batches.packing import fork_rows, pack_rows, separate_rows
from multimodal.batches.prefix_sharing import trained_domains
from multimodal.loss.language_loss import LanguageLoss

EXACT = {"opt": 1e-10, "gpt2": 1e-10, "llama": 1e-5, "gemma3": 1e-4, "mpt": 1e-5}  # where norms or softmax are made in float32


@pytest.mark.parametrize("name", EXACT)
def test_checkpointing_changes_nothing_in_any_of_the_three(name: str) -> None:
    model = adapted(name)
    ways = (separate_rows, fork_rows) if name == "mpt" else (separate_rows, pack_rows, fork_rows)
    loss = LanguageLoss(model)
    wanted = gradients(model, batch_of(separate_rows, slots_of(model)), loss)  # the first call tries the model out
    model.attachment.checkpoint_layers()
    made: list[int] = []
    layer = model.attachment.stack.get_submodule(model.anatomy.layers[0])
    linear = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    linear.register_forward_pre_hook(lambda module, args: made.append(1))
    for arrange in ways:
        made.clear()
        found = gradients(model, batch_of(arrange, slots_of(model)), loss)
        assert len(made) == (4 if arrange is fork_rows else 2)  # the control: the layer of each call ran again
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=EXACT[name], atol=EXACT[name])


def test_checkpointing_after_a_beginning_without_gradient() -> None:
    for name in ("opt", "gpt2"):
        model = adapted(name, {"bridge": Bridge(kind="mlp"), "adalink": AdaLink(rank=4, modalities=("text",))})
        model.active_adapter().get_submodule("bridge").requires_grad_(False)
        wanted = gradients(model, batch_of(separate_rows))
        model.attachment.checkpoint_layers()
        found = gradients(model, batch_of(partial(pack_rows, trained=trained_domains(model.active_adapter()))))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

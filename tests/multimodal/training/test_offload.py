"""Activations that wait on the host: the same gradients, and the weights stay where they are."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from composed import Drawn, two_texts
from test_compiled import batch_of, gradients, model_of

from adalink.errors import ConfigError
from multimodal.training.prepare import offloaded
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_bit_for_bit(family: str, checkpointing: bool) -> None:
    model = model_of(family)
    batch = batch_of(model, 3, packed=True)
    if checkpointing:
        model.adapted.attachment.checkpoint_layers()
    wanted = gradients(model, batch)
    with mock.patch.object(torch, "empty_like", wraps=torch.empty_like) as moved, offloaded(model, 0):
        found = gradients(model, batch)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    copied = [call.args[0] for call in moved.call_args_list if call.kwargs.get("device") == "cpu"]
    assert copied
    weights = {one.data_ptr() for one in model.parameters()}
    assert not [one for one in copied if one.data_ptr() in weights]


def test_a_view_with_gaps_or_repetitions_stays() -> None:
    whole = torch.randn(4, 6, requires_grad=True)
    with mock.patch.object(torch, "empty_like", wraps=torch.empty_like) as moved, offloaded(torch.nn.Identity(), 0):
        (whole[:, :4] * whole[:1].expand(4, -1)[:, :4]).sum()
    assert not moved.call_count


def test_what_spares_no_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.offload is activations, which spares the memory of a GPU, and this model trains on a CPU: leave it out"):
        train(model_of("opt"), Drawn(4), two_texts, TrainSettings(steps=1, batch_size=2, offload="activations"), tmp_path)


def test_flex_attention_learns_on_no_cpu(tmp_path: Path) -> None:
    model = model_of("opt")
    model.language.model.set_attn_implementation("flex_attention")
    with pytest.raises(ConfigError, match="base: attention is flex_attention, which has no backward pass on a CPU: give sdpa, or leave it out"):
        train(model, Drawn(4), two_texts, TrainSettings(steps=1, batch_size=2), tmp_path)

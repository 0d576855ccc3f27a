"""Calls that run, and are wrong, and say nothing: what packing must not do, each beside what it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sharing import adapted, batch_of, gradients, in_double, slots_of
from tiny_families import tiny_of
from torch import Tensor

from adalink import AdaptedModel, Prompt
from multimodal.batches import collate as packed_mask
from multimodal.batches.collate import Batch
from multimodal.batches.packing import pack_rows, separate_rows

WRONG = 1e-3  # of a gradient; what is right differs by 1e-10


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


def error(model: AdaptedModel, **changed: Any) -> float:
    """The largest difference of a gradient between packed rows, with arguments of the frozen model changed, and separate ones."""
    wanted = gradients(model, batch_of(separate_rows, slots_of(model)))

    def change(module: object, args: object, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **{name: make(kwargs[name]) for name, make in changed.items() if kwargs["input_ids"].shape[1] > 2}}

    handle = model.base.register_forward_pre_hook(change, with_kwargs=True)
    found = gradients(model, batch_of(pack_rows, slots_of(model)))
    handle.remove()
    return max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))


def packed(model: AdaptedModel) -> Batch:
    return batch_of(pack_rows, slots_of(model))


@pytest.mark.parametrize(("attention", "is_wrong"), [("eager", True), ("sdpa", False)])
def test_a_boolean_mask_is_wrong_under_eager_attention(attention: str, is_wrong: bool) -> None:
    model = adapted("llama", attention=attention)
    assert (error(model, attention_mask=lambda mask: mask == 0) > WRONG) == is_wrong
    assert error(model, attention_mask=lambda mask: mask) < 1e-10  # ours is additive


def test_positions_without_a_mask_are_taken_for_documents() -> None:
    assert error(adapted("llama"), attention_mask=lambda mask: None) > WRONG


@pytest.mark.parametrize("name", ["mistral_window", "phi3_window"])
def test_a_window_is_not_added_to_a_mask_that_is_given(name: str) -> None:
    model = adapted(name)
    batch = packed(model)
    assert batch.segment is not None
    assert error(model, attention_mask=lambda mask: batch.attention(torch.float64)) > WRONG
    assert error(model) < 1e-10


@pytest.mark.parametrize("name", ["mistral_window", "gemma3", "qwen2_window"])
def test_a_window_is_one_of_positions_and_not_of_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name)
    assert error(model) < 1e-10
    right = packed_mask.additive

    def in_columns(segment: Tensor, *args: Any, position: Tensor, **kwargs: Any) -> Tensor:
        return right(segment, *args, position=torch.arange(segment.shape[1]).expand_as(segment), **kwargs)

    monkeypatch.setattr(packed_mask, "additive", in_columns)
    assert error(model) > WRONG


@pytest.mark.parametrize("name", ["gemma3", "qwen2_window"])
def test_one_mask_for_layers_of_two_kinds_is_wrong(name: str) -> None:
    model = adapted(name)
    for kind in ("full_attention", "sliding_attention"):
        assert error(model, attention_mask=lambda masks, kind=kind: masks[kind]) > WRONG
    assert error(model) < 1e-10


def test_positions_that_do_not_restart_are_wrong() -> None:
    for name in ("llama", "opt"):
        model = adapted(name)
        assert error(model, position_ids=lambda position: torch.arange(position.shape[1]).expand_as(position)) > WRONG


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_prompt_tuning_of_peft_drops_positions_and_ours_reads_them() -> None:
    """Why packed rows cannot be had around it: positions that restart never reach the model."""
    peft = pytest.importorskip("peft")
    base = tiny_of("llama")
    tuned = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    ids, usual = torch.arange(5, 13)[None], torch.arange(8)[None]
    restarted = torch.tensor([[0, 1, 2, 3, 4, 2, 3, 4]])
    note = [tuned(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=position).logits for position in (usual, restarted)]
    assert torch.equal(*note)
    model = adapted("llama", {"prompt": Prompt(length=2, init_std=0.5)})
    assert error(model, position_ids=lambda position: torch.arange(position.shape[1]).expand_as(position)) > WRONG

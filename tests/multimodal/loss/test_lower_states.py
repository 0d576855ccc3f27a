"""What is below an adapter's lowest edit is run once for each text: same loss, same gradients, the same bits whenever a text is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shared import every_other
from sharing import PACKED, adapted, batch_of, check_equal, excite, gradients, in_double, slots_of
from tiny import INPUTS, tiny
from tiny_families import HARD, SETTINGS
from torch import Tensor
from transformers import AlbertConfig, AlbertForMaskedLM

from adalink import EPALM, AdaptedModel, LoRA, TokenMap
from adalink.errors import ConfigError
from multimodal.batches.packing import pack_rows, separate_rows
from multimodal.loss.hidden_states import LayersBelow, LowerStates
from multimodal.loss.language_loss import LanguageLoss
from multimodal.training.prepare import starts_exactly

N_LAYERS, FIRST, LENGTHY = 4, 2, [(2, [4, 6, 30]), (2, [5])]
DEEP = {"epalm": EPALM(layers=(FIRST, N_LAYERS), n_taps=2, connector="per_tap")}


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


def deep(family: str = "opt") -> AdaptedModel:
    model = AdaptedModel(tiny(family, n_layers=N_LAYERS), inputs=INPUTS)
    excite(model.add_adapter("a", DEEP).double())
    return model


def keeping(model: AdaptedModel, *, first: int = FIRST, most: int = 2**30, n_images: int = 0) -> LanguageLoss:
    loss = LanguageLoss(model)
    loss.lower = LowerStates(LayersBelow(model, first), int(model.rows(1)), most=most, n_images=n_images)
    return loss


def runs_of(model: AdaptedModel) -> Counter[int]:
    """Counts, from here on, how often each layer's queries are made."""
    runs: Counter[int] = Counter()
    for number, part in enumerate(model.anatomy.projections):
        def count(*_: object, number: int = number) -> None:
            runs[number] += 1

        model.attachment.stack.get_submodule(part.query.linear).register_forward_pre_hook(count)
    return runs


def methods_of(name: str) -> dict[str, Any]:
    if name == "mamba":
        return {"lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=2, targets=("in_proj",), exclude_layers=(0,))}
    if name in ("gptj", "xglm", "falcon_alibi", "bloom", "mpt"):  # no slot can be kept out of their positions, or they have none
        return {"lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=2, targets=("all",), exclude_layers=(0,))}
    return {"epalm": EPALM(layers=(1, 2), n_taps=1, connector="per_tap")}


@pytest.mark.parametrize("name", every_other(SETTINGS, shift=1, hard=HARD))
def test_every_family_learns_from_kept_states_what_it_learns_from_all_its_layers(name: str) -> None:
    model = adapted(name, methods_of(name))
    assert starts_exactly(LayersBelow(model, 1))
    loss = keeping(model, first=1)
    ways = [(separate_rows, 0)] + ([(pack_rows, 0), (pack_rows, 40)] if name in PACKED else [])
    for arrange, row_tokens in ways:
        batch = batch_of(arrange, slots_of(model), row_tokens=row_tokens)
        whole = gradients(model, batch)
        for _ in range(2):  # read, and then kept
            check_equal(gradients(model, batch, loss), whole)
    assert loss.lower is not None
    assert len(loss.lower) == 6  # the same six texts, in whatever rows they came


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_layers_below_are_not_run_for_texts_that_were_read(family: str) -> None:
    model = deep(family)
    loss = keeping(model)
    batch = batch_of(separate_rows, slots_of(model))
    whole = gradients(model, batch)
    runs = runs_of(model)
    first = gradients(model, batch, loss)
    assert runs[0]
    runs.clear()
    again = gradients(model, batch, loss)
    assert set(runs) == {2, 3}
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    check_equal(again, whole)


@pytest.mark.parametrize("lengths", [[(2, [4, 6, 1])], LENGTHY])
def test_a_text_has_the_same_bits_in_every_batch_and_row(lengths: Any) -> None:
    model = deep()
    lower = keeping(model).lower
    assert lower is not None
    found: dict[bytes, Tensor] = {}
    for texts in (lengths, lengths[:1], [*lengths[::-1], (2, [9, 9, 9])]):
        for arrange in (separate_rows, pack_rows):
            batch = batch_of(arrange, slots_of(model), texts)
            fresh = LowerStates(lower.below, lower.row, most=2**30)
            fresh.of(batch, TokenMap(batch.domain, model.rows(len(batch.ids))))
            for key, state in fresh._retained.items():
                assert torch.equal(found.setdefault(key, state), state)


def test_groups_of_texts_give_what_each_gives_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    batch = batch_of(separate_rows, slots_of(model), LENGTHY)
    alone = gradients(model, batch, keeping(model))
    monkeypatch.setattr("multimodal.loss.hidden_states.AT_ONCE", {"cpu": 3})
    check_equal(gradients(model, batch, keeping(model)), alone)


def test_what_does_not_fit_is_run_again_with_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    model = deep()
    batch = batch_of(pack_rows, slots_of(model))
    all_kept, some = keeping(model), keeping(model, most=8_000)
    wanted = gradients(model, batch, all_kept)
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(gradients(model, batch, some), wanted, strict=True))
    assert some.lower is not None
    assert all_kept.lower is not None
    assert 0 < len(some.lower) < len(all_kept.lower)
    assert some.lower.n_bytes <= 8_000
    assert some.lower.is_full
    assert not all_kept.lower.is_full
    assert capsys.readouterr().err == f"train.states_gib is full with the states of {len(some.lower)} texts: others are run at each reading\n"


def test_checkpointed_layers_learn_the_same_and_are_left_as_they_were() -> None:
    model = deep()
    batch = batch_of(pack_rows, slots_of(model))
    wanted = gradients(model, batch, keeping(model))
    model.attachment.checkpoint_layers()
    layers = [model.attachment.stack.get_submodule(name) for name in model.anatomy.layers]
    before = [(layer.forward, len(layer._forward_pre_hooks), len(layer._forward_hooks)) for layer in layers]
    loss = keeping(model)
    for _ in range(2):
        check_equal(gradients(model, batch, loss), wanted)
    assert before == [(layer.forward, len(layer._forward_pre_hooks), len(layer._forward_hooks)) for layer in layers]


def test_nothing_is_left_at_the_layers() -> None:
    model = deep()
    layers = [model.attachment.stack.get_submodule(name) for name in model.anatomy.layers]
    before = [(len(layer._forward_pre_hooks), len(layer._forward_hooks)) for layer in layers]
    gradients(model, batch_of(pack_rows, slots_of(model)), keeping(model))
    assert before == [(len(layer._forward_pre_hooks), len(layer._forward_hooks)) for layer in layers]
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_batch_of_another_adapter_is_refused() -> None:
    model = deep()
    loss, batch = keeping(model), batch_of(separate_rows, slots_of(model))
    gradients(model, batch, loss)
    model.add_adapter("b", DEEP).double()
    with pytest.raises(ConfigError, match="cached for the adapter that was active, and the batch is served by another: cache them for each adapter"):
        gradients(model, batch, loss)


def test_the_first_batch_tells_what_all_texts_need() -> None:
    model = deep()
    batch = batch_of(pack_rows, slots_of(model))
    gradients(model, batch, keeping(model, n_images=30))
    with pytest.raises(ConfigError, match=r"the states of the texts take about 0.\d+ GiB in each process, estimated from the first batch, and train.states_gib is"):
        gradients(model, batch, keeping(model, most=100_000, n_images=3_000))


def test_a_model_is_tried_first_and_one_whose_layers_hand_on_more_or_run_twice_is_not_started() -> None:
    assert not starts_exactly(LayersBelow(AdaptedModel(tiny("t5", n_layers=3), inputs=INPUTS), 1))
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 4}
    albert = AlbertForMaskedLM(AlbertConfig(**sizes, num_hidden_layers=4, num_hidden_groups=2)).eval().requires_grad_(False)
    assert not starts_exactly(LayersBelow(AdaptedModel(albert), 1))
    once = AlbertForMaskedLM(AlbertConfig(**sizes, num_hidden_layers=2, num_hidden_groups=2)).eval().requires_grad_(False)
    assert starts_exactly(LayersBelow(AdaptedModel(once), 1))  # the control: each layer runs once

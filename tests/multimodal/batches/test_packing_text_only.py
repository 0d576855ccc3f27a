"""Where nothing trained reads or writes what comes first, it is read without gradient, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from sharing import N_PATCHES, adapted, batch_of, check_equal, gradients, in_double, rows

from adalink import ANSWER, TEXT, AdaLink, AdaptedModel, Bottleneck, Bridge, Gated, LoRA, Method, Prompt, TokenMap
from multimodal.batches.packing import arrangement, fork_rows, pack_rows, separate_rows
from multimodal.batches.prefix_sharing import calls_of, trained_domains
from multimodal.batches.tokenize import Row
from multimodal.loss.language_loss import LanguageLoss

TEXT_ONLY: dict[str, Method] = {"adalink": AdaLink(rank=4, modalities=("text",)), "lora": LoRA(groups={"text": ("text",)}, rank=2, alpha=2.0)}
BRIDGED: dict[str, Method] = {"bridge": Bridge(kind="mlp"), **TEXT_ONLY}


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


def frozen_bridge(name: str) -> AdaptedModel:
    model = adapted(name, BRIDGED)
    model.active_adapter().get_submodule("bridge").requires_grad_(False)
    return model


def graph_of_beginnings(model: AdaptedModel, batch: object) -> list[bool]:
    """For each run of the first layer, whether it made a graph."""
    made: list[bool] = []
    loss = LanguageLoss(model)
    gradients(model, batch, loss)  # type: ignore[arg-type]  # the first call tries the model out
    layer = model.attachment.stack.get_submodule(model.anatomy.layers[0])
    handle = layer.register_forward_pre_hook(lambda module, args: made.append(torch.is_grad_enabled()))
    gradients(model, batch, loss)  # type: ignore[arg-type]
    handle.remove()
    return made


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "gemma3", "mistral_window", "mpt", "bloom", "gpt_neo_local"])
def test_the_picture_is_read_without_gradient_and_the_rest_is_equal(name: str) -> None:
    model = frozen_bridge(name)
    prompt = rows((), 2, [4], 0)[0]
    first = Row(prompt.ids[: N_PATCHES + 2], prompt.domain[: N_PATCHES + 2])
    arrange, note = arrangement(model.base, model.active_adapter(), first)
    packs = name not in ("mpt", "bloom", "gpt_neo_local")
    how = "the texts of an image packed" if packs else "each text"
    assert note == f"nothing trained reads or writes the first 3 of a prompt's 5 tokens: read without gradient, and {how} after them"
    batch = batch_of(arrange)
    assert (batch.segment is not None) == packs
    assert batch.shared_prefix is not None
    assert batch.shared_prefix.length == N_PATCHES
    assert graph_of_beginnings(model, batch) == [False, True]
    check_equal(gradients(model, batch), gradients(model, batch_of(separate_rows)))


def pack_text_only(model: AdaptedModel) -> Callable[[Sequence[Row]], Sequence[Row]]:
    return partial(pack_rows, trained=trained_domains(model.active_adapter()))


def test_what_is_trained_after_all_gets_its_gradient() -> None:
    """The batch says where it can be cut; whether a gradient is needed there is asked at every step."""
    model = frozen_bridge("llama")
    batch = batch_of(pack_text_only(model))
    assert graph_of_beginnings(model, batch) == [False, True]
    model.active_adapter().get_submodule("bridge").requires_grad_(True)
    assert graph_of_beginnings(model, batch) == [True]  # packed rows, in one call
    check_equal(gradients(model, batch), gradients(model, batch_of(separate_rows)))
    model = frozen_bridge("llama")
    model.base.get_input_embeddings().weight.requires_grad_(True)  # type: ignore[operator]
    assert graph_of_beginnings(model, batch) == [True]


def test_features_that_are_trained_need_the_gradient_too() -> None:
    model = frozen_bridge("llama")
    batch = batch_of(pack_text_only(model))
    assert batch.patches is not None
    retained = batch.patches[batch.image][:, :N_PATCHES]
    counts = []
    for features in (retained, retained.clone().requires_grad_(True)):
        token_map = TokenMap(batch.domain, model.rows(len(batch.ids)), {"image": features})
        counts.append(len(calls_of(model, batch, token_map)))
    assert counts == [2, 1]


@pytest.mark.parametrize(
    ("methods", "domains"),
    [
        (TEXT_ONLY, {TEXT, ANSWER}),
        ({"adalink": AdaLink(rank=2, modalities=("text",), scope="prompt")}, {TEXT}),
        ({"lora": LoRA(groups={"answer": ("answer",)}, rank=2, alpha=2.0)}, {ANSWER}),
        ({"gated": Gated(inner=LoRA(groups={"answer": ("answer",)}, rank=2, alpha=2.0))}, {ANSWER}),
        ({"prompt": Prompt(length=2, init_std=0.5)}, {3}),
    ],
)
def test_trained_domains_are_those_of_placements_with_weights(methods: dict[str, Method], domains: set[int]) -> None:
    model = adapted("llama", methods)
    assert trained_domains(model.active_adapter()) == domains
    model.active_adapter().requires_grad_(False)
    assert trained_domains(model.active_adapter()) == set()


def test_adapters_that_edit_what_comes_first_are_packed_whole() -> None:
    prompt = Row((0, 0, 0, 0, 7), (3, 3, 2, 2, 0))
    for methods in ({"prompt": Prompt(length=2, init_std=0.5), **TEXT_ONLY}, {"bottleneck": Bottleneck(width=4)}):
        model = adapted("llama", methods)
        assert arrangement(model.base, model.active_adapter(), prompt)[0] is pack_rows
    mostly_trained = Row((0, 7, 8), (2, 0, 0))
    model = adapted("llama", TEXT_ONLY)
    assert arrangement(model.base, model.active_adapter(), mostly_trained)[0] is pack_rows
    model = adapted("mpt", TEXT_ONLY)
    assert arrangement(model.base, model.active_adapter(), mostly_trained)[0] is fork_rows


def test_only_answers_trained_cut_a_row_where_its_question_ends() -> None:
    a = Row((0, 7, 8, 9, 5), (2, 0, 0, 1, 1), (2, 3, 4), (9, 5, 4))
    b = Row((0, 7, 6, 9), (2, 0, 0, 1), (2, 3), (9, 4))
    answers = frozenset({ANSWER})
    assert [row.shared_prefix for row in fork_rows([a, b], answers)] == [2, 2]  # what both begin with
    (packed,) = pack_rows([a, b], answers)
    assert packed.shared_prefix == 2
    assert [row.shared_prefix for row in pack_rows([a], answers)] == [3]

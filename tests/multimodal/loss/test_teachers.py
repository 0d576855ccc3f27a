"""An adapter that follows two others: loss and gradients against the reference computation, and against three models run apart however texts are arranged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from existing_checks import Case, case, check_same, families
from safetensors.torch import load_file
from shared import fixtures_root
from sharing import FORKED, N_PATCHES, PACKED, adapted, batch_of, check_equal, excite, gradients, in_double, slots_of
from torch import Tensor

from adalink import AdaLink, AdaptedModel, Bridge, LoRA, Prompt, TokenMap
from adalink.attachment.existing import NO_LABEL
from multimodal.batches.collate import Batch
from multimodal.batches.packing import fork_rows, pack_rows, separate_rows
from multimodal.batches.prefix_sharing import calls_of
from multimodal.loss.language_loss import LanguageLoss
from multimodal.loss.teachers import Followed, aligned_loss

EXACT = 1e-10
FILES = sorted((fixtures_root() / "muscle").glob("*.safetensors"))
VARIANTS = [(mask, kl) for mask in ("new", "student") for kl in ("teacher_student", "student_teacher")]
OTHERS = {"old": 16, "new": 3}  # ranks of the teachers
ARRANGED = {"apart": (separate_rows, 0), "forked": (fork_rows, 0), "packed": (pack_rows, 0), "joined": (pack_rows, 60)}
WAYS = [
    pytest.param(family, way, marks=() if (family, way) in (("gpt2", "forked"), ("llama", "packed"), ("llama", "joined")) else pytest.mark.slow)
    for family in FORKED for way in ARRANGED if way in ("apart", "forked") or family in PACKED
]  # fmt: skip
FOLLOWED = Followed(names=("old", "new"), digests=("", ""))


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


@pytest.mark.skipif(not FILES, reason="development data does not travel with the repository")
@pytest.mark.parametrize(("mask", "kl"), VARIANTS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loss_and_gradient_of_the_reference_computation(path: Path, mask: Any, kl: Any) -> None:
    given = load_file(path)
    target = torch.where(given["in.is_label"].bool(), given["in.labels"], NO_LABEL)
    student = given["in.student"].clone().requires_grad_()
    loss = aligned_loss(student, given["in.old"], given["in.new"], target, mask=mask, kl=kl) / (target != NO_LABEL).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert float((loss.detach() - given[f"loss.{mask}.{kl}"]).abs().max()) < EXACT
    assert float((gradient - given[f"grad.{mask}.{kl}"]).abs().max()) < EXACT
    decides = given["in.new"] if mask == "new" else given["in.student"]
    counts = given["in.is_label"].bool()
    assert torch.equal((decides.argmax(-1) != target)[counts], given[f"mask.{mask}"].bool()[counts])
    assert json.loads(path.with_suffix(".json").read_text())["flips"]  # what tests/tasks/evaluation/test_flip_rates.py reads
    other = aligned_loss(student, given["in.new"], given["in.old"], target, mask=mask, kl=kl) / (target != NO_LABEL).sum()
    assert float((other - loss).detach().abs()) > 1e-3  # control: the teachers in the other order


def test_a_student_that_is_the_new_teacher_learns_nothing_where_that_is_right() -> None:
    torch.manual_seed(0)
    new, old = torch.randn(5, 7), torch.randn(5, 7)
    student = new.clone().requires_grad_()
    right = new.argmax(-1)
    loss = aligned_loss(student, old, new, right)
    assert (float(loss), float(torch.autograd.grad(loss, student)[0].abs().max())) == (pytest.approx(0, abs=1e-15), pytest.approx(0, abs=1e-15))
    assert float(aligned_loss(student, old, new, (right + 1) % 7)) > 0.1  # control: where it is wrong, the old one is followed
    for target in (right, (right + 1) % 7):  # old = new: the mask does nothing
        student = torch.randn(5, 7, requires_grad=True)
        assert torch.equal(aligned_loss(student, new, new, target), aligned_loss(student, new, new, right))
    plain = torch.nn.functional.cross_entropy(student, right, reduction="sum")
    both = aligned_loss(student, old, new, right, labels=0.5)
    assert float(both - aligned_loss(student, old, new, right) - 0.5 * plain) == pytest.approx(0, abs=1e-12)


def three(family: str) -> AdaptedModel:
    """A tiny model with a student and two teachers: other ranks and other kinds of edits on one frozen model, and positions alike."""
    prompts = {"bridge": Bridge(kind="mlp"), "prompt": Prompt(length=2, init_std=0.5)}
    kinds = {"image": ("image",), "text": ("text",)}
    model = adapted(family, {**prompts, "adalink": AdaLink(rank=4, modalities=("image", "text"))})
    for name, rank in OTHERS.items():
        more: Any = AdaLink(rank=rank, modalities=("image", "text")) if name == "old" else LoRA(groups=kinds, rank=rank, alpha=2.0)
        excite(model.add_adapter(name, {**prompts, "more": more}).double())
    model.set_adapter("a")
    return model


def maps(model: AdaptedModel, batch: Batch, name: str) -> TokenMap:
    """What the batch's tokens are where one adapter serves all rows."""
    assert batch.patches is not None
    features = batch.patches[batch.image] if batch.token_image is None else batch.patches
    inputs = {"image": features[:, :N_PATCHES], "image_taps": features[:, N_PATCHES:]}
    serving = model.serving(len(batch.ids), [name] * len(batch.ids))
    return TokenMap(batch.domain, serving.row, inputs, entry=batch.token_image, serving=serving.serving, indices=serving.indices)


def logits(model: AdaptedModel, batch: Batch, name: str, token_map: TokenMap | None = None) -> Tensor:
    """float [B, M, V]: the model's own, of whole rows that one adapter serves."""
    (call,) = calls_of(model, replace(batch, shared_prefix=None), token_map or maps(model, batch, name))
    with call.bound(model):
        found: Tensor = torch.take_along_dim(model.base(**call.arguments).logits, batch.source[..., None], 1)
    return found


def apart(model: AdaptedModel, batch: Batch) -> list[Tensor]:
    """Loss and gradients of three models run apart."""
    with torch.no_grad():
        old, new = (logits(model, batch, name) for name in OTHERS)
    loss = aligned_loss(logits(model, batch, "a"), old, new, batch.target)
    return [loss.detach(), *torch.autograd.grad(loss, [one for one in model.active_adapter().parameters() if one.requires_grad])]


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_however_texts_are_arranged_it_is_what_three_models_apart_give(family: str, way: str) -> None:
    model = three(family)
    arrange, row_tokens = ARRANGED[way]
    loss = LanguageLoss(model)
    loss.followed = FOLLOWED
    wanted = apart(model, batch_of(separate_rows, slots_of(model)))
    check_equal(gradients(model, batch_of(arrange, slots_of(model), row_tokens=row_tokens), loss), wanted)


def test_the_teachers_of_a_student_on_texts_alone_read_prefixes_without_gradient() -> None:
    model = three("opt")
    excite(model.add_adapter("text", {"adalink": AdaLink(rank=4, modalities=("text",)), "bridge": Bridge(kind="mlp"), "prompt": Prompt(length=2)}).double())
    for module in model.adapters["text"].placements:  # nothing that comes before the texts is trained
        if 1 not in module.domains and 0 not in module.domains:
            module.edit.requires_grad_(False)
    batch = batch_of(lambda rows: fork_rows(rows, trained=frozenset({0})), slots_of(model))
    assert batch.shared_prefix is not None
    loss = LanguageLoss(model)
    loss.followed = FOLLOWED
    with torch.no_grad():
        old, new = (logits(model, batch, name) for name in OTHERS)
    wanted = aligned_loss(logits(model, batch, "text"), old, new, batch.target)
    assert float((loss(batch, maps(model, batch, "text")) - wanted).detach().abs()) < EXACT


def test_three_adapters_in_one_batch_write_what_three_models_write_bit_for_bit() -> None:
    model = three("llama")
    batch = batch_of(separate_rows, slots_of(model))
    loss = LanguageLoss(model)
    loss.followed = FOLLOWED
    rows, token_map = FOLLOWED.rows(model, batch, maps(model, batch, "a"))
    (call,) = calls_of(model, replace(rows, shared_prefix=None), token_map)
    with torch.no_grad(), call.bound(model):
        together = torch.take_along_dim(model.base(**call.arguments).logits, rows.source[..., None], 1)
    for name, found in zip(OTHERS, together.chunk(2), strict=True):
        with torch.no_grad():
            alone = logits(model, batch, name)
        assert torch.equal(found, alone), float((found - alone).abs().max())
    assert not torch.equal(together[: len(batch.ids)], together[len(batch.ids) :])  # control: the teachers differ


@pytest.mark.parametrize("name", families(("qwen2_vl",)))
def test_a_model_that_sees_already_has_teachers_too(name: str) -> None:
    one: Case = case(name)
    one.vlm.set_adapter("image")
    prepared, rows = one.rows()
    one.vlm.language_loss.followed = Followed(names=("text", "image"), digests=("", ""), labels=1.0)
    try:
        batch, found = one.gradients(prepared, rows)
    finally:
        one.vlm.language_loss.followed = None
    model = one.vlm.adapted

    def words(adapter: str) -> Tensor:
        return logits(model, batch, adapter, one.vlm.token_map(batch, [adapter] * len(batch.ids)))

    with torch.no_grad():
        old, new = words("text"), words("image")
    loss = aligned_loss(words("image"), old, new, batch.target, labels=1.0) / batch.n_targets
    check_same(found, [loss.detach(), *torch.autograd.grad(loss, list(model.active_adapter().parameters()))])

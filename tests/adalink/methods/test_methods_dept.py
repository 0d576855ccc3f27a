"""DePT: what the released code computes, places that padding does not move, its budget, and what it learns that a prompt cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from double import InDouble
from fixture_file import FixtureFile
from hosts import host
from shared import fixtures
from tiny import EXACT, run, tiny
from torch import Tensor, nn

from adalink import IMAGE, PAD, PROMPT, TEXT, Adapter, Anatomy, DePT, Prompt, TokenMap, attach
from adalink.errors import ConfigError

FILES = sorted(fixtures("dept").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_equals_the_released_code(path: Path) -> None:
    case = FixtureFile.read(path)
    spec = case.spec
    with InDouble():
        model: Any = host({"model_type": spec["family"], **spec["config"]}, case.under("w."))
        method = DePT(length=spec["prompt_length"], rank=spec["rank"], max_length=spec["max_length"], alpha=spec["alpha"])
        adapter = Adapter({"dept": method}, Anatomy.read(model)).double()
        parts: Any = {"prompt": adapter.get_parameter("dept.soft.table"), "A": adapter.get_parameter("dept.text.down"), "B": adapter.get_parameter("dept.text.up")}
        with torch.no_grad():
            for name, parameter in parts.items():
                parameter.copy_(case.tensors[name])
        attachment = attach(model, adapter)
        words, seen, labels = (case.tensors[f"in.{name}"] for name in ("input_ids", "attention_mask", "labels"))
        ids, mask = (torch.cat([value.new_ones(len(words), method.length), value], 1) for value in (words, seen))
        domain = torch.cat([torch.full((len(words), method.length), PROMPT), torch.full_like(words, TEXT)], 1)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        with attachment.bind(TokenMap(domain, torch.zeros(len(words), dtype=torch.int64))):
            if spec["family"] == "t5":
                output = model(**given, labels=labels)
                logits, loss = output.logits, output.loss
                if "gen.greedy" in case.tensors:
                    written = model.generate(**given, do_sample=False, max_new_tokens=6, min_new_tokens=6)
                    assert torch.equal(written[:, : case.tensors["gen.greedy"].shape[1]], case.tensors["gen.greedy"])
            else:
                logits = model(**given).logits
                loss = nn.functional.cross_entropy(logits[:, method.length : -1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
    real = torch.ones_like(labels, dtype=torch.bool) if spec["family"] == "t5" else mask.bool()
    close(logits[real], case.tensors["out.logits"][real])
    close(loss, case.tensors["out.loss"])
    for name, parameter in parts.items():
        close(parameter.grad, case.tensors[f"grad.{name}"])
    with torch.no_grad(), InDouble(), attachment.bind(TokenMap(domain, torch.zeros(len(words), dtype=torch.int64))):
        parts["B"].zero_()
        extra = {"labels": labels} if spec["family"] == "t5" else {}
        close(model(**given, **extra).logits[real], case.tensors["out.logits_without_B"][real])


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def changes(domain: list[list[int]], method: DePT, up: float = 1.0) -> Tensor:
    """[B, T, D]: what the edit of text adds."""
    torch.manual_seed(0)
    edit: Any = method.place(Anatomy.read(tiny("opt")))[1].edit.double()
    nn.init.normal_(edit.up, std=up)
    map_ = TokenMap(torch.tensor(domain), torch.zeros(len(domain), dtype=torch.int64))
    n_rows, length = map_.domain.shape
    tokens = map_.window(n_rows, 0, length, length)
    h = torch.zeros(*map_.domain.shape, 32).double()
    return torch.where(tokens.select((TEXT,), 0), edit(h, tokens, h), h)


def test_padding_and_images_before_a_text_do_not_move_its_places_and_later_ones_have_no_change() -> None:
    left, right, alone = changes(
        [[PAD, PAD, PROMPT, TEXT, TEXT, TEXT], [PROMPT, TEXT, TEXT, TEXT, PAD, PAD], [PROMPT, IMAGE, IMAGE, TEXT, TEXT, TEXT]], DePT(length=1, rank=2, max_length=2)
    )
    assert torch.equal(left[3:], right[1:4])
    assert torch.equal(left[3:], alone[3:])
    assert left[3:5].abs().min() > 0
    assert left[5].abs().max() == 0  # the third place


def test_it_starts_as_a_prompt_and_has_the_weights_that_it_promises() -> None:
    anatomy = Anatomy.read(tiny("opt"))
    assert torch.equal(changes([[TEXT, TEXT]], DePT(length=1, rank=2, max_length=2), up=0.0), torch.zeros(1, 2, 32).double())
    counts = [
        Adapter({"m": method}, anatomy).n_parameters()["m"] for method in (DePT(length=2, rank=4, max_length=16), Prompt(length=8))
    ]
    assert counts == [2 * 32 + (16 + 32) * 4, 8 * 32]  # the same budget
    placed = {one.role: one for one in DePT(length=40, rank=45).place(anatomy)}
    assert placed["text"].edit.get_parameter("down").shape == (256, 45)
    assert placed["text"].edit.get_parameter("down").abs().max() <= 45**-0.5  # kaiming_uniform(sqrt 5)


def test_its_budget_is_that_of_a_prompt_of_a_hundred_vectors() -> None:
    """Of T5-base: 40 vectors and rank 45 for 256 places, or 60 and rank 30."""
    anatomy = dataclasses.replace(Anatomy.read(tiny("t5")), width=768)
    with torch.device("meta"):
        methods = (DePT(length=40, rank=45), DePT(length=60, rank=30), Prompt(length=100))
        assert [Adapter({"m": method}, anatomy).n_parameters() for method in methods] == [{"m": 76_800}] * 3


KINDS = [PROMPT] * 2 + [TEXT] * 5
IDS = torch.tensor([[0, 0, 5, 6, 7, 8, 9], [0, 0, 4, 6, 8, 8, 9]])


def logits(model: Any, method: Any, ids: Tensor, kinds: list[int], up: float) -> Tensor:
    adapter = Adapter({"m": method}, Anatomy.read(model)).double()
    torch.manual_seed(0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    if isinstance(method, DePT):
        nn.init.normal_(adapter.get_parameter("m.text.up"), std=up)
    attachment = attach(model, adapter)
    token_map = TokenMap(torch.tensor([kinds] * len(ids)), torch.zeros(len(ids), dtype=torch.int64))
    with torch.no_grad(), attachment.bind(token_map):
        found = run(model, ids, (token_map.domain != PAD).long())
    attachment.detach()
    return found


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_a_row_is_alone_what_it_is_padded_on_either_side_and_without_a_change_it_is_a_prompt(family: str) -> None:
    model, dept = tiny(family), DePT(length=2, rank=2, max_length=3)
    assert torch.equal(logits(model, dept, IDS, KINDS, 0.0), logits(model, Prompt(length=2), IDS, KINDS, 0.0))
    alone = logits(model, dept, IDS[:1], KINDS, 1.0)[0]
    assert not torch.equal(alone, logits(model, dept, IDS[:1], KINDS, 0.0)[0])
    left = logits(model, dept, nn.functional.pad(IDS, (2, 0)), [PAD] * 2 + KINDS, 1.0)[0]
    right = logits(model, dept, nn.functional.pad(IDS, (0, 2)), KINDS + [PAD] * 2, 1.0)[0]
    for padded in (left, right) if family == "t5" else (left[2:], right[:7]):  # the logits of T5 are its decoder's
        torch.testing.assert_close(padded, alone, rtol=0, atol=EXACT[family])


def test_the_rows_that_are_added_stay_where_they_are_when_words_change_places_and_end_where_they_should() -> None:
    model: Any = tiny("opt")
    seen: list[Tensor] = []
    table = model.get_input_embeddings()
    for words in ([5, 6, 7, 8, 9], [5, 8, 7, 6, 9]):
        ids = torch.tensor([[0, 0, *words]])
        first = model.model.decoder.project_in.register_forward_pre_hook(lambda module, args, ids=ids: seen.append((args[0] - table.weight[ids])[0, 2:]))
        logits(model, DePT(length=2, rank=2, max_length=3), ids, KINDS, 1.0)
        first.remove()
    torch.testing.assert_close(seen[0], seen[1])
    assert seen[0][:3].abs().min() > 0
    assert torch.equal(seen[0][3:], torch.zeros_like(seen[0][3:]))  # the frozen embeddings, bit for bit


def left_after_learning(method: Any) -> float:
    """Mean squared error of a frozen model's outputs after learning what a matrix of rank 2, added by place, does to them."""
    torch.manual_seed(0)
    model: Any = tiny("opt").float()
    ids = torch.randint(3, 40, (6, 8))
    slots = getattr(method, "length", 0)
    embeddings = model.get_input_embeddings()(ids).detach()
    planted = (torch.randn(8, 2) @ torch.randn(2, 32)) * 0.3
    with torch.no_grad():
        wanted = model(inputs_embeds=embeddings + planted).logits
    adapter = Adapter({"m": method}, Anatomy.read(model))
    attachment = attach(model, adapter)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=5e-2)
    domain = torch.tensor([[PROMPT] * slots + [TEXT] * 8] * 6)
    whole = torch.cat([ids.new_ones(6, slots), ids], 1)
    positions = torch.cat([torch.zeros(6, slots, dtype=torch.int64), torch.arange(8).expand(6, -1)], 1)
    with attachment.bind(TokenMap(domain, torch.zeros(6, dtype=torch.int64))):
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(input_ids=whole, position_ids=positions).logits[:, slots:] - wanted).square().mean()
            loss.backward()
            optimizer.step()
    attachment.detach()
    return float(loss.detach())


def test_it_learns_a_change_by_place_of_its_rank_and_a_prompt_does_not() -> None:
    one, two = (left_after_learning(DePT(length=1, rank=rank, max_length=8)) for rank in (1, 2))
    prompt = left_after_learning(Prompt(length=3))
    assert two < 0.2 * one
    assert two < 0.1 * prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "DePT's rank is 0: give 1 or more"),
        ({"max_length": 0}, "DePT's max_length is 0: give 1 or more"),
        ({"rank": 300}, "DePT's rank is 300 with max_length 256, and the product has rank 256 at most: give less"),
        ({"alpha": 0.0}, r"DePT's alpha is 0.0 and its init_std 0.02: give a positive number"),
        ({"modalities": ("text", "text")}, r"DePT's modalities are \['text', 'text'\]: name text, image or both, each once"),
    ],
)
def test_what_it_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DePT(**{"length": 2, "rank": 2, **fields})

"""Merges of vectors equal the authors' functions on every fixture, and what they lose is what their papers' formulas lose."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared import fixtures, fixtures_root
from torch import Tensor

from adalink.lifecycle.flat import Flat
from adalink.lifecycle.vectors import balanced, by_parts, dare_masks, disjoint_mean, elected_signs, rescaled, ties, trimmed, weighted

FILES = sorted(path.stem for path in (fixtures_root() / "merge").glob("flat*.json")) or ["absent"]
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-12}


@cache
def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = fixtures("merge")
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def named(tensors: dict[str, Tensor], start: str, end: str = "") -> list[tuple[float, Tensor]]:
    """(the number between, the tensor) of every key of that form."""
    return [(float(key[len(start) : len(key) - len(end)]), value) for key, value in tensors.items() if key.startswith(start) and key.endswith(end)]


@pytest.mark.parametrize("name", FILES)
def test_the_order_of_the_vector_and_plain_sums(name: str) -> None:
    facts, tensors = case(name)
    one = {role: {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{role}.")} for role in ("init", "adapter0")}
    assert torch.equal(Flat.of(one["adapter0"]).vector - Flat.of(one["init"]).vector, tensors["tau"][0])
    tau, n = tensors["tau"], facts["n"]
    torch.testing.assert_close(weighted(tau, [1.0] * n), tensors["task_arithmetic.sum"], **EXACT)
    torch.testing.assert_close(weighted(tau, [1 / n] * n), tensors["average"], **EXACT)


@pytest.mark.parametrize("name", FILES)
def test_ties(name: str) -> None:
    tau = case(name)[1]["tau"]
    for percent, rows in named(case(name)[1], "ties.k", ".trimmed"):
        found, key = trimmed(tau, percent / 100), f"ties.k{percent:g}"
        assert torch.equal(found, rows)
        signs = elected_signs(found)
        assert torch.equal(signs, case(name)[1][f"{key}.signs"])
        torch.testing.assert_close(ties(tau, percent / 100), case(name)[1][f"{key}.mean"], **EXACT)
        assert not torch.allclose(disjoint_mean(tau, elected_signs(tau)), case(name)[1][f"{key}.mean"])  # untrimmed is another merge


@pytest.mark.parametrize("name", FILES)
def test_dare_with_the_masks_that_were_drawn(name: str) -> None:
    facts, tensors = case(name)
    for keep, masks in named(tensors, "dare.p", ".masks"):
        rows, n = rescaled(tensors["tau"], masks.bool(), keep), facts["n"]
        torch.testing.assert_close(weighted(rows, [1 / n] * n), tensors[f"dare.p{keep:g}.linear"], **EXACT)
        torch.testing.assert_close(disjoint_mean(rows, elected_signs(rows)) / n, tensors[f"dare.p{keep:g}.ties"], **EXACT)  # peft takes the weights 1 / n too
    assert any(named(tensors, "dare.p", ".masks"))


@pytest.mark.parametrize("name", FILES)
def test_pcb(name: str) -> None:
    facts, tensors = case(name)
    tau, n = tensors["tau"], facts["n"]
    for ratio, merged in named(tensors, "pcb.file.r", ".merged"):
        found = balanced(tau, ratio, [1.0] * n)
        torch.testing.assert_close(found.merged, merged, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.scores, tensors[f"pcb.file.r{ratio:g}.scale"], rtol=0, atol=1e-10)
        torch.testing.assert_close(found.clipped, tensors["pcb.file.clamped"], rtol=0, atol=1e-10)
        size = tau.shape[1]
        assert (found.scores != 0).sum(1).tolist() == [size - int(size * (1 - ratio)) - 1] * n
        torch.testing.assert_close(balanced(tau, ratio, [1.2] * n).merged, 1.2 * merged, rtol=0, atol=1e-10)
        for order in (tau.flip(0), tau.roll(1, 0)):
            torch.testing.assert_close(balanced(order, ratio, [1.0] * n).merged, merged, rtol=0, atol=1e-12)
    assert facts["ratios"] == [ratio for ratio, _ in sorted(named(tensors, "pcb.file.r", ".merged"), key=lambda pair: facts["ratios"].index(pair[0]))]


@pytest.mark.parametrize("name", FILES)
def test_pcb_is_a_selection_and_bends(name: str) -> None:
    facts, tensors = case(name)
    tau, ratio = tensors["tau"], facts["ratios"][0]
    alone = balanced(tau[[0, 0]], ratio, [1.0, 1.0]).merged
    torch.testing.assert_close(alone, tensors["pcb.file.self"], rtol=0, atol=1e-10)
    assert ((alone - tau[0]).abs() > 1e-9).double().mean() > 0.9
    small = balanced(tau * 0.001, ratio, [1.0] * facts["n"]).merged
    torch.testing.assert_close(small, tensors["pcb.file.tau_times_0.001"], rtol=0, atol=1e-10)
    assert not torch.allclose(small, 0.001 * balanced(tau, ratio, [1.0] * facts["n"]).merged, rtol=1e-9, atol=0)


def test_ties_keeps_every_tie_and_all_of_it_where_all_is_asked_for() -> None:
    tau = torch.tensor([[1.0, -1.0, 1.0, 0.0], [2.0, 0.5, -3.0, 0.0]], dtype=torch.float64)
    assert torch.equal(trimmed(tau, 1.0), tau)
    assert torch.equal(trimmed(tau, 0.25), torch.tensor([[1.0, -1.0, 1.0, 0.0], [2.0, 0.0, -3.0, 0.0]]).double())


def test_dare_is_right_on_average_and_follows_its_seed() -> None:
    tau = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = dare_masks(tau.shape, 0.7, 1)
    assert torch.equal(masks, dare_masks(tau.shape, 0.7, 1))
    assert not torch.equal(masks, dare_masks(tau.shape, 0.7, 2))
    assert abs(float(masks.double().mean()) - 0.7) < 0.01
    assert abs(float((rescaled(tau, masks, 0.7) - tau).mean())) < 0.02


def test_parts_are_merged_apart() -> None:
    tau = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [slice(0, 10), slice(10, 40)]
    apart = by_parts(lambda rows: ties(rows, 0.2), tau, parts)
    assert torch.equal(apart, torch.cat([ties(tau[:, part], 0.2) for part in parts]))
    assert not torch.equal(apart, ties(tau, 0.2))

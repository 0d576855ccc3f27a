"""Which adapter serves a row: the authors' numbers, planted clusters, and what a folder of a router refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared import fixtures
from torch import Tensor, nn

from adalink import BASE_NAME
from adalink.errors import CheckpointError, ConfigError
from adalink.lifecycle.route import Gate, Router, RouteSettings, best_temperature, centres_of, pruned, read_router, write_router
from adalink.tokens import AUTO

EXACT: Any = {"atol": 1e-12, "rtol": 0.0}


def cases(folder: str, key: str) -> list[Any]:
    """The fixtures of a kind that hold a tensor."""
    return [pytest.param(path, id=path.stem) for path in sorted(fixtures(folder).glob("*.safetensors")) if key in load_file(path)]


def planted(n: int = 40, width: int = 12, kinds: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Rows of three adapters, each around two directions of its own."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, 2 * kinds, generator=generator, dtype=torch.float64)).Q.T
    rows = {}
    for i, name in enumerate("bca"[:kinds]):
        either = directions[2 * i + torch.randint(2, (n,), generator=generator)]
        rows[name] = nn.functional.normalize(either + 0.1 * torch.randn(n, width, generator=generator, dtype=torch.float64), dim=-1)
    return rows


# ----------------------------------------
# The authors' numbers.


@pytest.mark.parametrize("path", cases("mos", "route.train"))
def test_prototypes_and_routes_are_those_of_the_reference(path: Path) -> None:
    t = load_file(path)
    centres = torch.cat([centres_of(rows, 1) for rows in t["route.train"]])
    torch.testing.assert_close(centres, t["route.prototypes"], **EXACT)
    n = len(centres)
    names = tuple(f"task{i:02}" for i in range(n))
    router = Router(names=names, settings=RouteSettings(by="prototypes", centers=1), centres=centres, owner=torch.arange(n), floors=torch.full((n,), -1.0))
    scores = torch.stack([router.scores(row) for row in t["route.test"]])
    torch.testing.assert_close(scores, t["route.scores"], **EXACT)
    chosen = [names.index(str(router.route(row))) for row in t["route.test"]]
    assert chosen == t["route.chosen"].tolist() == t["route.test_task"].tolist()  # every planted cluster is found


@pytest.mark.parametrize("path", cases("wemoe", "in.x"))
def test_gates_of_every_depth_mix_weights_as_published(path: Path) -> None:
    """Base and differences mixed by the gate, for each sample by itself; gates averaged over the batch, as shipped, give something else."""
    t = load_file(path)
    x, names = t["in.x"], sorted({key.removeprefix("base.") for key in t if key.startswith("base.")})
    experts = [{name: t[f"expert{k}.{name}"] for name in names} for k in range(len([key for key in t if key.startswith("expert")]) // len(names))]

    def mixed(weights: Tensor) -> Tensor:
        """[B, S, D] of weights [B, K]."""
        out = []
        for row, g in zip(x, weights, strict=True):
            own = {name: t[f"base.{name}"] + sum(w * (expert[name] - t[f"base.{name}"]) for w, expert in zip(g, experts, strict=True)) for name in names}
            out.append(nn.functional.linear(nn.functional.linear(row, own["0.weight"], own["0.bias"]).relu(), own["2.weight"], own["2.bias"]))
        return torch.stack(out)

    for depth in (0, 1, 2):
        gate = Gate(x.shape[-1], len(experts), depth)
        gate.load_state_dict({key.removeprefix(f"gate{depth}."): value for key, value in t.items() if key.startswith(f"gate{depth}.")})
        with torch.no_grad():
            weights = gate(x).mean(1)
        if depth:
            torch.testing.assert_close(weights, t[f"weights.depth{depth}"], **EXACT)
            averaged = mixed(weights.mean(0).expand_as(weights))
            torch.testing.assert_close(averaged, t[f"out.depth{depth}.batch_reduce"], atol=1e-10, rtol=0.0)
            assert (averaged - t[f"out.depth{depth}"]).abs().max() > 1e-3  # the control
        torch.testing.assert_close(mixed(weights), t[f"out.depth{depth}"], atol=1e-10, rtol=0.0)


@pytest.mark.parametrize("path", cases("wemoe", "in.x"))
def test_differences_are_pruned_as_published(path: Path) -> None:
    t, ratio = load_file(path), json.loads(path.with_suffix(".json").read_text())["prune_ratio"]
    keys = [key for key in t if key.startswith("pruned")]
    for key in keys:
        name = key.partition(".")[2]
        difference = t[key.replace("pruned", "expert")] - t[f"base.{name}"]
        assert torch.equal(pruned(difference, ratio), t[key])
        assert torch.equal(pruned(difference, ratio) != 0, difference.abs() > difference.abs().flatten().quantile(ratio))
    assert keys


# ----------------------------------------
# Routes.


@pytest.mark.parametrize("settings", [RouteSettings(), RouteSettings(depth=2), RouteSettings(by="prototypes", centers=2)], ids=["gate", "deep", "prototypes"])
def test_planted_rows_are_routed_right_in_any_order_of_adapters(settings: RouteSettings) -> None:
    rows, others = planted(), planted(seed=0, n=60)
    router = Router.fit(rows, settings)
    again = Router.fit(dict(reversed(rows.items())), settings)
    assert router.names == again.names == ("a", "b", "c")
    assert router.right == {"a": 1.0, "b": 1.0, "c": 1.0}
    for name, row in ((kind, row) for kind in others for row in others[kind]):
        route = router.route(row)
        assert route in (name, BASE_NAME)
        assert (route, route.weights, route.margin) == (again.route(row), again.route(row).weights, again.route(row).margin)
        assert route.weights == ({name: 1.0} if route == name else {})


def test_two_kinds_of_rows_need_two_centres() -> None:
    """The control of `centers`: in a plane of two adapters whose kinds lie crosswise, the one mean of each says nothing."""
    angles = torch.tensor([0.0, 180.0, 90.0, 270.0]).deg2rad().double()
    kinds = torch.stack([angles.cos(), angles.sin()], 1).repeat_interleave(10, 0)
    kinds = kinds + 0.05 * torch.randn(kinds.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = {"across": kinds[:20], "along": kinds[20:]}
    right = {n: Router.fit(rows, RouteSettings(by="prototypes", centers=n)).right for n in (1, 2)}
    assert min(right[2].values()) == 1.0
    assert min(right[1].values()) < 0.9


def test_a_row_like_no_example_has_no_route_and_one_of_the_examples_has() -> None:
    rows = planted(n=200)
    router = Router.fit(rows, RouteSettings())
    strange = torch.randn(200, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert sum(router.route(row) == BASE_NAME for row in strange) >= 190
    assert sum(router.route(row) == BASE_NAME for name in rows for row in rows[name]) <= 0.02 * 600


def test_weights_of_several_adapters_sum_to_one_and_the_best_is_the_one_that_would_serve_alone() -> None:
    rows = planted()
    best, every, two = (Router.fit(rows, RouteSettings(top=top)) for top in (1, 0, 2))
    for row in rows["c"][:5]:
        alone, mixed, pair = best.route(row), every.route(row), two.route(row)
        assert (mixed, pair) == (AUTO, AUTO)
        assert max(mixed.weights, key=lambda name: mixed.weights[name]) == alone == "c"
        assert (list(mixed.weights), len(pair.weights)) == (["a", "b", "c"], 2)
        assert [sum(route.weights.values()) for route in (mixed, pair)] == pytest.approx([1, 1])


def test_a_tie_goes_to_the_first_name() -> None:
    centres = torch.eye(2, dtype=torch.float64)
    settings = RouteSettings(by="prototypes", centers=1)
    router = Router(names=("a", "b"), settings=settings, centres=centres, owner=torch.arange(2), floors=torch.zeros(2, dtype=torch.float64))
    route = router.route(torch.ones(2))
    assert (route, route.margin) == ("a", 0.0)
    assert router.route(torch.tensor([0.9, 1.0])) == "b"


def test_the_temperature_makes_weights_as_sure_as_they_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(2, (2000,), generator=generator)
    heard = torch.where(torch.rand(2000, generator=generator) < 0.8, label, 1 - label)  # right in 80 of 100
    logits = 20.0 * nn.functional.one_hot(heard, 2).double()
    sure = (logits / best_temperature(logits, label)).softmax(1).amax(1)
    assert float(sure.mean()) == pytest.approx(0.8, abs=0.03)
    assert best_temperature(logits[:0], label[:0]) == 1.0


# ----------------------------------------
# The folder, and what is refused.


def saved(folder: Path, settings: RouteSettings) -> Router:
    router = Router.fit(planted(), settings)
    for name in router.names:
        (folder / "members" / name).mkdir(parents=True)
        (folder / "members" / name / "adalink_config.json").write_text("{}")
        (folder / "members" / name / "adapter_model.safetensors").write_bytes(name.encode())
    write_router(folder, router, {name: folder / "members" / name for name in router.names})
    return router


@pytest.mark.parametrize("settings", [RouteSettings(top=0), RouteSettings(depth=2), RouteSettings(by="prototypes", unknown="refuse")])
def test_a_folder_gives_the_router_that_was_written_wherever_it_is_moved(settings: RouteSettings, tmp_path: Path) -> None:
    router = saved(tmp_path / "one", settings)
    (tmp_path / "one").rename(tmp_path / "two")
    found = read_router(tmp_path / "two")
    assert (found.router.settings, found.router.right) == (settings, router.right)
    assert found.folders == {name: tmp_path / "two" / "members" / name for name in ("a", "b", "c")}
    for row in planted()["a"]:
        before, after = router.route(row), found.router.route(row)
        assert (before, before.weights, before.margin) == (after, after.weights, after.margin)


def test_a_router_whose_adapters_changed_or_went_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, RouteSettings())
    weights = tmp_path / "members" / "b" / "adapter_model.safetensors"
    weights.write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"the adapter b in .* is not the one that the router in .* was made with: make the router again"):
        read_router(tmp_path)
    for path in weights.parent.iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"members/b is no adapter folder: it has neither a config nor weights"):
        read_router(tmp_path)


def test_a_damaged_router_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, RouteSettings())
    path = tmp_path / "adalink_router.json"
    text = path.read_text()
    for wrong, sentence in [("{", "is not a router that can be read"), (text.replace('"format": 1', '"format": 9'), "has format 9, and this version"), (text.replace('"depth": 1', '"depth": 2'), "is not a router")]:
        path.write_text(wrong)
        with pytest.raises(CheckpointError, match=sentence):
            read_router(tmp_path)
    path.write_text(text)
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is no router folder"):
        read_router(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"by": "chance"}, "a router is by 'chance'"), ({"unknown": "guess"}, "give gate or prototypes, and base or refuse"), ({"top": -1}, "a router has top -1"),
     ({"centers": 0}, "centers 0"), ({"depth": 3}, "depth 3"), ({"by": "prototypes", "top": 0}, "the nearest prototype has no weights")],
)  # fmt: skip
def test_settings_that_no_router_has_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RouteSettings(**wrong)


def test_a_router_needs_two_adapters_with_examples() -> None:
    rows = planted()
    with pytest.raises(ConfigError, match="a router of 1 adapters was asked for"):
        Router.fit({"a": rows["a"]}, RouteSettings())
    with pytest.raises(ConfigError, match="the adapter b has no examples"):
        Router.fit({"a": rows["a"], "b": rows["b"][:0]}, RouteSettings())

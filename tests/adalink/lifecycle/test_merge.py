"""Merged folders: exact where they say so, refused where a merge would be another function, the same whatever order the folders come in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from shared import covering, fixtures, fixtures_root
from tiny import INPUTS, excite, rows, tiny, token_map
from torch import Tensor

from adalink import (
    BASE_NAME,
    IA3,
    IMAGE,
    AdaLink,
    AdaptedModel,
    Adapter,
    Anatomy,
    BitFit,
    Bottleneck,
    Bridge,
    LoRA,
    Method,
    Prompt,
    to_peft,
)
from adalink.checkpoint.folder import CONFIG_FILE, read_config, write_adapter
from adalink.edit import EMBEDDING
from adalink.errors import CheckpointError, ConfigError
from adalink.lifecycle.flat import read_flat, start_of
from adalink.lifecycle.merge import MergeSettings, merge
from adalink.lifecycle.stack import stacked, truncated

SUM = MergeSettings(method="stack", weights=(0.6, 0.4))
GROUPS = {"every": ("all",), "text": ("text",)}  # a token may be in both: what they add is added up
EXACT_METHODS: dict[str, Callable[[int], dict[str, Method]]] = {
    "adalink": lambda n: {"adalink": AdaLink(rank=2 + n, modalities=("text",), activation="gelu", bias=True)},
    "lora": lambda n: {"lora": LoRA(rank={"every": 1 + n, "text": 2}, groups=GROUPS, alpha=4.0 + n, bias="all", scaling=("standard", "rank_stabilized")[n])},
    "bottleneck": lambda n: {"bottleneck": Bottleneck(width=2 + n)},
    "bitfit": lambda n: {"bitfit": BitFit(groups=GROUPS, force_bias=True)},
    "ia3": lambda n: {"ia3": IA3(groups={"text": ("text",)})},
    "bridge_mlp": lambda n: {"bridge": Bridge(kind="mlp", hidden=5 + n, boundary="none", init_scale=1.0 + n), "adalink": AdaLink(rank=2, modalities=("text",))},
    "bridge_linear": lambda n: {"bridge": Bridge(kind="linear", bias=bool(n)), "adalink": AdaLink(rank=2, modalities=("image", "text"))},
    "chain": lambda n: {"bridge": Bridge(kind="mlp", hidden=5), "adalink": AdaLink(rank=2 + n, modalities=("image",), bias=True)},
}


def model_of(family: str) -> AdaptedModel:
    return AdaptedModel(tiny(family), inputs=INPUTS)


def save(folder: Path, methods: Mapping[str, Method], seed: int = 0, family: str = "llama", start: int = 0, **task: Any) -> Path:
    """A folder of an adapter in float64 that starts from one seed and is moved by another."""
    model = model_of(family)
    torch.manual_seed(start)
    adapter = model.add_adapter("one", methods)
    model.task = task
    excite(adapter, seed)
    config = dataclasses.replace(model._config_of("one"), task=task)
    generator = torch.Generator().manual_seed(seed)
    write_adapter(folder, {name: value.double() + 1e-9 * torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in adapter.tensors().items()}, config)
    return folder


def edits(folder: Path, family: str, dtype: torch.dtype = torch.float64) -> Callable[[str, Tensor, Any, Tensor], Tensor]:
    """What an adapter makes at a port of h, of the port's input x."""
    config, anatomy = read_config(folder), Anatomy.read(tiny(family), INPUTS)
    adapter = Adapter(config.methods, anatomy).to(dtype)
    for name, value in adapter.tensors().items():
        value.data.copy_(read_flat(folder).tensors()[name])

    def at(port: Any, h: Tensor, tokens: Any, x: Tensor) -> Tensor:
        for placement in adapter.placements:
            if placement.port == port:
                changed = placement.edit(h, tokens, h if x is None else x)
                mask = torch.isin(tokens.domain, torch.tensor(placement.domains))[..., None]
                h = torch.where(mask, changed, h)
        return h

    at.ports = {placement.port for placement in adapter.placements}  # type: ignore[attr-defined]
    return at


@pytest.mark.parametrize(("kind", "family"), covering(((kind, family) for kind in EXACT_METHODS for family in ("llama", "opt", "gpt2", "t5")), each=1))
def test_a_stacked_adapter_is_the_weighted_sum_at_every_port(kind: str, family: str, tmp_path: Path) -> None:
    folders = [save(tmp_path / str(n), EXACT_METHODS[kind](n), seed=n, family=family, start=n) for n in (0, 1)]
    merge(folders, SUM).write(tmp_path / "merged")
    one, two, both = (edits(folder, family) for folder in (*folders, tmp_path / "merged"))
    rounded = [edits(folder, family, torch.float32) for folder in (*folders, tmp_path / "merged")]
    ids, domain, _ = rows()
    tokens, generator = token_map(domain).window(len(ids), 0, domain.shape[1], domain.shape[1]), torch.Generator().manual_seed(5)
    anatomy = Anatomy.read(tiny(family), INPUTS)
    widths = {linear.name: (linear.n_in, linear.n_out) for linear in anatomy.linears}
    for port in one.ports:  # type: ignore[attr-defined]
        n_in, n_out = widths.get(port.module, (anatomy.width if port == EMBEDDING else anatomy.layer_width,) * 2)
        h = torch.randn(*ids.shape, n_in if port.side == "input" else n_out, generator=generator, dtype=torch.float64)
        x = h if port == EMBEDDING or port.side == "input" else torch.randn(*ids.shape, n_in, generator=generator, dtype=torch.float64)
        outputs = [at(port, h, tokens, x) for at in (one, two, both)]
        torch.testing.assert_close(outputs[2], 0.6 * outputs[0] + 0.4 * outputs[1], rtol=0, atol=1e-10)
        assert not torch.allclose(outputs[2], outputs[0])
        in_float32 = [at(port, h.float(), tokens, x.float()) for at in rounded]
        torch.testing.assert_close(in_float32[2], 0.6 * in_float32[0] + 0.4 * in_float32[1], rtol=1e-5, atol=1e-5)
    model = model_of(family)
    model.load_adapter(tmp_path / "merged", "merged")  # an ordinary folder


def test_one_adapter_of_weight_one_is_itself_bit_for_bit(tmp_path: Path) -> None:
    folder = save(tmp_path / "one", EXACT_METHODS["chain"](0))
    merge([folder], MergeSettings()).write(tmp_path / "again")
    assert read_flat(tmp_path / "again").digest == read_flat(folder).digest
    assert all(torch.equal(value, read_flat(folder).tensors()[name]) for name, value in read_flat(tmp_path / "again").tensors().items())
    assert dataclasses.replace(read_config(tmp_path / "again"), derived={}) == read_config(folder)


@pytest.mark.parametrize("kind", EXACT_METHODS)
def test_weights_of_one_and_nothing_give_the_first(kind: str, tmp_path: Path) -> None:
    folders = [save(tmp_path / str(n), EXACT_METHODS[kind](n), seed=n, start=n) for n in (0, 1)]
    merge(folders, MergeSettings(weights=(1.0, 0.0))).write(tmp_path / "merged")
    one, merged = edits(folders[0], "llama"), edits(tmp_path / "merged", "llama")
    ids, domain, _ = rows()
    tokens = token_map(domain).window(len(ids), 0, domain.shape[1], domain.shape[1])
    if EMBEDDING in one.ports:  # type: ignore[attr-defined]
        h = torch.randn(*ids.shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(merged(EMBEDDING, h, tokens, h), one(EMBEDDING, h, tokens, h), rtol=0, atol=1e-12)  # type: ignore[arg-type]


def test_a_stack_does_not_depend_on_the_order_of_hidden_units_and_an_average_does(tmp_path: Path) -> None:
    folders = [save(tmp_path / str(n), EXACT_METHODS["chain"](0), seed=n) for n in (0, 1)]
    tensors, order, path = dict(read_flat(folders[1]).tensors()), torch.tensor([3, 0, 4, 1, 2]), "bridge.image.layers"
    for name in (f"{path}.1.weight", f"{path}.1.bias"):
        tensors[name] = tensors[name][order]
    tensors[f"{path}.3.weight"] = tensors[f"{path}.3.weight"][:, order]
    write_adapter(tmp_path / "permuted", tensors, read_config(folders[1]))
    _, domain, _ = rows()
    tokens = token_map(domain).window(len(domain), 0, domain.shape[1], domain.shape[1])
    h = torch.randn(*domain.shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {}
    for method in ("stack", "average"):
        for name in ("1", "permuted"):
            merge([folders[0], tmp_path / name], MergeSettings(method=method)).write(tmp_path / f"{method}{name}")  # type: ignore[arg-type]
            found[method, name] = edits(tmp_path / f"{method}{name}", "llama")(EMBEDDING, h, tokens, h)  # type: ignore[arg-type]
    torch.testing.assert_close(found["stack", "permuted"], found["stack", "1"], rtol=0, atol=1e-12)
    assert (found["average", "permuted"] - found["average", "1"]).abs().max() > 1e-3


CONCAT = sorted(path.stem for path in (fixtures_root() / "merge").glob("concat*.json")) or ["absent"]
LORAS = sorted(path.stem for path in (fixtures_root() / "merge").glob("peft_lora*.json")) or ["absent"]


@cache
def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = fixtures("merge")
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def bridge_and_edit(tensors: Mapping[str, Tensor], values: Tensor, edit: Any) -> Tensor:
    """Features through a bridge of these tensors, then through AdaLink on images where there is one."""
    path = "bridge.image.layers"
    normed = torch.nn.functional.layer_norm(values, values.shape[-1:], tensors[f"{path}.0.weight"], tensors[f"{path}.0.bias"])
    middle = torch.nn.functional.gelu(normed @ tensors[f"{path}.1.weight"].T + tensors[f"{path}.1.bias"])
    made = middle @ tensors[f"{path}.3.weight"].T + tensors[f"{path}.3.bias"]
    return edited(tensors, "image", made, edit) if "adalink.image.up.weight" in tensors else made


def edited(tensors: Mapping[str, Tensor], modality: str, h: Tensor, act: Any) -> Tensor:
    return h + act(h @ tensors[f"adalink.{modality}.down.weight"].T) @ tensors[f"adalink.{modality}.up.weight"].T


@pytest.mark.parametrize("name", CONCAT)
def test_the_bridge_and_adalink_of_the_fixture(name: str) -> None:
    facts, tensors = case(name)
    act = {"identity": lambda x: x, "gelu": torch.nn.functional.gelu, "relu": torch.relu}[facts["activation"]]
    bridge = Bridge(kind="mlp", hidden=facts["H"])
    parts: dict[str, Any] = {}
    for n, rank in enumerate(facts["ranks"]):
        own = {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"adapter{n}.")}
        parts[str(n)] = ({"bridge": bridge, "adalink": AdaLink(rank=rank, modalities=("image", "text"), activation=facts["activation"])}, own)
        torch.testing.assert_close(bridge_and_edit(own, tensors["in.features"], act), tensors[f"out{n}.image"], rtol=0, atol=1e-10)
    apart = _stacked_apart(parts, facts["weights"])
    torch.testing.assert_close(bridge_and_edit(apart, tensors["in.features"], act), tensors["apart.image"], rtol=0, atol=1e-10)
    off = (tensors["apart.image"] - tensors["merged.image"]).norm() / tensors["merged.image"].norm()
    assert float(off) == pytest.approx(facts["relative_error_of_apart"], abs=1e-6)  # the control: stacked apart is another function
    assert off > 0.05
    if facts["activation"] != "identity":
        with pytest.raises(ConfigError, match=rf"edits what its bridge wrote, with the activation {facts['activation']}: .* --method average"):
            stacked(parts, facts["weights"])
        return
    methods, merged = stacked(parts, facts["weights"])
    assert isinstance(methods["bridge"], Bridge)
    assert methods["bridge"].hidden == facts["n"] * facts["H"]
    torch.testing.assert_close(bridge_and_edit(merged, tensors["in.features"], act), tensors["merged.image"], rtol=0, atol=1e-10)
    torch.testing.assert_close(edited(merged, "text", tensors["in.words"], act), tensors["merged.text"], rtol=0, atol=1e-10)


def _stacked_apart(parts: Mapping[str, Any], weights: list[float]) -> dict[str, Tensor]:
    """The bridges and the AdaLinks each for themselves, as peft's `linear` would: what must not be done."""
    alone = [{name: ({key: method}, {one: value for one, value in held.items() if one.startswith(f"{key}.")}) for name, (methods, held) in parts.items()
              for key, method in methods.items() if key == kind} for kind in ("bridge", "adalink")]  # fmt: skip
    return {name: value for each in alone for name, value in stacked(each, weights)[1].items()}


@pytest.mark.parametrize("name", LORAS)
def test_loras_stack_as_pefts_cat_and_are_not_its_linear(name: str) -> None:
    facts, tensors = case(name)
    targets = [key.removeprefix("exact.") for key in tensors if key.startswith("exact.")]
    parts: dict[str, Any] = {}
    for n, (rank, alpha) in enumerate(zip(facts["ranks"], facts["alphas"], strict=True)):
        held = {f"lora.all.0.{target}.{one}.weight": tensors[f"lora{n}.{target}.{letter}"] for target in targets for one, letter in (("down", "A"), ("up", "B"))}
        parts[str(n)] = ({"lora": LoRA(rank=rank, alpha=float(alpha))}, held)
    methods, merged = stacked(parts, facts["weights"])
    lora: Any = methods["lora"]
    assert (lora.rank, lora.alpha) == (sum(facts["ranks"]), sum(facts["ranks"]))
    for target in targets:
        exact, found = tensors[f"exact.{target}"], delta(merged, target)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(found, tensors[f"peft.cat.{target}.delta"], rtol=0, atol=1e-12)
        if f"peft.linear.{target}.delta" in tensors:
            assert (tensors[f"peft.linear.{target}.delta"] - exact).norm() > 0.3 * exact.norm()  # the control
        for rank in range(1, sum(facts["ranks"]) + 1):
            (cut_methods, cut), dropped = truncated((methods, {key: value for key, value in merged.items() if f".{target}." in key}), rank)
            left, values, right = torch.linalg.svd(exact)
            best = (left[:, :rank] * values[:rank]) @ right[:rank]
            torch.testing.assert_close(delta(cut, target), best, rtol=0, atol=1e-10)
            assert dropped == pytest.approx(float((values[rank:] ** 2).sum() / (values**2).sum()), abs=1e-10)
            assert cut_methods["lora"].rank == rank  # type: ignore[attr-defined]


def delta(tensors: Mapping[str, Tensor], target: str) -> Tensor:
    return tensors[f"lora.all.0.{target}.up.weight"] @ tensors[f"lora.all.0.{target}.down.weight"]


def test_a_stacked_lora_loads_in_peft_as_pefts_own_cat(tmp_path: Path) -> None:
    loras = [LoRA(rank=2, alpha=4), LoRA(rank=3, alpha=3, targets=("all",))]
    model = model_of("llama")
    for n, lora in enumerate(loras):
        torch.manual_seed(n)
        adapter = model.add_adapter(f"a{n}", {"lora": lora})
        excite(adapter, n)
        model.save_pretrained(tmp_path / f"a{n}")
        to_peft(adapter, model.base, tmp_path / f"peft{n}")
    merge([tmp_path / "a0", tmp_path / "a1"], MergeSettings(weights=(0.6, 0.4))).write(tmp_path / "merged")
    to_peft(model.load_adapter(tmp_path / "merged", "merged"), model.base, tmp_path / "peft")
    ours = PeftModel.from_pretrained(tiny("llama"), tmp_path / "peft")
    theirs = PeftModel.from_pretrained(tiny("llama"), tmp_path / "peft0", adapter_name="a0")
    theirs.load_adapter(tmp_path / "peft1", "a1")
    theirs.add_weighted_adapter(["a0", "a1"], [0.6, 0.4], "cat", combination_type="cat")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    wanted, found = theirs.get_submodule(name).get_delta_weight("cat"), ours.get_submodule(name).get_delta_weight("default")
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=1e-6)  # folders of float32


def weights_of(folders: list[Path], family: str = "llama", **settings: Any) -> Any:
    return merge(folders, MergeSettings(**settings), start=lambda folder: start_of(folder, model_of(family)))


OF_WEIGHTS: list[dict[str, Any]] = [
    {"method": "average"}, {"method": "arithmetic", "scale": 0.7}, {"method": "ties"}, {"method": "ties", "scope": "tensor"}, {"method": "pcb", "scope": "method"},
    {"method": "pcb", "keep": 0.3, "scale": 1.2}, {"method": "dare"}, {"method": "dare_ties", "seed": 3},
]  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = tmp_path_factory.mktemp("pair")
    return [save(made / str(n), EXACT_METHODS["chain"](0), seed=n + 1, task="captioning", prompt=f"prompt {n}", layer=-1) for n in (0, 1)]


@pytest.mark.parametrize("settings", OF_WEIGHTS, ids=str)
def test_a_merge_of_weights_does_not_depend_on_the_order_and_has_the_size_of_one(settings: dict[str, Any], pair: list[Path], tmp_path: Path) -> None:
    merged, turned = weights_of(pair, **settings), weights_of(pair[::-1], **settings)
    assert all(torch.equal(value, turned.tensors[name]) for name, value in merged.tensors.items())
    merged.write(tmp_path / "out")
    config, one = read_config(tmp_path / "out"), read_config(pair[0])
    assert (config.methods, config.start, config.task) == (one.methods, one.start, one.task)
    assert config.derived["sources"] == [str(folder) for folder in pair]
    assert config.derived["settings"].items() >= settings.items()
    assert weights_of([tmp_path / "out", pair[0]], method="arithmetic").tensors  # and is merged again
    assert not torch.equal(read_flat(tmp_path / "out").vector, read_flat(pair[0]).vector)


def test_the_start_cancels_where_weights_sum_to_one(pair: list[Path]) -> None:
    average, halves = weights_of(pair, method="average"), weights_of(pair, method="arithmetic", scale=0.5)
    for name, value in average.tensors.items():
        torch.testing.assert_close(halves.tensors[name], value, rtol=0, atol=1e-15)
    start = start_of(pair[0], model_of("llama")).tensors()
    rows = [read_flat(folder).tensors() for folder in pair]
    whole = weights_of(pair, method="arithmetic")
    for name, value in whole.tensors.items():
        torch.testing.assert_close(value, rows[0][name] + rows[1][name] - start[name], rtol=0, atol=1e-14)


def test_words_are_those_of_the_first_or_of_the_one_that_is_named(pair: list[Path]) -> None:
    assert weights_of(pair, method="average").config.task["prompt"] == "prompt 0"
    assert merge(pair, SUM, template_of=pair[1]).config.task["prompt"] == "prompt 1"
    with pytest.raises(ConfigError, match="template_of is elsewhere, which is none of the adapters"):
        merge(pair, SUM, template_of="elsewhere")


@pytest.mark.parametrize("kind", ["adalink", "lora"])
def test_rows_of_the_merged_adapter_and_its_sources_are_served_in_one_batch_as_alone(kind: str, tmp_path: Path) -> None:
    folders = {name: save(tmp_path / name, EXACT_METHODS[kind](n), seed=n) for n, name in enumerate("ab")}
    merge(list(folders.values()), SUM).write(tmp_path / "merged")
    folders["merged"] = tmp_path / "merged"
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))

    def logits(*names: str) -> Tensor:
        model = model_of("llama").eval()
        for name in names:
            model.load_adapter(folders[name], name).double()
        with torch.no_grad():
            return model(ids, adapter_names=[name if name in names else BASE_NAME for name in folders]).logits  # type: ignore[no-any-return]

    mixed = logits(*folders)
    assert all(torch.equal(logits(name)[n], mixed[n]) for n, name in enumerate(folders))
    assert not torch.equal(mixed[2], logits()[2])


def bad(folder: Path, methods: Mapping[str, Method] | None = None, **changes: Any) -> Callable[[Path], list[Path]]:
    """Makes two folders, of which the second differs."""
    del folder

    def make(tmp_path: Path) -> list[Path]:
        base = EXACT_METHODS["chain"](0)
        found = [save(tmp_path / "a", base, seed=1), save(tmp_path / "b", methods or base, seed=2, start=changes.get("start", 0), family=changes.get("family", "llama"))]
        if "config" in changes:
            content = json.loads((found[1] / CONFIG_FILE).read_text())
            (found[1] / CONFIG_FILE).write_text(json.dumps({**content, **changes["config"]}))
        if "beside" in changes:
            (found[1] / changes["beside"]).mkdir()
        return found

    return make


HERE = Path()
GELU: dict[str, Method] = {"bridge": Bridge(kind="mlp", hidden=5), "adalink": AdaLink(rank=2, modalities=("image",), activation="gelu", bias=True)}
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (bad(HERE, start=1), {"method": "average"}, r"start from different weights \(seed 0 and seed 1\): weights can only be merged from one start; use --method stack"),
    (bad(HERE, start=1), {"method": "pcb"}, r"start from different weights"),
    (bad(HERE, config={"start": None}), {"method": "ties"}, "b names no start"),
    (bad(HERE, family="opt"), {}, r"trained on other language models: .* \(\w{16}\) and .* \(\w{16}\); merge adapters of one base, or port one first \(adalink port\)"),
    (bad(HERE, family="opt"), {"method": "average"}, "trained on other language models"),
    (bad(HERE, GELU), {}, r"adalink.activation is 'identity' in .*a and 'gelu' in .*b"),
    (bad(HERE, {"lora": LoRA(rank=2)}), {}, r"has the methods bridge \(Bridge\), adalink \(AdaLink\) and .*b lora \(LoRA\)"),
    (bad(HERE), {"weights": (0.5, 0.6)}, "the weights sum to 1.1, and a bridge writes its vectors"),
    (bad(HERE), {"method": "average", "weights": (0.5, 0.6)}, "an average needs a sum of 1"),
    (bad(HERE), {"weights": (1.0,)}, "1 weights were given for 2 adapters"),
    (bad(HERE, config={"task": {"layer": -2}}), {}, r"layer is None in .*a and -2 in .*b"),
    (bad(HERE, beside="vision"), {}, "has an adapted encoder, which cannot be merged"),
    (bad(HERE, EXACT_METHODS["chain"](1)), {"method": "ties"}, r"adalink.rank is 2 in .*a and 3 in .*b"),
    (lambda path: [save(path / "a", GELU), save(path / "b", GELU, seed=2)], {}, "edits what its bridge wrote, with the activation gelu"),
    (lambda path: [save(path / "a", GELU)], {"method": "pcb"}, "one adapter was given: there is nothing to merge"),
    (lambda path: [save(path / n, {"soft": Prompt(length=2)}) for n in "ab"], {}, "soft in .* is a Prompt, whose effects do not add up"),
    (lambda path: [save(path / n, {"ia3": IA3(), "lora": LoRA()}) for n in "ab"], {}, "scales what another method adds to"),
    (lambda path: [save(path / n, {"ia3": IA3(groups={"a": ("all",), "b": ("text",)})}) for n in "ab"], {}, "two groups for one kind of token"),
    (lambda path: [save(path / n, {"adalink": AdaLink(rank=2, modalities=("text",), activation="relu")}) for n in "ab"], {"method": "svd", "rank": 1}, "no singular values describe"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_cannot_be_merged_rightly_is_refused_in_a_sentence(number: int, tmp_path: Path) -> None:
    make, settings, sentence = REFUSED[number]
    folders = make(tmp_path)
    with pytest.raises((ConfigError, CheckpointError), match=sentence):
        weights_of(folders, **settings)


def test_an_adapter_that_was_not_trained_is_named(tmp_path: Path) -> None:
    model = model_of("llama")
    for name in ("a", "b"):
        torch.manual_seed(0)
        excite(model.add_adapter(name, LoRA(rank=2)), 1) if name == "a" else model.add_adapter(name, LoRA(rank=2))
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match=r"the adapter in .*b equals its start"):
        weights_of([tmp_path / "a", tmp_path / "b"], method="pcb")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "ties", "keep": 0.0}, "keep is 0"), ({"method": "stack", "keep": 0.5}, "the others none"), ({"method": "stack", "scale": 2.0}, "scale is 2"),
        ({"method": "arithmetic", "scale": float("nan")}, "scale is nan"), ({"method": "ties", "weights": (1.0, 1.0)}, "none for ties"), ({"method": "svd"}, "rank is 0"),
        ({"method": "stack", "rank": 3}, "rank is 3"), ({"method": "average", "scope": "tensor"}, "scope is tensor"), ({"weights": (float("inf"), 1.0)}, "give numbers"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MergeSettings(**settings)


def test_a_bridge_that_all_share_stays_and_its_chain_adds_up_exactly(tmp_path: Path) -> None:
    """With any activation, and weights of any sum: the AdaLinks read the same vectors."""
    folders = [save(tmp_path / str(n), GELU, seed=n + 1) for n in (0, 1)]
    flats = [read_flat(folder) for folder in folders]
    shared = {name: value for name, value in flats[0].tensors().items() if name.startswith("bridge.")}
    for folder, flat in zip(folders, flats, strict=True):
        write_adapter(folder, {**flat.tensors(), **shared}, read_config(folder))
    merge(folders, MergeSettings(weights=(0.9, 0.8))).write(tmp_path / "merged")
    one, two, both = (edits(folder, "llama") for folder in (*folders, tmp_path / "merged"))
    _, domain, _ = rows()
    tokens = token_map(domain).window(len(domain), 0, domain.shape[1], domain.shape[1])
    h = torch.randn(*domain.shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bridge_alone = Adapter({"bridge": GELU["bridge"]}, Anatomy.read(tiny("llama"), INPUTS)).double()
    for name, value in bridge_alone.tensors().items():
        value.data.copy_(shared[name])
    is_image = (domain == IMAGE)[..., None]
    written = torch.where(is_image, bridge_alone.placements[0].edit(h, tokens, h), h)
    first, second, merged = (at(EMBEDDING, h, tokens, h) for at in (one, two, both))  # type: ignore[arg-type]
    torch.testing.assert_close(merged - written, 0.9 * (first - written) + 0.8 * (second - written), rtol=0, atol=1e-10)
    assert merge(folders, MergeSettings()).config.methods["bridge"] == GELU["bridge"]

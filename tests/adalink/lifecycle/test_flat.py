"""Adapter folders as vectors: strict, in the order of their names, back in their own dtypes; and starts that are drawn again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import INPUTS, excite, tiny

from adalink import AdaLink, AdaptedModel, Bridge, LoRA, Method, get_adalink_model
from adalink.checkpoint.folder import CONFIG_FILE, WEIGHTS_FILE, read_config
from adalink.checkpoint.start import digest_of
from adalink.errors import CheckpointError, ConfigError
from adalink.lifecycle.flat import Flat, check_alike, derived_from, parts_beside, read_flat, start_of, write_derived

METHODS: dict[str, Method] = {"adalink": AdaLink(rank=4, modalities=("text", "image"), bias=True), "bridge": Bridge(kind="mlp", hidden=8), "lora": LoRA(rank=2)}


def saved(folder: Path, seed: int, methods: dict[str, Method] = METHODS, *, draw_before: bool = False) -> Path:
    """A folder of a trained adapter: its start follows the seed, or a draw from the generator after other draws."""
    model = AdaptedModel(tiny("opt"), inputs=INPUTS)
    torch.manual_seed(seed)
    if draw_before:
        torch.randn(3)
    model.add_adapter("one", methods)
    excite(model.active_adapter(), seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter", 3)


def test_a_vector_holds_every_number_once_in_the_order_of_names_and_gives_the_tensors_back(folder: Path) -> None:
    stored, flat = load_file(folder / WEIGHTS_FILE), read_flat(folder)
    assert flat.names == tuple(sorted(stored))
    assert torch.equal(flat.vector, torch.cat([stored[name].double().flatten() for name in sorted(stored)]))
    assert {name: torch.equal(value, stored[name]) and value.dtype == stored[name].dtype for name, value in flat.tensors().items()} == dict.fromkeys(stored, True)
    assert all(torch.equal(flat.vector[place].reshape(stored[name].shape), stored[name].double()) for name, place in flat.parts().items())


def test_dtypes_are_restored() -> None:
    tensors = {"b": torch.randn(2, 3).half(), "a": torch.randn(4).bfloat16(), "c": torch.randn((), dtype=torch.float64)}
    again = Flat.of(tensors).tensors()
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in tensors.items())
    with pytest.raises(ConfigError, match="a vector of 3 numbers was given for tensors of 11"):
        Flat.of(tensors).over(torch.zeros(3))


def test_a_derived_folder_is_an_ordinary_one_that_says_where_it_came_from(folder: Path, tmp_path: Path) -> None:
    flat, out = read_flat(folder), tmp_path / "half"
    derived = derived_from("halve", {"a/adapter": flat}, {"scale": 0.5})
    write_derived(out, read_config(folder), flat.over(flat.vector / 2), derived)
    config = json.loads((out / CONFIG_FILE).read_text())
    assert config["derived"] == {"verb": "halve", "sources": ["a/adapter"], "digests": [digest_of(load_file(folder / WEIGHTS_FILE))], "settings": {"scale": 0.5}}
    assert config["weights"] == digest_of(load_file(out / WEIGHTS_FILE)) != flat.digest
    assert f"Made by `adalink halve` of a/adapter ({flat.digest})" in (out / "README.md").read_text()
    assert "| adalink | AdaLink | " + f"{sum(v.numel() for n, v in flat.tensors().items() if n.startswith('adalink.')):,} |" in (out / "README.md").read_text()
    model = AdaptedModel(tiny("opt"), inputs=INPUTS)
    adapter = model.load_adapter(out, "halved")
    assert all(torch.equal(value, flat.tensors()[name] / 2) for name, value in adapter.tensors().items())
    model.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == read_config(out)
    with pytest.raises(ConfigError, match="half is there already"):
        write_derived(out, read_config(folder), flat, derived)


@pytest.mark.parametrize("draw_before", [False, True])
def test_a_start_is_drawn_again_whatever_was_drawn_before_it(draw_before: bool, tmp_path: Path) -> None:
    model = AdaptedModel(tiny("opt"), inputs=INPUTS)
    torch.manual_seed(5)
    if draw_before:
        torch.randn(3)
    model.add_adapter("one", METHODS)
    wanted = {name: value.detach().clone() for name, value in model.active_adapter().tensors().items()}
    excite(model.active_adapter(), 1)
    model.save_pretrained(tmp_path / "one")
    frozen, config = AdaptedModel(tiny("opt"), inputs=INPUTS), read_config(tmp_path / "one")
    before = torch.get_rng_state()
    assert config.start is not None
    assert (config.start.seed == 5) is not draw_before
    found = start_of(tmp_path / "one", frozen).tensors()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(found["lora.all.0.q_proj.up.weight"], read_flat(tmp_path / "one").tensors()["lora.all.0.q_proj.up.weight"])  # it was trained


def test_two_adapters_of_one_seed_start_apart_and_each_is_found(tmp_path: Path) -> None:
    model = get_adalink_model(tiny("opt"), LoRA(rank=2))
    model.add_adapter("two", LoRA(rank=2))
    starts = []
    for name in ("default", "two"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        starts.append(start_of(tmp_path / name, model).vector)
        assert torch.equal(starts[-1], read_flat(tmp_path / name).vector)
    assert not torch.equal(*starts)


def test_a_start_that_is_not_found_is_never_another_one(folder: Path) -> None:
    config, frozen = json.loads((folder / CONFIG_FILE).read_text()), AdaptedModel(tiny("opt"), inputs=INPUTS)
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "start": {**config["start"], "seed": 4}}))
    with pytest.raises(CheckpointError, match=r"adapter: the start of the adapter cannot be drawn again: seed 4 gives weights with the digest \w{16}, and \w{16} was"):
        start_of(folder, frozen)
    torch.manual_seed(3)
    assert start_of(folder, frozen, (torch.get_rng_state(),)).digest == config["start"]["digest"]  # a state that was given leads there
    del config["start"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names no start; it was saved by an earlier version"):
        start_of(folder, frozen)


def test_damage_is_refused_by_name_and_changed_weights_are_reported(folder: Path) -> None:
    stored, path = load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE
    save_file({**stored, "bridge.image.layers.3.bias": stored["bridge.image.layers.3.bias"] + 1}, path)
    with pytest.warns(UserWarning, match=r"have the digest \w{16}, and its config names \w{16}: was the file changed"):
        read_flat(folder)
    save_file({**stored, "bridge.image.layers.3.bias": stored["bridge.image.layers.3.bias"] / 0}, path)
    with pytest.raises(CheckpointError, match=r"bridge\.image\.layers\.3\.bias holds values that are not finite"):
        read_flat(folder)
    save_file({**stored, "other.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"unknown are \['other\.weight'\]"):
        read_flat(folder)
    save_file({name: value for name, value in stored.items() if not name.startswith("lora.")}, path)
    with pytest.raises(CheckpointError, match=r"no tensor of \['lora'\] is there"):
        read_flat(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_flat(folder)


def test_other_tensors_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", 3, {**METHODS, "lora": LoRA(rank=3)})
    flats = {"a": read_flat(folder), "b": read_flat(other)}
    with pytest.raises(CheckpointError, match=r"lora\.all\.0\.fc1\.down\.weight is \[2, 48\] in a and \[3, 48\] in b"):
        check_alike(flats)
    check_alike({"a": flats["a"], "again": flats["a"]})


def test_a_failed_write_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    flat, config = read_flat(folder), read_config(folder)
    with pytest.raises(TypeError):
        write_derived(tmp_path / "new", config, flat, derived_from("x", {"a": flat}, {"not": object()}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert parts_beside(folder) == []
    (folder / "vision").mkdir()
    assert parts_beside(folder) == ["an adapted encoder"]


def test_a_folder_of_an_earlier_version_is_read_without_what_it_lacks(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({name: value for name, value in config.items() if name not in ("start", "derived", "weights")}))
    read = read_config(folder)
    assert (read.start, read.derived, read.weights) == (None, {}, "")
    assert read == dataclasses.replace(read_config(folder), weights="x")  # the digest is of the file, not of what it says
    assert len(read_flat(folder).names) == len(load_file(folder / WEIGHTS_FILE))

"""`adalink compress` and `decompress`: every command reads the small folder as the large one; what is refused leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_run import adalink, refused
from safetensors.torch import load_file
from scenes_adapters import moved_adapter, trained_adapter

from adalink import AdaLink, Bridge, Method
from adalink.checkpoint.compressed import COMPRESSED_FILE
from adalink.checkpoint.folder import CONFIG_FILE, WEIGHTS_FILE
from adalink.lifecycle.compress import coded
from adalink.lifecycle.flat import read_flat
from multimodal.data.images.decode import decode_image
from tasks.captioning import Captioning
from tasks.commands.lifecycle.compress import TRIES_FILE
from tasks.commands.parser import parsed
from tasks.data.sources import DataConfig
from tasks.runs.compose import load_adapted
from tasks.runs.scored import ScoredAdapter
from tasks.scenes.dataset import Scenes
from tasks.serve.server import served_model
from tasks.serve.settings import ServeSettings

VAL = ("--data.val.scenes", "val/3", "--generation.max_new_tokens", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A caption adapter that was moved from its start by more than int4 loses."""
    methods: dict[str, Method] = {"bridge": Bridge(kind="mlp", hidden=32, init_scale=8.0), "adalink": AdaLink(rank=8, modalities=("image", "text"))}
    return moved_adapter(tmp_path_factory.mktemp("run") / "adapter", methods, Captioning())


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    out = folder.parent / "small"
    done = adalink("compress", folder, "--out", out)
    assert done.code == 0, done.err
    n_before, n_after = (folder / WEIGHTS_FILE).stat().st_size, (out / COMPRESSED_FILE).stat().st_size
    assert f"wrote {out} by int4: {n_before:,} -> {n_after:,} bytes" in done.out
    return out


def test_every_command_reads_a_compressed_folder_as_what_it_decompresses_to(small: Path, tmp_path: Path) -> None:
    assert adalink("decompress", small, "--out", tmp_path / "plain").code == 0
    assert not (tmp_path / "plain" / COMPRESSED_FILE).exists()
    assert not (small / WEIGHTS_FILE).exists()
    model, _ = load_adapted(small)
    stored = load_file(tmp_path / "plain" / WEIGHTS_FILE)
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.adapted.active_adapter().tensors().items())
    served = served_model(ServeSettings(), {"small": small, "plain": tmp_path / "plain"})
    images = [decode_image(sample.images[0]) for sample in (Scenes(split="val", size=2)[index] for index in range(2))]
    texts = served.generate([image for image in images for _ in "ab"], [""] * 4, adapter_names=["small", "plain"] * 2, max_new_tokens=6)
    assert texts[::2] == texts[1::2]
    assert len(set(texts)) == 2
    for folder in (small, tmp_path / "plain"):
        done = adalink("evaluate", "--adapter", folder, "--out", tmp_path / f"of-{folder.name}", *VAL)
        assert done.code == 0, done.err
    assert (tmp_path / "of-small" / "results.json").read_bytes() == (tmp_path / "of-plain" / "results.json").read_bytes()


def test_a_compressed_folder_says_what_it_was_made_of(folder: Path, small: Path) -> None:
    was, now = (json.loads((one / CONFIG_FILE).read_text()) for one in (folder, small))
    derived = now.pop("derived")
    assert derived == {"verb": "compress", "sources": [str(folder)], "digests": [was["weights"]], "settings": {"method": "int4", "start": "drawn"}}
    assert {**was, "weights": ""} == {**now, "weights": ""}
    assert was["weights"] != now["weights"]
    assert "adalink compress" in (small / "README.md").read_text()


def test_a_search_scores_every_method_and_takes_the_best_signs(folder: Path, tmp_path: Path) -> None:
    given = ("--search.scenes", "val/3", "--keeps", "[0.2, 0.5]", "--alphas", "[0.5, 1.5]")
    done = adalink("compress", folder, "--out", tmp_path / "best", "--method", "ternary", *given)
    assert done.code == 0, done.err
    tries = json.loads((tmp_path / "best" / TRIES_FILE).read_text())
    assert [one["method"] for one in tries] == ["none", "int8", "int4", *["ternary"] * 4]
    assert all(f"{one['CIDEr']:.2f}" in done.out for one in tries)
    best = max(tries[3:], key=lambda one: one["CIDEr"])
    settings = json.loads((tmp_path / "best" / CONFIG_FILE).read_text())["derived"]["settings"]
    assert (settings["keep"], settings["alpha"]) == (best["keep"], best["alpha"])
    assert (tmp_path / "best" / COMPRESSED_FILE).stat().st_size == best["bytes"]


def test_what_is_refused_ends_with_two_and_leaves_nothing(folder: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "is compressed already, by int4: decompress it first" in refused(adalink("compress", small, "--out", out))
    assert "is not compressed: it has no adapter_model.compressed" in refused(adalink("decompress", folder, "--out", out))
    assert "keep is 2.0: give the share" in refused(adalink("compress", folder, "--out", out, "--method", "ternary", "--keep", "2"))
    assert "alpha is -1.0: give a number above 0" in refused(adalink("compress", folder, "--out", out, "--alphas", "[-1]"))
    assert "is there already: give another --out" in refused(adalink("compress", folder, "--out", small))
    content = (small / COMPRESSED_FILE).read_bytes()
    (cut := tmp_path / "cut").mkdir()
    for file in small.iterdir():
        (cut / file.name).write_bytes(content[:-1] if file.name == COMPRESSED_FILE else file.read_bytes())
    assert f"{COMPRESSED_FILE} is damaged" in refused(adalink("decompress", cut, "--out", out))
    old = json.loads((folder / CONFIG_FILE).read_text())
    (cut / CONFIG_FILE).write_text(json.dumps({name: value for name, value in old.items() if name != "start"}))
    (cut / COMPRESSED_FILE).unlink()
    (cut / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes())
    sentence = refused(adalink("compress", cut, "--out", out))
    assert "names no start" in sentence
    assert "or --start zero, which loses more" in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut"]
    assert adalink("compress", cut, "--out", out, "--start", "zero").code == 0  # which is offered for it


@pytest.mark.parametrize("method", ["stack", "average"])
def test_a_merge_of_compressed_adapters_is_that_of_what_they_decompress_to(folder: Path, small: Path, tmp_path: Path, method: str) -> None:
    for out, given in (("signs", ("--method", "ternary")), ("int8", ("--method", "int8"))):
        assert adalink("compress", folder, "--out", tmp_path / out, *given).code == 0
        assert adalink("decompress", tmp_path / out, "--out", tmp_path / f"plain-{out}").code == 0
    merged = {}
    for prefix in ("", "plain-"):
        done = adalink("merge", tmp_path / f"{prefix}signs", tmp_path / f"{prefix}int8", "--method", method, "--out", tmp_path / f"{prefix}merged")
        assert done.code == 0, done.err
        merged[prefix] = load_file(tmp_path / f"{prefix}merged" / WEIGHTS_FILE)
    assert merged[""].keys() == merged["plain-"].keys()
    assert all(torch.equal(tensor, merged["plain-"][name]) for name, tensor in merged[""].items())


@pytest.mark.slow
def test_a_trained_caption_adapter_is_nearly_as_good_in_four_bits_and_not_where_its_start_is_taken_for_zeros(tmp_path: Path) -> None:
    folder, start = trained_adapter(tmp_path, "captioning")
    scored, flat = ScoredAdapter.load(folder, DataConfig(scenes="val/100")), read_flat(folder)
    whole = scored.answers().value
    given = {
        "int4": coded(flat, start), "ternary": coded(flat, start, method="ternary", keep=0.5, alpha=1.5),
        "zero": coded(flat, None, method="ternary", keep=0.5, alpha=1.0),
    }  # fmt: skip
    shares = {name: scored.answers(done.weights).value / whole for name, done in given.items()}
    assert shares["int4"] > 0.97
    assert shares["ternary"] > 0.85
    assert shares["zero"] < 0.6


def test_a_data_set_is_given_by_its_path_where_an_option_names_one() -> None:
    assert parsed(["compress", "a", "--out", "b", "--search", "x.csv"])[2].search.path == "x.csv"
    assert parsed(["port", "a", "--out", "b", "--language_model", "c", "--data", "x.csv"])[2].data.path == "x.csv"
    assert parsed(["merge", "a", "b", "--out", "c", "--search", "x"])[2].search == [Path("x")]  # the control: there it names runs

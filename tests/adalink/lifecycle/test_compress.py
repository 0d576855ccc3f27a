"""Compressed adapters: the authors' signs and sizes, codes that give every bit back or are refused by name, folders that every reader takes."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shared import fixtures
from tiny import INPUTS, excite, tiny
from torch import Tensor

from adalink import AdaLink, AdaptedModel, Bridge, LoRA, Method
from adalink.checkpoint.compressed import COMPRESSED_FILE, Code, decode_signs, encode_signs, read_compressed
from adalink.checkpoint.folder import CONFIG_FILE, WEIGHTS_FILE, read_config
from adalink.errors import CheckpointError, ConfigError
from adalink.lifecycle.compress import coded, compress, decompress, size_of_change, strongest
from adalink.lifecycle.flat import read_flat, start_of, write_derived

# ----------------------------------------
# The authors' functions.


def test_signs_and_sizes_are_the_authors() -> None:
    folder = fixtures("compeft")
    for file in sorted(folder.glob("*.json")):
        facts, tensors = json.loads(file.read_text()), load_file(file.with_suffix(".safetensors"))
        names = sorted(name for name in tensors if name.startswith("adapter."))
        change = torch.cat([tensors[name].flatten() for name in names])
        assert float(change.std()) == pytest.approx(facts["std_unbiased"], rel=1e-12)
        for k in facts["ks_percent"]:
            signs = strongest(change, k / 100)
            assert torch.equal(signs, tensors[f"k{k}.signs"])
            expected = facts["facts"][str(k)]
            code = encode_signs(signs)
            assert code.n == expected["kept"]
            smallest = min(expected["rice_bits"], expected["bitmap_and_signs_bits"])
            assert math.ceil(smallest / 8) == len(code.bits)
            for alpha in (alpha for alpha in facts["alphas"] if alpha > 0 or alpha == -1):  # -1: the values stay; -2, a signed mean, is not offered
                ours = signs.double() * size_of_change(change, alpha) if alpha > 0 else change * signs.abs()
                theirs = torch.cat([tensors[f"k{k}.alpha{alpha}.{name.removeprefix('adapter.')}"].flatten() for name in names])
                assert (ours - theirs).abs().max() < 1e-12
                error = torch.linalg.vector_norm(theirs - change) / torch.linalg.vector_norm(change)
                assert float(error) == pytest.approx(expected["relative_l2_error"][str(alpha)], rel=1e-9)


def test_an_ia3_adapter_starts_at_one_and_what_is_dropped_is_one_exactly() -> None:
    tensors = load_file(fixtures("compeft") / "lora.safetensors")
    names = sorted(name.removeprefix("ia3.adapter.") for name in tensors if name.startswith("ia3.adapter."))
    trained = torch.cat([tensors[f"ia3.adapter.{name}"] for name in names])
    found = {tuple(name.removeprefix("ia3.k").split(".layers")[0].split(".alpha")) for name in tensors if name.startswith("ia3.k")}
    assert found
    for k, alpha in found:
        signs = strongest(trained - 1, float(k) / 100)
        ours = 1 + signs.double() * size_of_change(trained - 1, float(alpha))
        theirs = torch.cat([tensors[f"ia3.k{k}.alpha{alpha}.{name}"] for name in names])
        assert (ours - theirs).abs().max() < 1e-12
        assert bool((ours[signs == 0] == 1).all())


@pytest.mark.parametrize(("keep", "n"), [(1.0, 100), (0.29, 30), (0.5, 51), (0.001, 1)])
def test_one_more_than_the_share_stays(keep: float, n: int) -> None:
    assert int((strongest(torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64), keep) != 0).sum()) == n


def test_equal_magnitudes_all_stay() -> None:
    change = torch.tensor([2.0, -2.0, 2.0, 0.0], dtype=torch.float64)
    assert strongest(change, 0.25).tolist() == [1, -1, 1, 0]


# ----------------------------------------
# The code of the signs.


def signs_of(size: int, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(size, generator=generator) < density
    return (kept * (2 * torch.randint(0, 2, (size,), generator=generator) - 1)).to(torch.int8)


@given(st.integers(1, 3000), st.floats(0.001, 1), st.integers(0, 2**31))
def test_every_sign_comes_back(size: int, density: float, seed: int) -> None:
    signs = signs_of(size, density, seed)
    assert torch.equal(decode_signs(encode_signs(signs), size, "T"), signs)


@pytest.mark.parametrize(
    "signs",
    [
        torch.zeros(9, dtype=torch.int8), torch.ones(9, dtype=torch.int8), torch.tensor([0] * 8 + [-1], dtype=torch.int8), torch.ones(1, dtype=torch.int8),
        torch.zeros(1, dtype=torch.int8), signs_of(1_000_000, 0.001, 1), signs_of(1_000_000, 0.2, 2), torch.cat([torch.zeros(10**6), torch.ones(1)]).to(torch.int8),
    ],
)  # fmt: skip
def test_the_ends_and_the_large_come_back(signs: Tensor) -> None:
    assert torch.equal(decode_signs(encode_signs(signs), len(signs), "T"), signs)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("size", [10_000, 200_000])
def test_a_code_is_hardly_longer_than_what_the_signs_say(size: int, density: float) -> None:
    signs = signs_of(size, density, 3)
    d = float((signs != 0).double().mean())
    entropy = size * (-d * math.log2(d) - (1 - d) * math.log2(1 - d) + d)
    code = encode_signs(signs)
    assert entropy - 8 < 8 * len(code.bits) <= 1.02 * entropy + 8
    plain = min(size * 2, size + int(d * size))  # the control: two bits an entry, or a bitmap, is longer where few entries have a sign
    assert density == 0.5 or plain > 1.1 * entropy


# ----------------------------------------
# Folders.

METHODS: dict[str, Method] = {"adalink": AdaLink(rank=4, modalities=("text", "image"), bias=True), "bridge": Bridge(kind="mlp", hidden=8), "lora": LoRA(rank=2)}
SETTINGS: list[dict[str, Any]] = [{}, {"method": "int8"}, {"method": "ternary"}, {"method": "ternary", "keep": 0.05, "alpha": 3.0}]


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    return AdaptedModel(tiny("opt"), inputs=INPUTS)


@pytest.fixture(scope="module")
def folder(model: AdaptedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained from seed 3."""
    torch.manual_seed(3)
    excite(model.add_adapter("one", METHODS), 3, 0.05)
    model.save_pretrained(path := tmp_path_factory.mktemp("trained") / "adapter")
    model.delete_adapter("one")
    return path


def weights(model: AdaptedModel, path: Path) -> dict[str, Tensor]:
    """Those that loading the folder gives."""
    loaded = {name: tensor.detach().clone() for name, tensor in model.load_adapter(path, "loaded").tensors().items()}
    model.delete_adapter("loaded")
    return loaded


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_compressed_folder_loads_as_what_it_decompresses_to(model: AdaptedModel, folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    done = compress(folder, tmp_path / "small", start=start_of(folder, model), **settings)
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["README.md", "adalink_config.json", COMPRESSED_FILE]
    assert len(done.content) == (tmp_path / "small" / COMPRESSED_FILE).stat().st_size
    trained, start, loaded = weights(model, folder), start_of(folder, model).tensors(), weights(model, tmp_path / "small")
    assert all(torch.equal(loaded[name], done.weights[name]) for name in trained)
    change, error = (torch.cat([(one[name] - start[name]).flatten() for name in trained]) for one in (trained, loaded))
    assert float((error - change).norm() / change.norm()) == pytest.approx(done.error, abs=1e-4)
    model.load_adapter(tmp_path / "small", "again")
    model.save_pretrained(tmp_path / "saved")
    model.delete_adapter("again")
    decompress(tmp_path / "small", tmp_path / "plain", model)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert all(path.read_bytes() == (tmp_path / "saved" / path.name).read_bytes() for path in (tmp_path / "plain").iterdir())


def test_a_change_that_is_counted_from_zeros_needs_no_start_and_is_further_off(model: AdaptedModel, folder: Path, tmp_path: Path) -> None:
    errors = {}
    for method in ("int4", "ternary"):
        done = compress(folder, tmp_path / method, method=method, start=None)
        assert all(torch.equal(tensor, done.weights[name]) for name, tensor in read_flat(tmp_path / method).tensors().items())
        trained = read_flat(folder).vector
        change = trained - start_of(folder, model).vector
        errors[method] = float((read_flat(tmp_path / method).vector - trained).norm() / change.norm())
        assert errors[method] > 1.5 * coded(read_flat(folder), start_of(folder, model), method=method).error


def test_one_byte_that_is_another_or_is_missing_is_refused_by_name(model: AdaptedModel, folder: Path, tmp_path: Path) -> None:
    model.add_adapter("small", {"lora": LoRA(rank=1, targets=("q_proj",))})
    excite(model.active_adapter())
    model.save_pretrained(tmp_path / "trained")
    model.delete_adapter("small")
    start = start_of(tmp_path / "trained", model)
    for method in ("int4", "ternary"):
        file = tmp_path / method / COMPRESSED_FILE
        compress(tmp_path / "trained", tmp_path / method, method=method, start=start)
        content, expected = file.read_bytes(), read_compressed(file)
        for at in range(-1, len(content), 5):  # -1: the control
            file.write_bytes(content if at == -1 else content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with contextlib.nullcontext() if at == -1 else pytest.raises(CheckpointError, match=re.escape(str(file))):
                found = read_compressed(file)
                if found.start != expected.start:  # which the folder's config is compared with
                    raise CheckpointError(str(file))
                found.weights(start.tensors(), file)
        for n in (0, 7, 8, 100, len(content) - 1):
            file.write_bytes(content[:n])
            with pytest.raises(CheckpointError, match=f"{COMPRESSED_FILE} is damaged"):
                weights(model, tmp_path / method)


def test_a_code_that_ends_early_or_goes_on_or_leaves_its_tensor_is_refused() -> None:
    signs = signs_of(5000, 0.1, 1)
    code = encode_signs(signs)
    for bits, n, size, stated in [
        (code.bits[:100], code.n, 5000, rf"T.code ends after \d+ of {code.n} gaps"),
        (code.bits[:-1], code.n, 5000, rf"T.code ends after \d+ of {code.n} gaps"),
        (code.bits, code.n + 9, 5000, rf"T.code ends after \d+ of {code.n + 9} gaps"),
        (torch.cat([code.bits, code.bits[:1]]), code.n, 5000, f"T.code goes on after its {code.n} gaps"),
        (code.bits, code.n, 4000, r"T.code goes to entry 4,\d+ of 4,000"),
    ]:
        with pytest.raises(CheckpointError, match=stated):
            decode_signs(Code(n, code.parameter, bits), size, "T")


def test_what_cannot_be_compressed_is_refused_and_nothing_is_written(model: AdaptedModel, folder: Path, tmp_path: Path) -> None:
    start, out = start_of(folder, model), tmp_path / "out"
    compress(folder, tmp_path / "small", start=start)
    refusals: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "small", {}, "is compressed already, by int4: decompress it first"),
        (folder, {"keep": 0.0}, "keep is 0.0: give the share of the weights that change, above 0 and up to 1"),
        (folder, {"keep": 1.5}, "keep is 1.5"),
        (folder, {"alpha": 0.0}, "alpha is 0.0: give a number above 0"),
        (folder, {"alpha": math.nan}, "alpha is nan"),
        (folder, {"start": read_flat(folder)}, "equals its start, so there is nothing to compress"),
    ]
    for source, settings, stated in refusals:
        with pytest.raises((ConfigError, CheckpointError), match=stated):
            compress(source, out, **{"start": start, **settings})
    shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["bridge.project.0.weight" if "bridge.project.0.weight" in tensors else next(iter(tensors))][0] = math.nan
    save_file(tensors, tmp_path / "broken" / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="holds values that are not finite"):
        compress(tmp_path / "broken", out, start=start)
    with pytest.raises(CheckpointError, match=r"is not compressed: it has no adapter_model\.compressed"):
        decompress(folder, out, model)
    with pytest.raises(CheckpointError, match="holds changes of a start that is drawn on the frozen model: decompress it first"):
        read_flat(tmp_path / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "small"]


def test_another_start_is_refused(model: AdaptedModel, folder: Path, tmp_path: Path) -> None:
    compress(folder, tmp_path / "small", start=start_of(folder, model))
    file = tmp_path / "small" / CONFIG_FILE
    content = json.loads(file.read_text())
    for start, stated in [
        ({**content["start"], "seed": 4}, "the start of the adapter cannot be drawn again: seed 4"),
        ({"seed": 4, "digest": "0" * 16}, f"holds changes of the start {content['start']['digest']}, and its config names {'0' * 16}"),
        (None, "and its config names None"),
    ]:
        file.write_text(json.dumps({**content, "start": start}))
        with pytest.raises(CheckpointError, match=stated):
            weights(model, tmp_path / "small")


def test_scales_that_float16_does_not_hold_are_in_float32(model: AdaptedModel, folder: Path) -> None:
    flat, start = read_flat(folder), start_of(folder, model)
    for factor in (1e-7, 1e7):
        far = flat.over(start.vector + factor * (flat.vector - start.vector))
        assert coded(far, start, method="int8").error < 0.02


def test_the_folder_says_the_true_share_where_many_changes_are_as_large(folder: Path, tmp_path: Path) -> None:
    flat = read_flat(folder)
    change = torch.zeros_like(flat.vector)
    change[::4] = 0.5  # a quarter of the weights, each by as much, of which half are asked for
    write_derived(tmp_path / "ties", read_config(folder), flat.over(change), {})
    done = compress(tmp_path / "ties", tmp_path / "small", method="ternary", keep=0.125, start=None)
    share = float((change != 0).double().mean())
    assert done.density == share
    assert read_config(tmp_path / "small").derived["settings"]["changed"] == share

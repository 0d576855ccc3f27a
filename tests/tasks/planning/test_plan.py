"""`adalink compose` and `adalink train --dry-run`: what would be built, said before anything is loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import FIXED, RECIPES, WIDTH, Files, adalink, refused, train
from quantiser import find_torchao, held_bytes
from shared import ROOT
from tiny import tiny
from transformers import LlamaConfig

from adalink.checkpoint.precision import Precision, settle
from tasks.planning.plan import size
from tasks.planning.precisions import cast_as, weight_bytes

PARTS = ("--encoder", "scenes:encoder", "--language_model", "scenes:language")
ADALINK = ("--methods.adalink", "{rank: 4, modalities: [text]}")


def plan(*arguments: object) -> dict[str, Any]:
    """What `compose --json` says."""
    done = adalink("compose", *PARTS, "--json", *arguments)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_a_plan_counts_what_a_run_then_trains(tmp_path: Path) -> None:
    planned = plan("--config", RECIPES["captioning"], *FIXED)
    assert train("captioning", tmp_path / "run").code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {method["name"]: method["trained"] for method in planned["methods"]} == metrics["trained_parameters"]
    saved = json.loads((tmp_path / "run" / "adapter" / "adalink_config.json").read_text())["base"]
    assert {role: planned[role]["fingerprint"] for role in saved} == {role: part["fingerprint"] for role, part in saved.items()}


def test_memory_is_that_of_weights_gradients_and_moments() -> None:
    found = plan(*ADALINK)
    trained = 2 * 4 * WIDTH
    assert found["trained"] == trained
    memory = found["memory_to_train"]
    assert memory["frozen weights"] == found["encoder"]["bytes"] + found["language_model"]["bytes"] == 4 * found["frozen"]
    assert (memory["gradients"], memory["optimizer state"]) == (4 * trained, 8 * trained)
    assert plan(*ADALINK, "--train.batch_size", "32")["memory_to_train"]["activations, estimated"] > memory["activations, estimated"]
    assert plan(*ADALINK, "--train.checkpointing", "true")["memory_to_train"]["activations, estimated"] < memory["activations, estimated"]
    assert plan(*ADALINK, "--generation.num_beams", "3")["memory_to_serve"]["cache of one row, estimated"] == 3 * found["memory_to_serve"]["cache of one row, estimated"]


def test_a_trained_encoder_keeps_activations_of_its_own() -> None:
    lora = ("--vision_methods.lora", '{"groups": {"image": ["image"]}, "rank": 2, "alpha": 4}')
    what = "activations of the encoder, estimated"
    adapted, frozen = plan(*ADALINK, *lora)["memory_to_train"], plan(*ADALINK)["memory_to_train"]
    assert what not in frozen
    assert adapted["activations, estimated"] == frozen["activations, estimated"]
    assert plan(*ADALINK, *lora, "--train.batch_size", "32")["memory_to_train"][what] > 1.9 * adapted[what] > 0
    assert what in adalink("compose", *PARTS, *ADALINK, *lora).out


def test_states_of_texts_are_counted_and_refused_where_a_run_would_refuse_them() -> None:
    deep = ("--methods.epalm", '{"layers": [1, 2], "n_taps": 1, "connector": "shared"}')
    assert plan(*deep, "--train.states_gib", "0.5")["memory_to_train"]["cached states of texts, at most"] == 2**29
    assert "cached states of texts, at most" not in plan(*deep)["memory_to_train"]
    refused = adalink("compose", *PARTS, *ADALINK, "--train.states_gib", "0.5")
    assert refused.code == 2
    assert "adalink.text acts on what enters the layers: give train.states_gib: 0" in refused.err


def test_the_text_of_a_plan_says_it_all() -> None:
    done = adalink("compose", *PARTS, "--methods.bridge.kind", "linear", *ADALINK)
    assert done.code == 0
    for stated in (
        "fingerprint ", "adalink       1,024 trained", "embedding, for text, answer", "36 per image; slots of a row: 36 image; prompt: 1 words of an empty question",
        "memory to train about ", "activations, estimated", "memory to serve about ",
    ):  # fmt: skip
        assert stated in done.out


@pytest.mark.parametrize(("n", "stated"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**29, "2.5 GiB"), (3 * 2**50, "3072.0 TiB")])
def test_sizes_are_written_in_powers_of_1024(n: int, stated: str) -> None:
    assert size(n) == stated


def test_a_dry_run_loads_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = adalink("train", "--dry-run", "--config", RECIPES["vqa"], "--out", out)
    assert done.code == 0
    assert "data.train: 2,000 images, 0 known to be bad; the first one can be read" in done.out
    assert "nothing was loaded, trained or written" in done.out
    assert not out.exists()


def test_a_dry_run_checks_the_data_that_is_given_and_says_what_is_not(tmp_path: Path) -> None:
    files = Files(tmp_path / "files")
    half = ("train", "--dry-run", "--task", "captioning", *PARTS, *ADALINK, *files.as_data("val"), "--data.train.image_name", "x{image_id}.jpg")
    done = adalink(*half)
    assert done.code == 0, done.err
    assert "data.train: not given, and not checked" in done.out
    assert "data.val: 6 images, 0 known to be bad; the first one can be read" in done.out
    files.image(0).write_bytes(b"no image")  # a run leaves it out
    assert "data.val: 6 images, 1 known to be bad; number 2 can be read" in adalink(*half).out
    (tmp_path / "files" / "captions.json").unlink()
    assert "captions.json does not exist" in refused(adalink(*half))


def test_a_dry_run_of_a_taken_run_folder_is_refused_as_the_run_is(tmp_path: Path) -> None:
    dry = ("train", "--dry-run", *PARTS, *ADALINK, "--out")
    assert f"run folder: {tmp_path} (is there already, and empty)" in adalink(*dry, tmp_path).out
    (tmp_path / "file").touch()
    for json_too in ((), ("--json",)):
        assert f"the run folder {tmp_path} is there already" in refused(adalink(*dry, tmp_path, *json_too))
    assert f"cannot be made: {tmp_path / 'file'} is no folder" in refused(adalink(*dry, tmp_path / "file" / "run"))


def spoil_images(files: Files) -> None:
    for i in range(files.n):
        files.image(i).write_bytes(b"no image")


def spoil_two_images(files: Files) -> None:
    for i in range(2):
        files.image(i).unlink()


def take_captions(files: Files) -> None:
    for annotation in files.captions["annotations"]:
        annotation["caption"] = " "
    files.save()


DISAGREED = [
    ("train", spoil_images, 10, "none of the 6 images can be used"),
    ("val", spoil_images, 10, "none of the 6"),
    ("train", spoil_images, 3, " not an image ("),
    ("train", spoil_two_images, 1, "2 bad samples, and at most 1 is allowed: "),
    ("train", take_captions, 10, "gives no sample"),
    ("val", spoil_two_images, 1, "2 bad samples, and at most 1 is allowed: "),
]


@pytest.mark.parametrize(("split", "spoil", "budget", "expected"), DISAGREED, ids=[f"{split}-{spoil.__name__}-{budget}" for split, spoil, budget, _ in DISAGREED])
def test_a_dry_run_refuses_what_the_run_refuses(split: str, spoil: Callable[[Files], None], budget: int, expected: str, tmp_path: Path) -> None:
    files = Files(tmp_path / "files")
    spoil(files)
    options = (*files.as_data(split), "--train.bad_samples", str(budget))
    for dry in (("--dry-run", *(() if split == "train" else ("--json",))), ()):
        assert expected in refused(train("captioning", tmp_path / "run", *options, *dry)), dry
    assert not (tmp_path / "run").exists()


BAD = [
    (("compose", *ADALINK), "encoder and language_model are not given: name both frozen parts"),
    (("compose", "--encoder", "scenes:encoder", *ADALINK), "language_model is not given: name both frozen parts"),
    (("compose", *PARTS), "the config names no method: under `methods:`, give one or more of"),
    (("compose", *PARTS, *ADALINK, "--text_tokens", "0"), "text_tokens is 0: give 1 or more"),
    (("compose", *PARTS, *ADALINK, "--cards", "0"), "cards is 0: give 1 or more"),
    (("compose", *PARTS, *ADALINK, "--layer", "-9"), "layer=-9 is not in the encoder"),
    (("compose", *PARTS, "--methods.adalink.rank", "4"), "methods.adalink.modalities is not given, and has no default"),
    (("compose", *PARTS, "--methods.adalink", "{rank: 0, modalities: [text]}"), "AdaLink's rank is 0: give 1 or more"),
    (("compose", *PARTS, "--methods.adalnk.rank", "4"), "there is no setting methods.adalnk"),
    (("compose", *PARTS, *ADALINK, "--train.learning_rates", "{lora: 0.1}"), "train.learning_rates names lora, and this adapter's methods are adalink"),
    (("compose", *PARTS, *ADALINK, "--train.stages", "[{trains: [prefx]}]"), "train.stages names prefx, and this adapter's methods are adalink"),
    (("compose", "--encoder", "scenes:encodr", "--language_model", "scenes:language", *ADALINK), "there is no embedded part 'scenes:encodr'"),
    (("compose", "--encoder", "scenes:encoder", "--language_model", "no-such-lm", *ADALINK), "cannot load the language model 'no-such-lm'"),
    (("compose", *PARTS, "--methods.adalink", "{rank: 4, modalities: [image]}"), "is for image tokens, and rows of this model"),
    (("compose", *PARTS, "--methods.epalm", "{layers: [0, 99], n_taps: 1, connector: shared}"), "are outside this model, which has"),
    (("train", "--dry-run", *PARTS, *ADALINK, "--resume"), "--dry-run builds nothing and --resume goes on with what was built: give one of them"),
    (("train", "--dry-run", *PARTS, *ADALINK, "--data", "null"), "data is null: expected settings by name under it"),
    (("train", "--dry-run", *PARTS, *ADALINK, "--data.val.images", "/nowhere"), "the images in /nowhere come without texts"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[expected[:40] for _, expected in BAD])
def test_a_bad_plan_is_one_sentence(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refused(adalink(*arguments))


def test_training_still_needs_its_data() -> None:
    assert "data" in refused(adalink("train", "--task", "captioning", *PARTS, *ADALINK))


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word() -> None:
    command = f"{sys.executable} -c 'from adalink.__main__ import entry; entry()' --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == ""
    assert done.stdout == "141\n"


def test_weights_are_counted_in_each_precision_and_as_the_config_holds_them() -> None:
    plain = plan(*ADALINK)["language_model"]
    assert plain["in_memory"]["float32"] == 2 * plain["in_memory"]["bfloat16"] == plain["bytes"]
    assert plain["in_memory"]["bfloat16 nf4"] < plain["in_memory"]["bfloat16 int8"] < plain["in_memory"]["bfloat16"]
    held = plan(*ADALINK, "--base.language_model.dtype", "bfloat16", "--base.language_model.quantise", "nf4", "--base.encoder.dtype", "bfloat16")
    assert (held["language_model"]["dtype"], held["encoder"]["dtype"]) == ("bfloat16 nf4", "bfloat16")
    assert held["language_model"]["bytes"] == plain["in_memory"]["bfloat16 nf4"]
    assert held["memory_to_train"]["frozen weights"] == held["language_model"]["bytes"] + held["encoder"]["bytes"]
    assert held["memory_to_train"]["activations, estimated"] < plan(*ADALINK)["memory_to_train"]["activations, estimated"]
    assert held["language_model"]["fingerprint"] == plain["fingerprint"]


def test_memory_on_each_of_several_cards() -> None:
    one, four = plan(*ADALINK), plan(*ADALINK, "--cards", "4")
    assert one["memory_per_card"] == {}
    assert four["memory_per_card"]["DDP"] == sum(four["memory_to_train"].values())
    assert sum(four["memory_to_train"].values()) - four["frozen"] * 4 < four["memory_per_card"]["FSDP2"] < four["memory_per_card"]["DDP"]
    quantised = adalink("compose", *PARTS, *ADALINK, "--cards", "4", "--base.language_model.quantise", "int8").out
    assert re.search(r"on each of 4 cards: about DDP .* \(FSDP2 refuses this training\)", quantised)


def test_an_8b_base_is_counted_in_each_precision_without_its_weights(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    done = adalink("compose", "--encoder", "scenes:encoder", "--language_model", tmp_path, "--methods.bridge.kind", "linear", "--text_tokens", "4")
    assert done.code == 0, done.err
    assert "8,030,261,248 frozen parameters in bfloat16 (15.0 GiB)" in done.out
    assert "in memory: float32 29.9 GiB, bfloat16 15.0 GiB, bfloat16 int8 8.5 GiB, bfloat16 nf4 5.3 GiB" in done.out


@pytest.mark.parametrize("precision", ["bfloat16", "float32 int8", "bfloat16 int8", "float32 nf4", "bfloat16 nf4", "float32 fp8"])
def test_the_bytes_counted_are_those_that_quantised_weights_hold(precision: str) -> None:
    find_torchao()
    chosen, real = Precision.of(precision), tiny("llama").float()
    with torch.device("meta"):
        drawn = type(real)(real.config).float()
    cast_as(drawn, chosen)
    counted = weight_bytes(drawn, chosen.quantiser)
    settle(real, chosen, "x")
    assert counted == {name: held_bytes(weight) for name, weight in real.named_parameters()}

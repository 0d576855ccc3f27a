"""Plans and methods of models that see already: what is printed is what would be built, and no weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import adalink, refused
from existing_families import MADE
from PIL import Image

from adalink import AdaLink, LoRA, Prompt
from multimodal.model import TrainedParts, VisionLanguageModel
from tasks.captioning import Captioning

METHODS = ("--methods.adalink", "{rank: 3, modalities: [image, text]}", "--methods.prompt.length", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each model its config and its processor; the weights are left out."""
    found = {}
    for name in ("llava", "qwen2_vl"):
        found[name] = tmp_path_factory.mktemp(name)
        with torch.device("meta"):
            model, processor = MADE[name]()
        model.config.save_pretrained(found[name])
        processor.save_pretrained(found[name])
    return found


def planned(folder: Path, *given: object) -> dict[str, Any]:
    done = adalink("compose", "--model", folder, *METHODS, *given, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "given", "own"),
    [
        ("llava", ("--connector_methods.lora", "{rank: 2}"), {"connector_methods": {"lora": LoRA(rank=2)}}),
        ("qwen2_vl", ("--connector", "trained"), {"connector": "trained"}),
    ],
)
def test_a_plan_counts_what_the_model_would_have(name: str, given: tuple[str, ...], own: Any, folders: dict[str, Path]) -> None:
    plan = planned(folders[name], "--image_size", "70x24", *given)
    torch.manual_seed(0)
    made, processor = MADE[name]()
    model = VisionLanguageModel.from_model(made.eval(), processor, template=Captioning().words_for(True))
    model.add_adapter("one", {"adalink": AdaLink(rank=3, modalities=("image", "text")), "prompt": Prompt(length=2)}, **own)
    assert {method["name"]: method["trained"] for method in plan["methods"]} == TrainedParts.of(model).counts()
    assert plan["frozen"] == sum(parameter.numel() for parameter in made.parameters())
    tower = sum(parameter.numel() for parameter in made.get_encoder(modality="image").parameters())
    between = made.model.multi_modal_projector if name == "llava" else made.model.visual.merger
    connector = sum(parameter.numel() for parameter in between.parameters())
    assert (plan["encoder"]["parameters"], plan["connector"]["parameters"]) == (tower - (0 if name == "llava" else connector), connector)
    image = model.tower.preprocess(Image.new("RGB", (70, 24)))
    assert plan["tokens_per_image"] == image.n_vectors
    row = model.row_encoder().prompt("", image)
    assert plan["prompt_tokens"] + sum(plan["slots"].values()) == len(row.ids)
    assert plan["slots"] == {"prompt": 2, "image": image.n_vectors}


def test_a_plan_for_a_reader_names_the_parts_and_the_bounds_of_tokens(folders: dict[str, Path]) -> None:
    done = adalink("train", "--dry-run", "--model", folders["qwen2_vl"], *METHODS, "--image_tokens.max", "6", "--image_size", "300x20")
    assert done.code == 0, done.err
    assert "tower           Qwen2VisionTransformerPretrainedModel, 20,160 frozen parameters in float32" in done.out
    assert "connector       PatchMerger, 20,704 frozen parameters in float32" in done.out
    assert "language model  " in done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith("tokens")]
    assert " per image of 300 x 20; slots of a row: 2 prompt, " in line
    assert int(line.split()[1]) <= 6


def test_methods_are_counted_on_the_language_model_and_each_part_says_what_acts_on_it(folders: dict[str, Path]) -> None:
    done = adalink("methods", "--model", folders["llava"])
    assert done.code == 0, done.err
    assert f"{folders['llava']}: LlavaForConditionalGeneration" in done.out
    assert "  language model: `methods`; 2 layers of width 32; " in done.out
    assert "  tower: `vision_methods`; CLIPVisionModel" in done.out
    linears = "2 linears for `connector_methods`: multi_modal_projector.linear_1, multi_modal_projector.linear_2"
    assert f"  connector: `connector: trained`; {linears}; LlavaMultiModalProjector" in done.out
    other = adalink("methods", "--model", folders["qwen2_vl"])
    assert "  tower: no method; Qwen2VisionTransformerPretrainedModel has no convolution" in other.out
    assert "  connector: `connector: trained`; 2 linears for `connector_methods`: merger.mlp.0, merger.mlp.2; PatchMerger" in other.out


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--image_size", "wide"), "image_size is 'wide': give width and height in pixels, such as 640x480"),
        (("--encoder", "scenes:encoder"), "model and encoder were given"),
        (("--image_tokens.max", "3"), "image_tokens allows at most 3 tokens, and the processor of "),
        (("--layer", "-2"), "layer was given with model: a model that sees already has its own features"),
        (("--connector", "trained", "--connector_methods.lora", "{}"), "connector is trained, and connector_methods (lora) would act on its frozen weights"),
        (("--connector", "trained", "--train.features", "memory"), "train.features is memory, and features of a trained connector change with every step"),
        (("--connector_methods.prompt.length", "2"), "prompt adds tokens to a row, and a connector reads none: choose lora, hira, ia3 or bitfit"),
    ],
)
def test_what_a_run_would_refuse_is_refused(given: tuple[str, ...], sentence: str, folders: dict[str, Path]) -> None:
    assert refused(adalink("compose", "--model", folders["llava"], *METHODS, *given)).startswith(sentence)


def test_a_bridge_is_refused(folders: dict[str, Path]) -> None:
    sentence = "a bridge needs an encoder's features, and this model has none"
    assert refused(adalink("compose", "--model", folders["llava"], "--methods.bridge.kind", "linear")).startswith(sentence)


def test_the_language_model_and_the_tower_are_quantised_apart(folders: dict[str, Path]) -> None:
    plain = planned(folders["llava"], "--cards", "2")
    base = ("--base.language_model.dtype", "bfloat16", "--base.encoder.quantise", "int8")
    held = planned(folders["llava"], *base, "--cards", "2")
    assert (held["encoder"]["dtype"], held["language_model"]["dtype"]) == ("bfloat16 int8", "bfloat16")
    for part in ("encoder", "language_model"):
        assert held[part]["bytes"] == plain[part]["in_memory"][held[part]["dtype"]]
    assert held["memory_to_train"]["frozen weights"] == sum(held[part]["bytes"] for part in ("encoder", "connector", "language_model"))
    assert list(plain["memory_per_card"]) == ["DDP", "FSDP2"]
    assert list(held["memory_per_card"]) == ["DDP"]
    assert "give one of them for both, or one alone" in refused(
        adalink("compose", "--model", folders["llava"], *METHODS, "--base.encoder.quantise", "int8", "--base.language_model.quantise", "nf4")
    )

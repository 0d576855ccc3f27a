"""The recipes under examples/: each is read, checked and dry-run in its true size, and trains as many parameters as was published."""

from __future__ import annotations

import contextlib
import io
import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from published_shapes import SHAPES, shape_folder

from adalink import Bridge
from multimodal.data.feature_cache.format import Contents, needed_contents
from tasks.cli import main
from tasks.planning.meta import draw_adapter, draw_language, draw_tower
from tasks.runs.config import RunConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))

# Trained parameters by method, of the recipes that name their parts. eP-ALM's are the paper's own (ePALM_pt-L); the others follow from the methods' formulas, here written out.
LAYER_OF_QWEN = 2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864)  # in + out of q, o; k, v; gate, up, down
TRAINED = {
    "coco_epalm.yaml": {"epalm": 4_198_400, "prompt": 40_960},
    "coco_context_peft.yaml": {
        "bridge": 2 * 1024 + 1024 * 896 + 896 * 896 + 2 * 896,
        "lora": 2 * 24 * 8 * LAYER_OF_QWEN,
    },
    "vqav2_adalink.yaml": {"bridge": 2 * 1024 + (1024 + 1) * 2048 + (2048 + 1) * 2048, "adalink": 2 * 2 * 2048 * 64},
    # UniPELT's published total has the prefix as a table, which a network of 512 makes while it is trained.
    "vqav2_bert.yaml": {
        "bridge": 2 * 1024 + (1024 + 1) * 768 + (768 + 1) * 768,
        "unipelt": 1_410_672 - 10 * 12 * 2 * 768 + 10 * 768 + (768 + 1) * 512 + (512 + 1) * 12 * 2 * 768,
        "head": (768 + 1) * 3129,
    },
    "coco_paligemma.yaml": {"adalink": 2 * 2 * 2304 * 64},
    "vqav2_smolvlm.yaml": {"adalink": 2 * 2 * 576 * 16, "lora": 2 * 30 * 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))},
    "coco_qwen25vl.yaml": {"lora": 2 * 36 * 8 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008))},
    "cached_features.yaml": {"bridge": 2 * 768 + (768 + 1) * 768 + (768 + 1) * 768, "adalink": 2 * 2 * 768 * 64},
}


@cache
def dry_run(recipe: Path, *more: str, **parts: str) -> dict[str, Any]:
    """The plan of a recipe, made once; its hub names, or those of `parts` in their place, are replaced by folders of the same shape."""
    content = {**yaml.safe_load(recipe.read_text()), **parts}
    roles = ("model",) if "model" in content else ("encoder", "language_model")
    with TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()) as out:
        given = [part for role in roles for part in (f"--{role}", shape_folder(Path(root), content.get(role, f"scenes:{role.split('_')[0]}")))]
        assert main(["train", "--dry-run", "--config", str(recipe), *given, "--json", *more]) == 0
    plan: dict[str, Any] = json.loads(out.getvalue())
    return plan


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.name != "text.yaml"], ids=lambda path: path.name)  # whose plan is refused
def test_every_recipe_dry_runs_in_its_true_size(recipe: Path) -> None:
    unwritten = ("--train.features", "fill") if "features" in yaml.safe_load(recipe.read_text()) else ()  # a dry run refuses features that are not there
    plan = dry_run(recipe, *unwritten)
    assert plan["trained"] == sum(method["trained"] for method in plan["methods"])
    trained = {method["name"]: method["trained"] for method in plan["methods"]}
    assert trained == TRAINED.get(recipe.name, trained)


def test_every_count_is_of_a_recipe_that_is_there() -> None:
    assert set(TRAINED) <= {recipe.name for recipe in RECIPES}


def test_the_recipe_of_epalm_trains_what_was_published() -> None:
    plan = dry_run(EXAMPLES / "coco_epalm.yaml")
    assert plan["trained"] == 4_239_360
    assert plan["language_model"]["parameters"] == 6_658_473_984
    assert f"{100 * plan['trained'] / (plan['trained'] + plan['frozen']):.2f}" == "0.06"
    (epalm, _) = plan["methods"]
    assert epalm["edits"][0] == "input of layers.19..30, for percept"
    assert plan["slots"] == {"percept": 1, "prompt": 10}
    assert plan["tokens_per_image"] == 1


def test_the_base_model_of_epalm_trains_what_was_published() -> None:
    """ePALM: OPT-2.7B + ViT-B, six linears, a prompt with an MLP: the count of the same recipe can differ."""
    more = ["--methods.epalm.connector", "per_tap", "--methods.prompt.form", "mlp"]
    plan = dry_run(EXAMPLES / "coco_epalm.yaml", *more, encoder="timm:vit_base_patch16_224.augreg_in21k", language_model="facebook/opt-2.7b")
    assert {method["name"]: method["trained"] for method in plan["methods"]} == {"epalm": 11_811_840, "prompt": 13_137_920}


def test_adalink_of_rank_64_on_a_width_of_4096_is_the_published_million(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shape_folder(tmp_path, "facebook/opt-6.7b")
    adalink = ["--methods.adalink", "{rank: 64, modalities: [image, text]}", "--methods.bridge.kind", "linear"]
    assert main(["compose", "--encoder", "scenes:encoder", "--language_model", folder, "--json", *adalink]) == 0
    trained = {method["name"]: method["trained"] for method in json.loads(capsys.readouterr().out)["methods"]}
    assert trained["adalink"] == 2 * 2 * 4096 * 64 == 1_048_576


def test_what_a_recipe_says_of_cached_features_is_so(tmp_path: Path) -> None:
    text = (EXAMPLES / "cached_features.yaml").read_text()
    content = yaml.safe_load(text)
    tower = draw_tower(content["encoder"])
    adapter = draw_adapter(tower, draw_language(shape_folder(tmp_path, content["language_model"])), {"bridge": Bridge(**content["methods"]["bridge"])})
    everything = Contents(patches=tower.n_patches, pooled=tower.n_layers, width=tower.width)
    retained = needed_contents(adapter, everything)
    assert (retained.patches, retained.pooled) == (tower.n_patches, 0)
    assert f"{retained.n_bytes:,}" in text
    assert f"{113_287 * retained.n_bytes / 2**30:.1f} GiB" in text
    assert RunConfig.__dataclass_fields__["features_dtype"].default == retained.dtype == "float16"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_how_it_is_run(recipe: Path) -> None:
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any(f"adalink train --config examples/{recipe.name} --out runs/" in line for line in head)
    options = {option for line in head for option in re.findall(r"--(data\.[a-z0-9_.]+)", line)}
    assert {option.split(".")[1] for option in options} == {"train", "val"} or "..." in " ".join(head)


@pytest.mark.parametrize("name", ["coco_epalm.yaml", "coco_context_peft.yaml", "vqav2_adalink.yaml", "vqav2_bert.yaml"])
def test_a_hub_name_that_cannot_be_reached_is_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--config", str(EXAMPLES / name)]) == 2
    stated = capsys.readouterr().err.strip()
    assert stated.startswith("adalink: cannot load the ")
    assert "\n" not in stated
    assert any(f"'{part}'" in stated for part in SHAPES)

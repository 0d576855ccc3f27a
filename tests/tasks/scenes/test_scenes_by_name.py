"""An adapter of the embedded parts is loaded without `tasks`: an entry point of the package says where `scenes:encoder` lies."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from shared import ROOT

from adalink import Bridge
from adalink.errors import ConfigError
from multimodal.encoders.load import load_encoder
from multimodal.language import load_language
from multimodal.loading import PARTS
from multimodal.model import VisionLanguageModel
from tasks.captioning import Captioning
from tasks.runs.compose import compose
from tasks.scenes import Scenes


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install` writes of pyproject.toml, so that a checkout that was installed before it named the parts passes too."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][PARTS]
    info = tmp_path / "packages" / "parts-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parts\nVersion: 1\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{PARTS}]", *(f"{name} = {value}" for name, value in points.items())]))
    monkeypatch.syspath_prepend(info.parent)


@pytest.mark.usefixtures("_installed")
def test_a_saved_adapter_is_loaded_by_its_folder_alone(tmp_path: Path) -> None:
    trained = compose("scenes:encoder", "scenes:language", template=Captioning().template)
    trained.add_adapter("one", {"bridge": Bridge(kind="linear")})
    trained.save_pretrained(tmp_path / "adapter", task={"task": "captioning"})
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "adapter")
    assert (loaded.tower.name, loaded.language.name) == ("scenes:encoder", "scenes:language")
    for name, weight in loaded.adapted.active_adapter().named_parameters():
        assert torch.equal(weight, trained.adapted.active_adapter().get_parameter(name))
    image = Scenes(split="val", size=1)[0].image
    assert isinstance(image, bytes)
    assert loaded.generate(image, max_new_tokens=3) == trained.eval().generate(image, max_new_tokens=3)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("load", [lambda name: load_encoder(name, None), load_language])
def test_a_part_that_no_package_ships_is_one_sentence(load: object) -> None:
    assert callable(load)
    with pytest.raises(ConfigError, match=r"no installed package ships 'pictures:encoder' \(the prefixes that packages ship are: .*scenes:\): install"):
        load("pictures:encoder")
    with pytest.raises(ConfigError, match="there is no embedded part 'scenes:encodr': there are scenes:encoder and scenes:language"):
        load("scenes:encodr")

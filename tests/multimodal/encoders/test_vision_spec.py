"""Names and folders that lead to no encoder, and features that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adalink.errors import ConfigError
from multimodal.encoders.base import Features
from multimodal.encoders.tower import load_tower
from multimodal.loading import split_revision


@pytest.mark.parametrize("spec", ["./absent", "/absent/encoder", "~/absent-encoder", "some/where/else", Path("absent")])
def test_a_path_to_nothing_is_called_a_path(spec: str | Path) -> None:
    with pytest.raises(ConfigError, match="should be a folder with a model's files, found nothing there; check the path"):
        load_tower(spec)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="should be a folder with a model's files, found a file there"):
        load_tower(str(tmp_path / "model.safetensors"))


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.json or open_clip_config.json; give the folder of a saved vision encoder"):
        load_tower(tmp_path)


@pytest.mark.parametrize("text, message", [("{", "is no JSON"), ("[]", "has neither"), ('{"layers": 2}', "has neither 'model_type'")])
def test_a_configuration_of_nothing_known_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tower(tmp_path)


@pytest.mark.parametrize("text", ['{"model_type": "no_such_type"}', '{"architecture": "no_such_type"}'])
def test_an_unknown_architecture_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="no_such_type"):
        load_tower(tmp_path)


@pytest.mark.parametrize("name", ["no-such/encoder", "hf:no-such/encoder", "no-such/encoder@v1", "vit"])
def test_an_unreachable_hub_is_one_sentence_with_the_ways_to_name_an_encoder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the vision encoder '.*': .*; give a local folder, a hub id .*'timm:NAME'") as caught:
        load_tower(name)
    assert "\n" not in str(caught.value)


def test_a_revision_is_split_from_a_hub_id() -> None:
    assert split_revision("a/b@v1") == ("a/b", "v1")
    assert split_revision("a/b") == ("a/b", None)


def test_features_of_different_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"need patches \[B, N, Dv\] and pooled \[L, B, Dv\] of the same B, got \[2, 4, 8\] and \[1, 3, 8\]"):
        Features(patches=torch.zeros(2, 4, 8), pooled=torch.zeros(1, 3, 8))

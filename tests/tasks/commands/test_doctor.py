"""`adalink doctor`: what it says of this machine is so, and what is broken ends it with 2 and the command that mends it."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import Done, adalink, refused


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = adalink("doctor", "--json")
    assert done.code == 0, done
    content: dict[str, Any] = json.loads(done.out)
    return content


def test_what_is_needed_is_there_and_extras_have_a_command_where_they_are_not(found: dict[str, Any]) -> None:
    packages = {(one["extra"], one["name"]): one for one in found["packages"]}
    for name in ("torch", "torchvision", "transformers", "open_clip_torch", "timm", "accelerate"):
        assert packages["", name] == {"name": name, "version": version(name), "extra": "", "problem": "", "pip": ""}
    assert {extra for extra, _ in packages} >= {"", "coco", "remote", "trackers", "serve", "bench"}
    assert not {"test", "lint", "docs"} & {extra for extra, _ in packages}
    for one in packages.values():
        assert one["pip"].startswith(f"pip install '{one['name']}") if one["version"] is None else not one["pip"]
    assert found["broken"] == []
    assert found["adalink"] == version("adalink")


def test_the_device_and_its_kernels_are_those_of_torch(found: dict[str, Any]) -> None:
    assert found["devices"][0].startswith("cuda:0: " if torch.cuda.is_available() else "cpu: ")
    *kernels, chosen = found["attention"]
    assert [line.partition(":")[0] for line in kernels] == [f"scaled_dot_product_attention in {kind}" for kind in ("float32", "bfloat16")]
    assert all(line.endswith("math") for line in kernels)  # the one that runs everywhere
    assert ("needs CUDA and flash_attn" in chosen) == (not torch.cuda.is_available() or find_spec("flash_attn") is None)
    assert ("base: quantise needs torchao" in found["precision"]) == (find_spec("torchao") is None)
    whole, free = found["memory_gib"]
    assert 0 < free < whole
    assert "train.precision: bf16" in found["precision"]
    assert "HF_HUB_OFFLINE is set" in found["hub"]
    assert (found["java"] is None) == (shutil.which("java") is None)


def in_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, *needed: str) -> Done:
    """The command where adalink's own metadata needs these."""
    (folder / "adalink-9.9.dist-info").mkdir()
    lines = ["Metadata-Version: 2.4", "Name: adalink", "Version: 9.9", *(f"Requires-Dist: {one}" for one in needed)]
    (folder / "adalink-9.9.dist-info" / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    return adalink("doctor")


def test_what_is_broken_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halved").mkdir()
    (tmp_path / "halved" / "__init__.py").write_text("raise RuntimeError('half of it\\nis missing')\n")
    (tmp_path / "halved-1.0.dist-info").mkdir()
    (tmp_path / "halved-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.4\nName: halved\nVersion: 1.0\n")
    done = in_a_folder(tmp_path, monkeypatch, "no-such-package>=1", "safetensors>=99", "halved")
    sentence = refused(done)
    assert sentence.startswith("3 of the packages that adalink needs must be mended: no-such-package is not installed: pip install 'no-such-package>=1'; ")
    assert f"safetensors is {version('safetensors')}, and adalink needs >=99: pip install 'safetensors>=99'" in sentence
    assert "halved cannot be imported (half of it is missing): pip install 'halved'" in sentence
    assert done.out.count("BROKEN") == 3


def test_somebodys_tasks_is_a_note_and_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks.py").touch()
    done = in_a_folder(tmp_path, monkeypatch, "torch")
    assert done.code == 0
    text = " ".join(done.out.split())
    assert f"note `import tasks` in a script of this folder finds {tmp_path / 'tasks.py'}" in text
    assert "import multimodal" not in text
    assert max(map(len, done.out.splitlines())) <= 100 + len(str(tmp_path))

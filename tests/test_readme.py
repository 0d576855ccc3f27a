"""What the README shows is run: its lines of Python on pictures of the embedded data set, and every command by its help."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from adalink import AdaLink, Bridge
from multimodal.model import VisionLanguageModel
from tasks.captioning import Captioning
from tasks.cli import main
from tasks.scenes.dataset import Scenes
from tasks.scenes.parts import encoder_folder, language_folder

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
EXAMPLES = (Path(__file__).resolve().parents[1] / "examples" / "README.md").read_text()


def test_the_lines_of_python_train_and_save_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "train2014").mkdir()
    samples = [Scenes(split="train", size=4)[i] for i in range(4)]
    for sample in samples:
        assert isinstance(sample.image, bytes)
        (tmp_path / "train2014" / f"{sample.image_id}.png").write_bytes(sample.image)
    images = [{"id": s.image_id, "file_name": f"{s.image_id}.png"} for s in samples]
    captions = [{"id": s.image_id * 10 + k, "image_id": s.image_id, "caption": text} for s in samples for k, text in enumerate(s.captions)]
    (tmp_path / "captions_train2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith(("from", "import"))]) <= 10
    for name, folder in (("timm:vit_base_patch16_224.augreg_in21k", encoder_folder()), ("facebook/opt-125m", language_folder())):
        assert name in code
        code = code.replace(name, str(folder))
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(compile(code, "README.md", "exec"), {})
    finally:
        os.chdir(before)
    assert {"adalink_config.json", "adapter_model.safetensors", "README.md"} <= {p.name for p in (tmp_path / "runs" / "caption" / "adapter").iterdir()}


def test_a_loop_of_ones_own_over_ones_own_data_learns_and_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    samples = [Scenes(split="train", size=3)[i] for i in range(3)]
    for i, sample in enumerate(samples):
        assert isinstance(sample.image, bytes)
        (tmp_path / "photos" / f"{i}.png").write_bytes(sample.image)
    task = Captioning()
    model = VisionLanguageModel.compose(encoder_folder(), language_folder(), template=task.template)
    model.add_adapter("caption", {"bridge": Bridge(kind="mlp"), "adalink": AdaLink(rank=4, modalities=("text",))})
    code = next(found for found in re.findall(r"```python\n(.*?)```", EXAMPLES, flags=re.DOTALL) if "model.batches" in found)
    names: dict[str, Any] = {"model": model, "task": task, "captions": {f"{i}.png": sample.captions[0] for i, sample in enumerate(samples)}}
    exec(compile(code, "examples/README.md", "exec"), names)
    assert set(names["predictions"].texts) == {0, 1, 2}
    assert names["score"].figures["CIDEr"] >= 0


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^    adalink ((?:[a-z]+ ?)+)(?=[ -]|$)", README, flags=re.MULTILINE))))
def test_every_command_that_is_shown_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: adalink" in capsys.readouterr().out

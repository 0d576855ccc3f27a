"""Each family from a folder in transformers' format, as it is found on the hub: the same model, processor, rows and ways as the objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from existing_checks import NEED_IMAGES, TEXTS, case, families
from existing_families import images
from sharing import in_double

from multimodal.model import VisionLanguageModel


@pytest.mark.parametrize("name", families(["smolvlm", "gemma3"]))
def test_a_folder_gives_what_its_model_gives(name: str, tmp_path: Path) -> None:
    made = case(name)
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    with in_double():
        loaded = VisionLanguageModel.from_model(str(tmp_path), template=made.vlm.template)
        assert loaded.ways == made.vlm.ways
        assert loaded.tower.blocks == made.vlm.tower.blocks
        for image in [*images()[:2], *([] if name in NEED_IMAGES else [None])]:
            mine, other = (None if image is None else tower.preprocess(image) for tower in (made.vlm.tower, loaded.tower))
            assert made.vlm.row_encoder().row(TEXTS[1], mine) == loaded.row_encoder().row(TEXTS[1], other)
        with made.vlm.disable_adapter(), torch.no_grad():
            assert loaded.generate(images()[0], "no?", max_new_tokens=4) == made.vlm.generate(images()[0], "no?", max_new_tokens=4)

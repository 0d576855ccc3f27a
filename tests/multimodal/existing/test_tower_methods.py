"""Methods in the tower of a model that sees already: trained through shared rows as through rows alone, saved, and never cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from existing_checks import arranged, check_same
from existing_families import images, made
from sharing import in_double
from tiny import excite
from torch import Tensor

from adalink import LoRA
from adalink.errors import AttachError, ConfigError
from multimodal.batches.collate import collate, stacked
from multimodal.batches.packing import fork_rows, pack_rows, separate_rows
from multimodal.batches.prepared import ImageBatch, Prepared
from multimodal.batches.tokenize import Row
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.template import Template, Text

TEXTS = (Text("what color is it?", "red"), Text("how many circles?", "two of them"))
TEMPLATE = Template(prompt="<image>{question}", target="{text}")


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


def model_of(name: str, *, adapted: bool = True) -> VisionLanguageModel:
    model = VisionLanguageModel.from_model(*made(name), template=TEMPLATE)
    if adapted:
        edits = model.add_adapter("one", {"lora": LoRA(groups={"answer": ("answer",)}, rank=2)})
        for adapter in (edits, model.add_vision_adapter({"lora": LoRA(groups={"image": ("image",)}, rank=2)})):
            excite(adapter.double())
    return model.eval()


@pytest.fixture
def llava() -> VisionLanguageModel:
    return model_of("llava")


def gradients(model: VisionLanguageModel, arrange: Callable[[Sequence[Row]], Sequence[Row]]) -> list[Tensor]:
    prepared: list[Any] = [model.tower.preprocess(image) for image in images()]
    encoder = model.row_encoder()
    rows = arranged([[encoder.row(text, one) for text in TEXTS] for one in prepared], arrange)
    about = [i for i, one in enumerate(rows) for _ in one]
    batch = collate([row for one in rows for row in one], about, stacked(prepared), kind="pixels", side="right", pad_id=0)
    loss = model(batch)
    trained = TrainedParts.of(model).parameters()
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)  # LLaVA reads the layer before the tower's last
    return [loss.detach(), *(value for value in found if value is not None)]


def test_a_gradient_reaches_the_tower_through_shared_rows(llava: VisionLanguageModel) -> None:
    """Though nothing in the language model is trained before the answers, what texts share is then read with gradient."""
    wanted = gradients(llava, separate_rows)
    assert sum(bool(value.abs().sum() > 0) for value in wanted[1:]) > len(TrainedParts.of(llava).edits.state_dict())
    check_same(gradients(llava, pack_rows), wanted)
    check_same(gradients(llava, fork_rows), wanted)


def test_the_tower_s_adapter_is_saved_and_loaded_with_the_other(llava: VisionLanguageModel, tmp_path: Path) -> None:
    wanted = llava.generate(images(), ["what is it?"] * 3, max_new_tokens=4)
    llava.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "vision" / "adapter_model.safetensors").exists()
    other = model_of("llava", adapted=False)
    untrained = other.generate(images(), ["what is it?"] * 3, max_new_tokens=4)
    other.load_adapter(tmp_path / "saved", "two")
    assert other.double().generate(images(), ["what is it?"] * 3, max_new_tokens=4) == wanted != untrained


def test_what_changes_is_not_cached(llava: VisionLanguageModel) -> None:
    prepared = llava.tower.preprocess(images()[0])
    assert isinstance(prepared, Prepared)
    with pytest.raises(ConfigError, match="has trained weights, so its vectors change with every step and cannot be cached"):
        llava.tower.encode(ImageBatch(samples=(prepared,)))  # type: ignore[arg-type]


def test_a_tower_that_is_no_plain_vision_transformer_is_refused() -> None:
    with pytest.raises(AttachError, match="Qwen2VisionTransformerPretrainedModel"):
        model_of("qwen2_vl")

"""Loops of other people around an existing vision-language model: transformers' Trainer as it is, and plain PyTorch, on what its processor makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_llava import save_llava
from torch.utils.data import DataLoader, Dataset

from adalink import AdaLink, AdaptedModel, LoRA, get_adalink_model
from adalink.errors import CheckpointError, ConfigError
from multimodal.data.images.decode import decode_image
from multimodal.model import VisionLanguageModel
from multimodal.sample import Sample
from multimodal.template import Template, Text
from tasks.scenes.dataset import Scenes

METHODS = {"adalink": AdaLink(rank=4, modalities=("image", "text")), "lora": LoRA(rank=2, groups={"image": ("image",), "words": ("text", "answer")})}
TEMPLATE = Template(prompt="<image>{question}", target=" {text}", raw=True)
TEXTS = [("what color is the square?", "red"), ("how many circles are there?", "two of them"), ("is it red?", "no")]
STEPS, LENGTH = 8, 40


class Questions(Dataset[dict[str, torch.Tensor]]):
    """Each row as the processor makes it, padded to one length, with labels at the answer and its end."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.images = processor, [decode_image(Scenes(split="val", size=len(TEXTS))[i].image) for i in range(len(TEXTS))]
        self.rows = [self._row(index) for index in range(len(TEXTS))]

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]

    def prompt(self, index: int) -> dict[str, torch.Tensor]:
        return dict(self.processor(text=["<image>" + TEXTS[index][0]], images=[self.images[index]], return_tensors="pt"))

    def _row(self, index: int) -> dict[str, torch.Tensor]:
        question, answer = TEXTS[index]
        words = f"<image>{question} {answer}{self.processor.tokenizer.eos_token}"
        row = self.processor(text=[words], images=[self.images[index]], padding="max_length", max_length=LENGTH, padding_side="right", return_tensors="pt")
        is_answer = torch.arange(LENGTH) >= self.prompt(index)["input_ids"].shape[1]
        labels = row["input_ids"].masked_fill(~(is_answer & row["attention_mask"].bool()), -100)
        return {name: value[0] for name, value in {**row, "labels": labels}.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA model and its processor, in transformers' format."""
    made = tmp_path_factory.mktemp("llava")
    save_llava(made, std=0.2)
    return made


def adapted(folder: Path, **settings: Any) -> tuple[AdaptedModel, Questions]:
    torch.manual_seed(1)
    frozen = hf.AutoModelForImageTextToText.from_pretrained(folder)
    return get_adalink_model(frozen, METHODS, **settings), Questions(hf.AutoProcessor.from_pretrained(folder))


def by_trainer(model: AdaptedModel, rows: Questions, out: Path) -> Path:
    """The folder is a checkpoint of Trainer."""
    arguments: Any = hf.TrainingArguments
    args = arguments(
        output_dir=str(out), max_steps=STEPS, save_steps=STEPS, per_device_train_batch_size=3, learning_rate=0.01, use_cpu=True, disable_tqdm=True, report_to=[]
    )
    run = hf.Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.7 * first
    return out / f"checkpoint-{STEPS}"


def by_plain_pytorch(model: AdaptedModel, rows: Questions, out: Path) -> Path:
    """The folder is what the model saves."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    losses = []
    model.train()
    for _ in range(STEPS):
        for batch in DataLoader(rows, batch_size=3):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.save_pretrained(out / "adapter")
    return out / "adapter"


def existing(folder: Path, adapter: Path) -> VisionLanguageModel:
    model = VisionLanguageModel.from_model(folder, template=TEMPLATE)
    model.load_adapter(adapter, "theirs")
    return model


@torch.no_grad()
def outputs(model: AdaptedModel, rows: Questions) -> tuple[torch.Tensor, float]:
    """Logits and loss of all rows in one batch."""
    found = model.eval()(**next(iter(DataLoader(rows, batch_size=len(rows)))))
    return found.logits, found.loss.item()


@pytest.mark.parametrize("train", [by_trainer, by_plain_pytorch])
def test_a_loop_trains_the_adapter_alone_and_its_folder_is_read_by_from_model(train: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    model, rows = adapted(folder)
    frozen = {name: value.clone() for name, value in model.base.state_dict().items()}
    before = {name: value.clone() for name, value in model.active_adapter().state_dict().items()}
    adapter = train(model, rows, tmp_path)
    assert all(torch.equal(frozen[name], value) for name, value in model.base.state_dict().items())
    same = [name for name, value in model.active_adapter().state_dict().items() if torch.equal(before[name], value)]
    assert all(name.startswith("lora.image.1.") for name in same)  # in the last layer, whose output at an image nothing reads
    logits, loss = outputs(model, rows)
    other = existing(folder, adapter)
    assert torch.equal(outputs(other.adapted, rows)[0], logits)
    # The same by rows, prompts and images of its own.
    samples = [Sample(key=str(i), image_id=i, image=image) for i, image in enumerate(rows.images)]
    texts = {str(i): [Text(question, answer)] for i, (question, answer) in enumerate(TEXTS)}
    (batch,) = other.batches(samples, lambda sample, _: texts[sample.key], batch_size=3)
    assert other(batch).item() == pytest.approx(loss, rel=1e-4)
    for i, (question, _) in enumerate(TEXTS):
        prompt = rows.prompt(i)
        ids = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert other.generate(rows.images[i], question, max_new_tokens=6) == [rows.processor.decode(ids, skip_special_tokens=True).strip()]
    with other.disable_adapter():
        assert not torch.allclose(outputs(other.adapted, rows)[0], logits, atol=0.1)  # the control


def test_a_folder_of_from_model_is_read_beside_the_model_alone(folder: Path, tmp_path: Path) -> None:
    """It knows of the processor what a model alone cannot tell; what is unknown is not compared."""
    model, rows = adapted(folder)
    other = existing(folder, by_plain_pytorch(model, rows, tmp_path))
    other.save_pretrained(tmp_path / "again")
    part = AdaptedModel.read_config(tmp_path / "again").base["language_model"]
    assert part.tokenizer
    assert {"pixels", "features", "states"} <= set(part.sketches)
    read = AdaptedModel.from_pretrained(adapted(folder)[0].unload(), tmp_path / "again")
    assert torch.equal(outputs(read, rows)[0], outputs(model, rows)[0])


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    save_llava(tmp_path / "other", seed=1)
    adapted(tmp_path / "other")[0].save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="was trained on the language model"):
        existing(folder, tmp_path / "adapter")


def test_a_trained_connector_comes_along(folder: Path, tmp_path: Path) -> None:
    model, rows = adapted(folder, modules_to_save=("multi_modal_projector",))
    with torch.no_grad():
        for parameter in model.active_adapter().copies["model.multi_modal_projector"].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    other = existing(folder, tmp_path)
    logits = outputs(model, rows)[0]
    assert torch.equal(outputs(other.adapted, rows)[0], logits)
    question, prompt = TEXTS[0][0], rows.prompt(0)
    ids = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert other.generate(rows.images[0], question, max_new_tokens=6) == [rows.processor.decode(ids, skip_special_tokens=True).strip()]
    assert not torch.allclose(outputs(adapted(folder)[0], rows)[0], logits, atol=0.1)  # the control


def test_a_trained_tower_is_not_left_out_in_silence(folder: Path, tmp_path: Path) -> None:
    adapted(folder, modules_to_save=("vision_tower",))[0].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"a trained copy of model.vision_tower, which is no part of the connector, and the tower encodes images with its frozen"):
        existing(folder, tmp_path)


def test_a_trained_head_comes_along(folder: Path, tmp_path: Path) -> None:
    model, rows = adapted(folder, modules_to_save=("lm_head",))
    with torch.no_grad():
        model.active_adapter().copies["lm_head"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(existing(folder, tmp_path).adapted, rows)[0], outputs(model, rows)[0])

"""Adapted tiny models of each family, conversations, and what the model itself makes of them: its processor's ids, its scores, its own generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from existing_families import MADE, images, made
from PIL import Image
from sharing import excite, in_double
from torch import Tensor

from adalink import AdaLink, LoRA
from multimodal.batches.collate import Batch, collate, stacked
from multimodal.batches.packing import joined_rows, separate_rows
from multimodal.batches.prepared import Prepared
from multimodal.batches.tokenize import Row
from multimodal.model import VisionLanguageModel
from multimodal.sample import Sample
from multimodal.template import Template, Text

SYSTEM = "be brief"
READ_RAW = ("paligemma", "paligemma2", "blip2")  # processors without a chat template
ONE_IMAGE = ("blip2", "llava_onevision")  # a conversation has one image, or several that are not what each is alone
NEED_IMAGES = ("paligemma", "paligemma2")  # their processor refuses a text alone
# Prompts that differ and prompts that do not, answers that begin alike, and one of a single token.
TEXTS = (
    Text("what color is the square?", "red"), Text("how many circles are there?", "two of them"), Text("how many circles are there?", "two"),
    Text("how many circles are there?", "no"),
)  # fmt: skip
QUESTIONS = ("what color is it?", "how many circles?", "no?")
EXACT = 1e-10


def families(default: Sequence[str], of: Iterable[str] = MADE) -> list[Any]:
    """Parameters for all families, of which the default suite runs these."""
    return [pytest.param(name, marks=() if name in default else pytest.mark.slow) for name in of]


@dataclass(frozen=True)
class Case:
    """A model in float64 with two adapters whose weights are random, and its processor; `image` edits images and texts, `text` texts alone."""

    name: str
    vlm: VisionLanguageModel
    model: Any
    processor: Any

    @property
    def prepared(self) -> list[Prepared]:
        """Three images of unlike shapes, as the model's tower takes them."""
        return [self.vlm.tower.preprocess(image) for image in images()]

    def rows(self, *, others: bool = True) -> tuple[list[Prepared], list[list[Row]]]:
        """The images, and where the family takes them a sample that has none and one of two; with the rows of the texts about each."""
        alone = [Prepared(wording=(), counts=())] if others and self.name not in NEED_IMAGES else []
        two = [self.vlm.tower.processor.prepare(images()[:2])] if others and self.name not in ONE_IMAGE else []
        prepared, encoder = [*self.prepared, *alone, *two], self.vlm.row_encoder()
        return prepared, [[encoder.row(text, one) for text in TEXTS] for one in prepared]

    def native(self, image: Image.Image | Sequence[Image.Image] | None, question: str, answer: str | None = None) -> Mapping[str, Any]:
        """What the processor makes of the conversation, as its documentation has it written; tensors of one row."""
        all_images = [image] if isinstance(image, Image.Image) else list(image or [])
        if self.name in READ_RAW:
            mark = "<image>" * len(all_images) if self.name in NEED_IMAGES else ""
            suffix = {"suffix": answer} if answer is not None and self.name in NEED_IMAGES else {}
            rest = f" {answer}</s>" if answer is not None and not suffix else ""
            found = self.processor(text=[f"{mark}{question}{rest}"], images=all_images or None, return_tensors="pt", **suffix)
        else:
            turns = [_turn("system", SYSTEM), _turn("user", question, all_images), *([] if answer is None else [_turn("assistant", answer)])]
            found = self.processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=answer is None)
        return {name: value.double() if value.is_floating_point() else value for name, value in found.items() if name != "labels"}

    def gradients(self, prepared: Sequence[Prepared], arranged: Sequence[Sequence[Row]], row_tokens: int = 0) -> tuple[Batch, list[Tensor]]:
        """The batch, and its loss with every gradient of the active adapter."""
        rows, about = [row for one in arranged for row in one], [i for i, one in enumerate(arranged) for _ in one]
        if row_tokens:
            rows, about = joined_rows(rows, about, row_tokens)
        batch = collate(rows, about, stacked(prepared), kind="pixels", side="right", pad_id=self.processor.tokenizer.pad_token_id)
        loss = self.vlm(batch)
        return batch, [loss.detach(), *torch.autograd.grad(loss, list(self.vlm.adapted.active_adapter().parameters()))]

    def one_row_a_call(self, prepared: Sequence[Prepared], texts: Sequence[Sequence[Row]]) -> list[Tensor]:
        """The same of one call for each row, which has its image alone: nothing is padded, shared or joined."""
        n = sum(len(row.target) for rows in texts for row in rows)
        parameters = list(self.vlm.adapted.active_adapter().parameters())
        total = [torch.zeros((), dtype=torch.float64), *(torch.zeros_like(parameter) for parameter in parameters)]
        for one, rows in zip(prepared, texts, strict=True):
            for row in rows:
                batch = collate([row], [0], stacked([one]), kind="pixels", side="right", pad_id=self.processor.tokenizer.pad_token_id)
                loss = self.vlm(batch) * (len(row.target) / n)
                found = torch.autograd.grad(loss, parameters, allow_unused=True)  # a text alone reads no image's edits
                total = [a + b if b is not None else a for a, b in zip(total, [loss.detach(), *found], strict=True)]
        return total


def _turn(role: str, text: str, all_images: Sequence[Image.Image] = ()) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": "image", "image": image} for image in all_images), {"type": "text", "text": text}]}


@cache
def case(name: str) -> Case:
    """Made once for all tests of a process."""
    torch.manual_seed(0)
    model, processor = made(name)
    raw = name in READ_RAW
    template = Template(prompt="<image>{question}", target=" {text}" if name == "blip2" else "{text}", system="" if raw else SYSTEM)
    with in_double():
        vlm = VisionLanguageModel.from_model(model, processor, template=template)
        methods = {"image": ("image", "text"), "text": ("text",)}
        for adapter, modalities in methods.items():
            lora = LoRA(groups={"image": ("image",), "text": ("text", "answer")}, rank=2, alpha=2.0)
            excite(vlm.add_adapter(adapter, {"adalink": AdaLink(rank=4, modalities=modalities), **({"lora": lora} if adapter == "image" else {})}).double())
        vlm.set_adapter("image")
    return Case(name, vlm.eval(), model, processor)


def samples() -> list[Sample]:
    """One for each image."""
    return [Sample(key=str(i), image_id=i, image=image) for i, image in enumerate(images())]


def texts_of(sample: Sample, rng: object) -> Sequence[Text]:
    """What is learnt from each."""
    return TEXTS


def check_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Loss and every gradient, all of which say something."""
    scale = max(float(one.abs().max()) for one in wanted)
    assert sum(bool(one.abs().max() > 0) for one in wanted) > 0.7 * len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT * scale)


Arrange = Callable[[Sequence[Row]], Sequence[Row]]


def arranged(texts: Sequence[Sequence[Row]], arrange: Arrange = separate_rows) -> list[Sequence[Row]]:
    """The rows of each image as they are to be trained on."""
    return [arrange(rows) for rows in texts]


# What each family's texts may share: packed, forked, and which tokens read later ones.
MADE_WAYS: Mapping[str, tuple[str, str, str]] = {
    **dict.fromkeys(MADE, ("texts", "texts", "")),
    "gemma3": ("texts", "texts", "images"),
    "paligemma": ("answers", "answers", "prompts"),
    "paligemma2": ("", "answers", "prompts"),
    "blip2": ("", "texts", ""),
}

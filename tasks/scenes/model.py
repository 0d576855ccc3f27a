"""A vision-language model that sees, without a download: `python -m tasks.scenes.model --out FOLDER`.

The two frozen parts of scenes and a connector that is trained here, in the way of LLaVA: on captions, and nothing else changes. The folder is of
transformers' PerceptionLM, which is LLaVA with an encoder of timm: `AutoModelForImageTextToText` and `AutoProcessor` load it, and `model:` of a run.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PerceptionLMProcessor,
    PerceptionLMVideoProcessor,
    TimmWrapperConfig,
)

from adalink import Bridge
from multimodal.model import VisionLanguageModel
from multimodal.sample import Sample
from multimodal.template import Template, Text
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train
from tasks.scenes.dataset import Scenes
from tasks.scenes.parts import encoder_folder, language_folder

__all__ = ["assemble", "main", "train_connector"]

CONNECTOR = Bridge(kind="mlp", norm="none", init_scale=8.0)  # linear, gelu, linear: what LLaVA has between its parts
SETTINGS = TrainSettings(epochs=3, batch_size=8, learning_rate=0.005, weight_decay=0.0, betas=(0.9, 0.99), log_every=50, features="memory")
IMAGE, VIDEO = "<image>", "<video>"
# A message is asked as the language model's own texts ask; where an image comes without a question, a caption follows.
CHAT = (
    "{% for message in messages %}{% set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content %}"
    "{% if message.role == 'assistant' %}{% for part in parts %} {{ part.text }}{% endfor %}</s>"
    "{% else %}{% for part in parts if part.type == 'image' %}<image>{% endfor %}</s>"
    "{% for part in parts if part.type == 'text' %} question: {{ part.text }} answer:{% endfor %}{% endif %}{% endfor %}"
)


def train_connector(settings: TrainSettings, *, images: int) -> tuple[VisionLanguageModel, nn.Sequential]:
    """The composed model, and its connector after training on the captions of so many scenes: linear, activation, linear."""
    torch.manual_seed(settings.seed)
    model = VisionLanguageModel.compose(encoder_folder(), language_folder(), template=Template(prompt="<image><bos>"))
    adapter = model.add_adapter("connector", {"connector": CONNECTOR})
    with TemporaryDirectory() as folder:
        train(model, Scenes(split="train", size=images), _two_captions, settings, Path(folder))
    (layers,) = (module for module in adapter.modules() if isinstance(module, nn.Sequential))
    return model, layers


def _two_captions(sample: Sample, rng: random.Random) -> list[Text]:
    return [Text("", caption) for caption in rng.sample(sample.captions, 2)]


def assemble(model: VisionLanguageModel, connector: nn.Sequential) -> tuple[PerceptionLMForConditionalGeneration, PerceptionLMProcessor]:
    """A composed model and its connector as one model of transformers, with its processor.

    The tokenizer gets a token for an image and one for a video, with the word vector of `<unk>`, which no text holds.
    """
    encoder, language = model.vision_tower.encoder.get_submodule("model"), model.language.model
    tokenizer: Any = AutoTokenizer.from_pretrained(language_folder(), extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO})
    encoder_config = json.loads((encoder_folder() / "config.json").read_text())
    vision = TimmWrapperConfig(architecture=encoder_config["architecture"], model_args=encoder_config["model_args"], do_pooling=False, num_labels=0)
    text = {**language.config.to_dict(), "vocab_size": len(tokenizer)}
    ids = {"image_token_id": tokenizer.image_token_id, "video_token_id": tokenizer.video_token_id}
    whole = PerceptionLMForConditionalGeneration(PerceptionLMConfig(vision_config=vision, text_config=text, **ids)).eval()
    whole.model.vision_tower.timm_model.load_state_dict(encoder.state_dict())
    words = language.model.state_dict()
    known = words["embed_tokens.weight"]
    new = known[tokenizer.unk_token_id].expand(len(tokenizer) - len(known), -1)
    whole.model.language_model.load_state_dict({**words, "embed_tokens.weight": torch.cat([known, new])})
    first, last = (layer for layer in connector if isinstance(layer, nn.Linear))
    whole.model.multi_modal_projector.linear_1.load_state_dict(first.state_dict())
    whole.model.multi_modal_projector.linear_2.load_state_dict(last.state_dict())
    return whole, _processor(tokenizer, encoder_config)


def _processor(tokenizer: Any, encoder_config: dict[str, Any]) -> PerceptionLMProcessor:
    pixels = encoder_config["pretrained_cfg"]
    side, normal = pixels["input_size"][-1], {"image_mean": pixels["mean"], "image_std": pixels["std"]}
    images = PerceptionLMImageProcessor(vision_input_type="vanilla", tile_size=side, max_num_tiles=1, size={"height": side, "width": side}, **normal)
    patch = 4 * encoder_config["model_args"]["patch_size"]
    return PerceptionLMProcessor(PerceptionLMVideoProcessor(), images, tokenizer, patch_size=patch, pooling_ratio=1, chat_template=CHAT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the connector, and write the model's folder; arguments: those of the command line, where none are given."""
    parser = argparse.ArgumentParser(description="Make a vision-language model that sees, of the two frozen parts of scenes.")
    parser.add_argument("--out", type=Path, required=True, help="the folder that is made, in the format of transformers")
    parser.add_argument("--images", type=int, default=1600, help="scenes whose captions the connector learns")
    parser.add_argument("--epochs", type=float, default=SETTINGS.epochs, help="passes over them")
    args = parser.parse_args(arguments)
    composed, connector = train_connector(replace(SETTINGS, epochs=args.epochs), images=args.images)
    whole, processor = assemble(composed, connector)
    whole.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{args.out} holds a vision-language model that sees: adalink train --model {args.out} ...")


if __name__ == "__main__":
    main()

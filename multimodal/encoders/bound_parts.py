"""The frozen parts of a composed model, with what an adapter of it is bound to beside their weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adalink import FrozenPart
from adalink.checkpoint.fingerprint import Sketch, part_of
from multimodal.encoders.base import Preprocess
from multimodal.encoders.clips import ClipPreprocess
from multimodal.encoders.tower import VisionTower
from multimodal.language import Language

__all__ = ["encoder_part", "language_part", "processor_digest", "test_image", "test_pixels", "tokenizer_digest"]

N_VALUES = 64  # of each sketch
OF_CLASSES = re.compile(r"_class$|_type$|version|auto_map|name_or_path")  # settings of a processor that change no image
PROBES = (
    "a photo of two dogs on a beach", "What COLOR is the bus?", "12,345.67 km/h", "it's the cat's\n  third\tbowl", "naïve café – “quoted”", "东京 一只猫",
    "Привет", "🙂", "x=(a+b)*c_d",
)  # fmt: skip


def encoder_part(tower: VisionTower) -> FrozenPart:
    """The encoder, with sketches of a test image as it is prepared and of its features; of an adapted one, which changes, without those."""
    part = dataclasses.replace(part_of(tower, name=tower.name), processor=processor_digest(tower.preprocess))
    if tower.adapter is not None:
        return part
    pixels = test_pixels(tower.preprocess)
    with torch.autocast(next(tower.encoder.parameters()).device.type, enabled=False):
        features = tower.encode(pixels[None]).joined
    return dataclasses.replace(part, sketches={"pixels": Sketch.of(pixels, N_VALUES), "features": Sketch.of(features, N_VALUES)})


def language_part(language: Language) -> FrozenPart:
    """The language model, with what its tokenizer makes of texts."""
    part = part_of(language.model, name=language.name)
    return part if language.tokenizer is None else dataclasses.replace(part, tokenizer=tokenizer_digest(language.tokenizer))


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hex digits of a tokenizer's vocabulary and of the ids that it gives to some texts."""
    words = sorted(tokenizer.get_vocab().items())
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    return hashlib.sha256(json.dumps([words, ids]).encode()).hexdigest()[:16]


def processor_digest(preparing: Any) -> str:
    """16 hex digits of how images are prepared: of the settings of a processor of transformers, or of the steps that another library composed.

    Names of classes do not count, so that the fast and the slow form of one processor are alike.
    """
    own = preparing
    for inside in ("transform", "processor", "image_processor"):
        own = getattr(own, inside, own)
    to_dict = getattr(own, "to_dict", None)
    content: Any = re.sub(r" at 0x\w+", "", repr(own))
    if callable(to_dict):
        content = {name: value for name, value in to_dict().items() if not OF_CLASSES.search(name)}
    if isinstance(preparing, ClipPreprocess):
        content = [content, preparing.n_frames, preparing.rate]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def test_pixels(preprocess: Preprocess) -> Tensor:
    """The test image as an encoder's preprocessing makes it, or of an encoder of clips its own."""
    return preprocess.probe() if isinstance(preprocess, ClipPreprocess) else preprocess(test_image())


def test_image() -> Image.Image:
    """RGB, 640 x 400, of sharp blocks in no symmetry: another size, crop, filter, scale or turn shows."""
    y, x, channel = (axis.astype(np.uint8) for axis in np.ogrid[:25, :40, :3])
    blocks = x * np.uint8(37) + y * np.uint8(101) + channel * np.uint8(53)  # modulo 256
    return Image.fromarray(blocks.repeat(16, axis=0).repeat(16, axis=1))

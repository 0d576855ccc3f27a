"""An adapter of a composed model is bound to how images are prepared, to statistics that are no weights, and to the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composed import language, tower
from shared import shared
from tokenizers.normalizers import Replace
from torch import Tensor, nn

from adalink import Bridge
from adalink.checkpoint.fingerprint import differences
from adalink.errors import CheckpointError
from multimodal.encoders.bound_parts import encoder_part, processor_digest, tokenizer_digest
from multimodal.encoders.tower import load_tower
from multimodal.model import VisionLanguageModel
from multimodal.template import Template
from tasks.scenes import encoder_folder

TEMPLATE = Template(prompt="<image><bos>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("composed")
    model = VisionLanguageModel(tower(), language("opt"), TEMPLATE)
    model.add_adapter("one", {"bridge": Bridge(kind="linear")})
    model.save_pretrained(path)
    return path


def other_pixels(model: Any) -> None:
    prepare = model.tower.preprocess

    def preprocess(image: Any) -> Tensor:
        found: Tensor = prepare(image) * 1.3 + 0.2
        return found

    model.tower.preprocess = preprocess


def other_words(model: Any) -> None:
    model.language.tokenizer.add_tokens(["cube?"])


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "preprocessing": (other_pixels, r"the encoder .* with images that are prepared otherwise \(they differ by \d+ %"),
    "tokenizer": (other_words, "the language model .* with another tokenizer, which makes other ids of the same text"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_preparation_or_tokenizer_is_refused_by_name(name: str, folder: Path) -> None:
    change, message = CHANGES[name]
    changed = VisionLanguageModel(load_tower(encoder_folder()), language("opt"), TEMPLATE)
    change(changed)
    model = VisionLanguageModel(changed.tower, changed.language, TEMPLATE)
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(folder, "one")
    assert not model.adapted.adapters
    with pytest.warns(UserWarning, match=message):
        model.load_adapter(folder, "one", allow_other_base=True)


def test_the_same_parts_are_not_refused(folder: Path) -> None:
    VisionLanguageModel(tower(), language("opt"), TEMPLATE).load_adapter(folder, "one")


def test_statistics_of_a_batch_norm_and_activations_belong_to_an_encoder() -> None:
    path = shared("parts/mobilenet_v2_1.0_224_hf")
    known = encoder_part(load_tower(path))
    assert not list(differences(known, encoder_part(load_tower(path))))
    changed = load_tower(path)
    for module in changed.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.mul_(1.02)
    note = list(differences(known, encoder_part(changed)))
    assert "with other buffers" in note[0]
    assert any("makes other features of the same image" in each for each in note)


def test_a_tokenizer_is_known_by_its_words_and_by_what_it_makes_of_texts() -> None:
    plain, more, lower = (language("opt").tokenizer for _ in range(3))
    assert tokenizer_digest(plain) == tokenizer_digest(language("opt").tokenizer)
    more.add_tokens(["WHAT"])
    lower.backend_tokenizer.normalizer = Replace("bus?", "red")
    assert len({tokenizer_digest(each) for each in (plain, more, lower)}) == 3


def test_a_processors_digest_changes_with_its_settings_and_not_with_its_class() -> None:
    from torchvision import transforms
    from transformers import CLIPImageProcessor

    settings = [{"size": {"shortest_edge": 8}}, {"size": {"shortest_edge": 9}}, {"size": {"shortest_edge": 8}, "image_mean": [0.4, 0.5, 0.5]}]
    digests = [processor_digest(CLIPImageProcessor(**given)) for given in settings]
    assert len({*digests}) == 3
    assert processor_digest(CLIPImageProcessor(**settings[0])) == digests[0]
    composed = [processor_digest(transforms.Compose([lambda image: image, transforms.Resize(side)])) for side in (8, 8, 9)]
    assert composed[0] == composed[1] != composed[2]

"""An adapted encoder in a composed model: trained through, never kept, saved beside the language model's adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from composed import Drawn, excite, language, patches, two_texts
from PIL import Image
from torch import Tensor

from adalink import AdaLink, BitFit, Bridge, LoRA, Method, Prompt
from adalink.errors import CheckpointError, ConfigError
from multimodal.batches.collate import Batch, collate
from multimodal.data.feature_cache.encode import encode_all
from multimodal.encoders.tower import load_tower
from multimodal.model import VisionLanguageModel
from multimodal.template import Template, Text
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train
from tasks.scenes.parts import encoder_folder

VISION: dict[str, Method] = {
    "adalink": AdaLink(rank=4, modalities=("image",)),
    "lora": LoRA(groups={"image": ("image",)}, rank=2, alpha=4),
    "bitfit": BitFit(groups={"image": ("image",)}),
    "prompt": Prompt(length=3, init_std=0.5),
}
BRIDGE: dict[str, Method] = {"bridge": Bridge(kind="linear")}
PICTURES = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]


def model_of(vision: dict[str, Method] | None = None, layer: int = -1) -> VisionLanguageModel:
    """Its own tower: an adapter changes it for good."""
    model = VisionLanguageModel(load_tower(encoder_folder(), layer=layer), language("opt"), Template(prompt="<image><bos>question: {question} answer:"))
    if vision is not None:
        excite(model.add_vision_adapter(vision))
    return model


def adapted(vision: dict[str, Method] = VISION, layer: int = -1) -> VisionLanguageModel:
    model = model_of(vision, layer)
    excite(model.add_adapter("one", BRIDGE).double())
    return model


def pixels(model: VisionLanguageModel) -> Tensor:
    return torch.stack([model.tower.preprocess(image) for image in PICTURES])


def batch_of(model: VisionLanguageModel) -> Batch:
    rows = [model.row_encoder().row(text) for text in (Text("is it red ?", "yes"), Text("", "a red cube"))]
    return collate(rows, [0, 1], pixels(model), kind="pixels", side="right", pad_id=0)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", VISION)
def test_features_have_their_shape_and_a_gradient_and_the_loss_goes_down(name: str, layer: int) -> None:
    model = adapted({name: VISION[name]}, layer)
    frozen = copy.deepcopy(model.tower.encoder.state_dict())
    plain = load_tower(encoder_folder(), layer=layer)(pixels(model))
    features = model.tower(pixels(model))
    assert (features.patches.shape, features.pooled.shape) == (plain.patches.shape, plain.pooled.shape)
    assert not torch.isclose(features.patches, plain.patches).all(-1).any()
    assert model.tower.adapter is not None
    optimizer = torch.optim.AdamW(model.tower.adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(batch_of(model))
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.tower.adapter.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[key], value) for key, value in model.tower.encoder.state_dict().items())
    with torch.no_grad():
        assert not model.tower(pixels(model)).patches.requires_grad


def test_a_frozen_tower_records_no_gradient_still() -> None:
    model = model_of()
    assert not model.tower(pixels(model)).patches.requires_grad
    assert model.tower.adapter is None


def test_nothing_keeps_features_that_change() -> None:
    model = adapted()
    with pytest.raises(ConfigError, match=r"has trained weights, so its features change with every step and cannot be cached: .* \(train.features: encode\)"):
        model.encode(pixels(model))
    with pytest.raises(ConfigError, match="has trained weights, so its features change"):
        encode_all(model, Drawn(2))
    retained = collate([model.row_encoder().prompt("is it ?")], [0], patches(1), kind="patches", side="right", pad_id=0)
    with pytest.raises(ConfigError, match="the batch holds cached features, and this model's encoder has trained weights: collate it with pixels"):
        model(retained)
    model_of().encode(pixels(model))  # control


def test_the_training_loop_trains_both_sides_and_refuses_to_keep_features(tmp_path: Path) -> None:
    model = adapted({"lora": VISION["lora"]})
    assert model.tower.adapter is not None
    before = [copy.deepcopy(dict(side.named_parameters())) for side in (model.tower.adapter, model.adapted.active_adapter())]
    settings = TrainSettings(steps=2, batch_size=2, learning_rate=1e-2, warmup=0.0)
    train(model, Drawn(4), two_texts, settings, folder=tmp_path / "run")
    after = [dict(side.named_parameters()) for side in (model.tower.adapter, model.adapted.active_adapter())]
    for was, now in zip(before, after, strict=True):
        assert not any(torch.equal(was[name], now[name]) for name in was)
    memory = TrainSettings(steps=2, batch_size=2, learning_rate=1e-2, warmup=0.0, features="memory")
    with pytest.raises(ConfigError, match="has trained weights, so its features change"):
        train(model, Drawn(4), two_texts, memory, folder=tmp_path / "again")


def test_an_adapted_encoder_is_saved_and_loaded_with_its_adapter(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    again = model_of()
    again.load_adapter(tmp_path, "one").double()
    assert torch.equal(again.tower(pixels(model)).patches, model.tower(pixels(model)).patches)
    assert again.generate(PICTURES, ["is it red ?"] * 2) == model.generate(PICTURES, ["is it red ?"] * 2)
    assert {path.name for path in (tmp_path / "vision").iterdir()} == {"README.md", "adalink_config.json", "adapter_model.safetensors"}


def test_adapters_that_saw_another_encoder_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "adapted")
    plain = model_of()
    plain.add_adapter("one", BRIDGE)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="was trained with an adapted encoder, which it would change for the adapters that this model has already"):
        plain.load_adapter(tmp_path / "adapted", "two")
    assert (list(plain.adapted.adapters), plain.tower.adapter) == (["one"], None)
    with pytest.raises(ConfigError, match="was trained on the frozen encoder, and this model's encoder is adapted: load it on a model of its own"):
        adapted().load_adapter(tmp_path / "plain", "two")
    weights = tmp_path / "adapted" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    fresh = model_of()
    with pytest.raises(CheckpointError, match="is damaged"):
        fresh.load_adapter(tmp_path / "adapted", "one")
    assert (list(fresh.adapted.adapters), fresh.tower.adapter) == ([], None)


def test_one_adapter_an_encoder() -> None:
    with pytest.raises(ConfigError, match="has an adapter already: put all its methods into one"):
        adapted().add_vision_adapter({"bitfit": VISION["bitfit"]})
    with pytest.raises(ConfigError, match="slots are asked for at the place after_text, and a vision encoder reads no words"):
        model_of({"prompt": Prompt(length=2, at="after_text")})
    with pytest.raises(ConfigError, match="a prompt starts from words, and an encoder of images has none"):
        model_of({"prompt": Prompt(length=1, ids=((4,),))})
    with pytest.raises(ConfigError, match=r"the edit adalink\.text is for text, answer tokens, and a vision encoder has image tokens"):
        model_of().add_vision_adapter({"adalink": AdaLink(rank=4, modalities=("text",))})


def test_what_is_trained_in_the_encoder_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted({"adalink": VISION["adalink"], "prompt": VISION["prompt"]})
    model.print_trainable_parameters()
    width = model.tower.vision_anatomy().width
    assert capsys.readouterr().out.splitlines()[1] == f"in the encoder: {8 * width + 3 * width:,} (adalink {8 * width:,}, prompt {3 * width:,})"


def test_fsdp2_does_not_train_an_adapted_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: True))
    settings = TrainSettings(steps=1, batch_size=2, learning_rate=1e-2)
    with pytest.raises(ConfigError, match="FSDP2 trains the language model's adapter alone, and this model's encoder has one too: train it with DDP"):
        train(adapted({"lora": VISION["lora"]}), Drawn(4), two_texts, settings, folder=tmp_path)

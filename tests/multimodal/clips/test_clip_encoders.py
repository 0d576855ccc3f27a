"""Every class of video and sound gives its own features: patches and pooled vectors of each block, for the frames that it is loaded with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import language
from saved_clips import CLASSES, SOUND, VIDEO, clip_tower, model_of, save_clips
from torch import Tensor, nn

from adalink import Bridge
from adalink.errors import ConfigError
from adalink.methods.bridge import FramePool
from multimodal.encoders.bound_parts import encoder_part, processor_digest
from multimodal.encoders.clips import FAMILIES, ClipPreprocess
from multimodal.encoders.tower import load_tower
from multimodal.model import VisionLanguageModel
from multimodal.template import Template
from tasks.scenes.parts import part_folder

FIRST = {"timesformer": 1, "vivit": 1, "ast": 2}


def own(name: str, model: Any, pixels: Tensor) -> Tensor:
    """What the model of transformers itself gives, [B, P + N, D]; of CLAP's map its places."""
    options: dict[str, Any] = {"skip_predictor": True} if name == "vjepa2" else {}
    if name.startswith("clap"):
        model, options = model.audio_model, {"is_longer": torch.zeros(len(pixels), 1)}
    if name == "whisper":
        model = model.encoder
    state: Tensor = model(**{FAMILIES[model_of(name).config.model_type].takes: pixels}, **options).last_hidden_state
    return state.flatten(2).transpose(1, 2) if state.dim() == 4 else state


def cut(name: str, model: Any, n_blocks: int) -> Any:
    """A copy with its first blocks alone, whose final features are those of the last of them."""
    family, model = FAMILIES[model.config.model_type], copy.deepcopy(model)
    parent, _, last = ".".join(filter(None, (family.inner, family.blocks))).rpartition(".")
    setattr(model.get_submodule(parent), last, nn.ModuleList(list(model.get_submodule(f"{parent}.{last}".strip("."))[:n_blocks])))  # type: ignore[index]
    return model


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_the_features_are_the_models_own(name: str, tmp_path: Path) -> None:
    tower = clip_tower(name, tmp_path)
    model = copy.deepcopy(model_of(name)).double()
    pixels = torch.stack([tower.preprocess.probe(), tower.preprocess.probe(70)]).double()  # type: ignore[attr-defined]
    found, first = tower(pixels), FIRST.get(name, 0)
    expected = own(name, model, pixels)
    torch.testing.assert_close(found.patches, expected[:, first:], rtol=0, atol=1e-12)
    assert (found.patches[0] - found.patches[1]).abs().max() > 1e-3  # the control: another clip has others
    if name.startswith("clap"):
        torch.testing.assert_close(found.pooled, expected.mean(1)[None], rtol=0, atol=1e-12)
        return
    assert found.pooled.shape[0] == 3
    for number, pooled in enumerate(found.pooled, 1):
        state = own(name, cut(name, model, number), pixels)
        torch.testing.assert_close(pooled, state[:, 0] if first else state.mean(1), rtol=0, atol=1e-12)
    second = load_tower(tmp_path, layer=-2, dtype=torch.float64)(pixels).patches
    assert (second - found.patches).abs().max() > 1e-3


@pytest.mark.parametrize("name", VIDEO)
@torch.no_grad()
def test_another_number_of_frames_is_that_of_a_model_made_for_it(name: str, tmp_path: Path) -> None:
    tower = clip_tower(name, tmp_path, frames=8)
    kind, config = type(model_of(name)), copy.deepcopy(model_of(name).config)
    setattr(config, FAMILIES[config.model_type].frames, 8)
    weights = dict(model_of(name).state_dict())
    times = {"timesformer": (0, "embeddings.time_embeddings"), "vivit": (1, "embeddings.position_embeddings")}
    if name in times:  # each time twice: the nearest of 4 to 8
        n_first, tensor = times[name]
        before = weights[tensor][:, n_first:].reshape(1, 4 if name == "timesformer" else 2, -1, 24)
        weights[tensor] = torch.cat([weights[tensor][:, :n_first], before.repeat_interleave(2, 1).flatten(1, 2)], 1)
    model = kind(config).eval()
    model.load_state_dict(weights)
    assert isinstance(tower.preprocess, ClipPreprocess)
    pixels = tower.preprocess.probe()[None].double()
    assert pixels.shape[1] == tower.preprocess.n_frames == 8
    torch.testing.assert_close(tower(pixels).patches, own(name, model.double(), pixels)[:, FIRST.get(name, 0) :], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VIDEO)
def test_clips_of_other_frames_are_refused_and_never_wrong(name: str, tmp_path: Path) -> None:
    tower = clip_tower(name, tmp_path)
    with pytest.raises(ConfigError, match=r"takes clips of 4 frames \[B, 4, 3, H, W\], and was given clips of 6 frames: load it with the frames that"):
        tower(torch.zeros(1, 6, 3, 32, 32))
    with pytest.raises(ConfigError, match=r"and was given a tensor \[1, 3, 32, 32\]"):
        tower(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(("name", "frames", "step"), [("timesformer", 0, 1), ("vivit", 3, 2), ("videomae", 5, 2), ("vjepa2", -2, 2)])
def test_frames_that_no_tubelet_fits_are_refused(name: str, frames: int, step: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^frames is {frames}, and the encoder '.*' takes {step} at a time: give a multiple of {step}, from {step} on$"):
        clip_tower(name, tmp_path, frames=frames)


def test_frames_of_an_encoder_that_has_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^frames is 8, and the encoder '.*' takes audio, which has none: leave it out$"):
        clip_tower("ast", tmp_path, frames=8)
    with pytest.raises(ConfigError, match=r"^frames is 8, and the encoder '.*' takes image, which has none: leave it out$"):
        load_tower(part_folder("encoder"), frames=8)


def test_a_clip_encoder_of_another_class_is_refused_with_the_classes_there_are(tmp_path: Path) -> None:
    import transformers as t

    model = t.SEWModel(t.SEWConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,), conv_kernel=(10,),
                                   conv_stride=(5,), squeeze_factor=1))  # fmt: skip
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is of model type 'sew' with the input input_values, expected one that takes pixel_values; .* encoder of clips \(timesformer, vivit, "):
        load_tower(tmp_path)


def test_frames_are_part_of_what_an_adapter_is_bound_to(tmp_path: Path) -> None:
    for name in ("timesformer", "vjepa2"):
        towers = [clip_tower(name, tmp_path / name, frames=frames) for frames in (None, 8)]
        parts = [encoder_part(tower) for tower in towers]
        assert parts[0].processor != parts[1].processor
        assert parts[0] == encoder_part(clip_tower(name, tmp_path / name))  # the control
        assert (parts[0].fingerprint != parts[1].fingerprint) == (name == "timesformer")


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_of_any_length_becomes_one_shape_and_the_same_each_time(name: str, tmp_path: Path) -> None:
    prepare = clip_tower(name, tmp_path).preprocess
    assert isinstance(prepare, ClipPreprocess)
    noise = np.random.default_rng(3).normal(size=40 * prepare.rate).astype(np.float32) / 4
    shapes = {tuple(prepare(noise[:n]).shape) for n in (prepare.rate // 20, prepare.rate, len(noise))}
    assert len(shapes) == 1
    assert torch.equal(prepare(noise), prepare(noise))
    assert prepare(prepare.blank).shape == next(iter(shapes))
    assert processor_digest(prepare) == processor_digest(clip_tower(name, tmp_path).preprocess)


def test_the_preprocessing_must_be_there(tmp_path: Path) -> None:
    (save_clips("ast", tmp_path) / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"cannot load the preprocessing of '.*'.*put the encoder's preprocessor_config\.json beside its config\.json"):
        load_tower(tmp_path)


def test_ast_reads_the_settings_of_its_folder(tmp_path: Path) -> None:
    save_clips("ast", tmp_path)
    known = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(known | {"mean": 0.0, "std": 0.5}))
    prepare = load_tower(tmp_path).preprocess
    raw, zero = prepare(np.zeros(8000, np.float32)), prepare(np.zeros(400, np.float32))  # type: ignore[arg-type]
    assert raw[0, 0] == zero[0, 0] == np.float32(np.log(2.0**-23))
    assert zero[1:].abs().max() == 0  # filled up before it is normalised


@pytest.mark.parametrize("name", [*VIDEO, "ast"])
@torch.no_grad()
def test_frames_are_pooled_moment_by_moment(name: str, tmp_path: Path) -> None:
    """Embeddings that hold nothing but the time of their pixels: all patches of a moment are alike, and moments come in order."""
    tower = clip_tower(name, tmp_path)
    model = copy.deepcopy(tower.encoder.get_submodule("model"))
    for parameter in model.embeddings.parameters():
        parameter.fill_(1 / parameter[0].numel() if parameter.dim() >= 4 else 0)
    if name.startswith("videomae"):
        model.embeddings.position_embeddings = torch.zeros_like(model.embeddings.position_embeddings)
    if name == "ast":
        pixels = torch.arange(40.0).double()[None, :, None].expand(1, 40, 24)
    else:
        pixels = torch.arange(4.0).double().reshape(1, 4, 1, 1, 1).expand(1, 4, 3, 32, 32)
    rows = model.embeddings(pixels, *([None] if name.startswith("videomae") else []))[:, FIRST.get(name, 0) :]
    image = tower.inputs["image"]
    assert image.count % image.times == 0
    pooled = FramePool(image.times, image.is_time_first)(rows)[0, :, 0]
    assert len(pooled) == {"timesformer": 4, "ast": 7}.get(name, 2)
    assert (pooled.diff() > 0.5).all()
    spread = rows[0, :, 0].unflatten(0, (image.times, -1) if image.is_time_first else (-1, image.times)).std(1 if image.is_time_first else 0)
    assert spread.max() < 1e-9
    wrong = FramePool(image.times, not image.is_time_first)(rows)[0, :, 0]
    assert (wrong.diff() < 0.5).any()  # the control


def test_a_bridge_pools_clips_and_says_where_it_cannot(tmp_path: Path) -> None:
    for name, count in (("timesformer", 4), ("videomae", 2), ("ast", 7)):
        tower = clip_tower(name, tmp_path / name)
        model = VisionLanguageModel(tower, language("opt"), Template(prompt="<image>"))
        for pool, expected in (("frames", count), ("stride", -(-tower.n_patches // 5))):
            bridge = Bridge(kind="linear", norm="none", pool=pool, stride=5 if pool == "stride" else 0)  # type: ignore[arg-type]
            adapter = model.add_adapter(pool, bridge).double()
            assert adapter.slots[0].count == expected
            layers = adapter.get_submodule("bridge.image").layers
            found = layers(features := tower(tower.preprocess.probe()[None].double()).patches)  # type: ignore[attr-defined]
            by_time = features.unflatten(1, (count, -1)).mean(2) if name == "videomae" else features.unflatten(1, (-1, count)).mean(1)
            torch.testing.assert_close(found, layers[-1](by_time if pool == "frames" else features[:, ::5]), rtol=0, atol=1e-12)
    whisper = VisionLanguageModel(clip_tower("whisper", tmp_path / "w"), language("opt"), Template(prompt="<image>"))
    with pytest.raises(ConfigError, match="the bridge's pool is frames, and this encoder's 50 patches are of no moments of a clip: give stride, or leave it out"):
        whisper.add_adapter("a", Bridge(kind="linear", pool="frames"))
    for fields in ({"pool": "stride"}, {"pool": "frames", "stride": 2}, {"stride": 3}, {"pool": "stride", "stride": 1}):
        with pytest.raises(ConfigError, match=r"give pool: stride with a stride of 2 or more, or neither"):
            Bridge(kind="linear", **fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the bridge's pool is 'time': give the rows and columns to keep"):
        Bridge(kind="linear", pool="time")  # type: ignore[arg-type]

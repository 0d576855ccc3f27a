"""Small encoders of video and sound with drawn weights, saved as their users' are: one of every class that the tower admits."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as t

from multimodal.encoders.tower import VisionTower, load_tower

_SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_VIDEO: dict[str, Any] = {"image_size": 32, "num_frames": 4, **_SIZES}
_WAVE: dict[str, Any] = {
    **_SIZES, "conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (20, 16), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_OF_VIDEO: dict[str, Any] = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
_CLAP = {"spec_size": 64, "num_mel_bins": 16, "window_size": 2, "patch_embeds_hidden_size": 12, "depths": [1, 1], "num_attention_heads": [2, 2], "hidden_size": 24,
         "enable_fusion": False}  # fmt: skip
_TEXT = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "projection_dim": 8}


def _clap(fusion: bool) -> Any:
    return t.ClapModel(t.ClapConfig(audio_config=_CLAP | {"enable_fusion": fusion}, text_config=_TEXT, projection_dim=8))


# Name -> the model, and what prepares its clips.
CLASSES: dict[str, tuple[Any, Any]] = {
    "timesformer": (lambda: t.TimesformerModel(t.TimesformerConfig(patch_size=8, **_VIDEO)), lambda: t.TimesformerVideoProcessor(**_OF_VIDEO)),
    "vivit": (lambda: t.VivitModel(t.VivitConfig(tubelet_size=[2, 8, 8], **_VIDEO)), lambda: t.VivitVideoProcessor(**_OF_VIDEO)),
    "videomae": (lambda: t.VideoMAEModel(t.VideoMAEConfig(patch_size=8, use_mean_pooling=False, **_VIDEO)), lambda: t.VideoMAEVideoProcessor(**_OF_VIDEO)),
    "videomae_mean": (lambda: t.VideoMAEModel(t.VideoMAEConfig(patch_size=8, **_VIDEO)), lambda: t.VideoMAEVideoProcessor(**_OF_VIDEO)),
    "vjepa2": (
        lambda: t.VJEPA2Model(t.VJEPA2Config(patch_size=8, crop_size=32, frames_per_clip=4, hidden_size=24, num_attention_heads=2, num_hidden_layers=3,
                                             pred_hidden_size=12, pred_num_attention_heads=1, pred_num_hidden_layers=1)),
        lambda: t.VJEPA2VideoProcessor(crop_size=32),
    ),
    "ast": (
        lambda: t.ASTModel(t.ASTConfig(num_mel_bins=24, max_length=40, patch_size=8, frequency_stride=5, time_stride=5, **_SIZES)),
        lambda: {"feature_extractor_type": "ASTFeatureExtractor", "num_mel_bins": 24, "max_length": 40},
    ),
    "whisper": (
        lambda: t.WhisperModel(t.WhisperConfig(vocab_size=32, num_mel_bins=16, d_model=24, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=48,
                                               decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, max_source_positions=50, pad_token_id=0,
                                               bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)),
        lambda: t.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
    ),
    "wav2vec2": (lambda: t.Wav2Vec2Model(t.Wav2Vec2Config(**_WAVE)), lambda: t.Wav2Vec2FeatureExtractor(sampling_rate=4000)),
    "wav2vec2_stable": (
        lambda: t.Wav2Vec2Model(t.Wav2Vec2Config(**_WAVE, do_stable_layer_norm=True, feat_extract_norm="layer")),
        lambda: t.Wav2Vec2FeatureExtractor(sampling_rate=4000, return_attention_mask=True),
    ),
    "hubert": (lambda: t.HubertModel(t.HubertConfig(**_WAVE)), lambda: t.Wav2Vec2FeatureExtractor(sampling_rate=4000)),
    "clap": (lambda: _clap(False), lambda: t.ClapFeatureExtractor(feature_size=16, sampling_rate=8000, max_length_s=1, truncation="rand_trunc")),
    "clap_fusion": (lambda: _clap(True), lambda: t.ClapFeatureExtractor(feature_size=16, sampling_rate=8000, max_length_s=1, truncation="fusion")),
}  # fmt: skip
VIDEO = [name for name in CLASSES if name.startswith(("time", "v"))]
SOUND = [name for name in CLASSES if name not in VIDEO]


@cache
def model_of(name: str) -> Any:
    """The model itself, float32, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        return CLASSES[name][0]().eval()


def save_clips(name: str, folder: Path) -> Path:
    """The folder of the encoder."""
    model_of(name).save_pretrained(folder)
    made = CLASSES[name][1]()
    if isinstance(made, dict):
        (folder / "preprocessor_config.json").write_text(json.dumps(made))
    else:
        made.save_pretrained(folder)
    return folder


def clip_tower(name: str, folder: Path, **options: Any) -> VisionTower:
    """The tower of a saved encoder, float64."""
    return load_tower(save_clips(name, folder), dtype=torch.float64, **options)

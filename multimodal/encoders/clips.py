"""Encoders of transformers for video and sound, each with its own preprocessing: a clip in one tensor of a fixed shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adalink.errors import ConfigError, DataError
from multimodal.encoders.base import Loaded, Preprocess, Stage, from_map
from multimodal.loading import loading, quiet
from multimodal.sample import MediaKind

__all__ = ["FAMILIES", "ClipEncoder", "ClipPreprocess", "FilterBank", "set_frames", "load_clips"]

_SECONDS = 10.0  # of sound that encoders of any length are given (Wav2Vec2, HuBERT): as long as AudioCaps' clips


@dataclass(frozen=True)
class Family:
    """What the states of one model type hold.

    kind      what it encodes
    takes     the argument of its forward
    n_first   rows before the patches: the CLS token, of AST also the distillation token
    blocks    the module that lists the blocks, inside `inner`
    inner     the part of the model that is the encoder; empty: all of it
    frames    the setting of its config that says how many frames a clip has
    """

    kind: MediaKind
    takes: str
    n_first: int
    blocks: str
    inner: str = ""
    frames: str = ""


FAMILIES = {
    "timesformer": Family("video", "pixel_values", 1, "encoder.layer", frames="num_frames"),
    "vivit": Family("video", "pixel_values", 1, "layers", frames="num_frames"),
    "videomae": Family("video", "pixel_values", 0, "encoder.layer", frames="num_frames"),
    "vjepa2": Family("video", "pixel_values_videos", 0, "layer", inner="encoder", frames="frames_per_clip"),
    "audio-spectrogram-transformer": Family("audio", "input_values", 2, "layers"),
    "whisper": Family("audio", "input_features", 0, "layers", inner="encoder"),
    "wav2vec2": Family("audio", "input_values", 0, "encoder.layers"),
    "hubert": Family("audio", "input_values", 0, "encoder.layers"),
    "clap": Family("audio", "input_features", 0, "audio_encoder.layers", inner="audio_model"),
}


def load_clips(spec: str | Path, name: str, revision: str | None, model: nn.Module, frames: int | None) -> Loaded:
    """The encoder of a model of one of FAMILIES, with the preprocessing in its folder. frames: of each clip; None: as its config says.

    Raises ConfigError for a number of frames that the encoder cannot take, and where there is no preprocessing.
    """
    config: Any = model.config
    family = FAMILIES[config.model_type]
    if frames is not None and family.kind == "video":
        set_frames(model, family, frames, str(spec))
    with loading("preprocessing of", spec, "put the encoder's preprocessor_config.json beside its config.json"), quiet():
        made: Any = (_video if family.kind == "video" else _sound)(name, revision, config)
    inner: Any = model.get_submodule(family.inner)
    if family.kind == "video":
        return Loaded(
            encoder=ClipEncoder(inner, family, str(spec), n_frames := getattr(config, family.frames)),
            preprocess=ClipPreprocess(transform=made, kind="video", n_frames=n_frames),
        )
    return Loaded(encoder=ClipEncoder(inner, family, str(spec)), preprocess=ClipPreprocess(transform=made, kind="audio", rate=made.rate))


# ----------------------------------------
# Another number of frames than the encoder was trained with.


def set_frames(model: Any, family: Family, frames: int, name: str) -> None:
    """Make the encoder one of `frames` frames: its config, which every block reads, and what it adds by time, by the nearest that was trained.

    VideoMAE computes that for any length, and V-JEPA 2 turns queries and keys by it, so nothing of theirs is resized.
    Raises ConfigError for a number that no tubelets fit.
    """
    step = step_of(model.config)
    if frames < 1 or frames % step:
        raise ConfigError(f"frames is {frames}, and the encoder '{name}' takes {step} at a time: give a multiple of {step}, from {step} on")
    embeddings: Any = getattr(model, "embeddings", None)
    trained = getattr(model.config, family.frames)
    setattr(model.config, family.frames, frames)
    if model.config.model_type == "timesformer" and model.config.attention_type != "space_only":
        embeddings.time_embeddings = _nearest(embeddings.time_embeddings, 0, trained, frames)
    elif model.config.model_type == "vivit":
        embeddings.position_embeddings = _nearest(embeddings.position_embeddings, 1, trained // step, frames // step)
    elif model.config.model_type == "videomae":
        embeddings.position_embeddings = type(embeddings)(model.config).position_embeddings


def step_of(config: Any) -> int:
    """How many frames a patch is of."""
    size = getattr(config, "tubelet_size", 1)
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _nearest(values: Tensor, n_first: int, n_times: int, wanted: int) -> nn.Parameter:
    """[1, n_first + n_times * N, D] -> [1, n_first + wanted * N, D]: the values of the nearest time."""
    first, rest = values.data[:, :n_first], values.data[:, n_first:]
    by_time = rest.reshape(1, n_times, -1).transpose(1, 2)
    resized = nn.functional.interpolate(by_time, size=wanted, mode="nearest").transpose(1, 2)
    return nn.Parameter(torch.cat([first, resized.reshape(1, -1, rest.shape[2])], 1), requires_grad=False)


# ----------------------------------------
# The model.


class ClipEncoder(nn.Module):
    """A model of video or sound. A `multimodal.encoders.base.Encoder` of clips [B, T, 3, H, W], spectrograms or waves [B, samples].

    n_frames   T of the clips that it takes; 0 for sound
    """

    def __init__(self, model: nn.Module, family: Family, name: str, n_frames: int = 0) -> None:
        super().__init__()
        self.model = model
        self.family, self.name, self.n_frames = family, name, n_frames

    @property
    def times(self) -> tuple[int, bool]:
        """How many moments the patches are of, and whether all places of one come together; 0 where each patch is a moment, or places and times merge."""
        config: Any = self.model.config
        if self.family.kind == "video":
            return self.n_frames // step_of(config), config.model_type != "timesformer"
        if config.model_type == "audio-spectrogram-transformer":
            return (config.max_length - config.patch_size) // config.time_stride + 1, False
        return 0, True

    def whole(self, pixels: Tensor) -> object:
        return self._run(pixels)

    def blocks(self, pixels: Tensor) -> tuple[Stage, ...]:
        """What each block gives, as it is: transformers' own hidden states end in normed ones in some models."""
        found: list[Tensor] = []

        def note(_block: nn.Module, _inputs: object, output: Any) -> None:
            found.append(output if isinstance(output, Tensor) else output[0])

        handles = [block.register_forward_hook(note) for block in self.model.get_submodule(self.family.blocks).children()]
        try:
            self._run(pixels)
        finally:
            for handle in handles:
                handle.remove()
        return tuple(map(self._stage, found))

    def last(self, pixels: Tensor) -> Stage:
        return self._stage(self._run(pixels).last_hidden_state)

    def _run(self, pixels: Tensor) -> Any:
        if self.n_frames and (pixels.dim() != 5 or pixels.shape[1] != self.n_frames):
            found = f"clips of {pixels.shape[1]} frames" if pixels.dim() == 5 else f"a tensor {list(pixels.shape)}"
            raise ConfigError(
                f"the encoder '{self.name}' takes clips of {self.n_frames} frames [B, {self.n_frames}, 3, H, W], and was given {found}: "
                "load it with the frames that the clips have (frames)"
            )
        given = {self.family.takes: pixels}
        if getattr(self.model.config, "enable_fusion", False):  # of CLAP: no part of a longer sound is drawn, so none is looked at more closely
            given["is_longer"] = torch.zeros(len(pixels), 1, dtype=torch.bool)
        return self.model(**given)

    def _stage(self, state: Tensor) -> Stage:
        n_first = self.family.n_first
        return from_map(state) if state.dim() == 4 else Stage(patches=state[:, n_first:], cls=state[:, 0] if n_first else None)


# ----------------------------------------
# Preprocessing.


@dataclass(frozen=True, kw_only=True)
class ClipPreprocess(Preprocess):
    """A clip as its encoder takes it; like `Preprocess` it holds no weights.

    kind       video or audio
    n_frames   how many frames are to be read of a clip
    is_drawing whether they are drawn anew in each epoch of training
    rate       samples a second of the sound that it takes
    """

    transform: Callable[[Any], Tensor]
    n_frames: int = 0
    rate: int = 0
    is_drawing: bool = False

    def __call__(self, media: Any) -> Tensor:
        """float32 [T, 3, H, W] of frames uint8 [T, h, w, 3]; of a wave float32 [samples] what the encoder takes. Raises DataError for one too short."""
        return self.transform(media).float()

    @property
    def blank(self) -> NDArray[Any]:
        """Black frames, or a tenth of a second of silence."""
        return np.zeros((self.n_frames, 8, 8, 3), np.uint8) if self.kind == "video" else np.zeros(self.rate // 10, np.float32)

    def probe(self, size: int = 40) -> Tensor:
        """A clip with structure in space and time, prepared; its shape does not depend on `size`, as the clips of a batch need it."""
        if self.kind == "video":
            t, y, x, channel = np.ogrid[: self.n_frames, : 10 * size, : 16 * size, :3]
            return self((x * 37 // 16 + y * 101 // 16 + channel * 53 + t * 29).astype(np.uint8))
        seconds = np.arange(self.rate * size // 32) / self.rate
        return self((0.3 * np.sin(2 * np.pi * (8 * size + 900 * seconds) * seconds)).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class _Video:
    processor: Any  # a video processor of transformers

    def __call__(self, frames: NDArray[np.uint8]) -> Tensor:
        made = self.processor(videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors="pt")
        pixels: Tensor = next(made[name] for name in ("pixel_values", "pixel_values_videos") if name in made)
        return pixels[0]


def _video(name: str, revision: str | None, _config: Any) -> _Video:
    from transformers import AutoVideoProcessor

    return _Video(processor=AutoVideoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False))


@dataclass(frozen=True, kw_only=True)
class _Sound:
    """What transformers' extractor makes of a wave, which is cut first: CLAP's would draw a part of a longer one at random.

    n_samples   that it takes; fewer are filled up by the extractor itself, or with zeros where `is_wave`
    """

    processor: Any
    rate: int
    n_samples: int
    is_wave: bool

    def __call__(self, wave: NDArray[np.float32]) -> Tensor:
        made = self.processor(wave[: self.n_samples], sampling_rate=self.rate, return_tensors="pt")
        if not self.is_wave:
            features: Tensor = made["input_features"][0]
            return features
        values: Tensor = made["input_values"][0]
        return nn.functional.pad(values, (0, self.n_samples - len(values)))


def _sound(name: str, revision: str | None, config: Any) -> FilterBank | _Sound:
    if config.model_type == "audio-spectrogram-transformer":
        from transformers.feature_extraction_utils import FeatureExtractionMixin

        known, _ = FeatureExtractionMixin.get_feature_extractor_dict(name, revision=revision)
        return FilterBank.from_settings(known)
    from transformers import AutoFeatureExtractor

    made = AutoFeatureExtractor.from_pretrained(name, revision=revision, trust_remote_code=False)
    is_wave = config.model_type in ("wav2vec2", "hubert")
    n_samples = int(_SECONDS * made.sampling_rate) if is_wave else getattr(made, "nb_max_samples", None) or made.n_samples
    return _Sound(processor=made, rate=made.sampling_rate, n_samples=n_samples, is_wave=is_wave)


@dataclass(frozen=True, kw_only=True)
class FilterBank:
    """AST's log mel filter bank, as Kaldi computes it.

    Frames of 25 ms every 10 ms, each minus its mean, with pre-emphasis 0.97 and a Hann window; the power in triangles from 20 Hz to half
    the rate, and its logarithm. Cut, or filled up with zeros, to `max_length` frames, and only then normalised: (x - mean) / (2 std).
    """

    rate: int = 16_000
    num_mel_bins: int = 128
    max_length: int = 1024
    mean: float = -4.2677393
    std: float = 4.5689974
    do_normalize: bool = True
    floor: float = field(default=2.0**-23, init=False)  # of the power, float32's eps

    @staticmethod
    def from_settings(known: dict[str, Any]) -> FilterBank:
        """Of the settings in a preprocessor_config.json of AST."""
        names = ("num_mel_bins", "max_length", "mean", "std", "do_normalize")
        return FilterBank(rate=known.get("sampling_rate", 16_000), **{name: known[name] for name in names if name in known})

    def __call__(self, wave: NDArray[np.floating[Any]] | Tensor) -> Tensor:
        """float32 [max_length, num_mel_bins] of a wave [samples]. Raises DataError where it is shorter than a frame."""
        found = self.frames(torch.as_tensor(wave))[: self.max_length]
        found = nn.functional.pad(found, (0, 0, 0, self.max_length - len(found)))
        return ((found - self.mean) / (2 * self.std) if self.do_normalize else found).float()

    def frames(self, wave: Tensor) -> Tensor:
        """float64 [frames, num_mel_bins]: the logarithms alone. Raises DataError as the call does."""
        size, step = self.rate // 40, self.rate // 100
        if len(wave) < size:
            raise DataError(f"a sound of {len(wave)} samples is shorter than one frame of {size}: leave it out")
        frames = wave.double().unfold(0, size, step)
        frames = frames - frames.mean(1, keepdim=True)
        frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], 1)
        frames = frames * torch.hann_window(size, periodic=False, dtype=torch.float64)
        power = torch.fft.rfft(frames, self._n_fft).abs() ** 2
        return (power @ self._triangles).clamp_min(self.floor).log()

    @property
    def _n_fft(self) -> int:
        return 1 << (self.rate // 40 - 1).bit_length()

    @cached_property
    def _triangles(self) -> Tensor:
        """float64 [n_fft / 2 + 1, num_mel_bins]: equal sides in mel, 1127 ln(1 + Hz / 700), their corners at equal distances."""
        corners = torch.linspace(_mel(20.0), _mel(self.rate / 2), self.num_mel_bins + 2, dtype=torch.float64)
        hertz = torch.arange(self._n_fft // 2 + 1, dtype=torch.float64) * self.rate / self._n_fft
        mel = 1127 * torch.log1p(hertz / 700)[:, None]
        up = (mel - corners[:-2]) / (corners[1:-1] - corners[:-2])
        down = (corners[2:] - mel) / (corners[2:] - corners[1:-1])
        return torch.minimum(up, down).clamp_min(0)


def _mel(hertz: float) -> float:
    return 1127 * math.log1p(hertz / 700)

"""A frozen vision encoder of any library: pixels in, features out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from adalink import Adapter, Anatomy, FrozenPart, InputSpec, Method
from adalink.attachment.vision import attach_vision, read_vision
from adalink.checkpoint.folder import AdapterConfig, load_weights, read_config, save_adapter
from adalink.checkpoint.precision import AS_SAVED, Precision, settle
from adalink.errors import ConfigError
from multimodal.encoders.base import Encoder, Features, Loaded, Preprocess, Stage, read_layout
from multimodal.encoders.clips import ClipPreprocess
from multimodal.encoders.load import load_encoder
from multimodal.loading import freeze, loading

__all__ = [
    "NoTower", "VisionTower", "has_vision_adapter", "load_tower", "load_vision_adapter", "new_vision_adapter", "refuse_other_features", "save_vision_adapter",
]  # fmt: skip


def load_tower(
    spec: str | Path, *, layer: int = -1, dtype: torch.dtype | None = None, precision: Precision = AS_SAVED, frames: int | None = None
) -> VisionTower:
    """The frozen tower that `spec` names.

    spec    a local folder in the format of transformers, timm or open_clip; `timm:vit_base_patch16_224.augreg_in21k`;
            `open_clip:ViT-B-32/laion2b_s34b_b79k`; or a transformers hub id, `hf:org/name` or `org/name`, with `@revision` to pin it
    layer   which block the patches come from, counted from the end: -1 the final features, -2 the block before (Context-PEFT)
    dtype   of the weights and the features; None keeps what the files hold
    precision   how the weights are held; its attention is not for encoders
    frames  of a video encoder: how many each clip has; its embeddings of time are resized to so many. None: as its config says

    Raises ConfigError for a name or folder that leads to no encoder, DataError for damaged weights.
    """
    loaded = load_encoder(spec, dtype, frames)
    if frames is not None and loaded.preprocess.kind != "video":
        raise ConfigError(f"frames is {frames}, and the encoder '{spec}' takes {loaded.preprocess.kind}, which has none: leave it out")
    freeze(loaded.encoder, dtype)
    tower = VisionTower(loaded, name=str(spec), layer=layer)
    if precision.attention != "auto":
        raise ConfigError(f"base: attention is {precision.attention} for the encoder '{spec}', which has its own: leave it out")
    settle(tower, precision, str(spec))
    tower.frames = frames
    return tower


class VisionTower(nn.Module):
    """A frozen encoder and its preprocessing. Always in eval mode, whatever `train()` is called on the model around it.

    name        what it was loaded from
    n_patches   N, at the encoder's own image size
    width       Dv of the patches
    layer       the block that the patches come from, counted from the end
    n_layers    L of `Features.pooled`: the number of blocks, or 1 where the widths of the blocks differ
    n_retained      how many vectors of width Dv an image's features are, joined: N + L, or N where pooled ones have another width
    preprocess  PIL image -> float32[3, H, W], or a clip -> a tensor of one shape; holds no weights, so it is cheap to send to worker processes
    """

    def __init__(self, loaded: Loaded, *, name: str, layer: int = -1) -> None:
        super().__init__()
        self.encoder = loaded.encoder
        self.preprocess: Preprocess = loaded.preprocess
        self.name = name
        self.frames: int | None = None  # that a video encoder was loaded for; None: as its config says
        self.adapter: Adapter | None = None  # of `adapt`; where there is one, features are trained through
        freeze(self.encoder, None)
        pixels = _example(self.preprocess, self.name)
        with torch.no_grad(), loading("vision encoder", name, "choose an encoder that turns a batch of images alone into patches"):
            self._layout = read_layout(self._encoder, self.encoder, self._placed(pixels))
        if not -self._layout.n_blocks <= layer <= -1:
            raise ConfigError(
                f"layer={layer} is not in the encoder '{self.name}', which has {self._layout.n_blocks} blocks; "
                f"choose -1 (the last) to {-self._layout.n_blocks} (the first)"
            )
        self.layer = layer
        features = self(pixels)
        self.n_layers = features.pooled.shape[0]
        self.n_patches, self.width = features.patches.shape[1:]
        self.n_retained = features.joined.shape[1]

    @property
    def inputs(self) -> dict[str, InputSpec]:
        """What the edits can read of an image or a clip; pooled features of another width than the patches are left out."""
        times, is_time_first = getattr(self.encoder, "times", (0, True))
        image = {"image": InputSpec(self.n_patches, self.width, times, is_time_first)}
        n_pooled = self.n_retained - self.n_patches
        return {**image, "image_taps": InputSpec(n_pooled, self.width)} if n_pooled else image

    @property
    def _encoder(self) -> Encoder:
        return self.encoder  # type: ignore[return-value]  # nn.Module attributes are typed as modules

    def train(self, mode: bool = True) -> VisionTower:
        """Stays in eval mode, but for an adapter: frozen parts have no dropout and their batch statistics do not move."""
        super().train(False)
        if self.adapter is not None:
            self.adapter.train(mode)
        return self

    def adapt(self, adapter: Adapter) -> Adapter:
        """Attach an adapter to the encoder, for good: from now on its features are trained through, and nothing may cache them.

        adapter: made with `vision_anatomy()`. Raises ConfigError where the encoder has one already.
        """
        if self.adapter is not None:
            raise ConfigError(f"the encoder '{self.name}' has an adapter already: put all its methods into one")
        attach_vision(self.encoder.get_submodule("model"), adapter)
        self.adapter = adapter.to(next(self.encoder.parameters()).device)
        return adapter

    def vision_anatomy(self) -> Anatomy:
        """Where methods can be placed in the encoder. Raises AttachError where it is no plain vision transformer."""
        return read_vision(self.encoder.get_submodule("model"))

    def encode(self, pixels: Tensor) -> Features:
        """As `forward`, without gradient, for a cache of features. Raises ConfigError where the encoder is adapted: then they change."""
        if self.adapter is not None:
            raise ConfigError(
                f"the encoder '{self.name}' has trained weights, so its features change with every step and cannot be cached: "
                "encode images as they come (train.features: encode)"
            )
        with torch.no_grad():
            return self(pixels)  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> Features:
        """Features of `pixels` float[B, 3, H, W], or of clips, as `preprocess` makes them, in the dtype of the tower; without gradient unless it is adapted.

        patches, layer = -1: the final features after the encoder's final norm, also where the encoder norms its CLS token only (CLIP);
            not normed where the encoder averages its patches before that norm. layer < -1: the block's output without the norm.
            CLS and register tokens are dropped; a feature map [B, C, h, w] becomes [B, h * w, C].
        pooled: of every block, the final norm applied to its CLS token (eP-ALM); the mean of the normed patches where there is no CLS;
            the norm of the mean where the encoder averages first. Where the widths of the blocks differ (most CNNs, Swin), only
            the layer that the patches come from: L = 1.
        """
        with torch.set_grad_enabled(self.adapter is not None and torch.is_grad_enabled()):
            return self._features(self._placed(pixels))

    def _features(self, pixels: Tensor) -> Features:
        if self._layout.is_column:
            blocks = self._encoder.blocks(pixels)
            patches = self._normed(blocks[-1].patches) if self.layer == -1 else blocks[self.layer].patches
            return Features(patches=patches, pooled=torch.stack([self._pooled(stage) for stage in blocks]))
        stage = self._encoder.last(pixels) if self.layer == -1 else self._encoder.blocks(pixels)[self.layer]
        return Features(patches=stage.patches, pooled=_pool(stage)[None])

    def _placed(self, pixels: Tensor) -> Tensor:
        weight = next(self.encoder.parameters())
        return pixels.to(device=weight.device, dtype=weight.dtype)

    def _normed(self, tokens: Tensor) -> Tensor:
        norm = self._layout.norm
        return norm.module(tokens) if norm is not None and norm.takes == "tokens" else tokens

    def _pooled(self, stage: Stage) -> Tensor:
        """float[B, Dv]. Norms one row an image where there is a CLS token, not all of them."""
        norm = self._layout.norm
        if norm is not None and norm.takes == "mean":
            return norm.module(stage.patches.mean(1))
        return self._normed(stage.cls) if stage.cls is not None else self._normed(stage.patches).mean(1)


def _pool(stage: Stage) -> Tensor:
    return stage.cls if stage.cls is not None else stage.patches.mean(1)


def _example(preprocess: Preprocess, name: str) -> Tensor:
    """float32[1, 3, H, W] of an image with structure, or of a clip. Raises ConfigError where two images or clips do not come out at one size."""
    if isinstance(preprocess, ClipPreprocess):
        return preprocess.probe()[None]
    wide = Image.linear_gradient("L").resize((640, 400))
    pixels = preprocess(Image.merge("RGB", [wide, wide.transpose(Image.Transpose.FLIP_TOP_BOTTOM), wide]))
    high = preprocess(Image.new("RGB", (300, 500)))
    if pixels.shape != high.shape or pixels.dim() != 3:
        raise ConfigError(
            f"the preprocessing of '{name}' gives images of different sizes ({list(pixels.shape)} and {list(high.shape)}), "
            f"expected one size so that images stack; choose an encoder that crops or resizes to a fixed size"
        )
    return pixels[None]


class NoTower(nn.Module):
    """In the place of a tower where a model has no encoder, and reads texts alone."""

    name, layer, n_patches, n_retained, frames = "", -1, 0, 0, None
    adapter: Adapter | None = None

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()  # without a weight

    def preprocess(self, image: Image.Image) -> Tensor:
        """Raises ConfigError: nothing reads an image."""
        raise ConfigError("this model has no encoder, and an image was given: leave it out, or compose a model with an encoder")

    def vision_anatomy(self) -> Anatomy:
        """Raises ConfigError: there is nothing to adapt."""
        raise ConfigError("methods for the encoder were given, and this model has none: leave vision_methods out")

    def adapt(self, adapter: Adapter) -> Adapter:
        """Raises ConfigError likewise."""
        raise ConfigError("an adapter of the encoder was given, and this model has none: leave it out")


# ----------------------------------------
# The adapter of an encoder, in the folder of the language model's adapter that was trained with it: `vision/`, in the same format.


FOLDER = "vision"


class Adaptable(Protocol):
    """A frozen tower that methods can be put into."""

    adapter: Adapter | None

    def vision_anatomy(self) -> Anatomy:
        """Where they can be placed."""

    def adapt(self, adapter: Adapter) -> Adapter:
        """Attach an adapter, for good."""


def new_vision_adapter(tower: Adaptable, methods: Mapping[str, Method]) -> Adapter:
    """Attach new methods to the tower's encoder. Raises ConfigError or AttachError where they do not fit it."""
    return tower.adapt(Adapter(methods, tower.vision_anatomy()))


def save_vision_adapter(folder: Path, tower: Adaptable, encoder: FrozenPart) -> None:
    """Write the encoder's adapter below the folder, where there is one."""
    if tower.adapter is not None:
        save_adapter(folder / FOLDER, tower.adapter, AdapterConfig(tower.adapter.methods, {"encoder": encoder}))


def has_vision_adapter(folder: Path) -> bool:
    """Whether an adapter's folder holds an encoder's too."""
    return (folder / FOLDER).is_dir()


def load_vision_adapter(
    folder: Path, tower: Adaptable, encoder: FrozenPart, n_adapters: int, *, allow_other_base: bool = False
) -> Adapter | None:
    """The encoder's adapter of a folder with its weights, not attached yet; None where the folder holds none.

    n_adapters: adapters that the language model has already. They share the encoder, so a folder with an encoder's adapter can only
    be the first. Raises ConfigError where the encoder is not as the folder's adapter knew it, CheckpointError for a damaged folder.
    """
    below = folder / FOLDER
    if not has_vision_adapter(folder):
        if tower.adapter is not None:
            raise ConfigError(f"the adapter in {folder} was trained on the frozen encoder, and this model's encoder is adapted: load it on a model of its own")
        return None
    if tower.adapter is not None or n_adapters:
        raise ConfigError(
            f"the adapter in {folder} was trained with an adapted encoder, which it would change for the adapters that this model has already: "
            "load it first, on a model of its own"
        )
    config = read_config(below)
    config.check_base({"encoder": encoder}, str(below), allow_other_base=allow_other_base)
    adapter = Adapter(config.methods, tower.vision_anatomy())
    load_weights(below, adapter)
    return adapter


def refuse_other_features(tower: VisionTower | NoTower, config: AdapterConfig, parts: Mapping[str, FrozenPart], folder: str | Path) -> None:
    """Raise ConfigError where an adapter was trained on another layer's features, or on clips of other frames."""
    layer, frames = config.task.get("layer", tower.layer), config.task.get("frames")
    if layer != tower.layer:
        config.check_base({**parts, "encoder": replace(parts["encoder"], sketches={})}, str(folder))  # another model is the first error to raise
        raise ConfigError(
            f"the adapter in {folder} reads the features of layer {layer}, and this model's encoder gives those of layer {tower.layer}: "
            f"compose the model with layer={layer}"
        )
    if frames != tower.frames:
        was, now = (number or "as many as its config says" for number in (frames, tower.frames))
        raise ConfigError(
            f"the adapter in {folder} was trained on clips with frames: {was}, and this model's encoder has {now}: compose it with frames={frames}"
        )

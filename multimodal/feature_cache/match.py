"""Features on disk for a model that is here: read where they are its own, refused where they are not."""

from __future__ import annotations

from pathlib import Path

from multimodal.feature_cache.binding import bind, refuse_other
from multimodal.feature_cache.cache import FeatureCache
from multimodal.feature_cache.contents import Contents
from multimodal.feature_cache.manifest import read_manifest
from multimodal.sample import SampleSource
from multimodal.vision import VisionTower

__all__ = ["matching_features"]


def matching_features(folder: Path, tower: VisionTower, source: SampleSource, needed: Contents) -> FeatureCache:
    """The folder's features of these pictures by this encoder, of which only what is needed is read.

    Raises DataError as `FeatureCache.open`; ConfigError, naming both sides, where they are of another encoder, layer, preprocessing or data
    set, or lack what is needed, and where the encoder has trained weights.
    """
    manifest = read_manifest(folder)
    refuse_other(manifest.binding, bind(tower, source), folder)
    return FeatureCache.of(folder, manifest).reading(needed, folder)

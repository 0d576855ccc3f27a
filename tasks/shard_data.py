"""Shards as a config names them: a folder or a URL, or several mixed by weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from multimodal.bad_samples import BadSample
from multimodal.mixing import MixedSet, Mixture
from multimodal.pixels import Drafted
from multimodal.remote import RemoteSettings, shown
from multimodal.sample import Decode, SampleSource
from multimodal.shards import ShardSource

__all__ = ["open_mix", "open_shards"]


def open_shards(place: str, remote: RemoteSettings) -> tuple[SampleSource, tuple[BadSample, ...]]:
    """The samples of a folder or a URL, and those that are known to be bad."""
    source = ShardSource(place, remote=remote)
    return source, tuple(source.problems)


def open_mix(mix: Mapping[str, int], remote: RemoteSettings, decode: Decode) -> tuple[SampleSource, tuple[BadSample, ...]]:
    """The samples of several folders or URLs, which a training stream mixes by weight; `coco:42` is sample 42 of .../coco."""
    sources = {place: ShardSource(place, remote=remote) for place in mix}
    short = {place: shown(place).rstrip("/").rpartition("/")[2] for place in mix}
    names = {place: name if list(short.values()).count(name) == 1 else shown(place) for place, name in short.items()}
    problems = tuple(replace(bad, key=f"{names[place]}:{bad.key}") for place, source in sources.items() for bad in source.problems)
    return Mixture({names[place]: MixedSet(Drafted(source) if decode == "draft" else source, mix[place]) for place, source in sources.items()}), problems

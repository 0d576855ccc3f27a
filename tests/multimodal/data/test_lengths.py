"""Data sets say how long their texts are without reading an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_shards import image, made_shards, tar_of

from multimodal.data.inputs import Drafted
from multimodal.data.order import MixedSet, Mixture
from multimodal.data.shards.reader import ShardSource, encode_record
from multimodal.sample import Sample, lengths_of


def never(sample: Sample) -> int:
    raise AssertionError("shards are not read to be measured")


def test_of_shards_they_are_the_bytes_of_what_holds_the_texts(tmp_path: Path) -> None:
    written = made_shards(tmp_path / "set")
    expected = [len(encode_record(written[i])) for i in range(10)]
    source = ShardSource(tmp_path / "set")
    for tar in (tmp_path / "set").glob("*.tar"):
        tar.write_bytes(b"")  # the manifest was enough
    assert np.asarray(lengths_of(source, never)).tolist() == expected
    assert np.asarray(lengths_of(Drafted(source), never)).tolist() == expected
    mixed = Mixture({"a": MixedSet(source, 1), "b": MixedSet(source, 2)})
    assert np.asarray(lengths_of(mixed, never)).tolist() == expected * 2


def test_of_foreign_shards_the_caption_counts_and_not_what_else_their_json_says(tmp_path: Path) -> None:
    members = [("0.jpg", image(0)), ("0.txt", b"a dog"), ("0.json", b'{"url": "https://x.example/' + b"y" * 90 + b'"}')]
    members += [("1.jpg", image(1)), ("1.txt", b"a dog runs in the snow"), ("2.png", image(2, "PNG")), ("2.json", b'{"caption": "a cat"}')]
    assert np.asarray(lengths_of(ShardSource([tar_of(tmp_path / "0.tar", members)]), never)).tolist() == [5, 22, 20]


@pytest.mark.parametrize("samples_per_shard", [1, 4, 10])
def test_they_do_not_depend_on_how_the_samples_are_laid_out(samples_per_shard: int, tmp_path: Path) -> None:
    """So a stream that goes on from shards that lie elsewhere has the same order."""
    written = made_shards(tmp_path / "set", samples_per_shard=samples_per_shard)
    assert np.asarray(lengths_of(ShardSource(tmp_path / "set"), never)).tolist() == [len(encode_record(written[i])) for i in range(10)]

"""Decoding at a fraction of the size: only where it was asked for, never too small, and never mistaken for the exact one."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import language, tower, two_texts
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from adalink import IMAGE, Slots
from adalink.errors import ConfigError
from multimodal.batches.packing import separate_rows
from multimodal.batches.tokenize import RowEncoder
from multimodal.data.feature_cache.encode import encoded_groups, pixel_table
from multimodal.data.feature_cache.reader import bind, refuse_other
from multimodal.data.images.decode import BadImage, decode_image
from multimodal.data.inputs import Drafted, needed_side, read_pixels
from multimodal.data.loader import train_loader
from multimodal.data.order import MixedSet, Mixture, fingerprint_of
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from multimodal.sample import Sample
from multimodal.template import Template

Transform = Callable[[Image.Image], Tensor]


def photograph(width: int, height: int, seed: int = 1) -> Image.Image:
    """Soft shapes with some noise, as a photograph has."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1)), dtype=np.float32)
    return Image.fromarray((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", exif: Image.Exif | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90, **({"exif": exif} if exif else {}))
    return buffer.getvalue()


def resized(*steps: Callable[[Image.Image], Image.Image]) -> Transform:
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.2])])


SQUASHED = resized(transforms.Resize((224, 224)))


class Photographs:
    """A data set of JPEGs, of 640 x 480 unless told otherwise."""

    def __init__(self, n: int, size: tuple[int, int] = (640, 480)) -> None:
        self.images = [encoded(photograph(*size, seed=i)) for i in range(n)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(key=f"p{index}", image_id=index, image=self.images[index], captions=("a red cube",))


@pytest.mark.parametrize(
    ("transform", "side"),
    [
        (SQUASHED, 224),
        (resized(transforms.Resize(224), transforms.CenterCrop(224)), 224),
        (resized(transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)), 256),
        (resized(transforms.Resize(248, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)), 248),
        (resized(transforms.Resize((384, 384))), 384),
    ],
)
def test_what_an_encoder_needs_is_read_from_its_preprocessing(transform: Transform, side: int) -> None:
    assert side * 0.985 <= needed_side(transform) <= side


def test_the_embedded_encoder_needs_its_own_size() -> None:
    assert needed_side(tower().preprocess) == tower().preprocess(Image.new("RGB", (9, 9))).shape[-1]


@pytest.mark.parametrize(
    ("size", "at_least", "found"),
    [
        ((640, 480), 224, (320, 240)), ((640, 480), 240, (320, 240)), ((640, 480), 241, (640, 480)), ((1000, 2000), 224, (250, 500)),
        ((2000, 2000), 224, (250, 250)), ((447, 640), 224, (447, 640)),
    ],
)  # fmt: skip
def test_a_picture_shrinks_to_no_less_than_is_needed(size: tuple[int, int], at_least: int, found: tuple[int, int]) -> None:
    data = encoded(photograph(*size))
    assert decode_image(data, at_least=at_least).size == found
    assert decode_image(data).size == size


def test_what_does_not_shrink_keeps_every_pixel() -> None:
    for kind, size in (("PNG", (640, 480)), ("WEBP", (640, 480)), ("JPEG", (300, 200))):
        data = encoded(photograph(*size), kind)
        assert decode_image(data, at_least=224).tobytes() == decode_image(data).tobytes()


def test_a_turned_picture_is_still_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(photograph(640, 480), exif=exif), at_least=224).size == (240, 320)


def test_a_truncated_picture_is_still_refused() -> None:
    data = encoded(photograph(640, 480))
    with pytest.raises(BadImage, match="truncated"):
        decode_image(data[: len(data) // 2], at_least=224)


def test_other_pixels_come_of_a_draft_but_near_ones() -> None:
    sample = Photographs(1)[0]
    exact, draft = read_pixels(sample, SQUASHED), read_pixels(Drafted(Photographs(1))[0], SQUASHED)
    deviation = torch.tensor([0.2, 0.3, 0.2])[:, None, None]
    noise = ((exact - draft) * deviation).square().mean()
    assert 32 < 10 * math.log10(1 / float(noise)) < 60
    assert torch.equal(exact, SQUASHED(decode_image(sample.image)))  # the control


def test_every_reader_of_samples_reads_drafts() -> None:
    source, drafted = Photographs(2), Drafted(Photographs(2))
    encoder = RowEncoder(Template(prompt="<image><bos>"), language("opt"), [Slots(IMAGE, tower().n_patches)])

    def streamed(given: object) -> Tensor:
        loader = train_loader(given, two_texts, encoder, separate_rows, tower().preprocess, steps=1, batch_size=2, seed=1, workers=0)  # type: ignore[arg-type]
        (one,) = list(loader)
        assert one.batch is not None
        assert one.batch.pixels is not None
        return one.batch.pixels

    def features(given: object) -> Tensor:
        ((_, found, _),) = encoded_groups(tower(), given, [0], workers=0)  # type: ignore[arg-type]
        assert found is not None
        return found.joined

    def displayed(given: object) -> Tensor:
        return torch.stack([pixel_table(given, tower().preprocess, label="")[i] for i in range(2)])  # type: ignore[arg-type]

    for read in (streamed, features, displayed):
        assert not torch.equal(read(source), read(drafted))
        assert torch.equal(read(source), read(source))  # the control


def test_drafts_of_shards_and_of_a_folder_are_the_same(tmp_path: Path) -> None:
    source = Photographs(3)
    write_shards(source, tmp_path / "shards", samples_per_shard=2, workers=1)
    files = [tmp_path / f"p{i}.jpg" for i in range(3)]
    for i, path in enumerate(files):
        path.write_bytes(source.images[i])
    shards = Drafted(ShardSource(tmp_path / "shards"))
    for i, path in enumerate(files):
        of_file = read_pixels(replace(source[i], image=path, decode="draft"), SQUASHED)
        assert torch.equal(read_pixels(shards[i], SQUASHED), of_file)
        assert not torch.equal(read_pixels(source[i], SQUASHED), of_file)
    mixed = Mixture({"a": MixedSet(shards, 1), "b": MixedSet(ShardSource(tmp_path / "shards"), 1)})
    assert [mixed[i].decode for i in (0, 3)] == ["draft", "exact"]


def test_how_pictures_are_decoded_is_part_of_a_data_sets_fingerprint(tmp_path: Path) -> None:
    source = Photographs(2)
    write_shards(source, tmp_path, samples_per_shard=2, workers=1)
    shards = ShardSource(tmp_path)
    assert fingerprint_of(Drafted(shards)) not in ("", fingerprint_of(shards))
    assert fingerprint_of(Drafted(source)) == ""  # files have none: their images are looked at, and how they are decoded with them
    for exact in (source, shards):
        written, here = bind(tower(), exact), bind(tower(), Drafted(exact))
        refuse_other(written, bind(tower(), exact), tmp_path)
        with pytest.raises(ConfigError, match=r"are of the data set \w+, and here it is \w+"):
            refuse_other(written, here, tmp_path)


def test_draws_of_a_task_do_not_depend_on_how_pictures_are_decoded() -> None:
    assert two_texts(Photographs(1)[0], random.Random(1)) == two_texts(Drafted(Photographs(1))[0], random.Random(1))

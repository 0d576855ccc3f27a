"""Images as an existing vision-language model takes them: the tokens that stand for each, and what its tower reads or has made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["NO_IMAGE", "ImageBatch", "Prepared", "joined", "joined_inputs", "placed"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The images of one sample, in their order; most samples have one, and a text alone has none.

    wording  the text that the processor puts in the place of each image: its tokens, and what stands around and between them
    counts   how many vectors each image has; as many tokens of its wording are an image's
    inputs   for each image, what the model's tower reads (pixel_values, image_grid_thw, ...); empty where vectors alone are cached
    grids    for each image, int64 [1, 3] (time, height, width) where the model's positions have several dimensions; empty elsewhere
    vectors  float [sum of counts, W], what the tower and the frozen connector make of the images; None where they are not encoded yet
    """

    wording: tuple[str, ...]
    counts: tuple[int, ...]
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    grids: tuple[Tensor, ...] = ()
    vectors: Tensor | None = None

    @property
    def n_vectors(self) -> int:
        """Of all images together."""
        return sum(self.counts)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        held = [value for one in self.inputs for value in one.values()] + [self.vectors] * (self.vectors is not None)
        return sum(value.nbytes for value in held if value is not None)

    def first(self, n: int) -> Prepared:
        """The first n images alone."""
        if n == len(self.wording):
            return self
        vectors = None if self.vectors is None else self.vectors[: sum(self.counts[:n])]
        return Prepared(wording=self.wording[:n], counts=self.counts[:n], inputs=self.inputs[:n], grids=self.grids[:n], vectors=vectors)

    def encoded(self, vectors: Tensor) -> Prepared:
        """The same images with their vectors, float [n, W], in place of what the tower reads."""
        return replace(self, inputs=(), vectors=vectors)


NO_IMAGE = Prepared(wording=(), counts=())


def joined(images: Sequence[Prepared]) -> Prepared:
    """Images that were prepared apart as those of one conversation, in this order: all with vectors, or all with what the tower reads."""
    if len(images) < 2:
        return images[0] if images else NO_IMAGE
    vectors = [image.vectors for image in images if image.vectors is not None]
    assert len(vectors) in (0, len(images))
    return Prepared(
        wording=tuple(one for image in images for one in image.wording),
        counts=tuple(one for image in images for one in image.counts),
        inputs=tuple(one for image in images for one in image.inputs),
        grids=tuple(one for image in images for one in image.grids),
        vectors=torch.cat(vectors) if vectors else None,
    )


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """The images of a batch, one entry for each sample."""

    samples: tuple[Prepared, ...]

    @property
    def starts(self) -> list[int]:
        """Where the vectors of each sample begin, once those of all samples are joined."""
        starts = [0]
        for sample in self.samples:
            starts.append(starts[-1] + sample.n_vectors)
        return starts[:-1]

    def to(self, device: torch.device) -> ImageBatch:
        """The same on a device."""
        return ImageBatch(samples=tuple(_moved(sample, device) for sample in self.samples))


def placed(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. From pinned memory, where that is CUDA: a copy from any other waits for all that the device has still to do."""
    is_far = device.type == "cuda" and value.device.type == "cpu"
    return (value.pin_memory() if is_far else value).to(device, non_blocking=True)


def _moved(sample: Prepared, device: torch.device) -> Prepared:
    inputs = tuple({name: placed(value, device) for name, value in one.items()} for one in sample.inputs)
    vectors = None if sample.vectors is None else placed(sample.vectors, device)
    return replace(sample, inputs=inputs, vectors=vectors)


def joined_inputs(images: Sequence[Mapping[str, Tensor]]) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Images that can be run through the tower together, as their indices and their inputs one after the other.

    The first dimension of each input counts images, tiles or patches; images whose other dimensions are equal go together.
    """
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(tuple((name, tuple(value.shape[1:])) for name, value in sorted(image.items())), []).append(index)
    return [(indices, {name: torch.cat([images[i][name] for i in indices]) for name in images[indices[0]]}) for indices in groups.values()]

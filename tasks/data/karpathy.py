"""Karpathy's splits of COCO, Flickr8k and Flickr30k: one JSON file with every image's split and captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adalink.errors import ConfigError, DataError
from multimodal.sample import BadSample, Sample
from tasks.data.files import FileSource, ImageFolder, Rows, first_has, integer, read_annotation_file, text
from tasks.data.reader import Given, Reader

__all__ = ["READER", "KarpathyImage", "read_karpathy", "read_karpathy_images"]


@dataclass(frozen=True, kw_only=True)
class KarpathyImage:
    """One image of a split.

    image_id  COCO's own id where the file has it (`cocoid`), else the number that the file gives (`imgid`)
    names     where the image may lie in the images folder: with the folder that the file names, and without it
    """

    image_id: int
    where: str  # the row, for messages
    names: tuple[str, ...]
    captions: tuple[str, ...]


def read_karpathy(file: Path, images: Path, split: str) -> FileSource:
    """One sample per image of the split with all its captions, in the file's order; the key is the image's id.

    file     such as dataset_coco.json, dataset_flickr8k.json
    images   the folder of images; COCO's may lie in train2014 and val2014 within it, or directly in it
    split    train, restval, val or test, or several with `+`: COCO is usually trained on `train+restval`

    Images that are not in the folder and images without a caption are in `problems`.
    Raises DataError on a file that is missing or of another shape; ConfigError on a split that the file does not have.
    """
    folder = ImageFolder(images)
    samples, problems = [], []
    described = read_karpathy_images(file, split)
    for image in described:
        key = str(image.image_id)
        path = next((path for name in image.names if (path := folder.find(name, image.where)) is not None), None)
        if path is None:
            problems.append(BadSample(key=key, reason="missing file", detail=f"{images / image.names[0]} is missing", file=image.names[0]))
        elif not image.captions:
            problems.append(
                BadSample(key=key, reason="no text", detail=f"image {key} ({image.names[-1]}) has no caption", file=image.names[-1])
            )
        else:
            samples.append(Sample(key=key, image_id=image.image_id, media=path, captions=image.captions))
    return FileSource(samples, problems, read_from=file, item_ids=(image.image_id for image in described))


def read_karpathy_images(file: Path, split: str) -> list[KarpathyImage]:
    """The images of a split without their files: what scoring needs. Arguments and errors as those of `read_karpathy`."""
    _, (rows,) = read_annotation_file(file, "images")
    named = [(text(row, "split", where), where, row) for where, row in rows]
    known = sorted({name for name, _, _ in named})
    wanted = split.split("+")
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"{file} has no split {unknown[0]!r}; it has {', '.join(known) or 'no image'}; several are joined as in train+restval"
        )
    found: dict[int, KarpathyImage] = {}
    for name, where, row in named:
        if name in wanted:
            image = _image(where, row)
            if image.image_id in found:
                raise DataError(
                    f"{where} has the id {image.image_id}, which {found[image.image_id].where} has too; expected each image once"
                )
            found[image.image_id] = image
    return list(found.values())


def _image(where: str, row: Mapping[str, object]) -> KarpathyImage:
    name = text(row, "filename", where)
    names = (f"{text(row, 'filepath', where)}/{name}", name) if "filepath" in row else (name,)
    sentences = row.get("sentences")
    if not isinstance(sentences, list):
        raise DataError(f"{where} has no list 'sentences'; expected Karpathy's format, such as dataset_coco.json")
    captions = tuple(caption for at, sentence in Rows(f"{where}.sentences", sentences) if (caption := text(sentence, "raw", at).strip()))
    return KarpathyImage(
        image_id=integer(row, "cocoid" if "cocoid" in row else "imgid", where), where=where, names=names, captions=captions
    )


def _open(given: Given) -> FileSource:
    if given.split is None:
        raise ConfigError(f"{given.path} holds several splits: give split, such as val or test")
    return read_karpathy(given.path, given.folder, given.split)


READER = Reader("karpathy", "Karpathy's splits", lambda found: first_has(found.document.get("images"), "sentences"), _open, reads=("split",))

"""Captions in COCO's format: a folder of images and a JSON file with the lists `images` and `annotations`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adalink.errors import DataError
from multimodal.sample import BadSample, Sample
from tasks.data.files import FileSource, ImageFolder, ImageName, Rows, document_keys, first_has, integer, read_annotation_file, text
from tasks.data.reader import Found, Given, Reader

__all__ = ["READER", "is_caption", "read_coco_captions", "read_coco_images"]


def read_coco_captions(*, images: Path, annotations: Path, image_name: str | None = None) -> FileSource:
    """One sample per image with all its captions, both in the file's order; the key is the image's id.

    images        the folder of images
    annotations   such as captions_train2014.json
    image_name    a pattern such as `COCO_val2014_{image_id:012d}.jpg`; None takes each image's `file_name`

    Images that are not in the folder, images without a caption, and captions without a letter are in `problems`.
    Raises DataError on a file that is missing or of another shape, and on an annotation that names no image; ConfigError on the pattern.
    """
    name = None if image_name is None else ImageName(image_name)
    folder = ImageFolder(images)
    _, (image_rows, caption_rows) = read_annotation_file(annotations, "images", "annotations")
    files = _file_names(image_rows, name)
    problems: list[BadSample] = []
    captions = _captions(caption_rows, files, problems, annotations)
    samples = []
    for image_id, (where, file_name) in files.items():
        path = folder.find(file_name, where)
        if path is None:
            problems.append(_missing(image_id, images / file_name))
        elif not captions[image_id]:
            problems.append(
                BadSample(key=str(image_id), reason="no text", detail=f"image {image_id} ({file_name}) has no caption", file=file_name)
            )
        else:
            samples.append(Sample(key=str(image_id), image_id=image_id, media=path, captions=tuple(captions[image_id])))
    return FileSource(samples, problems, read_from=annotations, item_ids=files)


def read_coco_images(*, images: Path, annotations: Path, image_name: str | None = None) -> FileSource:
    """One sample per image, without captions: for a test split, whose file (image_info_test2014.json) has the list `images` alone.

    Arguments, problems and errors as those of `read_coco_captions`.
    """
    name = None if image_name is None else ImageName(image_name)
    folder = ImageFolder(images)
    _, (image_rows,) = read_annotation_file(annotations, "images")
    samples, problems = [], []
    files = _file_names(image_rows, name)
    for image_id, (where, file_name) in files.items():
        path = folder.find(file_name, where)
        if path is None:
            problems.append(_missing(image_id, images / file_name))
        else:
            samples.append(Sample(key=str(image_id), image_id=image_id, media=path))
    return FileSource(samples, problems, read_from=annotations, item_ids=files)


def _file_names(rows: Rows, name: ImageName | None) -> dict[int, tuple[str, str]]:
    """Image id -> (the row's name for messages, the image's file name)."""
    files: dict[int, tuple[str, str]] = {}
    for where, row in rows:
        image_id = integer(row, "id", where)
        if image_id in files:
            raise DataError(f"{where} has the id {image_id}, which {files[image_id][0]} has too; expected each image once")
        files[image_id] = where, _file_name(row, where) if name is None else name(image_id)
    return files


def _file_name(row: Mapping[str, object], where: str) -> str:
    if "file_name" not in row:
        raise DataError(f"{where} has no 'file_name'; give an image name pattern, such as COCO_val2014_{{image_id:012d}}.jpg")
    return text(row, "file_name", where)


def _captions(rows: Rows, files: Mapping[int, tuple[str, str]], problems: list[BadSample], path: Path) -> dict[int, list[str]]:
    """Image id -> its captions; those without a letter go to `problems`."""
    captions: dict[int, list[str]] = {image_id: [] for image_id in files}
    for where, row in rows:
        image_id = integer(row, "image_id", where)
        if image_id not in captions:
            raise DataError(f"{where} belongs to image {image_id}, which the list 'images' of {path} does not have ({len(files)} images)")
        caption = text(row, "caption", where).strip()
        if not is_caption(row):
            continue
        if caption:
            captions[image_id].append(caption)
        else:
            file_name = files[image_id][1]
            problems.append(
                BadSample(
                    key=str(image_id), reason="empty caption", detail=f"{where} of image {image_id} ({file_name}) is empty", file=file_name
                )
            )
    return captions


def is_caption(row: Mapping[str, object]) -> bool:
    """Whether it is one of a person: VizWiz marks spam, and the sentence that stands for "nothing to be seen", and its own API leaves both out."""
    return not (row.get("is_rejected") or row.get("is_precanned"))


def _missing(image_id: int, path: Path) -> BadSample:
    return BadSample(key=str(image_id), reason="missing file", detail=f"{path} is missing", file=path.name)


def _recognises(found: Found) -> bool:
    """Captions, or the list of images of a test split."""
    images, annotations = (found.document.get(name) for name in ("images", "annotations"))
    if not isinstance(images, list) or first_has(images, "sentences"):
        return False
    return annotations is None or first_has(annotations, "caption")


def _open(given: Given) -> FileSource:
    read = read_coco_captions if "annotations" in document_keys(given.path) else read_coco_images
    return read(images=given.folder, annotations=given.path, image_name=given.image_name)


READER = Reader("coco", "COCO captions", _recognises, _open, reads=("image_name",))

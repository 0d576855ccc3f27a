"""References and results of captioning, as the official evaluation takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.annotation_files import integer, read_annotation_file, text
from tasks.karpathy import read_karpathy_images
from tasks.metrics.documents import read_document, rows_of
from tasks.metrics.offenders import refuse, refuse_repeated

__all__ = ["check_split", "empty_captions", "read_caption_results", "read_references"]

_SHAPE = '{"image_id": 42, "caption": "a dog"}'


def read_references(path: Path, split: str | None = None) -> dict[int, list[str]]:
    """Image id -> its human captions, as they stand in the file.

    path   COCO's format, such as captions_val2014.json; with a split, Karpathy's, such as dataset_coco.json

    Raises DataError on a file that is missing or of another shape, on captions of unknown images and on images without a caption.
    """
    if split is not None:
        references = {image.image_id: list(image.captions) for image in read_karpathy_images(path, split)}
    else:
        _, (image_rows, rows) = read_annotation_file(path, "images", "annotations")
        ids = [integer(row, "id", where) for where, row in image_rows]
        refuse_repeated(ids, f"image ids stand more than once in the list 'images' of {path}")
        references = {image: [] for image in ids}
        captions = [(integer(row, "image_id", where), text(row, "caption", where)) for where, row in rows]
        unknown = {image: None for image, _ in captions if image not in references}
        refuse(unknown, f"images have captions in {path} and are not in its list 'images'", "expected every captioned image there")
        for image, caption in captions:
            references[image].append(caption)
    bare = [image for image, captions in references.items() if not captions]
    refuse(bare, f"images of {path} have no caption", "expected at least one reference for each")
    return references


def read_caption_results(path: Path) -> dict[int, str]:
    """Image id -> its generated caption, from the official result file: a list of image_id and caption.

    Raises DataError on a file that is missing or of another shape, and on images with two captions.
    """
    pairs = [(integer(row, "image_id", where), text(row, "caption", where)) for where, row in rows_of(path, read_document(path), _SHAPE)]
    refuse_repeated((image for image, _ in pairs), f"images have more than one caption in {path}")
    return dict(pairs)


def empty_captions(results: Mapping[int, str], path: Path) -> list[str]:
    """A sentence where captions have no letter: they are scored, as officially, and rarely meant so."""
    empty = [image for image, caption in results.items() if not caption.strip()]
    if not empty:
        return []
    count = f"{len(empty)} of {len(results)} (first: image {empty[0]})"
    return [f"empty captions in {path}: {count}, scored as the official evaluation does; did the model end at once?"]


def check_split(results: Mapping[int, str], references: Mapping[int, Sequence[str]], results_path: Path, references_path: Path) -> None:
    """Raises DataError where the results are not for exactly the images of the references."""
    unknown = [image for image in results if image not in references]
    missing = [image for image in references if image not in results]
    advice = f"{len(unknown)} of {len(results)} results are for images without references, {len(missing)} of {len(references)} images have no result"
    refuse(unknown, f"images of {results_path} are not in {references_path}", f"{advice}: are both of one split?")
    refuse(missing, f"images of {references_path} have no caption in {results_path}", f"{advice}: expected a caption for every image")

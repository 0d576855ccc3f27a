"""Texts of a folder of images or clips in one JSON file.

COCO's captions, with the lists `images` and `annotations`; Karpathy's, with every image's split; and eP-ALM's lists of clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adalink.errors import ConfigError, DataError
from multimodal.sample import BadSample, MediaKind, Question, Sample
from tasks.data.files import (
    FileSource,
    ImageFolder,
    ImageName,
    Rows,
    annotation_document,
    document_keys,
    first_has,
    integer,
    read_annotation_file,
    text,
)
from tasks.data.reader import Found, Given, Reader

__all__ = [
    "CLIPS", "KARPATHY", "READER", "KarpathyImage", "is_caption", "read_clip_list", "read_coco_captions", "read_coco_images", "read_karpathy",
    "read_karpathy_images",
]  # fmt: skip


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
    for image_id, (where, file_name, kind) in files.items():
        path = folder.find(file_name, where)
        if path is None:
            problems.append(_missing(image_id, images / file_name))
        elif not captions[image_id]:
            problems.append(
                BadSample(key=str(image_id), reason="no text", detail=f"image {image_id} ({file_name}) has no caption", file=file_name)
            )
        else:
            samples.append(Sample(key=str(image_id), image_id=image_id, media=path, kind=kind, captions=tuple(captions[image_id])))
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
    for image_id, (where, file_name, kind) in files.items():
        path = folder.find(file_name, where)
        if path is None:
            problems.append(_missing(image_id, images / file_name))
        else:
            samples.append(Sample(key=str(image_id), image_id=image_id, media=path, kind=kind))
    return FileSource(samples, problems, read_from=annotations, item_ids=files)


def _file_names(rows: Rows, name: ImageName | None) -> dict[int, tuple[str, str, MediaKind]]:
    """Image id -> (the row's name for messages, the image's or clip's file name, what it is)."""
    files: dict[int, tuple[str, str, MediaKind]] = {}
    for where, row in rows:
        image_id = integer(row, "id", where)
        if image_id in files:
            raise DataError(f"{where} has the id {image_id}, which {files[image_id][0]} has too; expected each image once")
        kind = _kind(row)
        files[image_id] = where, _file_name(row, kind, where) if name is None else name(image_id), kind
    return files


def _kind(row: Mapping[str, object]) -> MediaKind:
    return "video" if "video" in row else "audio" if "audio" in row else "image"


def _file_name(row: Mapping[str, object], kind: MediaKind, where: str) -> str:
    if kind == "image" and "file_name" not in row:
        raise DataError(f"{where} has no 'file_name'; give an image name pattern, such as COCO_val2014_{{image_id:012d}}.jpg")
    return text(row, "file_name" if kind == "image" else kind, where)


def _captions(rows: Rows, files: Mapping[int, tuple[str, str, MediaKind]], problems: list[BadSample], path: Path) -> dict[int, list[str]]:
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


# ----------------------------------------
# Karpathy's splits of COCO, Flickr8k and Flickr30k.


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


def _open_karpathy(given: Given) -> FileSource:
    if given.split is None:
        raise ConfigError(f"{given.path} holds several splits: give split, such as val or test")
    return read_karpathy(given.path, given.folder, given.split)


KARPATHY = Reader(
    "karpathy", "Karpathy's splits", lambda found: first_has(found.document.get("images"), "sentences"), _open_karpathy, reads=("split",)
)  # fmt: skip


# ----------------------------------------
# eP-ALM's lists of clips: a row is {"video": "video7010.mp4", "caption": one or several}, or a question with its answers
# {"video": ..., "question_id": 5, "sent": "who sings ?", "label": {"man": 1.0}}; of sounds with "audio".


_ANSWERS = 10  # that VQAv2 has of each question
_ENDINGS = ("", ".mp4", ".avi", ".webm", ".mkv", ".mov", ".wav", ".flac", ".ogg", ".mp3")


def read_clip_list(file: Path, media: Path) -> FileSource:
    """One sample per clip with all its captions or questions, in the order in which the clips come; the key is the clip's name.

    file    a JSON list of rows
    media   the folder of clips; a name may lack its ending, or be that of a folder of frames

    A clip's id is its place among the clips. Of several answers one of weight w is given round(10 w) times. Clips that are not in the folder, and those without
    a text, are in `problems`. Raises DataError on a file that is missing or of another shape.
    """
    rows = annotation_document(file)
    if not isinstance(rows, list):
        raise DataError(f"{file} holds no list, expected rows such as {{'video': 'a.mp4', 'caption': 'a man sings'}}")
    folder, clips = ImageFolder(media), dict[str, _Clip]()
    for where, row in Rows(str(file), rows):
        kind = _kind(row)
        name = text(row, "video" if kind == "image" else kind, where)
        clip = clips.setdefault(name, _Clip(where, kind))
        if "sent" in row:
            number, asked = integer(row, "question_id", where), text(row, "sent", where).strip()
            clip.questions.append(Question(question_id=number, text=asked, answers=_weighted(row, where)))
        else:
            clip.captions.extend(_captions_of(row, where))
    samples, problems = [], []
    for number, (name, clip) in enumerate(clips.items()):
        path = next((path for ending in _ENDINGS if (path := folder.find(name + ending, clip.where)) is not None), None)
        if path is None:
            problems.append(BadSample(key=name, reason="missing file", detail=f"{media / name} is missing", file=name))
        elif not clip.captions and not clip.questions:
            problems.append(BadSample(key=name, reason="no text", detail=f"{name} has no caption", file=path.name))
        else:
            own = tuple(clip.captions), tuple(clip.questions)
            samples.append(Sample(key=name, image_id=number, media=path, kind=clip.kind, captions=own[0], questions=own[1]))
    ids = [question.question_id for clip in clips.values() for question in clip.questions]
    return FileSource(samples, problems, read_from=file, item_ids=ids or range(len(clips)))


@dataclass(frozen=True)
class _Clip:
    where: str  # its first row, for messages
    kind: MediaKind
    captions: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


def _captions_of(row: Mapping[str, object], where: str) -> list[str]:
    found = row.get("caption")
    return [stripped for one in (found if isinstance(found, list) else [found]) if (stripped := text({"caption": one}, "caption", where).strip())]


def _weighted(row: Mapping[str, object], where: str) -> tuple[str, ...]:
    """One answer as it is, which is scored by an exact match; several as often as their weights say; none in a test split."""
    label = row.get("label", {})
    if not isinstance(label, dict) or not all(isinstance(weight, (int, float)) and weight > 0 for weight in label.values()):
        raise DataError(f"{where}: 'label' is {str(label)[:60]!r}; expected answers with weights above 0, such as {{'man': 1.0}}")
    return tuple(answer for answer, weight in label.items() for _ in range(max(1, round(_ANSWERS * weight)) if len(label) > 1 else 1))


def _recognises_clips(found: Found) -> bool:
    row = found.row if found.suffix == ".json" else {}
    return ("video" in row or "audio" in row) and ("caption" in row or "sent" in row)


CLIPS = Reader("clips", "a list of clips with captions or questions", _recognises_clips, lambda given: read_clip_list(given.path, given.folder))

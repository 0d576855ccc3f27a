"""Questions and answers in VQAv2's format: a folder of images, a questions file, and for all but test splits an annotations file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adalink.errors import ConfigError, DataError
from multimodal.sample import BadSample, Question, Sample, counted
from tasks.data.files import FileSource, ImageFolder, ImageName, Rows, answer_marks, first_has, integer, read_annotation_file, text
from tasks.data.reader import Found, Given, Reader

__all__ = ["READER", "VQA_SPLITS", "read_vqa", "read_vqa_split", "split_parts"]


def read_vqa(*, images: Path, questions: Path, annotations: Path | None, image_name: str | None = None) -> FileSource:
    """One sample per image with all its questions, in the order of the questions file; the key is the image's id.

    images        the folder of images
    questions     such as v2_OpenEnded_mscoco_val2014_questions.json
    annotations   such as v2_mscoco_val2014_annotations.json; None for a test split: the questions then have no answers
    image_name    a pattern such as `image{image_id}.jpg`; None takes COCO's names where the questions file says that it is about COCO

    Images that are not in the folder, and questions without a letter, are in `problems`.
    Raises DataError on a file that is missing or of another shape and where questions and annotations do not match one to one;
    ConfigError on the pattern.
    """
    given = None if image_name is None else ImageName(image_name)
    folder = ImageFolder(images)
    document, (question_rows,) = read_annotation_file(questions, "questions")
    name = given or _coco_name(document, questions)
    asked = _questions(question_rows)
    answered: Mapping[int, _Answered] | None = None
    if annotations is not None:
        answered = _annotations(annotations)
        _check_match(asked, answered, questions, annotations)
    problems: list[BadSample] = []
    samples = []
    for image_id, of_image in _by_image(asked, answered, problems).items():
        key = str(image_id)
        path = folder.find(name(image_id), f"{questions} with the image name pattern")
        if path is None:
            detail = f"{images / name(image_id)} is missing ({counted(len(of_image), 'question')})"
            problems.append(BadSample(key=key, reason="missing file", detail=detail, file=name(image_id)))
        elif not of_image:
            problems.append(BadSample(key=key, reason="no text", detail=f"image {image_id} ({path.name}) has no question", file=path.name))
        else:
            samples.append(Sample(key=key, image_id=image_id, media=path, questions=tuple(of_image)))
    return FileSource(samples, problems, read_from=questions, item_ids=asked)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    where: str  # the row, for messages
    image_id: int
    text: str


@dataclass(frozen=True, kw_only=True)
class _Answered:
    where: str
    image_id: int
    answers: tuple[str, ...]
    marks: tuple[str, ...]
    question_type: str
    answer_type: str


def _coco_name(document: Mapping[str, object], questions: Path) -> ImageName:
    """COCO's own file names, where the questions file is one of the official ones (data_type `mscoco`).

    The split test-dev2015 asks about images of test2015, and they are named so.
    """
    split = document.get("data_subtype")
    if document.get("data_type") != "mscoco" or not isinstance(split, str):
        raise ConfigError(f"{questions} does not say what its images are called; give an image name, such as image{{image_id}}.jpg")
    return ImageName(f"COCO_{split.replace('test-dev', 'test')}_{{image_id:012d}}.jpg")


def _questions(rows: Rows) -> dict[int, _Asked]:
    asked: dict[int, _Asked] = {}
    for where, row in rows:
        question_id = integer(row, "question_id", where)
        if question_id in asked:
            raise DataError(f"{where} has the question_id {question_id}, which {asked[question_id].where} has too; expected each once")
        asked[question_id] = _Asked(where=where, image_id=integer(row, "image_id", where), text=text(row, "question", where).strip())
    return asked


def _annotations(path: Path) -> dict[int, _Answered]:
    _, (rows,) = read_annotation_file(path, "annotations")
    answered: dict[int, _Answered] = {}
    for where, row in rows:
        question_id = integer(row, "question_id", where)
        if question_id in answered:
            raise DataError(f"{where} has the question_id {question_id}, which {answered[question_id].where} has too; expected each once")
        answered[question_id] = _Answered(
            where=where,
            image_id=integer(row, "image_id", where),
            answers=_answers(row, where),
            marks=tuple(map(sys.intern, answer_marks(row["answers"]))),  # type: ignore[arg-type]  # a list, or the line above has raised
            question_type=_optional(row, "question_type", where),
            answer_type=_optional(row, "answer_type", where),
        )
    return answered


def _answers(row: Mapping[str, object], where: str) -> tuple[str, ...]:
    """The answers as they stand in the file, since the official score normalises them only at times.

    Each text is stored once for all that gave it: VQAv2's training split has 4.4 million answers and far fewer different ones.
    """
    found = row.get("answers")
    if not isinstance(found, list) or not found:
        raise DataError(f"{where}: 'answers' is {str(found)[:60]!r}; expected a list of objects such as {{'answer': 'yes'}}")
    answers = []
    for index, answer in enumerate(found):
        name = f"{where}.answers[{index}]"
        if not isinstance(answer, dict):
            raise DataError(f"{name} is {str(answer)[:60]!r}; expected an object such as {{'answer': 'yes'}}")
        answers.append(sys.intern(text(answer, "answer", name)))
    return tuple(answers)


def _optional(row: Mapping[str, object], key: str, where: str) -> str:
    return sys.intern(text(row, key, where)) if key in row else ""


def _check_match(asked: Mapping[int, _Asked], answered: Mapping[int, _Answered], questions: Path, annotations: Path) -> None:
    """One annotation per question and one question per annotation, about the same image."""
    _check_partners({key: row.where for key, row in asked.items()}, answered, annotations)
    _check_partners({key: row.where for key, row in answered.items()}, asked, questions)
    for question_id, row in asked.items():
        other = answered[question_id]
        if row.image_id != other.image_id:
            raise DataError(f"question {question_id} is about image {row.image_id} in {row.where} and {other.image_id} in {other.where}")


def _check_partners(rows: Mapping[int, str], others: Mapping[int, object], path: Path) -> None:
    lonely = [question_id for question_id in rows if question_id not in others]
    if lonely:
        count = f"{len(lonely)} of {len(rows)} have no partner there"
        raise DataError(
            f"{rows[lonely[0]]} has the question_id {lonely[0]}, which {path} does not have ({count}); are both files of one split?"
        )


def _by_image(
    asked: Mapping[int, _Asked], answered: Mapping[int, _Answered] | None, problems: list[BadSample]
) -> dict[int, list[Question]]:
    """Image id -> its questions; those without a letter go to `problems`."""
    by_image: dict[int, list[Question]] = {}
    for question_id, row in asked.items():
        of_image = by_image.setdefault(row.image_id, [])
        if row.text:
            of_image.append(_question(question_id, row.text, None if answered is None else answered[question_id]))
        else:
            detail = f"question {question_id} of image {row.image_id} is empty"
            problems.append(BadSample(key=str(row.image_id), reason="empty question", detail=detail))
    return by_image


def _question(question_id: int, question: str, answered: _Answered | None) -> Question:
    if answered is None:
        return Question(question_id=question_id, text=question)
    return Question(
        question_id=question_id,
        text=question,
        answers=answered.answers,
        question_type=answered.question_type,
        answer_type=answered.answer_type,
        marks=answered.marks,
    )


# ----------------------------------------
# VQAv2's splits by name, from the official files that a user unpacked into one folder.


# Name -> (what the files say, the folder that COCO keeps the images in). `test-dev` is the part of `test` that the server scores at once.
VQA_SPLITS = {
    "train": ("train2014", "train2014"),
    "val": ("val2014", "val2014"),
    "test": ("test2015", "test2015"),
    "test-dev": ("test-dev2015", "test2015"),
}
_UNANSWERED = ("test", "test-dev")


def read_vqa_split(files: Path, images: Path, split: str) -> FileSource:
    """One sample per image of the split with all its questions; the key is the image's id.

    files    the folder of v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and the like
    images   the folder of images; COCO's may lie in train2014, val2014 and test2015 within it, or directly in it
    split    train, val, test or test-dev (also as train2014, ...), or several with `+`: the server's models are usually trained on
             `train+val`. Test splits have no answers.

    Raises ConfigError on an unknown split, and as `read_vqa` does; DataError where train and test questions are mixed.
    """
    sources = [_read(files, images, name) for name in split_parts(split)]
    if len(sources) == 1:
        return sources[0]
    samples = (source[i] for source in sources for i in range(len(source)))
    problems = (problem for source in sources for problem in source.problems)
    return FileSource(samples, problems, read_from=files, item_ids=(item for source in sources for item in source.item_ids))


def split_parts(split: str) -> list[str]:
    """The names in VQA_SPLITS of a split: ["train", "val"] for `train2014+val2014`.

    Raises ConfigError on a name that there is not, on one given twice, and on questions with and without answers in one split.
    """
    by_file = {file: name for name, (file, _) in VQA_SPLITS.items()}
    parts = [by_file.get(part, part) for part in split.split("+")]
    if unknown := [part for part in parts if part not in VQA_SPLITS]:
        raise ConfigError(f"VQAv2 has no split {unknown[0]!r}; it has {', '.join(VQA_SPLITS)}; several are joined as in train+val")
    if len(set(parts)) < len(parts) or {"test", "test-dev"} <= set(parts):
        raise ConfigError(f"the split {split!r} holds the same questions twice; name each once (test-dev is a part of test)")
    if len({part in _UNANSWERED for part in parts}) > 1:
        raise ConfigError(f"the split {split!r} mixes questions with answers and without; take train and val, or a test split")
    return parts


def _read(files: Path, images: Path, name: str) -> FileSource:
    official, folder = VQA_SPLITS[name]
    questions = files / f"v2_OpenEnded_mscoco_{official}_questions.json"
    annotations = None if name in _UNANSWERED else files / f"v2_mscoco_{official}_annotations.json"
    for path in (questions, annotations):
        if path is not None and not path.is_file():
            raise DataError(f"{path} is not there; VQAv2's split {name} needs it: unpack the official files into {files}")
    inside = f"{folder}/" if (images / folder).is_dir() else ""
    return read_vqa(images=images, questions=questions, annotations=annotations, image_name=f"{inside}COCO_{folder}_{{image_id:012d}}.jpg")


# ----------------------------------------
# VQAv2 by its path: a questions file, or the folder of the official files.


def _recognises(found: Found) -> bool:
    return first_has(found.document.get("questions"), "question") or any(name.startswith("v2_OpenEnded_mscoco_") for name in found.names)


def _open(given: Given) -> FileSource:
    if not given.path.is_dir():
        annotations = given.annotations or _beside(given.path)
        return read_vqa(images=given.folder, questions=given.path, annotations=annotations, image_name=given.image_name)
    if given.split is None:
        raise ConfigError(f"{given.path} holds several splits: give split, such as val or test")
    return read_vqa_split(given.path, given.folder, given.split)


def _beside(questions: Path) -> Path | None:
    """The official annotations beside official questions: mscoco_val2014_annotations.json of OpenEnded_mscoco_val2014_questions.json (OK-VQA)."""
    name = questions.name.replace("OpenEnded_", "").replace("_questions.json", "_annotations.json")
    found = questions.with_name(name)
    return found if name != questions.name and found.is_file() else None


READER = Reader("vqav2", "VQAv2's questions", _recognises, _open, reads=("annotations", "image_name", "split"))

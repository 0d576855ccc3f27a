"""Questions with people's answers, and predicted answers, in the formats of the common VQA data sets."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from adalink.errors import ConfigError, DataError
from adalink.files import write_whole
from tasks.data.benchmarks import Benchmark, benchmark_questions, find_benchmark
from tasks.data.coco import is_caption, read_karpathy_images
from tasks.data.files import Rows, answer_marks, integer, read_annotation_file, text, text_lines
from tasks.data.reader import Official
from tasks.metrics.vqa import GradedQuestion, QuestionId, VqaScorer, refuse, refuse_repeated

__all__ = [
    "caption_results_name", "check_questions", "check_split", "empty_captions", "read_answer_results", "read_caption_results",
    "read_document", "read_graded_questions", "read_question_ids", "read_references", "rows_of", "scored_benchmark", "vqa_results_name",
    "write_caption_results", "write_vqa_results",
]  # fmt: skip


# ----------------------------------------
# JSON files of references and results.


Row = Mapping[str, object]


def read_document(path: Path) -> object:
    """What a JSON file holds.

    Raises DataError where it is missing, cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"the file {path} does not exist; check the path") from error
    except OSError as error:
        raise DataError(f"the file {path} cannot be read: {error.strerror}; expected a JSON file") from error
    except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8 both
        raise DataError(f"{path} is not JSON: {error}; is it whole, and unpacked?") from error


def rows_of(path: Path, document: object, shape: str) -> Iterator[tuple[str, Row]]:
    """The rows of a document that is a list, each with its name for messages.

    shape  what a row looks like, for the message: `{"image_id": 42, "caption": "a dog"}`

    Raises DataError where the document is no list, is empty, or a row is no object.
    """
    if not isinstance(document, list):
        found = f"an object with {', '.join(map(repr, list(document)[:5]))}" if isinstance(document, dict) else repr(document)[:60]
        raise DataError(f"{path} holds {found}; expected a list of {shape}")
    if not document:
        raise DataError(f"{path} holds an empty list; expected at least one {shape}")
    return iter(Rows(str(path), document))


_RESULT = '{"question_id": 42, "answer": "yes"}'
_KNOWN = (
    "an object with the list 'annotations' (VQAv2, OK-VQA) or 'data' (TextVQA), a list with 'direct_answers' (A-OKVQA) or 'image' and "
    "'answers' (VizWiz), an object of questions by id (GQA), or a text file of questions and answers in turn (DAQUAR)"
)
# One person's answer stands for ten: with them all equal, the official accuracy is 100 for the very same string and 0 for any other.
_PEOPLE = 10


def scored_benchmark(path: Path, scorer: VqaScorer | None) -> Benchmark | None:
    """The benchmark whose file it is, where that has a scorer of its own; of two the one that the scorer is for."""
    found = find_benchmark(path) if path.exists() and path.suffix != ".txt" else ()
    chosen = [one for one in found if one.letters == (scorer == "choice")] or found
    return next((one for one in chosen if one.scorer not in ("", "exact")), None)


def read_graded_questions(path: Path, benchmark: Benchmark | None = None, split: str | None = None) -> list[GradedQuestion]:
    """The questions of an annotation file with people's answers, raw and in the file's order.

    benchmark   whose file it is, where that is none of these:

    VQAv2, OK-VQA   an object with the list `annotations`; types as they stand
    TextVQA         an object with the list `data`
    A-OKVQA         a list with `direct_answers`; ids are texts
    VizWiz          a list with `image` and `answers`; the image's name is the id, and answers have no id of their own
    GQA             an object of questions by id with one `answer`; the types are the structural and the semantic one
    DAQUAR          a text file (.txt), a question and its answer in turn; the id is the question's number, from 1

    split       of a benchmark's file that holds several

    Raises DataError on a file that is missing or of another shape, on repeated ids, and on questions without an answer.
    """
    if benchmark is not None:
        asked = benchmark_questions(path, benchmark, split)
        questions = [GradedQuestion(question_id=name, answers=one.answers, question_type=one.question_type, answer_type=one.answer_type) for name, one in asked]
    else:
        questions = _daquar(path) if path.suffix == ".txt" else _graded(path, read_document(path))
    refuse_repeated((question.question_id for question in questions), f"question ids stand more than once in {path}")
    bare = [question.question_id for question in questions if not question.answers]
    refuse(bare, f"questions of {path} have no answers", "expected people's answers; is it a test split?")
    return questions


def read_answer_results(path: Path) -> dict[QuestionId, str]:
    """Question id -> predicted answer.

    The official result file is a list of question_id and answer; GQA's is one of questionId and prediction, VizWiz's of image and answer,
    A-OKVQA's an object of direct_answer by id.

    Raises DataError on a file that is missing or of another shape, and on questions with two answers.
    """
    document = read_document(path)
    if isinstance(document, dict):
        rows = ((f"{path}: {name!r}", name, row) for name, row in document.items())
        pairs: list[tuple[QuestionId, str]] = [(name, text(_object(row, where), "direct_answer", where)) for where, name, row in rows]
    else:
        pairs = [_predicted(row, where) for where, row in rows_of(path, document, _RESULT)]
    refuse_repeated((name for name, _ in pairs), f"questions have more than one answer in {path}")
    return dict(pairs)


def read_question_ids(path: Path) -> list[QuestionId]:
    """The ids of a questions file of VQAv2's format, in the file's order.

    Raises DataError on a file that is missing or of another shape, and on repeated ids.
    """
    _, (rows,) = read_annotation_file(path, "questions")
    ids: list[QuestionId] = [integer(row, "question_id", where) for where, row in rows]
    refuse_repeated(ids, f"question ids stand more than once in {path}")
    return ids


def check_questions(ids: Iterable[QuestionId], others: Iterable[QuestionId], path: Path, other_path: Path) -> None:
    """Raises DataError where two files are not about exactly the same questions."""
    first, second = dict.fromkeys(ids), dict.fromkeys(others)
    unknown = [name for name in first if name not in second]
    missing = [name for name in second if name not in first]
    advice = f"{len(unknown)} of {len(first)} questions there are unknown, {len(missing)} of {len(second)} are missing: are both files of one split?"
    refuse(unknown, f"questions of {path} are not in {other_path}", advice)
    refuse(missing, f"questions of {other_path} are not in {path}", advice)


def _graded(path: Path, document: object) -> list[GradedQuestion]:
    if isinstance(document, dict):
        for key, read in (("annotations", _vqa), ("data", _textvqa)):
            if key in document:
                _, (rows,) = read_annotation_file(path, key)
                return [read(row, where) for where, row in rows]
        if document and all(isinstance(row, dict) and "answer" in row for row in document.values()):
            return [_gqa(name, row, f"{path}: {name!r}") for name, row in document.items()]
    if isinstance(document, list) and document and isinstance(document[0], dict):
        read = _aokvqa if "direct_answers" in document[0] else _vizwiz
        return [read(row, where) for where, row in Rows(str(path), document)]
    raise DataError(f"{path} has none of the known formats of questions with answers; expected {_KNOWN}")


def _vqa(row: Row, where: str) -> GradedQuestion:
    records = _list(row, "answers", where)
    return GradedQuestion(
        question_id=integer(row, "question_id", where),
        answers=_answers(records, where),
        marks=answer_marks(records),
        question_type=_optional(row, "question_type", where),
        answer_type=_optional(row, "answer_type", where),
    )


def _textvqa(row: Row, where: str) -> GradedQuestion:
    return GradedQuestion(question_id=integer(row, "question_id", where), answers=_texts(row, "answers", where))


def _aokvqa(row: Row, where: str) -> GradedQuestion:
    return GradedQuestion(question_id=text(row, "question_id", where), answers=_texts(row, "direct_answers", where))


def _vizwiz(row: Row, where: str) -> GradedQuestion:
    records = _list(row, "answers", where)
    return GradedQuestion(
        question_id=text(row, "image", where),
        answers=_answers(records, where),
        marks=answer_marks(records),
        answer_type=_optional(row, "answer_type", where),
    )


def _gqa(name: str, row: Row, where: str) -> GradedQuestion:
    types = _object(row.get("types", {}), f"{where}: 'types'")
    return GradedQuestion(
        question_id=name,
        answers=(text(row, "answer", where),) * _PEOPLE,
        question_type=_optional(types, "structural", where),
        answer_type=_optional(types, "semantic", where),
    )


def _daquar(path: Path) -> list[GradedQuestion]:
    try:
        lines = text_lines(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"the file {path} cannot be read: {error}; expected a text file of questions and answers in turn") from error
    if not lines or len(lines) % 2:
        raise DataError(f"{path} has {len(lines)} lines that are not empty; expected a question and its answer in turn")
    return [GradedQuestion(question_id=number, answers=(answer,) * _PEOPLE) for number, answer in enumerate(lines[1::2], start=1)]


def _answers(records: Sequence[object], where: str) -> tuple[str, ...]:
    named = ((f"{where}.answers[{index}]", record) for index, record in enumerate(records))
    return tuple(sys.intern(text(_object(record, name), "answer", name)) for name, record in named)


def _predicted(row: Row, where: str) -> tuple[QuestionId, str]:
    id_name = next((name for name in ("question_id", "questionId", "image") if name in row), "question_id")
    name = row.get(id_name)
    key: QuestionId = name if isinstance(name, str) else integer(row, id_name, where)
    return key, text(row, "prediction" if "prediction" in row and "answer" not in row else "answer", where)


def _texts(row: Row, key: str, where: str) -> tuple[str, ...]:
    found = _list(row, key, where)
    if wrong := [index for index, answer in enumerate(found) if not isinstance(answer, str)]:
        raise DataError(f"{where}.{key}[{wrong[0]}] is {str(found[wrong[0]])[:60]!r}; expected a text")
    return tuple(map(str, found))


def _list(row: Row, key: str, where: str) -> Sequence[object]:
    found = row.get(key)
    if not isinstance(found, list):
        raise DataError(f"{where} has no list {key!r}; expected people's answers there (a test split has none)")
    return found


def _object(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {str(value)[:60]!r}; expected an object with named fields")
    return value


def _optional(row: Row, key: str, where: str) -> str:
    return sys.intern(text(row, key, where)) if isinstance(row.get(key), str) else ""


# ----------------------------------------
# References and results of captioning, as the official evaluation takes them.


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
        captions = [(integer(row, "image_id", where), text(row, "caption", where)) for where, row in rows if is_caption(row)]
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


# ----------------------------------------
# Result files as the official evaluation servers of COCO captions and VQAv2 take them.


def write_caption_results(path: Path, captions: Mapping[int, str], official: Official | None = None) -> None:
    """Writes `[{"image_id": 42, "caption": "a dog ."}, ...]`, in the order given; whole or not at all.

    captions   image id -> ONE caption (the server refuses two)
    official   the names of the fields, and of the images, where a benchmark has its own
    Raises DataError on an id or text of another type, on no captions, and where the file cannot be written.
    """
    _write(path, captions, official or Official(id_name="image_id", text_name="caption"))


def write_vqa_results(path: Path, answers: Mapping[int, str], official: Official | None = None) -> None:
    """Writes `[{"question_id": 42000, "answer": "yes"}, ...]`, in the order given; whole or not at all.

    answers    question id -> answer; the server wants every question of the split
    official   the names of the fields, and of the questions, where a benchmark has its own
    Raises DataError on an id or text of another type, on no answers, and where the file cannot be written.
    """
    _write(path, answers, official or Official(id_name="question_id", text_name="answer"))


def caption_results_name(split: str, algorithm: str) -> str:
    """`captions_val2014_adalink_results.json`, as the COCO caption server wants it."""
    return f"captions_{_part('split', split)}_{_part('algorithm', algorithm)}_results.json"


def vqa_results_name(split: str, algorithm: str) -> str:
    """`v2_OpenEnded_mscoco_test-dev2015_adalink_results.json`, as the VQA server wants it."""
    return f"v2_OpenEnded_mscoco_{_part('split', split)}_{_part('algorithm', algorithm)}_results.json"


def _part(what: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.-]+", value):
        raise ConfigError(
            f"the {what} {value!r} cannot stand in a result file's name, whose parts '_' divides; use letters, digits, '.' and '-'"
        )
    return value


def _write(path: Path, results: Mapping[int, str], official: Official) -> None:
    id_name, text_name = official.id_name, official.text_name
    if not results:
        raise DataError(f"there are no results to write to {path}; expected at least one {id_name} with its {text_name}")
    rows: list[dict[str, int | str]] = []
    for key, value in results.items():
        if type(key) is not int or not isinstance(value, str):
            expected = f"a whole number ({id_name}) and a text ({text_name})"
            raise DataError(f"the result {key!r}: {value!r} cannot be written to {path}; expected {expected}")
        rows.append({id_name: official.ids.get(key, key), text_name: value})
    by_id = {str(row[id_name]): {text_name: row[text_name]} for row in rows}  # A-OKVQA's
    write_whole(path, json.dumps(by_id if text_name == "direct_answer" else rows).encode("ascii"))

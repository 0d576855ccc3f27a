"""Official files of benchmarks by their path alone, each in its released layout: the samples, the ids of results, and the scorer."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adalink.errors import AdalinkError, DataError
from tasks.data.sources import DataConfig, scorer_of

TEN = ["nokia"] * 7 + ["toshiba", "nokia 3310", ""]
CLASSES = {"image_classes": ["Mobile phone"], "flickr_original_url": "https://f.example/1_o.jpg", "image_width": 1024, "image_height": 664}
QUESTION = {"question": "What is it?", "choices": ["a cat", "a dog", "a cow"]}


@dataclass(frozen=True)
class Case:
    """A file, the images that it needs, and what one sample must be.

    samples   (file of the image, its texts): a caption, or a question with its answers
    """

    file: str
    document: Any
    images: Sequence[str]
    samples: Sequence[tuple[str, Sequence[Any]]]
    scorer: str = ""
    official: Mapping[int, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""


CASES: dict[str, Case] = {
    "NoCaps": Case(
        "nocaps_val_4500_captions.json",
        {
            "licenses": [], "info": {"description": "nocaps"},
            "images": [{"id": 0, "open_images_id": "0013ea2087020901", "file_name": "0013ea2087020901.jpg", "domain": "near-domain", "width": 1024,
                        "height": 732, "coco_url": "https://s3.example/val/0013ea2087020901.jpg", "license": 0, "date_captured": "2018-11-06"}],
            "annotations": [{"image_id": 0, "id": 0, "caption": "A baby is standing."}, {"image_id": 0, "id": 1, "caption": "A child by a table."}],
        },
        ["0013ea2087020901.jpg"], [("0013ea2087020901.jpg", ["A baby is standing.", "A child by a table."])], about="COCO captions",
    ),
    "TextCaps": Case(
        "TextCaps_0.1_val.json",
        {"dataset_type": "val", "dataset_name": "textcaps", "dataset_version": "0.1", "data": [
            {"caption_str": text, "caption_id": k, "image_id": "2ce6bcf3a7f2a6ab", **CLASSES, "set_name": "val", "image_name": "2ce6bcf3a7f2a6ab",
             "image_path": "train/2ce6bcf3a7f2a6ab.jpg", "caption_tokens": text.split(), "reference_strs": ["a sign", "stop"], "reference_tokens": []}
            for k, text in enumerate(["a sign", "stop"])
        ]},
        ["train_images/2ce6bcf3a7f2a6ab.jpg"], [("2ce6bcf3a7f2a6ab.jpg", ["a sign", "stop"])], official={0: "2ce6bcf3a7f2a6ab"},
    ),
    "TextCaps, test": Case(
        "TextCaps_0.1_test.json",
        {"dataset_type": "test", "dataset_name": "textcaps", "data": [
            {"image_id": "00aa", **CLASSES, "set_name": "test", "image_name": "00aa", "image_path": "test/00aa.jpg"}]},
        ["00aa.jpg"], [("00aa.jpg", [])], official={0: "00aa"},
    ),
    "TextVQA": Case(
        "TextVQA_0.5.1_val.json",
        {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [
            {"question": "what is the brand?", "image_id": "003a8ae2ef43b901", **CLASSES, "answers": TEN, "question_tokens": ["what"],
             "question_id": 34602, "set_name": "val"}]},
        ["003a8ae2ef43b901.jpg"], [("003a8ae2ef43b901.jpg", [("what is the brand?", TEN)])], official={34602: 34602},
    ),
    "TextVQA, test": Case(
        "TextVQA_0.5.1_test.json",
        {"dataset_type": "test", "data": [{"question": "why?", "image_id": "0101010101010101", **CLASSES, "question_id": 39602, "set_name": "test"}]},
        ["test_images/0101010101010101.jpg"], [("0101010101010101.jpg", [("why?", [])])],
    ),
    "VizWiz": Case(
        "val.json",
        [{"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answer_type": "other", "answerable": 1,
          "answers": [{"answer_confidence": "yes", "answer": "basil"}] * 9 + [{"answer_confidence": "maybe", "answer": "basil leaves"}]}],
        ["val/VizWiz_val_00000000.jpg"], [("VizWiz_val_00000000.jpg", [("What is this?", ["basil"] * 9 + ["basil leaves"])])],
        official={0: "VizWiz_val_00000000.jpg"},
    ),
    "VizWiz, test": Case(
        "test.json", [{"image": "VizWiz_test_00000003.jpg", "question": "Colour?"}], ["VizWiz_test_00000003.jpg"],
        [("VizWiz_test_00000003.jpg", [("Colour?", [])])], about="VizWiz's questions",
    ),
    "VizWiz captions": Case(
        "train.json",
        {"info": {}, "images": [{"id": 0, "file_name": "VizWiz_train_00000000.jpg", "vizwiz_url": "https://v.example/0.jpg", "text_detected": True}],
         "annotations": [
             {"caption": "A bottle.", "image_id": 0, "is_precanned": False, "is_rejected": False, "id": 0, "text_detected": True},
             {"caption": "asdf", "image_id": 0, "is_precanned": False, "is_rejected": True, "id": 1, "text_detected": True},
             {"caption": "Quality issues are too severe.", "image_id": 0, "is_precanned": True, "is_rejected": False, "id": 2, "text_detected": True}]},
        ["VizWiz_train_00000000.jpg"], [("VizWiz_train_00000000.jpg", ["A bottle."])],
    ),
    "OK-VQA": Case(
        "OpenEnded_mscoco_val2014_questions.json",
        {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": "val2014",
         "questions": [{"image_id": 297147, "question": "What sport?", "question_id": 2971475}]},
        ["COCO_val2014_000000297147.jpg"], [("COCO_val2014_000000297147.jpg", [("What sport?", ["race", "race"])])],
    ),
    "A-OKVQA": Case(
        "aokvqa_v1p0_val.json",
        [{"split": "val", "image_id": 461751, "question_id": "22jbM6gDxdaMaunuzgrsBB", "question": "What is in the motorcyclist's mouth?",
          "choices": ["toothpick", "food", "popsicle stick", "cigarette"], "correct_choice_idx": 3, "difficult_direct_answer": False,
          "direct_answers": ["cigarette"] * 9 + ["cigarettes"], "rationales": ["He's smoking."]}],
        ["val2017/000000461751.jpg"],
        [("000000461751.jpg", [("What is in the motorcyclist's mouth?", ["cigarette"] * 9 + ["cigarettes"])])],
        official={0: "22jbM6gDxdaMaunuzgrsBB"}, settings={"format": "aokvqa"},
    ),
    "A-OKVQA, choices": Case(
        "aokvqa_v1p0_train.json",
        [{"split": "train", "image_id": 299207, "question_id": "22MexNkBPpdZGX6sxbxVBH", "question": "What is awaited?", "correct_choice_idx": 3,
          "choices": ["skateboarder", "train", "delivery", "cab"], "direct_answers": ["ride"] * 10, "difficult_direct_answer": False, "rationales": []}],
        ["COCO_train2014_000000299207.jpg"],
        [("COCO_train2014_000000299207.jpg", [("What is awaited?\nA. skateboarder\nB. train\nC. delivery\nD. cab", ["D"])])],
        "choice", {0: "22MexNkBPpdZGX6sxbxVBH"}, {"format": "aokvqa_choices"},
    ),
    "GQA": Case(
        "testdev_balanced_questions.json",
        {"02930152": {"semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}], "entailed": ["02930160"],
                      "equivalent": ["02930152"], "question": "Is the sky dark?", "imageId": "2354786", "isBalanced": True, "answer": "yes",
                      "groups": {"global": None, "local": "06-sky_dark"}, "semanticStr": "select: sky", "annotations": {"answer": {}},
                      "types": {"detailed": "verify", "semantic": "global", "structural": "verify"}, "fullAnswer": "Yes, it is."},
         "201640614": {"question": "Who is “ü”?", "imageId": "n161313", "answer": "boy", "types": {"semantic": "rel", "structural": "query"}}},
        ["images/2354786.jpg", "images/n161313.jpg"],
        [("2354786.jpg", [("Is the sky dark?", ["yes"])]), ("n161313.jpg", [("Who is “ü”?", ["boy"])])],
        "exact", {0: "02930152", 1: "201640614"},
    ),
    "ST-VQA": Case(
        "train_task_3.json",
        {"task": 3, "dataset_name": "st-vqa", "data": [
            {"question": "Where is this at?", "file_path": f"coco-text/COCO_train2014_00000000000{k}.jpg", "file_name": f"COCO_train2014_00000000000{k}.jpg",
             "dataset": "coco-text", "question_tokens": [], "answers": ["foster farms", "farm"], "question_id": f"7-{k}", "set_name": "train"}
            for k in range(2)]},
        ["coco-text/COCO_train2014_000000000000.jpg", "COCO_train2014_000000000001.jpg"],
        [(f"COCO_train2014_00000000000{k}.jpg", [("Where is this at?", ["foster farms", "farm"])]) for k in range(2)],
        "anls", {0: "7-0", 1: "7-1"},
    ),
    "DocVQA": Case(
        "val_v1.0_withQT.json",
        {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": [
            {"questionId": 49153, "question": "What is the ‘actual’ value?", "question_types": ["figure/diagram", "layout"], "docId": 14465,
             "image": "documents/pybv0228_81.png", "ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81", "answers": ["0.28", ".28"],
             "data_split": "val"}]},
        ["documents/pybv0228_81.png"], [("pybv0228_81.png", [("What is the ‘actual’ value?", ["0.28", ".28"])])], "anls", {49153: 49153},
    ),
    "DocVQA, test": Case(
        "test_v1.0.json",
        {"dataset_name": "docvqa", "data": [{"questionId": 57344, "question": "What?", "image": "documents/a_1.png", "docId": 4720, "data_split": "test"}]},
        ["a_1.png"], [("a_1.png", [("What?", [])])], "anls",
    ),
    "InfographicVQA": Case(
        "infographicsVQA_val_v1.0_withQT.json",
        {"dataset_name": "infographicVQA", "dataset_version": "1.0", "dataset_split": "val", "data": [
            {"questionId": 98313, "question": "Which site?", "image_local_name": "38313.jpeg", "image_url": "https://i.example/38313.jpeg",
             "ocr_output_file": "38313.json", "answers": ["PINTEREST", "pinterest"], "answer_type": ["single span"], "evidence": ["text"],
             "operation/reasoning": [], "data_split": "val"}]},
        ["38313.jpeg"], [("38313.jpeg", [("Which site?", ["PINTEREST", "pinterest"])])], "anls", {98313: 98313},
    ),
    "ChartQA": Case(
        "test_human.json", [{"imgname": "41699051005347.png", "query": "How many items?", "label": "14"},
                            {"imgname": "41699051005347.png", "query": "Is it over 20%?", "label": "Yes"}],
        ["png/41699051005347.png"], [("41699051005347.png", [("How many items?", ["14"]), ("Is it over 20%?", ["Yes"])])], "relaxed", {},
    ),
    "ScienceQA": Case(
        "problems.json",
        {str(k): {**QUESTION, "answer": k % 3, "hint": hint, "image": image, "task": "closed choice", "grade": "grade2", "subject": "natural science",
                  "topic": "biology", "category": "x", "skill": "y", "lecture": "", "solution": "", "split": split}
         for k, (hint, image, split) in enumerate([("", "image.png", "train"), ("It barks.", "image.png", "test"), ("", None, "test")])},
        ["test/1/image.png", "train/0/image.png"],
        [("image.png", [("Context: It barks.\nWhat is it?\nA. a cat\nB. a dog\nC. a cow", ["B"])])], "choice", {1: "1"}, {"split": "test"},
        "1 question without an image left out",
    ),
}  # fmt: skip


def made(tmp_path: Path, case: Case) -> DataConfig:
    """The file and its images, beside each other."""
    path = tmp_path / case.file
    path.write_text(json.dumps(case.document), encoding="utf-8")
    for name in case.images:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    if case.file.startswith("OpenEnded"):
        answers = [{"answer_id": k, "raw_answer": "racing", "answer_confidence": "yes", "answer": "race"} for k in (1, 2)]
        rows = [{"image_id": 297147, "answer_type": "other", "question_type": "one", "question_id": 2971475, "answers": answers, "confidence": 3}]
        (tmp_path / "mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": rows}))
    return DataConfig(path=path, **case.settings)


@pytest.mark.parametrize("name", CASES)
def test_a_file_in_its_released_layout_is_recognised_and_read(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    opened = made(tmp_path, case).open()
    source = pickle.loads(pickle.dumps(opened.source))  # as a worker process gets it
    assert opened.problems == ()
    found = [source[i] for i in range(len(source))]
    texts = [sample.captions or [(one.text, list(one.answers)) for one in sample.questions] for sample in found]
    assert [(sample.file, list(of_image)) for sample, of_image in zip(found, texts, strict=True)] == [(file, list(row)) for file, row in case.samples]
    assert all((tmp_path / str(sample.image)).is_file() for sample in found)
    assert scorer_of(opened.source) == case.scorer
    assert (case.about or name.partition(",")[0].partition("-")[0]) in opened.sentence or name == "OK-VQA" or name == "VizWiz captions"
    if case.official is not None:
        assert opened.official is not None
        assert opened.official.ids == case.official


def ai2d(root: Path, *, listed: bool = True) -> Path:
    """Three questions about two images, one of them with letters over its labels."""
    for folder in ("questions", "images", "abc_images"):
        (root / folder).mkdir(parents=True)
    choices = ["face", "teeth", "legs", "eyes"]
    questions = {
        "0.png": {"What is this?": {"abcLabel": False, "answerTexts": choices, "correctAnswer": 3, "questionId": "0.png-0"},
                  "Which is the face?": {"abcLabel": True, "answerTexts": ["B", "A"], "correctAnswer": 0, "questionId": "0.png-1"}},
        "12.png": {"Who?": {"abcLabel": False, "answerTexts": choices, "correctAnswer": 0, "questionId": "12.png-0"}},
    }  # fmt: skip
    for name, of_image in questions.items():
        (root / "questions" / f"{name}.json").write_text(json.dumps({"imageName": name, "questions": of_image}))
        for folder in ("images", "abc_images"):
            Image.new("RGB", (4, 4)).save(root / folder / name)
    if listed:
        (root / "ai2d_test_ids.csv").write_text("12\n")
    return root


def test_ai2d_is_a_folder_with_a_file_for_each_image(tmp_path: Path) -> None:
    root = ai2d(tmp_path / "ai2d")
    opened = DataConfig(path=root, split="train").open()
    found = [(Path(str(one.image)).parent.name, one.questions[0].text, one.questions[0].answers) for one in (opened.source[i] for i in range(2))]
    assert found == [
        ("images", "What is this?\nA. face\nB. teeth\nC. legs\nD. eyes", ("D",)),
        ("abc_images", "Which is the face?\nA. B\nB. A", ("A",)),
    ]
    assert (scorer_of(opened.source), opened.official and opened.official.ids) == ("choice", {0: "0.png-0", 1: "0.png-1"})
    assert len(DataConfig(path=root, split="test").open().source) == 1
    assert len(DataConfig(path=ai2d(tmp_path / "other", listed=False)).open().source) == 3
    with pytest.raises(AdalinkError, match="holds several splits, test, train: give split"):
        DataConfig(path=root).open()


def test_a_okvqa_may_be_two_things_and_names_the_key_that_decides(tmp_path: Path) -> None:
    config = made(tmp_path, CASES["A-OKVQA"])
    with pytest.raises(DataError, match="with direct answers or A-OKVQA's questions with their choices: choose with format, aokvqa or aokvqa_choices"):
        DataConfig(path=config.path).open()


def test_a_missing_image_is_named_with_its_row_and_a_row_in_another_shape_is_refused(tmp_path: Path) -> None:
    case = CASES["TextVQA"]
    rows = case.document["data"]
    more = {**case.document, "data": [*rows, {**rows[0], "image_id": "ffff", "question_id": 2}]}
    (bad,) = made(tmp_path, Case(case.file, more, case.images, ())).open().problems
    assert (bad.reason, bad.detail) == ("missing file", f"{case.file}[1]: {tmp_path / 'ffff.jpg'} is missing")
    problems = {"1": {**QUESTION, "split": "test", "image": "image.png", "answer": 5}}
    with pytest.raises(DataError, match=r"problems.json\[0\]: 'answer' is 5; expected the number of one of 3 choices, from 0"):
        made(tmp_path, Case("problems.json", problems, (), ())).open()
    with pytest.raises(DataError, match=r"names the image '../../x.jpg'; expected a file name inside"):
        made(tmp_path, Case("t.json", {"data": [{"file_path": "../../x.jpg", "question": "?"}]}, (), ())).open()
    with pytest.raises(AdalinkError, match="is one split of textvqa: leave split 'val' out"):
        DataConfig(path=tmp_path / case.file, split="val").open()


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"1": {"question": "?", "imageId": "1"}, "2": {"que', "is not JSON at row 1, line 1"), ('{"1": {"question": "?", "imageId": "1"}; 2', "is followed by"),
     ('{"1": {"question": "?", "imageId": "1"}, "2": 7}', r"\[1\] is '7'; expected an object with named fields")],
)  # fmt: skip
def test_rows_by_their_ids_that_break_are_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(DataError, match=message):
        DataConfig(path=tmp_path / "q.json").open()

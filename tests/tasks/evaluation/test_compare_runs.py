"""Two run folders: metrics, flips, and a page with the images that changed sides."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_run import Files, adalink, refused

from tasks.report.compare_pages import FlipCard, FlipPage, FlipSection, render_changed
from tasks.scenes.dataset import Scenes

N = 6


def sample_answers(n: int = N) -> dict[int, str]:
    source = Scenes(split="val", size=n)
    return {question.question_id: question.answers[0] for i in range(n) for question in source[i].questions}


def run_folder(folder: Path, texts: dict[int, str], task: str = "vqa", data: dict[str, Any] | None = None, **config: Any) -> Path:
    """What `adalink evaluate` leaves, as far as a comparison reads it."""
    folder.mkdir(parents=True)
    id_name, text_name = ("question_id", "answer") if task == "vqa" else ("image_id", "caption")
    (folder / "results.json").write_text(json.dumps([{id_name: item, text_name: text} for item, text in texts.items()]))
    (folder / "metrics.json").write_text(json.dumps({"task": task}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"task": task, "data": {"val": data or {"scenes": f"val/{N}", "limit": 0}}, **config}))
    return folder


def compare(first: Path, second: Path, *more: object) -> Any:
    return adalink("compare", first, second, "--resamples", "20", *more)


@pytest.fixture
def answers() -> dict[int, str]:
    return sample_answers()


def test_answers_of_two_runs_are_compared_and_the_page_shows_the_pictures(tmp_path: Path, answers: dict[int, str]) -> None:
    items = list(answers)
    before, after = {**answers, items[0]: "<b>wrong</b>"}, {**answers, items[1]: "elephant", items[2]: ""}
    first, second = run_folder(tmp_path / "a", before), run_folder(tmp_path / "b", after)
    done = compare(first, second)
    assert done.code == 0, done
    rate = 100 * 2 / len(answers)
    assert f"right to wrong: 2 of {len(answers)} questions, negative flip rate {rate:.2f} %" in done.out
    assert f"wrong to right: 1 of {len(answers)} questions" in done.out
    assert done.out.endswith(f"report: {second / 'comparison.html'}\n")
    page = (second / "comparison.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "elephant" in page
    assert "the model wrote nothing" in page
    assert "&lt;b&gt;wrong&lt;/b&gt;" in page
    assert "<b>wrong</b>" not in page
    assert re.findall(r'(?:src|href)="(?!data:|#)', page) == []  # nothing is loaded from elsewhere
    assert "script-src &#39;none&#39;" in page or "script-src 'none'" in page
    assert f"negative flip rate {rate:.2f} %" in page
    assert "answer type: " in page


def test_machines_get_json_and_the_page_goes_where_it_is_asked_for(tmp_path: Path, answers: dict[int, str]) -> None:
    first, second = run_folder(tmp_path / "a", answers), run_folder(tmp_path / "b", answers)
    done = compare(first, second, "--json", "--report", tmp_path / "page.html", "--items", tmp_path / "items.json")
    found = json.loads(done.out)
    assert (found["negative_flip_rate"], found["right_to_wrong"], found["n_items"]) == (0, [], len(answers))
    assert "No item changed this way." in (tmp_path / "page.html").read_text()
    assert not (second / "comparison.html").exists()
    assert len(json.loads((tmp_path / "items.json").read_text())) == len(answers)


def test_captions_of_two_runs_are_compared_with_their_references(tmp_path: Path) -> None:
    files = Files(tmp_path / "files", n=4)
    data = {"images": str(files.folder / "pictures"), "annotations": str(files.folder / "captions.json")}
    good = {i: next(row["caption"] for row in files.captions["annotations"] if row["image_id"] == i) for i in range(4)}
    first = run_folder(tmp_path / "a", good, "captioning", data)
    second = run_folder(tmp_path / "b", {**good, 3: ""}, "captioning", data)
    files.image(3).write_bytes(b"no image any more")
    done = compare(first, second)
    assert "right to wrong: 1 of 4 images, negative flip rate 25.00 % (right from 100 on)" in done.out, done
    page = (second / "comparison.html").read_text()
    assert "the image cannot be read: not an image" in page
    assert good[3] in page
    files.image(3).unlink()  # then the data set has no such item any more
    assert "1 of 4 results of" in refused(compare(first, second))


def test_the_scorer_is_that_of_the_runs_and_must_be_given_where_they_differ(tmp_path: Path, answers: dict[int, str]) -> None:
    folders = [run_folder(tmp_path / name, answers, vqa={"scorer": name}) for name in ("official", "normalized")]
    assert "was scored as official and" in refused(compare(*folders))
    assert "VQA accuracy, normalized" in compare(*folders, "--scorer", "normalized").out
    assert "VQA accuracy, normalized" in compare(folders[1], folders[1]).out


def test_runs_on_other_data_are_named(tmp_path: Path, answers: dict[int, str]) -> None:
    first = run_folder(tmp_path / "a", answers)
    fewer = dict(list(answers.items())[:-2])
    last = list(answers)[-2]
    sentence = refused(compare(first, run_folder(tmp_path / "b", fewer)))
    assert f"2 items of {first} are not in {tmp_path / 'b'} (first: {last}, " in sentence
    assert "are not in" in refused(compare(tmp_path / "b", first))
    assert "is a run of vqa" in refused(compare(first, run_folder(tmp_path / "c", answers, "captioning")))
    files = Files(tmp_path / "files", n=2)
    data = {"images": str(files.folder / "pictures"), "questions": str(files.folder / "questions.json"), "image_name": "{image_id}.png"}
    own = {row["question_id"]: "yes" for row in files.questions["questions"]}
    bare = run_folder(tmp_path / "d", own, data=data)
    assert "have no references or answers (first: " in refused(compare(bare, bare))
    graded = run_folder(tmp_path / "e", own, data={**data, "annotations": str(files.folder / "answers.json")})
    for row in files.answers["annotations"]:
        row["answers"] = [{"answer": "other"}]
    (files.folder / "answers2.json").write_text(json.dumps(files.answers))
    changed = run_folder(tmp_path / "f", own, data={**data, "annotations": str(files.folder / "answers2.json")})
    assert f"{len(own)} items have other references in the second run" in refused(compare(graded, changed))


def test_folders_that_are_no_runs_are_named(tmp_path: Path, answers: dict[int, str]) -> None:
    run = run_folder(tmp_path / "a", answers)
    assert f"{tmp_path / 'no'} is no run folder of `adalink train` or `adalink evaluate`" in refused(compare(run, tmp_path / "no"))
    for name, text, message in (
        ("metrics.json", "{", "is damaged"),
        ("metrics.json", "[]", "is damaged"),
        ("metrics.json", '{"task": "poetry"}', "is of the task 'poetry'"),
        ("config.yaml", "data: 5", "is damaged"),
        ("results.json", "[]", "holds an empty list"),
        ("config.yaml", "data: {val: {scenes: val/2, foo: 1}}", "a data set has no setting 'foo'"),
        ("config.yaml", "data: {val: {images: absent, questions: q.json}}", "the images folder absent does not exist"),
        ("config.yaml", "data: {val: {scenes: val/1}}", f"of {len(answers)} results of"),
        ("config.yaml", f"{{data: {{val: {{scenes: val/{N}}}}}, vqa: {{scorer: best}}}}", "the runs chose the scorer 'best'"),
    ):
        retained = (run / name).read_text()
        (run / name).write_text(text)
        sentence = refused(compare(run, run))
        assert message in sentence, sentence
        (run / name).write_text(retained)
    assert compare(run, run).code == 0


def test_the_page_is_the_same_for_the_same_flips_and_escapes_what_it_shows() -> None:
    card = FlipCard(key="<i>", image=None, question="", said_before="</style><script>1</script>", said_after="b", before=1.5, after=0, people=["<x>"])
    page = FlipPage(title="<t>", summary="s", scorer="c", rows=[], n_hidden_rows=0, sections=[FlipSection(name="n", tone="bad", n_changed=1, cards=[card])])
    html = render_changed(page)
    assert html == render_changed(page)
    assert "<script" not in html
    assert "no image was saved" in html
    assert "References" in html


def test_more_runs_have_a_table_of_flips_and_a_limit_beside_the_first(tmp_path: Path, answers: dict[int, str]) -> None:
    items = list(answers)
    runs = {"old": answers, "new": {**answers, items[0]: "x"}, "newer": {**answers, items[0]: "x", items[1]: "y"}}
    folders = [run_folder(tmp_path / name, texts) for name, texts in runs.items()]
    for folder in folders:
        whole = {"headline": "overall", "rows": {}, "items": len(items), "trained_parameters": {}, "seconds_to_generate": 1.0}
        (folder / "metrics.json").write_text(json.dumps({"task": "vqa", **whole}))
    one, two = 1 / len(items), 2 / len(items)
    done = adalink("compare", *folders, "--resamples", "20")
    assert re.search(rf"^new +0.00 +- +{100 * one:.2f}$", done.out, re.MULTILINE), done
    assert json.loads(adalink("compare", *folders, "--json").out)["negative_flip_rates"] == [[0, one, two], [0, 0, one], [0, 0, 0]]
    assert ">Negative flips<" in (folders[2] / "comparison.html").read_text()
    limited = adalink("compare", *folders, "--resamples", "20", "--most-negative-flips", str(1.5 * one), "--by_estimate")
    assert (limited.code, limited.err.startswith(f"adalink: {folders[2]}: 2 of {len(items)} items went")) == (3, True)
    other = run_folder(tmp_path / "other", dict(list(answers.items())[:-1]))
    (other / "metrics.json").write_text((folders[0] / "metrics.json").read_text())
    assert "no flips between these runs: 1 items of" in adalink("compare", *folders[:2], other).out
    assert "1 items of" in refused(adalink("compare", *folders[:2], other, "--most-negative-flips", "0.5"))


def test_a_limit_ends_with_exit_code_3_once_the_page_is_written(tmp_path: Path, answers: dict[int, str]) -> None:
    first, second = run_folder(tmp_path / "a", answers), run_folder(tmp_path / "b", dict.fromkeys(answers, "x"))
    done = compare(first, second, "--most-negative-flips", "0.5")
    assert done.code == 3
    assert f"report: {second / 'comparison.html'}" in done.out
    page = (second / "comparison.html").read_text()
    assert "wrong in both, other words" in page
    assert "right to wrong, or wrong with other words" in page

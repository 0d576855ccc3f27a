"""What README.md and the pages say beside their code: length, tables of methods, recipes. (Their code: test_pages.py.)"""

from __future__ import annotations

import re

from blocks import PAGES, ROOT, blocks

from adalink import METHODS

README = (ROOT / "README.md").read_text()
PAGE_OF_METHODS = (ROOT / "examples" / "docs" / "concepts" / "methods.md").read_text()
CODE = re.compile(r"`(\w+)`")


def test_it_fits_its_length_and_its_lines_of_python_are_ten() -> None:
    assert len(README.splitlines()) <= 120
    first = next(block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    assert len([line for line in first.splitlines() if line and not line.startswith(("from", "import"))]) <= 10


def test_the_tables_of_methods_have_every_method_and_no_other() -> None:
    table = README.partition("| method | what it does |\n")[2].partition("\n\n")[0]
    assert sorted(name for row in table.splitlines() for name in CODE.findall(row.split("|")[1])) == sorted(METHODS)
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE_OF_METHODS, flags=re.MULTILINE)) == sorted(METHODS)


def test_every_recipe_is_named() -> None:
    text = (ROOT / "examples" / "README.md").read_text()
    for path in (ROOT / "examples").glob("*.yaml"):
        assert f"[{path.name}]({path.name})" in text


def test_every_page_is_in_the_table_of_contents() -> None:
    docs = ROOT / "examples" / "docs"
    index = (docs / "index.md").read_text()
    listed = {line for tree in re.findall(r"```{toctree}\n(.*?)```", index, flags=re.DOTALL) for line in tree.splitlines() if line and line[0] != ":"}
    assert listed == {str(page.relative_to(docs).with_suffix("")) for page in PAGES if docs in page.parents} - {"index"}


def test_the_sample_of_a_shard_is_what_is_written() -> None:
    from multimodal.data.shards.reader import decode_record, encode_record
    from multimodal.sample import Question, Sample

    page = (ROOT / "examples" / "docs" / "concepts" / "shards.md").read_text()
    (displayed,) = re.findall(r"000042\.json +(\{.*?\]\}\]\})", page, flags=re.DOTALL)
    sample = Sample(key="42", image_id=42, image=b"", captions=("a dog runs.",), questions=(Question(question_id=7, text="?", answers=("yes",)),))
    written = encode_record(sample).decode()
    assert all(name in written for name in re.findall(r'"(\w+)":', displayed))
    assert decode_record(written.encode()).captions == ("a dog runs.",)

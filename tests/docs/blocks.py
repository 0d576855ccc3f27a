"""The code of a page: fenced blocks, and the comments before them that say how a test runs them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "examples" / "docs").rglob("*.md")])
RUN, DATA, OUTPUT = ("bash", "python"), ("yaml",), ("text", "json")

_FENCE = re.compile(r"^(`{3,})(.*)$")
_COMMENT = re.compile(r"^<!-- (setup|parsed|file): (.+?) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or a `setup` comment.

    language   bash, python, yaml; text and json are output; setup for a comment, whose text is the name of what to make
    comments   those just before it: `parsed` (the reason why a test only parses it), `file` (where it is saved)
    """

    page: Path
    line: int
    language: str
    text: str
    comments: dict[str, str]

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Everything to run on a page, in its order. Directives of MyST (```{name}) are no code."""
    fence, start, language, inside, comments = "", 0, "", [], {}
    for number, line in enumerate(page.read_text().splitlines(), 1):
        found = _FENCE.match(line)
        if fence:
            if found and found[1] == fence and not found[2]:
                if not language.startswith("{"):
                    yield Block(page, start, language, "\n".join(inside) + "\n", comments)
                fence, comments = "", {}
            else:
                inside.append(line)
        elif found:
            fence, start, language, inside = found[1], number, found[2].strip(), []
        elif comment := _COMMENT.match(line):
            if comment[1] == "setup":
                yield Block(page, number, "setup", comment[2], {})
            else:
                comments = {**comments, comment[1]: comment[2]}
        else:
            assert not line.startswith("<!-- "), f"{page}, line {number}: a comment that no test understands"
            assert not line.strip() or not comments, f"{page}, line {number}: there is text between a block and the comment that is about it"
    assert not fence, f"{page}: the block of line {start} does not end"


def commands(text: str) -> list[str]:
    """The commands of a bash block: lines joined where they go on, without comments."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s{2,})#.*$", "", line).strip())]

"""`adalink data ...`: see what a data set holds before it is trained on, and check that every image can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Optional

from adalink.errors import ConfigError
from multimodal.sample import BadSample, BadSamples, counted
from tasks.commands import Command
from tasks.commands.settings import add_data_set, data_set_of
from tasks.data.sources import DataConfig

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from tasks.data.look.facts import CountTokens, Facts, Part
    from tasks.data.sources import Opened

__all__ = ["CHECK", "LOOK"]

_MOST_WIDTH = 140  # columns of a terminal's table
_LISTED = 20  # samples named for each reason
_DATA_FIRST = ("path", "images", "columns", "format", "split", "annotations", "questions", "shards", "limit")


def _add_data(parser: Any) -> None:
    add_data_set(parser)
    parser.add_argument("--workers", type=int, default=None, help="processes that read; by default one for each core, at most four")


def _workers(values: Any) -> int:
    from tasks.data.look.scan import usual_workers

    if values.workers is not None and values.workers < 0:
        raise ConfigError(f"workers is {values.workers}: give 0 (no other process) or more")
    return usual_workers() if values.workers is None else int(values.workers)


def _understood(data: DataConfig, opened: Opened) -> str:
    """How the data set was read, also where the settings say it."""
    if opened.sentence:
        return opened.sentence
    given = [f"{name} {value}" for one in fields(DataConfig) if (name := one.name) in _GIVEN and (value := getattr(data, name)) is not None]
    return f"{', '.join(given)} ({counted(len(opened.source), 'image')})"


_GIVEN = ("path", "images", "media", "annotations", "questions", "image_info", "karpathy", "vqav2", "split", "shards", "mix", "scenes")


# ----------------------------------------
# data look


def _add_look(parser: Any) -> None:
    _add_data(parser)
    parser.add_argument("--val", type=Optional[DataConfig], default=None, help="another data set, whose images must not be in this one")  # noqa: UP045
    parser.add_argument("--language_model", default=None, help="folder or hub id of a language model: texts are counted in its tokens too")
    parser.add_argument("--model", default=None, help="likewise, of a model that sees already")
    parser.add_argument("--samples", type=int, default=25_000, help="most samples that are looked at, evenly spread; 0: all")
    parser.add_argument("--out", type=Path, default=Path("look.html"), help="the page to browse")
    parser.add_argument("--page_samples", type=int, default=5_000, help="most samples on the page; 0: no page")


def _look(values: Any, plain: Any) -> None:
    """Print what was found, and write the page. Raises ConfigError and DataError as opening a data set does."""
    from tasks.data.look.page import check_place, chosen_samples, render, side_for, write_page
    from tasks.data.look.scan import thumbnails

    for name in ("samples", "page_samples"):
        if values[name] < 0:
            raise ConfigError(f"{name} is {values[name]}: give 0 or more")
    data, workers = data_set_of(values), _workers(values)
    if values.page_samples:
        check_place(values.out)
    opened = data.open(in_order=True)
    facts = _facts(values, data, opened, workers)
    print("\n".join(_as_text(facts)))
    if not values.page_samples:
        return
    chosen = chosen_samples(facts, values.page_samples)
    small = thumbnails(opened.source, [one.number for one in chosen], side=side_for(len(chosen)), workers=workers)
    html = render(facts, chosen, small, title=_title(data))
    write_page(values.out, html)
    print(f"\n{values.out}: {counted(len(chosen), 'sample')} to browse ({len(html) / 2**20:.1f} MiB)")
    if damaged := sum(one.bad is None and any(image.reason for image in images) for one, images in zip(chosen, small, strict=True)):
        print(f"{counted(damaged, 'sample')} of the page with an image that cannot be decoded: `adalink data check` names every one")


def _facts(values: Any, data: DataConfig, opened: Opened, workers: int) -> Facts:
    from tasks.data.look.facts import Facts
    from tasks.data.look.scan import look_at, spread_over

    count, counted_by = _token_counter(values.language_model, values.model)
    val = None
    if values.val is not None:
        other = values.val.open(in_order=True).source
        seen = look_at(other, spread_over(len(other), values.samples), workers=workers, label="reading val")
        val = {image.digest: one.key for one in reversed(seen) for image in one.images}
    return Facts(
        sentence=_understood(data, opened),
        total=len(opened.source),
        seen=look_at(opened.source, spread_over(len(opened.source), values.samples), workers=workers),
        problems=opened.problems,
        val=val,
        count=count,
        counted_by=counted_by,
        left_out=opened.left_out,
    )


def _token_counter(language_model: str | None, model: str | None) -> tuple[CountTokens | None, str]:
    """What counts the tokens of texts, and whose they are. Raises ConfigError where both are given or there is no tokenizer."""
    if language_model is not None and model is not None:
        raise ConfigError("language_model and model were given: tokens are those of one, so leave the other out")
    name = language_model or model
    if name is None:
        return None, ""
    from transformers import AutoTokenizer

    from multimodal.loading import existing_folder, loading, split_revision
    from tasks.runs.compose import found_part

    place = found_part(name)
    folder = existing_folder(place)
    repository, revision = (str(folder), None) if folder is not None else split_revision(str(place))
    with loading("tokenizer of", name, "give the folder of a language model, with its tokenizer.json"):
        tokenizer: Any = AutoTokenizer.from_pretrained(repository, revision=revision, trust_remote_code=False)

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for at in range(0, len(texts), 1000) for ids in tokenizer(list(texts[at : at + 1000]), add_special_tokens=False)["input_ids"]]

    return count, name


def _title(data: DataConfig) -> str:
    given = data.path or data.shards or data.karpathy or data.vqav2 or data.questions or data.annotations or data.image_info
    return f"Data: {Path(str(given)).name if given is not None else data.scenes or 'a mix'}"


def _as_text(facts: Facts) -> Iterator[str]:
    """The tables for a terminal."""
    yield facts.sentence
    for part in facts.parts:
        yield ""
        yield part.name
        yield from _table(part)
        yield from (f"  {note}" for note in part.notes)


def _table(part: Part) -> Iterator[str]:
    widths = [max(len(row[column]) for row in part.rows) for column in range(len(part.rows[0]))] if part.rows else []
    for row in part.rows:
        cells = [cell.ljust(width) if part.is_prose(column) else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
        line = ("  " + "  ".join(cells)).rstrip()
        yield line if len(line) <= _MOST_WIDTH else line[: _MOST_WIDTH - 3] + "..."


LOOK = Command(
    _add_look, _look, classes=(f"{DataConfig.__module__}.{DataConfig.__qualname__}",),
    first=(*_DATA_FIRST, ("--val PATH", "another data set: images that are in both are named"), "language_model", "model", "samples", "out", "page_samples"),
    examples=(
        "adalink data look captions.csv --images photographs --val val.csv",
        "adalink data look captions_val2014.json --images val2014 --language_model facebook/opt-125m",
    ),
)  # fmt: skip


# ----------------------------------------
# data check


def _add_check(parser: Any) -> None:
    _add_data(parser)
    about = "a sample without a text for this task counts too; by default any text will do"
    parser.add_argument("--task", type=Optional[Literal["captioning", "vqa"]], default=None, help=about)  # noqa: UP045
    parser.add_argument("--bad_samples", type=int, default=0, help="how many may be skipped before the exit code is 2, as train.bad_samples")
    parser.add_argument("--out", type=Path, default=None, help="a file for all that would be skipped, one JSON list a line: key, reason, detail, file")


def _check(values: Any, plain: Any) -> None:
    """Print what training would skip. Raises BudgetError where that is more than may be."""
    from tasks.captioning import Captioning
    from tasks.data.look.scan import skipped
    from tasks.vqa import Vqa

    budget, data, workers = BadSamples(budget=values.bad_samples), data_set_of(values), _workers(values)
    opened = data.open(in_order=True)
    print(_understood(data, opened))
    task = {"captioning": Captioning(), "vqa": Vqa(), None: None}[values.task]
    found = [*opened.problems, *skipped(opened.source, task=task, workers=workers)]
    for bad in found:
        budget.add(bad)
    print("\n".join(_named(found, len(opened.source), len(opened.problems))))
    if values.out is not None:
        from adalink.files import write_whole

        write_whole(values.out, "".join(json.dumps(bad.to_row(), ensure_ascii=True) + "\n" for bad in found).encode())
        print(f"{values.out}: all {counted(len(found), 'sample')}")
    budget.check()


def _named(found: Sequence[BadSample], n_samples: int, n_problems: int) -> Iterator[str]:
    """Each reason with its samples, the first twenty of them, and the count."""
    by_reason: dict[str, list[BadSample]] = {}
    for bad in found:
        by_reason.setdefault(bad.reason, []).append(bad)
    for reason, samples in by_reason.items():
        yield f"{reason}: {len(samples):,}"
        yield from (f"  {bad}: {bad.detail}" if bad.detail else f"  {bad}" for bad in samples[:_LISTED])
        if len(samples) > _LISTED:
            yield f"  and {len(samples) - _LISTED:,} more"
    skipped = f"{counted(len(found), 'bad sample')}, which training would skip; " if found else ""
    yield f"{skipped}{counted(n_samples - (len(found) - n_problems), 'image')} can be used"


CHECK = Command(
    _add_check, _check,
    first=(*_DATA_FIRST, "task", "bad_samples", "out", "workers"),
    examples=("adalink data check captions.csv --images photographs", "adalink data check shards/train --task captioning --bad_samples 10"),
)  # fmt: skip

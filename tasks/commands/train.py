"""`adalink train`, `features`, `evaluate` and `report`; also a sweep, as in `--train.learning_rate 1e-3,3e-3`, which trains one run for each value."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from adalink.errors import ConfigError
from tasks.commands import Command
from tasks.commands.answer import add_allow_other_base
from tasks.commands.plan import add_plan_options, dry_run_command
from tasks.commands.settings import (
    DATA_ROWS,
    METHODS_ROW,
    PARTS_FIRST,
    SAVED,
    SPLITS,
    DryRunConfig,
    EvaluationSettings,
    add_run,
    only_named_data,
    settings_of,
)
from tasks.runs.config import Parts, RunConfig, chosen_methods, number_settings
from tasks.runs.help import comments_as_help
from tasks.task import Submission

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from multimodal.data.feature_cache.format import AnyContents
    from multimodal.encoders.tower import VisionTower
    from multimodal.existing.tower import ModelTower
    from tasks.data.sources import Opened
    from tasks.runs.run import Evaluation

__all__ = ["EVALUATE", "FEATURES", "REPRESENTATION", "TRAIN", "Sweep", "config_text", "results_table", "run_config", "swept"]


def _train(values: Any, plain: Any) -> None:
    from tasks.runs.run import train_run

    evaluation = train_run(run_config(values), config_text(plain.as_dict()), resume=values.resume)
    _display(evaluation, values.out)


def _evaluate(values: Any, plain: Any) -> None:
    from tasks.runs.run import evaluate_run

    run = values.adapter.resolve().parent
    # The config of the run names the run's own folder, whose metrics and report stay what the training made them.
    out = values.out if values.out is not None and values.out.resolve() != run else values.adapter.parent / "evaluation"
    settings = settings_of(values.adapter, values)
    text = config_text({**plain.as_dict(), **{name: settings[name] for name in SAVED}})
    _display(evaluate_run(RunConfig(**settings), text, values.adapter, out, values.submission, allow_other_base=values.allow_other_base), out)


def _represent(values: Any, plain: Any) -> None:
    from tasks.evaluation.representation import representation_json, representation_rows
    from tasks.runs.run import represent_adapter

    config = RunConfig(**{**settings_of(values.adapter, values), "representation": values.samples})
    found = represent_adapter(config, values.adapter, allow_other_base=values.allow_other_base)
    rows = {name: {column: value for column, value in row.items() if value is not None} for name, row in representation_rows(found).items()}
    print(representation_json(values.samples, found) if values.json else results_table(rows))


def _add_represent(parser: Any) -> None:
    add_run(parser, EvaluationSettings)
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter folder; with the config of its run, its start is compared too")
    parser.add_argument("--samples", type=int, default=64, help="samples of data.val whose texts are read, the first ones")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    add_allow_other_base(parser)


def _display(evaluation: Evaluation, folder: Path) -> None:
    from tasks.runs.results import UNSCORED
    from tasks.runs.run import is_main

    if not is_main():
        return
    print(results_table({name: score.metrics for name, score in evaluation.scores.items()}) if evaluation.scores else UNSCORED)
    print(f"report: {folder / 'report.html'}")


def _add_train(parser: Any) -> None:
    add_run(parser)
    _add_train_options(parser)


def _add_dry_train(parser: Any) -> None:
    add_run(parser, DryRunConfig)
    _add_train_options(parser)
    add_plan_options(parser)


def _add_train_options(parser: Any) -> None:
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder, exactly")
    parser.add_argument("--dry_run", action="store_true", help="check settings, parts and data that are given, print what `compose` prints, load nothing")


def _add_evaluate(parser: Any) -> None:
    add_run(parser, EvaluationSettings)
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter folder; results go to `out`, or to `evaluation` beside it")
    add_allow_other_base(parser)
    comments_as_help(Submission)
    parser.add_class_arguments(Submission, "submission")


def run_config(values: Any) -> RunConfig:
    """The settings of a run, of a command's parsed values."""
    names = RunConfig.__dataclass_fields__
    return RunConfig(**{name: values[name] for name in names})


def config_text(plain: Mapping[str, Any]) -> str:
    """The settings as they were used, as YAML that `--config` reads again, from any folder: paths are absolute."""
    content = {name: value for name, value in plain.items() if name in RunConfig.__dataclass_fields__}
    return yaml.safe_dump(_plain(content), sort_keys=False)


# Settings that are a name or a local folder, as a text.
_NAMES_OR_FOLDERS = ("model", "encoder", "language_model", "shards", "mix")


def _plain(value: Any, name: str = "") -> Any:
    from tasks.runs.compose import located

    if isinstance(value, Mapping):
        return {located(str(key)) if name == "mix" else str(key): _plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return _plain(vars(value))
    if isinstance(value, Path):
        return str(value.absolute())
    return located(value) if isinstance(value, str) and name in _NAMES_OR_FOLDERS else value


def results_table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """One line for each row, one column for each metric, two decimals; `undefined` where a metric has no value."""
    columns = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    cells = [["", *columns], *([name, *(_metric(metrics[c]) if c in metrics else "" for c in columns)] for name, metrics in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _metric(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


@dataclass(frozen=True)
class Sweep:
    """Arguments of one run after the other, and the folder that each trains into."""

    runs: tuple[tuple[tuple[str, ...], Path], ...]

    def train(self, run: Callable[[Sequence[str]], int], is_dry: bool) -> int:
        """The exit code of the first run that fails, and 0 where all have trained and stand in a table; `run` is the command line."""
        for arguments, out in self.runs:
            print(f"sweep: {out}")
            if code := run(arguments):
                return code
        folders = [str(out) for _, out in self.runs]
        return 0 if is_dry or len(folders) < 3 else run(["compare", *folders])


def swept(arguments: Sequence[str]) -> Sweep | None:
    """The runs of a sweep; None where no setting has several values.

    Several values are written with commas and no brackets, for settings that are one number: `--train.betas [0.9,0.999]` is one value, and
    so is any text with a comma. Two such settings give every pair. Raises ConfigError where no run folder is given, or a value is missing.
    """
    if arguments[:1] != ["train"]:
        return None
    numbers = set(number_settings())
    found = {at: (name, value.split(",")) for at, name, value in _given(arguments) if name in numbers and "," in value and value[:1] not in "[{('\""}
    if not found:
        return None
    for name, values in found.values():
        if not all(part.strip() for part in values):
            raise ConfigError(f"--{name} is {','.join(values)}: one of the values between its commas is empty; write them as 1e-3,3e-3")
    out = _out(arguments)
    runs = []
    for chosen in itertools.product(*([part.strip() for part in values] for _, values in found.values())):
        one, labels = list(arguments), []
        for (at, (name, _)), value in zip(found.items(), chosen, strict=True):
            one[at] = f"--{name}={value}" if one[at].startswith("--") else value
            labels.append(f"{name.rpartition('.')[2]}={value}")
        folder = out / ",".join(labels)
        runs.append(((*one, "--out", str(folder)), folder))
    return Sweep(tuple(runs))


def _given(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(place of the value, name, value) of every setting."""
    for at, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        if equals:
            yield at, name, value
        elif at + 1 < len(arguments) and not arguments[at + 1].startswith("--"):
            yield at + 1, name, arguments[at + 1]


def _out(arguments: Sequence[str]) -> Path:
    """The run folder, on the command line or in its config."""
    given: dict[str, Any] = {}
    for _, name, value in _given(arguments):
        if name == "config":
            try:
                read: Any = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):  # the run itself says what is wrong with it
                continue
            given |= {"out": read["out"]} if isinstance(read, dict) and read.get("out") else {}
        elif name == "out":
            given["out"] = value
    if not given:
        raise ConfigError("a sweep needs `out`, the folder in which each run gets one of its own: give --out")
    return Path(typing.cast("str", given["out"]))


def _add_features(parser: Any) -> None:
    add_run(parser, DryRunConfig)
    parser.add_argument(
        "--contents", type=Literal["needed", "all"], default="needed",
        help="needed: what the methods of the config read, patches or the few pooled vectors that eP-ALM taps; all: patches and every pooled vector",
    )  # fmt: skip


def _features(values: Any, plain: Any) -> None:
    """Write FOLDER/train and FOLDER/val, for each of the two data sets that is given. Goes on where it was interrupted; checks what is whole.

    Raises ConfigError where no folder or no data is given, and what `write_features` raises.
    """
    from tasks.runs.compose import composed_tower, existing_tower

    if values.features is None:
        raise ConfigError("no folder is given to write the features to: give --features FOLDER")
    Parts(model=values.model, encoder=values.encoder, language_model=values.language_model, image_tokens=values.image_tokens, frames=values.frames).check()
    opened = {split: data.open() for split in SPLITS if (data := getattr(values.data, split)) is not None}
    if not opened:
        raise ConfigError("no data is given whose features could be written: give data.train, data.val or both")
    if values.model is None:
        tower: Any = composed_tower(values.encoder, values.layer, values.base, values.frames)
    else:
        tower = existing_tower(values.model, values.image_tokens, values.base)
    contents = _contents(values, tower)
    for split, data in opened.items():
        _write(tower, data, values.features / split, contents, values)


def _contents(values: Any, tower: VisionTower | ModelTower) -> AnyContents:
    """Known without the language model's weights."""
    from multimodal.data.feature_cache.format import all_contents, needed_contents
    from multimodal.encoders.tower import VisionTower
    from tasks.planning.meta import draw_adapter, draw_language
    from tasks.runs.compose import found_part

    everything = all_contents(tower, values.features_dtype)
    if values.contents == "all" or values.model is not None:
        return everything
    assert isinstance(tower, VisionTower)
    language = draw_language(found_part(values.language_model))
    return needed_contents(draw_adapter(tower, language, chosen_methods(values.methods)), everything)


def _write(tower: VisionTower | ModelTower, data: Opened, folder: Path, contents: AnyContents, values: Any) -> None:
    from multimodal.data.feature_cache.encode import write_features
    from multimodal.data.feature_cache.format import as_size
    from multimodal.sample import BadSamples
    from tasks.runs.compose import log, size_of

    above = next(parent for parent in folder.resolve().parents if os.path.exists(parent))
    log(f"{folder}: {size_of(contents, len(data.source))}; {as_size(shutil.disk_usage(above).free)} are free")
    workers, budget = values.train.workers, values.train.bad_samples
    cache = write_features(tower, data.source, folder, contents, workers=workers, budget=budget, label=folder.name)
    bad = BadSamples(budget=len(cache), found=cache.bad.values())
    log(f"{folder}: {len(cache) - len(cache.bad):,} images have features" + (f"; skipped: {bad.summary()}" if cache.bad else ""))


TRAIN = Command(
    _add_train, _train, has_config=True,
    dry=Command(_add_dry_train, dry_run_command, has_config=True, prepare=only_named_data),
    first=(
        *PARTS_FIRST, *DATA_ROWS, METHODS_ROW,
        *(f"train.{name}" for name in ("epochs", "steps", "batch_size", "learning_rate", "precision", "features", "workers", "measure_every", "seed")),
        "generation.num_beams", "out", "resume", "dry_run",
    ),
    examples=(
        "adalink train --config run.yaml --out runs/first",
        "adalink train --config run.yaml --out runs/first --train.learning_rate 3e-4 --dry-run",
    ),
)  # fmt: skip
EVALUATE = Command(
    _add_evaluate, _evaluate, has_config=True,
    first=(
        "adapter", "config", DATA_ROWS[0], "generation.num_beams", "generation.max_new_tokens", "train.workers", "features", "out",
        "submission.split", "submission.incomplete", "allow_other_base",
    ),
    examples=(
        "adalink evaluate --adapter runs/first/adapter --config runs/first/config.yaml",
        "adalink evaluate --adapter runs/first/adapter --config run.yaml --generation.num_beams 5",
    ),
)  # fmt: skip
REPRESENTATION = Command(
    _add_represent, _represent, has_config=True,
    first=("adapter", "config", DATA_ROWS[0], "samples", "json", "allow_other_base"),
    examples=(
        "adalink report representation --adapter runs/first/adapter --config runs/first/config.yaml",
        "adalink report representation --adapter runs/first/adapter --config run.yaml --samples 16 --json",
    ),
)  # fmt: skip
FEATURES = Command(
    _add_features, _features, has_config=True, prepare=only_named_data,
    first=(*PARTS_FIRST, *DATA_ROWS, METHODS_ROW, "layer", "features", "features_dtype", "contents", "train.workers", "train.bad_samples"),
    examples=("adalink features --config run.yaml --features runs/features",),
)  # fmt: skip

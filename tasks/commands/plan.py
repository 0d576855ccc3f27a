"""`adalink compose`, `adalink methods` and `adalink train --dry-run`: print what would be built, and load nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from adalink.errors import BudgetError, ConfigError, DataError
from multimodal.sample import counted
from tasks.commands import Command
from tasks.commands.settings import METHODS_ROW, PARTS_FIRST, SPLITS, DryRunConfig, add_run, only_named_data
from tasks.runs.config import chosen_methods

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from multimodal.sample import BadSamples, SampleSource
    from tasks.data.sources import DataConfig
    from tasks.planning.plan import Plan
    from tasks.task import Task

__all__ = ["COMPOSE", "METHODS_LIST", "add_plan_options", "dry_run_command", "dry_run_of", "plan_of"]

SHAPE = ("scenes:encoder", "scenes:language")  # what methods are counted on, where no parts are given

TEXT_TOKENS, IMAGE_SIZE = 30, "640x480"


def add_plan_options(parser: Any) -> None:
    """What a plan needs beside a run's settings."""
    parser.add_argument("--text_tokens", type=int, default=TEXT_TOKENS, help="words of a row, prompt and answer together, that the estimates of memory assume")
    parser.add_argument("--image_size", default=IMAGE_SIZE, help="of a model that sees already: width and height of the image whose tokens are counted")
    parser.add_argument("--cards", type=int, default=1, help="GPUs that train together: also print the memory on each of them")
    _add_json(parser)


def _add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _methods(values: Any, plain: Any) -> None:
    """Print every method, counted on the parts that are given."""
    from tasks.planning.existing import draw_model
    from tasks.planning.meta import draw_language, draw_tower
    from tasks.planning.methods import listed_methods, methods_as_json, methods_as_text, methods_on
    from tasks.runs.compose import found_part

    given = {name: method for name, method in vars(values.methods).items() if method is not None}
    if values.model is not None:
        dry_run = dry_run_of(values)
        dry_run.check_form()
        drawn = draw_model(dry_run.parts)
        methods = methods_on(drawn.adapted.anatomy, given)
        roles = "\n".join([f"{values.model}: {type(drawn.language.model).__name__}", *drawn.role_lines(), "", ""])
        print(methods_as_json(methods) if values.json else roles + methods_as_text(methods, values.model))
        return
    encoder, language_model = (given or default for given, default in zip((values.encoder, values.language_model), SHAPE, strict=True))
    methods = listed_methods(draw_tower(found_part(encoder), layer=values.layer), draw_language(found_part(language_model)), given)
    print(methods_as_json(methods) if values.json else methods_as_text(methods, f"{language_model} with {encoder}"))


def _compose(values: Any, plain: Any) -> None:
    """Print the plan."""
    from tasks.planning.plan import plan_as_json, plan_as_text

    plan = plan_of(values)
    print(plan_as_json(plan) if values.json else plan_as_text(plan))


def dry_run_command(values: Any, plain: Any) -> None:
    """Check the settings, the folders, the data where it is given, and print the plan. Raises what a run would, and ConfigError with --resume."""
    from multimodal.training.distributed import check_trackers
    from tasks.planning.plan import plan_as_json, plan_as_text

    if values.resume:
        raise ConfigError("--dry-run builds nothing and --resume goes on with what was built: give one of them")
    dry_run, plan = dry_run_of(values), plan_of(values)
    check_trackers(dry_run.train)
    _check_folders(dry_run)
    data = _check_data(dry_run)
    if values.json:
        print(plan_as_json(plan))
        return
    for line in data:
        print(line)
    out = "not given" if values.out is None else f"{values.out}{' (is there already, and empty)' if values.out.exists() else ''}"
    print(f"run folder: {out}\n")
    print(plan_as_text(plan))
    print("\nnothing was loaded, trained or written")


def _check_folders(dry_run: Any) -> None:
    """Raises ConfigError as a run would where its folder is taken or cannot be made, and where a folder of features holds none."""
    from multimodal.data.feature_cache.reader import read_manifest
    from tasks.runs.run import refuse_taken

    if dry_run.out is not None:
        refuse_taken(dry_run.out, resume=False)
        if (above := next((path for path in dry_run.out.absolute().parents if path.exists()), None)) is not None and not above.is_dir():
            raise ConfigError(f"the run folder {dry_run.out} cannot be made: {above} is no folder")
    if dry_run.features is not None and dry_run.train.features != "fill":
        read_manifest(dry_run.features / "train")


def _check_data(dry_run: Any) -> Sequence[str]:
    """One line for each data set: what was found where it is given, a word where it is not.

    Reads annotations or manifests, and images up to the first that can be used. Raises DataError, BudgetError and ConfigError as a run would.
    """
    from multimodal.sample import BadSamples
    from tasks.runs.conversations import refuse_beyond

    lines = []
    for split in SPLITS:
        config: DataConfig | None = getattr(dry_run.data, split)
        if config is None:
            lines.append(f"data.{split}: not given, and not checked")
            continue
        opened = config.open()
        if dry_run.model is None:
            parts = f"a model of the encoder {dry_run.encoder} and the language model {dry_run.language_model}"
            refuse_beyond(opened, f"data.{split}", dry_run.chosen_task(), parts)
        bad = BadSamples(budget=dry_run.train.bad_samples, found=opened.problems)
        place = _first_usable(opened.source, dry_run.chosen_task(), split, bad)
        n_bad, which = sum(bad.counts.values()), "the first one" if place == 0 else f"number {place + 1}"
        lines.append(f"data.{split}: {counted(len(opened.source), 'image')}, {n_bad:,} known to be bad; {which} can be read")
    return lines


def _first_usable(source: SampleSource, task: Task, split: str, bad: BadSamples) -> int:
    """The index of the first sample that a run can use. Raises BudgetError where too many come before it, DataError where there is none."""
    from multimodal.data.images.decode import BadImage, decode_image
    from multimodal.sample import BadSample, DamagedSample

    _check_budget(bad, split)
    for index in range(len(source)):
        try:
            sample = source[index]
            for image in sample.images:
                decode_image(image)
        except DamagedSample as error:
            bad.add(error.bad)
        except BadImage as error:
            bad.add(BadSample(key=sample.key, reason=error.reason, detail=str(error)))
        else:
            if split == "val":
                task.score({asked.item: "a" for asked in task.asked(sample)}, [sample])  # raises where there is nothing to score against
                return index
            if any((text.target or "").strip() for text in task.texts(sample, random.Random(0))):
                return index
            bad.add(BadSample(key=sample.key, reason="no text", detail=f"{sample.key} has no text to learn from"))
        _check_budget(bad, split)
    raise DataError(f"data.{split}: none of the {counted(len(source), 'image')} can be used: {bad.summary()}; mend the data, or give other data")


def _check_budget(bad: BadSamples, split: str) -> None:
    try:
        bad.check()
    except BudgetError as error:
        raise BudgetError(f"data.{split}: {error}") from None


def dry_run_of(values: Any) -> Any:
    """The settings of a run, of which some may be missing, of a command's parsed values."""
    return DryRunConfig(**{name: values[name] for name in DryRunConfig.__dataclass_fields__})


def plan_of(values: Any) -> Plan:
    """The plan of a run's parsed settings, with the options of `add_plan_options`. Raises what a run would refuse, in the same words."""
    from tasks.planning.existing import make_existing_plan
    from tasks.planning.plan import make_plan

    dry_run = dry_run_of(values)
    dry_run.check_form()
    if dry_run.task == "text":
        raise ConfigError("a run of the task text has no encoder, and its memory is not planned: train without --dry-run, or with train.steps 1")
    if values.text_tokens < 1:
        raise ConfigError(f"text_tokens is {values.text_tokens}: give 1 or more")
    if values.cards < 1:
        raise ConfigError(f"cards is {values.cards}: give 1 or more")
    if dry_run.model is not None:
        return make_existing_plan(
            dry_run.parts,
            chosen_methods(dry_run.methods, needs_one=dry_run.connector == "frozen"),
            encoder_methods=dry_run.encoder_methods,
            connector=dry_run.connector,
            connector_methods=dry_run.methods_on_connector,
            template=dry_run.chosen_task().words_for(True),
            train=dry_run.train,
            generation=dry_run.generation,
            text_tokens=values.text_tokens,
            image_size=_size(values.image_size),
            cards=values.cards,
        )
    return make_plan(
        dry_run.encoder,
        dry_run.language_model,
        chosen_methods(dry_run.methods),
        encoder_methods=dry_run.encoder_methods,
        n_answers=dry_run.n_answers,
        layer=dry_run.layer,
        template=dry_run.chosen_task().template,
        train=dry_run.train,
        generation=dry_run.generation,
        text_tokens=values.text_tokens,
        base=dry_run.base,
        cards=values.cards,
    )


def _size(given: str) -> tuple[int, int]:
    width, _, height = given.lower().partition("x")
    if not (width.strip().isdigit() and height.strip().isdigit() and int(width) and int(height)):
        raise ConfigError(f"image_size is {given!r}: give width and height in pixels, such as 640x480")
    return int(width), int(height)


def _add_compose(parser: Any) -> None:
    add_run(parser, DryRunConfig)
    add_plan_options(parser)


def _add_methods(parser: Any) -> None:
    add_run(parser, DryRunConfig)
    _add_json(parser)


COMPOSE = Command(
    _add_compose, _compose, has_config=True, prepare=only_named_data,
    first=(*PARTS_FIRST, METHODS_ROW, "layer", "train.batch_size", "train.precision", "train.checkpointing", "generation.num_beams", "text_tokens",
           "image_size", "cards", "json"),
    examples=(
        "adalink compose --encoder scenes:encoder --language_model scenes:language --methods.lora.rank 8",
        "adalink compose --config run.yaml --json",
    ),
)  # fmt: skip
METHODS_LIST = Command(
    _add_methods, _methods, has_config=True, prepare=only_named_data,
    first=("config", "model", "encoder", "language_model", METHODS_ROW, "layer", "json"),
    examples=("adalink methods", "adalink methods --methods.adalink '{rank: 16, modalities: [text]}' --json"),
)  # fmt: skip

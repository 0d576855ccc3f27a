"""`adalink compose`, `adalink methods` and `adalink train --dry-run`: print what would be built, and load nothing."""

from __future__ import annotations

from typing import Any

from adalink.errors import ConfigError
from multimodal.training.distributed import check_trackers
from tasks.commands import Command
from tasks.commands.settings import Draft, add_run, check_data, check_folders, name_both_parts, only_named_data
from tasks.planning.meta import draw_language, draw_tower
from tasks.planning.methods import listed_methods, methods_as_json, methods_as_text
from tasks.planning.plan import Plan, make_plan, plan_as_json, plan_as_text
from tasks.runs.compose import found_part
from tasks.runs.config import chosen_methods

__all__ = ["COMPOSE", "METHODS_LIST", "add_plan_options", "dry_run_command"]

SHAPE = ("scenes:encoder", "scenes:language")  # what methods are counted on, where no parts are given

TEXT_TOKENS = 30


def add_plan_options(parser: Any) -> None:
    """What a plan needs beside a run's settings."""
    parser.add_argument("--text_tokens", type=int, default=TEXT_TOKENS, help="words of a row, prompt and answer together, that the estimates of memory assume")
    _add_json(parser)


def _add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _methods(values: Any, plain: Any) -> None:
    """Print every method, counted on the parts that are given."""
    encoder, language_model = (given or default for given, default in zip((values.encoder, values.language_model), SHAPE, strict=True))
    given = {name: method for name, method in vars(values.methods).items() if method is not None}
    methods = listed_methods(draw_tower(found_part(encoder), layer=values.layer), draw_language(found_part(language_model)), given)
    print(methods_as_json(methods) if values.json else methods_as_text(methods, encoder, language_model))


def _compose(values: Any, plain: Any) -> None:
    """Print the plan."""
    plan = _plan(values)
    print(plan_as_json(plan) if values.json else plan_as_text(plan))


def dry_run_command(values: Any, plain: Any) -> None:
    """Check the settings, the folders, the data where it is given, and print the plan. Raises what a run would, and ConfigError with --resume."""
    if values.resume:
        raise ConfigError("--dry-run builds nothing and --resume goes on with what was built: give one of them")
    draft, plan = _draft(values), _plan(values)
    check_trackers(draft.train)
    check_folders(draft)
    data = check_data(draft)
    if values.json:
        print(plan_as_json(plan))
        return
    for line in data:
        print(line)
    out = "not given" if values.out is None else f"{values.out}{' (is there already, and empty)' if values.out.exists() else ''}"
    print(f"run folder: {out}\n")
    print(plan_as_text(plan))
    print("\nnothing was loaded, trained or written")


def _draft(values: Any) -> Any:
    return Draft(**{name: values[name] for name in Draft.__dataclass_fields__})


def _plan(values: Any) -> Plan:
    draft = _draft(values)
    name_both_parts(draft)
    if values.text_tokens < 1:
        raise ConfigError(f"text_tokens is {values.text_tokens}: give 1 or more")
    return make_plan(
        draft.encoder,
        draft.language_model,
        chosen_methods(draft.methods),
        encoder_methods=draft.encoder_methods,
        n_answers=draft.n_answers,
        layer=draft.layer,
        template=draft.chosen_task().template,
        train=draft.train,
        generation=draft.generation,
        text_tokens=values.text_tokens,
    )


def _add_compose(parser: Any) -> None:
    add_run(parser, Draft)
    add_plan_options(parser)


def _add_methods(parser: Any) -> None:
    add_run(parser, Draft)
    _add_json(parser)


COMPOSE = Command(_add_compose, _compose, has_config=True, prepare=only_named_data)
METHODS_LIST = Command(_add_methods, _methods, has_config=True, prepare=only_named_data)

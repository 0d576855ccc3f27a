"""The commands: what each takes, and the function that it calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adalink import METHODS
from adalink.errors import ConfigError
from multimodal.generate import GenerationChoice, GenerationSettings, saved_generation
from multimodal.images import decode_image
from multimodal.template import Template
from multimodal.train_settings import TrainSettings
from tasks.bench.command import bench
from tasks.captioning import Captioning
from tasks.compare_files import compare_coco, compare_vqa
from tasks.compose import load_adapted, located
from tasks.config import Data, RunConfig
from tasks.data import DataConfig
from tasks.demo import run_demo
from tasks.draft import Draft, only_named_data
from tasks.export import export_embeds, export_folded, export_merged
from tasks.feature_command import FEATURES_HELP, add_features_options, features_command
from tasks.figure_commands import add_compared_runs, add_scored, run_compared, run_compared_runs, run_scored
from tasks.given_images import images_and_questions, images_of
from tasks.help import comments_as_help
from tasks.plan_commands import add_methods_options, add_plan_options, compose_command, dry_run_command, methods_command
from tasks.run import Evaluation, evaluate_run, is_main, train_run
from tasks.run_metrics import UNSCORED
from tasks.run_table import listed_runs
from tasks.saved_settings import SAVED, EvaluationSettings, settings_of
from tasks.score import score_coco, score_vqa
from tasks.serve.command import add_serve, serve
from tasks.shards import shards_check, shards_coco, shards_folder, shards_img2dataset, shards_vqa
from tasks.show import results_table
from tasks.submission import Submission
from tasks.vqa import Vqa

__all__ = ["COMMANDS", "UNNAMED", "Command", "commands_for"]

CAPTIONED_AT_ONCE = 16  # pictures; thousands may be given


@dataclass(frozen=True)
class Command:
    """A command. run gets the parsed values as objects, and as plain data for the run folder's config.yaml.

    prepare   may change the plain data before objects are made of them
    """

    help: str
    add: Callable[[Any], Any]
    run: Callable[[Any, Any], None]
    has_config: bool = False
    prepare: Callable[[Any], None] = lambda plain: None


def _train(values: Any, plain: Any) -> None:
    evaluation = train_run(_config(values), _config_text(plain.as_dict()), resume=values.resume)
    _show(evaluation, values.out)


def _evaluate(values: Any, plain: Any) -> None:
    run = values.adapter.resolve().parent
    # The config of the run names the run's own folder, whose metrics and report stay what the training made them.
    out = values.out if values.out is not None and values.out.resolve() != run else values.adapter.parent / "evaluation"
    settings = settings_of(values.adapter, values)
    text = _config_text({**plain.as_dict(), **{name: settings[name] for name in SAVED}})
    _show(evaluate_run(RunConfig(**settings), text, values.adapter, out, values.submission, allow_other_base=values.allow_other_base), out)


def _show(evaluation: Evaluation, folder: Path) -> None:
    if not is_main():
        return
    print(results_table({name: score.figures for name, score in evaluation.scores.items()}) if evaluation.scores else UNSCORED)
    print(f"report: {folder / 'report.html'}")


def _caption(values: Any, plain: Any) -> None:
    model, saved = load_adapted(values.adapter, encoder=values.encoder, language_model=values.language_model, allow_other_base=values.allow_other_base)
    if saved["task"] != "captioning":
        raise ConfigError(f"the adapter in {values.adapter} was trained for {saved['task']}: use `adalink ask`")
    settings = values.generation.over(saved_generation(saved))
    images = images_of(values.images)
    for path in images:
        decode_image(path)  # before the first is captioned: a wrong path is told at once
    for start in range(0, len(images), CAPTIONED_AT_ONCE):
        paths = images[start : start + CAPTIONED_AT_ONCE]
        texts = model.generate([decode_image(path) for path in paths], [""] * len(paths), settings=settings)
        for path, text in zip(paths, texts, strict=True):
            print(f"{path}\t{text}" if len(images) > 1 else text)


def _ask(values: Any, plain: Any) -> None:
    images, questions = images_and_questions([values.image, *values.question])
    if not questions:
        raise ConfigError(f"no question is given after {images[-1]}: write one, such as 'what is on the table?'")
    model, saved = load_adapted(values.adapter, encoder=values.encoder, language_model=values.language_model, allow_other_base=values.allow_other_base)
    if saved["task"] != "vqa":
        raise ConfigError(f"the adapter in {values.adapter} was trained for {saved['task']}: use `adalink caption`")
    settings = values.generation.over(saved_generation(saved))
    for path in images:
        decode_image(path)  # before the first question is answered
    for start in range(0, len(images), CAPTIONED_AT_ONCE):
        paths = images[start : start + CAPTIONED_AT_ONCE]
        shown = [decode_image(path) for path in paths]  # each once for all its questions, so it is read once
        asked = [(path, image, question) for path, image in zip(paths, shown, strict=True) for question in questions]
        texts = model.generate([image for _, image, _ in asked], [question for _, _, question in asked], settings=settings)
        for (path, _, question), text in zip(asked, texts, strict=True):
            print("\t".join([*[str(path)] * (len(images) > 1), *[question] * (len(questions) > 1), text]))


def _add_run(parser: Any, settings: Any = RunConfig) -> None:
    for kind in (RunConfig, Data, DataConfig, Captioning, Vqa, Template, TrainSettings, GenerationSettings, *METHODS.values()):
        comments_as_help(kind)
    settings.__doc__ = RunConfig.__doc__
    parser.add_class_arguments(settings, None)


def _add_train(parser: Any) -> None:
    _add_run(parser)
    _add_train_options(parser)


def _add_dry_train(parser: Any) -> None:
    _add_run(parser, Draft)
    _add_train_options(parser)
    add_plan_options(parser)


def _add_train_options(parser: Any) -> None:
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder, exactly")
    parser.add_argument("--dry_run", action="store_true", help="check settings, parts and data that are given, print what `compose` prints, load nothing")


def _add_compose(parser: Any) -> None:
    _add_run(parser, Draft)
    add_plan_options(parser)


def _add_features(parser: Any) -> None:
    _add_run(parser, Draft)
    add_features_options(parser)


def _add_methods(parser: Any) -> None:
    _add_run(parser, Draft)
    add_methods_options(parser)


def _add_evaluate(parser: Any) -> None:
    comments_as_help(GenerationChoice)
    _add_run(parser, EvaluationSettings)
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter folder; results go to `out`, or to `evaluation` beside it")
    _add_allowed(parser)
    comments_as_help(Submission)
    parser.add_class_arguments(Submission, "submission")


def _add_allowed(parser: Any) -> None:
    help = "load the adapter though a frozen part is not as it was when it was trained; what differs is a warning"
    parser.add_argument("--allow_other_base", action="store_true", help=help)


def _add_adapter(parser: Any) -> None:
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter folder that `adalink train` wrote")
    parser.add_argument("--encoder", type=str | None, default=None, help="where the encoder is, if not where the adapter says")
    parser.add_argument("--language_model", type=str | None, default=None, help="where the language model is, if not where the adapter says")
    _add_allowed(parser)
    comments_as_help(GenerationChoice)
    parser.add_class_arguments(GenerationChoice, "generation")


def _add_caption(parser: Any) -> None:
    _add_adapter(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="images: files (JPEG, PNG or WebP), folders of them, or patterns")


def _add_ask(parser: Any) -> None:
    _add_adapter(parser)
    parser.add_argument("image", type=str, metavar="IMAGE ...", help="images: files (JPEG, PNG or WebP), folders of them, or patterns")
    parser.add_argument("question", type=str, nargs="+", metavar="QUESTION", help="what to ask about each of them; several are answered in one batch")


def _add_runs(parser: Any) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="the folder that holds the run folders")


def _add_demo(parser: Any) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the folder that the two run folders are made in")


def _call(function: Callable[..., object]) -> Callable[[Any, Any], None]:
    """A command that is a function with typed keyword arguments."""

    def run(values: Any, plain: Any) -> None:
        function(**{name: value for name, value in vars(values).items() if name != "config"})

    return run


def _function(help_text: str, function: Callable[..., object]) -> Command:
    return Command(help_text, lambda parser: parser.add_function_arguments(function), _call(function))


def _config(values: Any) -> RunConfig:
    names = RunConfig.__dataclass_fields__
    return RunConfig(**{name: values[name] for name in names})


def _config_text(plain: Mapping[str, Any]) -> str:
    """The settings as they were used, as YAML that `--config` reads again, from any folder: paths are absolute."""
    content = {name: value for name, value in plain.items() if name in RunConfig.__dataclass_fields__}
    return yaml.safe_dump(_plain(content), sort_keys=False)


# Settings that are a name or a local folder, as a text.
_NAMES_OR_FOLDERS = ("encoder", "language_model", "shards", "mix")


def _plain(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {located(str(key)) if name == "mix" else str(key): _plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return _plain(vars(value))
    if isinstance(value, Path):
        return str(value.absolute())
    return located(value) if isinstance(value, str) and name in _NAMES_OR_FOLDERS else value


COMMANDS: dict[str, Command | Mapping[str, Command]] = {
    "demo": Command("train and evaluate both tasks on the embedded scenes, offline", _add_demo, lambda values, plain: run_demo(values.out)),
    "train": Command("train an adapter, evaluate it, write its report", _add_train, _train, has_config=True),
    "evaluate": Command("evaluate a saved adapter: results.json in the official format, metrics.json, report.html", _add_evaluate, _evaluate, has_config=True),
    "features": Command(FEATURES_HELP, _add_features, features_command, has_config=True, prepare=only_named_data),
    "compose": Command(
        "what would be built of two frozen parts and methods: parameters, positions, memory; loads nothing",
        _add_compose, compose_command, has_config=True, prepare=only_named_data,
    ),
    "methods": Command(
        "every method: what it computes, where it edits, its settings, what it trains",
        _add_methods, methods_command, has_config=True, prepare=only_named_data,
    ),
    "caption": Command("caption pictures with a saved adapter", _add_caption, _caption),
    "ask": Command("ask a question about a picture, with a saved adapter", _add_ask, _ask),
    "serve": Command("serve adapters on one frozen model: OpenAI's chat API with pictures, and a page to try them", add_serve, serve),
    "score": {
        "coco": Command("score a file of captions as the official COCO evaluation does", add_scored(score_coco), run_scored(score_coco)),
        "vqa": Command("score a file of answers with the VQA accuracy", add_scored(score_vqa), run_scored(score_vqa)),
    },
    "compare": {
        "runs": Command("compare run folders, with a report (also without the word: `compare RUN_A RUN_B ...`)", add_compared_runs, run_compared_runs),
        "coco": Command("compare two files of captions", add_scored(compare_coco), run_compared(compare_coco)),
        "vqa": Command("compare two files of answers", add_scored(compare_vqa), run_compared(compare_vqa)),
    },
    "runs": Command("list the runs in a folder and below it", _add_runs, lambda values, plain: listed_runs(folder=values.folder)),
    "export": {
        "folded": _function("write the language model with a text-only AdaLink in its embedding table", export_folded),
        "merged": _function("write the language model with a LoRA for all tokens in its weights", export_merged),
        "embeds": _function("write prompts as embeddings, for an engine that serves the frozen model", export_embeds),
    },
    "bench": _function("how fast this machine trains and answers beside the peers: ratios with their spread, and the targets", bench),
    "shards": {
        "coco": _function("write webdataset shards from COCO captions", shards_coco),
        "vqa": _function("write webdataset shards from VQAv2 questions and annotations", shards_vqa),
        "folder": _function("write webdataset shards from a folder of pictures with captions beside them", shards_folder),
        "img2dataset": _function("write the manifest of shards that img2dataset made", shards_img2dataset),
        "check": _function("verify shards against their manifest, and name what is wrong", shards_check),
    },
}

# Group -> which of its commands is meant where none of them is named: `adalink compare RUN_A RUN_B`.
UNNAMED = {"compare": "runs"}

_DRY_TRAIN = Command("check a run without its weights", _add_dry_train, dry_run_command, has_config=True, prepare=only_named_data)


def commands_for(arguments: Sequence[str]) -> Mapping[str, Command | Mapping[str, Command]]:
    """The commands; `train` with looser settings where --dry_run is among the arguments, since data then need not be given."""
    return {**COMMANDS, "train": _DRY_TRAIN} if "--dry_run" in arguments else COMMANDS

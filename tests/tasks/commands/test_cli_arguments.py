"""What is wrong with the arguments or the config file is one sentence: the whole setting, what was found, what was expected."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_run import RECIPES, SMALL, adalink, refused, train

from tasks.commands.parser import one_sentence, parsed, worker_sentence
from tasks.runs.config import setting_names

RECIPE = yaml.safe_load(RECIPES["captioning"].read_text())
LISTS = "; `adalink train --help` lists what there is"


def put(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *groups, last = name.split(".")
        for group in groups:
            content = content[group]
        content[last] = value

    return change


def run_yaml(folder: Path, content: object) -> str:
    config = folder / "run.yaml"
    config.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    sentence = refused(adalink("train", "--config", config, "--out", folder / "run"))
    assert not (folder / "run").exists()
    return sentence


def changed(folder: Path, name: str, value: object) -> str:
    content = copy.deepcopy(RECIPE)
    put(name, value)(content)
    return run_yaml(folder, content)


UNKNOWN = {
    "tasks": "there is no setting tasks: the nearest is task",
    "foo": "there is no setting foo: there are task, model, encoder, language_model, image_tokens, base,",
    "batch_size": "there is no setting batch_size: it is train.batch_size",
    "train.learing_rate": "there is no setting train.learing_rate: the nearest is train.learning_rate",
    "train.foo": "there is no setting train.foo: under train there are epochs, steps, batch_size,",
    "data.foo": "there is no setting data.foo: under data there are val, train",
    "data.train.scene": "there is no setting data.train.scene: the nearest is data.train.scenes",
    "methods.xyz": "there is no setting methods.xyz: under methods there are adalink,",
    "methods.adalink.rnak": "there is no setting methods.adalink.rnak: the nearest is methods.adalink.rank",
    "captioning.name": "there is no setting captioning.name: under captioning there are template, captions_per_image, style",
    "captioning.template.foo": "there is no setting captioning.template.foo: under captioning.template there are prompt, target",
    "generation.temperature": "there is no setting generation.temperature: under generation there are max_new_tokens, num_beams, length_penalty",
}


@pytest.mark.parametrize("given", ["class_path", "name", "arguments"])
def test_no_setting_imports_anything_by_its_name(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Method: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = copy.deepcopy(RECIPE)
    inner = {"class_path": "somebodys.Method", "init_args": {}}
    content["methods"]["gated"] = {"inner": inner if given == "class_path" else "somebodys.Method"}
    stated = "methods.gated.inner names the class somebodys.Method, and a setting imports nothing: give a method of the package, such as adalink.LoRA"
    if given == "arguments":
        assert refused(train("captioning", tmp_path / "run", "--methods.gated.inner.class_path", "somebodys.Method")).startswith(stated)
    else:
        assert run_yaml(tmp_path, content).startswith(stated)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("path", "given"), [("adalink.Bottleneck", {"width": 4}), ("adalink.methods.prompt.Prompt", {"length": 2})], ids=["now", "of 0.1"])
def test_a_method_of_the_package_is_given_by_its_class(path: str, given: dict[str, int], tmp_path: Path) -> None:
    content = copy.deepcopy(RECIPE)
    content["methods"]["gated"] = {"inner": {"class_path": path, "init_args": given}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    done = adalink("train", "--config", tmp_path / "run.yaml", "--out", tmp_path / "run", "--dry_run")
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_setting_in_the_yaml_file_is_named_with_its_neighbours(name: str, tmp_path: Path) -> None:
    content = copy.deepcopy(RECIPE)
    content["captioning"]["template"] = {"prompt": "<image>"}
    put(name, {"rank": 1} if name == "methods.xyz" else 1)(content)
    sentence = run_yaml(tmp_path, content)
    assert sentence.startswith(UNKNOWN[name])
    assert sentence.endswith(LISTS)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_setting_on_the_command_line_is_named_likewise(name: str, tmp_path: Path) -> None:
    assert refused(train("captioning", tmp_path / "run", f"--{name}", "1")).startswith(UNKNOWN[name])
    assert refused(train("captioning", tmp_path / "run", f"--{name}=1")).startswith(UNKNOWN[name])
    assert not (tmp_path / "run").exists()


TYPES = [
    ("train.batch_size", "many", "train.batch_size is many: expected a whole number"),
    ("train.batch_size", 1.5, "train.batch_size is 1.5: expected a whole number"),
    ("train.batch_size", True, "train.batch_size is True: expected a whole number"),
    ("train.learning_rate", "fast", "train.learning_rate is fast: expected a number"),
    ("train.learning_rate", "nan", "train.learning_rate is nan: expected a number"),
    ("train.learning_rates", 0.1, "train.learning_rates is 0.1: expected names with values"),
    ("train.precision", "fp8", "train.precision is fp8: expected one of 'no', 'bf16', 'fp16'"),
    ("train.trackers", ["mlflow"], "train.trackers is mlflow: expected one of 'tensorboard', 'wandb'"),
    ("methods.adalink.rank", "big", "methods.adalink.rank is big: expected a whole number"),
    ("methods.adalink.modalities", ["sound"], "methods.adalink.modalities is sound: expected one of 'text', 'image'"),
    ("methods.adalink.modalities", "image", "methods.adalink.modalities is image: expected a list"),
    ("methods.bridge.kind", "conv", "methods.bridge.kind is conv: expected one of 'linear', 'mlp'"),
    ("methods.adalink", True, "methods.adalink is True: expected settings by name under it, such as --methods.adalink.NAME VALUE"),
    ("data.train.scenes", 5, "data.train.scenes is 5: expected a text"),
    ("task", "poetry", "task is poetry: expected one of 'captioning', 'vqa'"),
    ("train", None, "train is None: expected settings by name under it, or leave it out"),
    ("data", None, "data is None: expected settings by name under it"),
    ("methods", ["bridge"], "methods is ['bridge']: expected settings by name under it"),
]


@pytest.mark.parametrize(("name", "value", "expected"), TYPES, ids=[f"{name}={value}" for name, value, _ in TYPES])
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(name: str, value: object, expected: str, tmp_path: Path) -> None:
    assert changed(tmp_path, name, value).startswith(expected)


VALUES = [
    ("train.batch_size", 0, "train.batch_size is 0: give 1 or more"),
    ("train.learning_rate", -1.0, "train.learning_rate is -1.0"),
    ("train.epochs", 0, "train.epochs is 0.0 and train.steps 0"),
    ("train.warmup", 1.0, "train.warmup is 1.0"),
    ("train.bad_samples", -1, "train.bad_samples is -1: give 0 or more"),
    ("methods.adalink.rank", 0, "AdaLink's rank is 0: give 1 or more"),
    ("methods.adalink.modalities", [], "AdaLink's modalities are []"),
    ("methods.adalink.modalities", ["text", "text"], "AdaLink's modalities are ['text', 'text']"),
    ("methods.bridge.hidden", -1, "the bridge's hidden width is -1"),
    ("methods.prompt", {"length": 0, "init_std": 0.1}, "the prompt's length is 0"),
    ("methods", {}, "the config names no method: under `methods:`, give one or more of adalink, adalora, bitfit, "),
    ("captioning.template", {"prompt": "an image of"}, "the prompt template 'an image of' has 0 places for the image"),
    ("captioning.template", {"prompt": "<image>", "target": "x"}, "the target template 'x' must hold {text}"),
    ("captioning.captions_per_image", -1, "captions_per_image is -1"),
    ("generation.max_new_tokens", 0, "max_new_tokens is 0 and num_beams 1"),
    ("data.train", {"scenes": "train/3", "shards": "x"}, "a data set needs one of path, images, shards, mix, glue, table, disk and scenes, got shards, scenes"),
    ("data.train", {"scenes": "train/3", "annotations": "x"}, "annotations would not be read: scenes holds its own texts"),
    ("data.train", {"scenes": "train/3", "limit": -1}, "the data set's limit is -1"),
    ("data.train", {"images": "x"}, "the images in x come without texts: give annotations"),
    ("data.train", None, "training needs `out`, the run folder, and `data.train`"),
]


@pytest.mark.parametrize(("name", "value", "expected"), VALUES, ids=[f"{name}={value}" for name, value, _ in VALUES])
def test_a_value_that_its_dataclass_refuses_is_one_sentence(name: str, value: object, expected: str, tmp_path: Path) -> None:
    assert expected in changed(tmp_path, name, value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"encoder": None}, "encoder is not given: name both frozen parts, such as --encoder scenes:encoder and --language_model scenes:language, or give"),
        ({"encoder": None, "language_model": None}, "encoder and language_model are not given: name both frozen parts,"),
        ({"model": "x"}, "model and encoder and language_model were given: a run is of a model that sees already (`model`), or of a composed one"),
        ({"model": "x", "encoder": None, "language_model": None, "layer": -2}, "layer was given with model: a model that sees already has its own features"),
    ],
)
def test_a_run_names_its_frozen_parts_in_one_of_two_forms(change: dict[str, object], expected: str, tmp_path: Path) -> None:
    assert run_yaml(tmp_path, {**copy.deepcopy(RECIPE), **change}).startswith(expected)


@pytest.mark.parametrize("name", ["methods.adalink.rank", "methods.bridge.kind"])
def test_a_setting_without_a_default_must_be_given(name: str, tmp_path: Path) -> None:
    content = copy.deepcopy(RECIPE)
    *groups, last = name.split(".")
    group = content
    for part in groups:
        group = group[part]
    del group[last]
    assert run_yaml(tmp_path, content) == f"{name} is not given, and has no default{LISTS}"


FILES = {
    "task: [captioning\nencoder: x": "is not YAML: expected ',' or ']', but got ':' at line 2, column 8",
    "task:\n\tx: 1": r"is not YAML: found character '\t' that cannot start any token at line 2, column 1",
    "- a\n- b": "holds a list: expected names with values, such as `task: captioning`",
    "hello": "holds one value: expected names with values",
    "": "holds nothing: expected names with values",
    "task: vqa\ntrain: {seed: 1}\ntask: captioning\n": "gives 'task' a second time at line 3: keep one of them",
    "train:\n  seed: 1\n  steps: 2\n  seed: 3\n": "gives 'seed' a second time at line 4",
    "methods: [{a: 1, a: 2}]": "gives 'a' a second time at line 1",
    "task: !!python/object/apply:os.system ['ls']": "is not YAML: could not determine a constructor for the tag",
    "a: \x01": "is not YAML: unacceptable character #x0001: special characters are not allowed",
    "[" * 5000: "is not YAML: ",
}


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_a_config_file_that_is_no_yaml_of_names_is_one_sentence(text: str, tmp_path: Path) -> None:
    sentence = run_yaml(tmp_path, text)
    assert sentence.startswith(f"the config {tmp_path / 'run.yaml'} {FILES[text]}")


def test_a_config_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    assert refused(adalink("train", "--config", tmp_path / "no.yaml")) == f"the config {tmp_path / 'no.yaml'} does not exist: check the path"
    assert refused(adalink("train", "--config", tmp_path)) == f"the config {tmp_path} cannot be read (Is a directory): give a YAML file"
    (tmp_path / "utf16.yaml").write_bytes("task: vqa".encode("utf-16"))
    assert "is not text in UTF-8 (invalid start byte at byte 0)" in refused(adalink("train", "--config", tmp_path / "utf16.yaml"))


COMMANDS = [
    (["trian"], "there is no command 'trian': give one of 'demo', 'train',", "adalink"),
    (["train"], "task is not given, and has no default", "adalink train"),
    (["train", "--config"], "--config stands without a value", "adalink train"),
    (["train", "--train.seed"], "--train.seed stands without a value", "adalink train"),
    (["train", "--train", "x"], "train is x: expected settings by name under it, such as --train.NAME VALUE", "adalink train"),
    (["train", "--train", "x"], "train is x: expected settings by name under it", "adalink train"),
    (["train", "--config", RECIPES["vqa"], "extra"], "extra stands where nothing more is expected", "adalink train"),
    (["train", "--resume", "yes"], "yes stands where nothing more is expected", "adalink train"),
    (["evaluate", "--config", RECIPES["vqa"]], "adapter is not given, and has no default", "adalink evaluate"),
    (["caption", "--adapter", "x"], "images is not given, and has no default", "adalink caption"),
    (["ask", "--adapter", "x", "a.png"], "question is not given, and has no default", "adalink ask"),
    (["ask", "--adaptor", "x", "a.png", "is it?"], "there is no setting adaptor", "adalink ask"),
    (["demo", "--foo"], "there is no setting foo;", "adalink demo"),
]


@pytest.mark.parametrize(("arguments", "expected", "where"), COMMANDS, ids=range(len(COMMANDS)))
def test_each_command_says_what_it_lacks_and_where_its_help_is(arguments: list[object], expected: str, where: str) -> None:
    sentence = refused(adalink(*arguments))
    assert sentence.startswith(expected)
    assert sentence.endswith(f"; `{where} --help` lists what there is")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["evaluate", "--help"], ["caption", "--help"], ["ask", "--help"], ["demo", "--help"]])
def test_help_is_there_on_every_level(arguments: list[str]) -> None:
    done = adalink(*arguments)
    assert done.code == 0
    assert done.out.startswith("usage: adalink")
    assert not done.err


def test_what_stands_on_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    sentence = refused(train("captioning", tmp_path / "taken", "--train.batch_size", "0", "--train.batch_size", "2"))
    assert sentence == f"the run folder {tmp_path / 'taken'} is there already: give another `out`, or --resume to go on with it"


def test_a_run_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refused(train("captioning", tmp_path / "file")).startswith(f"the run folder {tmp_path / 'file'} is there already")
    assert refused(train("captioning", tmp_path / "file" / "run")) == f"the run folder {tmp_path / 'file' / 'run'} cannot be made: Not a directory"
    assert (tmp_path / "file").read_bytes() == b""


def test_setting_names_are_those_that_the_parser_takes() -> None:
    names = setting_names()
    assert {"task", "data.train.scenes", "train.batch_size", "methods.adalink.rank", "captioning.template.prompt"} <= set(names)
    assert not [name for name in names if name.endswith((".name", ".headline"))]  # class variables of the tasks


def test_a_message_that_no_pattern_knows_is_put_on_one_line() -> None:
    assert one_sentence("first\n  second") == "first second"


def test_an_error_of_a_worker_process_is_told_without_its_traceback() -> None:
    passed_on = 'Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "x"\nadalink.errors.DataError: a: b is bad\n'
    assert worker_sentence(passed_on) == "a: b is bad"
    assert worker_sentence("a: b is bad") == "a: b is bad"


def test_refusals_of_these_tests_can_be_told_from_success(tmp_path: Path) -> None:
    done = adalink("--version")
    assert done.code == 0
    assert re.fullmatch(r"adalink \d+\.\d+\.\d+\n", done.out)
    with pytest.raises(AssertionError):
        refused(done)
    assert SMALL


def test_a_setting_of_before_has_its_old_name_for_one_version(capsys: pytest.CaptureFixture[str]) -> None:
    _, values, _ = parsed(["serve", "--adapter", "one=runs/adapter", "--limits.cached-pictures=7"])
    assert values.limits.cached_images == 7
    assert capsys.readouterr().err == "adalink: --limits.cached_pictures is now --limits.cached_images; the old name goes with the next version\n"


def test_a_data_set_may_be_a_path_alone(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("task: captioning\nencoder: scenes:encoder\nlanguage_model: scenes:language\ndata:\n  val: in_a_file.csv\n")
    _, plain, _ = parsed(["train", "--config", str(tmp_path / "c.yaml"), "--data.train", "t.jsonl", "--data.train.images=i"])
    assert (plain.data.train.path, plain.data.train.images, plain.data.val.path) == ("t.jsonl", Path("i"), "in_a_file.csv")
    _, plain, _ = parsed(["train", "--config", str(tmp_path / "c.yaml"), "--data.val", "{scenes: val/2}", "--data.val.path", "null"])
    assert (plain.data.val.path, plain.data.val.scenes) == (None, "val/2")

"""The model plug-in of the lmms_eval suite: found by it, made by it, and run on requests of its kind; skipped where it is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest
from shared import ROOT

from adalink.errors import ConfigError, DataError

HAS_SUITE = importlib.util.find_spec("lmms_eval") is not None
needs_suite = pytest.mark.skipif(not HAS_SUITE, reason="lmms_eval is not installed")


def test_the_entry_point_names_something_that_is_there() -> None:
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]["adalink"]
    module, _, name = entry.partition(":")
    assert f"def {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


@pytest.mark.skipif(HAS_SUITE, reason="lmms_eval is installed")
def test_without_the_suite_the_error_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"the lmms_eval suite is not installed .*: pip install 'adalink\[lmms_eval\]'"):
        importlib.import_module("tasks.commands.lmms_eval")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cli_run import SMALL, train

    out = tmp_path_factory.mktemp("runs") / "vqa"
    assert train("vqa", out, small=SMALL).code == 0
    return out / "adapter"


@pytest.fixture(scope="module")
def model(adapter: Path) -> Any:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from tasks.commands.lmms_eval import manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    return registry.get_model_class("adalink").create_from_arg_string(f"adapter={adapter},question=first_line", {"batch_size": 2, "device": "cpu"})


def requests(model: Any, contexts: list[str], **settings: Any) -> list[Any]:
    """As the suite makes them: the context, how to generate, and where the image is found."""
    from lmms_eval.api.instance import Instance

    from multimodal.data.images.decode import decode_image
    from tasks.scenes.dataset import Scenes

    source = Scenes(split="val", size=len(contexts))
    model.task_dict = {"tiny": {"test": [{"image": decode_image(source[i].image)} for i in range(len(contexts))]}}
    rows = []
    for number, context in enumerate(contexts):
        arguments = (context, dict(settings), lambda document: [document["image"]], number, "tiny", "test")
        metadata = {"task": "tiny", "doc_id": number, "repeats": 1}
        rows.append(Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata))
    return rows


@needs_suite
def test_a_tiny_task_is_answered_in_order_as_the_model_answers_by_itself(model: Any) -> None:
    from multimodal.generation.generate import GenerationSettings

    asked = ["what color is the circle?", "how many shapes?", "is it red?"]
    made = requests(model, [f"{question}\nAnswer the question using a single word or phrase." for question in asked], max_new_tokens=4)
    images = [document["image"] for document in model.task_dict["tiny"]["test"]]
    direct = model._model.generate(images, asked, settings=GenerationSettings(max_new_tokens=4))
    found = model.generate_until(made)
    assert found == [text.strip() for text in direct]
    longer = requests(model, asked, max_new_tokens=8)
    longer[1].arguments[1]["max_new_tokens"] = 2  # requests of other settings are not mixed up
    assert model.generate_until(longer)[1] == model.generate_until(longer[1:2])[0]


@needs_suite
def test_texts_stop_where_the_task_says(model: Any) -> None:
    from tasks.commands.lmms_eval import _until

    assert _until("a dog. a cat", {"until": ["."]}) == "a dog"
    assert _until("a dog\n\nx", {"until": "\n\n"}) == "a dog"
    assert _until(" a ", {}) == "a"


@needs_suite
def test_what_is_not_offered_is_one_sentence(model: Any, adapter: Path) -> None:
    from tasks.commands.lmms_eval import LmmsEvalModel

    with pytest.raises(ConfigError, match="choose tasks whose output type is generate_until"):
        model.loglikelihood([])
    with pytest.raises(ConfigError, match="choose tasks of one round"):
        model.generate_until_multi_round([])
    (request,) = requests(model, ["?"])
    request.arguments = (*request.arguments[:2], lambda document: [], *request.arguments[3:])
    with pytest.raises(DataError, match="document 0 of tiny has 0 visuals; expected one image"):
        model.generate_until([request])
    with pytest.raises(ConfigError, match="question is 'last': give whole or first_line"):
        LmmsEvalModel(str(adapter), question="last")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_size is 'auto': give a number from 1"):
        LmmsEvalModel(str(adapter), batch_size="auto")

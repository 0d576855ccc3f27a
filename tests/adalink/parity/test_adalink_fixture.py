"""AdaLink against reference computations: every file of fixtures/adalink, and cases of images and text made here, in float64, to 1e-10."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import adalink_made
import pytest
import torch
from adalink_case import Case, runs_in
from double import arithmetic
from shared import covering, fixtures, fixtures_root
from torch import Tensor

from adalink import Adapter, attach

EXACT = 1e-10
FILES = {path.stem: path for path in sorted((fixtures_root() / "adalink").glob("*.safetensors"))}
NAMES = [*FILES, *adalink_made.SETTINGS]
ON_ALL = pytest.mark.parametrize("name", NAMES)


@cache
def case(name: str) -> Case:
    return Case.read(FILES[name]) if name in FILES else adalink_made.made(**adalink_made.SETTINGS[name])


def results_of(name: str) -> Iterable[str]:
    """The names of a case's results; one that is made here is made when a test of it runs."""
    return case(name).tensors if name in FILES else adalink_made.result_names(**adalink_made.SETTINGS[name])


def run(c: Case, model: Any, row: Tensor, *adapters: Adapter) -> tuple[Tensor, Tensor]:
    """(edited embeddings, logits): by ids where a bridge projects the images, else by embeddings in which they are."""
    given = {"input_ids": c.whole("input_ids", 0)} if c.images is None or (c.is_bridged and bool((row >= 0).all())) else {"inputs_embeds": c.embeddings(model)}
    attachment = attach(model, *adapters)
    seen: list[Tensor | None] = []
    stack = attachment.stack
    handles = [
        stack.get_submodule(attachment.anatomy.embedding).register_forward_hook(lambda module, args, out: seen.append(out)),
        stack.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs.get("inputs_embeds")), with_kwargs=True),
    ]
    with attachment.bind(c.token_map(row)):
        logits = model(**given, **c.inputs(model)).logits
    for handle in handles:
        handle.remove()
    attachment.detach()
    return next(value for value in seen if value is not None), logits


def computed_in(c: Case) -> Any:
    variant, scope = c.runs()[0]

    def difference() -> Tensor:
        model = c.model()
        adapter = c.adapter(model, c.tasks()[0], variant, scope, c.trained(variant, scope))
        return real(c, run(c, model, zeros(c), adapter)[1] - c.tensors[f"{variant}.{scope}.logits"])

    c.fit(difference)
    return arithmetic(difference)


RUNS = [(name, ".".join(what)) for name in NAMES for what in runs_in(results_of(name))]
SAMPLE = [*((name, what) for name, what in RUNS if name in FILES), *covering((run for run in RUNS if run[0] not in FILES), each=3)]


@pytest.mark.parametrize(("name", "what"), SAMPLE)
def test_embeddings_logits_loss_and_gradients_equal_the_reference(name: str, what: str) -> None:
    c, (variant, scope) = case(name), what.split(".")
    with computed_in(c)():
        model = c.model()
        adapter = c.adapter(model, c.tasks()[0], variant, scope, c.trained(variant, scope))
        embedded, logits = run(c, model, zeros(c), adapter)
        loss = c.loss(logits)
        loss.backward()
    expected = c.under(f"{variant}.{scope}.")
    is_real = c.whole("attention_mask", 1).bool()
    close(embedded[is_real], expected["inputs_embeds"][is_real])
    close(real(c, logits), real(c, expected["logits"]))
    close(loss, expected["loss"].squeeze())
    gradients = {own: value for key, value in expected.items() if key.startswith("grad.") and (own := c.own(key.removeprefix("grad.")))}
    parameters = dict(adapter.named_parameters())
    assert {own for own in parameters if own.startswith("adalink")} <= set(gradients)
    for own, gradient in gradients.items():
        if own in parameters:
            close(parameters[own].grad, gradient)
        else:
            assert own.startswith("bridge")
            assert not c.is_bridged


@pytest.mark.parametrize(("name", "variant"), [(name, key.split(".")[0]) for name in NAMES for key in results_of(name) if key.endswith(".lookup_table")])
def test_the_lookup_table_equals_the_module(name: str, variant: str) -> None:
    c = case(name)
    model: Any = c.model()
    adapter = c.adapter(model, c.tasks()[0], variant, "all", ("text",))
    edit: Any = adapter.get_submodule("adalink_text.text")
    close(edit.lookup_table(model.get_input_embeddings().weight), c.tensors[f"{variant}.lookup_table"])


@pytest.mark.parametrize(("name", "variant"), [(name, key.split(".")[0]) for name in NAMES for key in results_of(name) if key.endswith("mixed_tasks.logits")])
def test_mixed_tasks_in_one_batch_equal_the_reference(name: str, variant: str) -> None:
    c = case(name)
    modalities = c.trained(variant, "all")
    with computed_in(c)(), torch.no_grad():
        model = c.model()
        adapters = [c.adapter(model, task, variant, "all", modalities) for task in c.tasks()]
        logits = run(c, model, c.tensors["in.task_ids"], *adapters)[1]
    close(real(c, logits), real(c, c.tensors[f"{variant}.mixed_tasks.logits"]))


@pytest.mark.parametrize("name", [name for name in NAMES if "out.base.logits" in results_of(name)])
def test_without_a_row_of_its_own_the_model_is_the_frozen_one(name: str) -> None:
    c = case(name)
    with computed_in(c)(), torch.no_grad():
        model = c.model()
        adapter = c.adapter(model, c.tasks()[0], *c.runs()[0], c.trained(*c.runs()[0]))
        close(run(c, model, zeros(c) - 1, adapter)[1], c.tensors["out.base.logits"])


@pytest.mark.parametrize("name", adalink_made.SETTINGS)
def test_a_case_that_is_made_has_the_results_that_its_parameters_name(name: str) -> None:
    names = case(name).tensors
    assert set(results_of(name)) == {key for key in names if key.endswith((".loss", ".lookup_table", "mixed_tasks.logits")) or key == "out.base.logits"}


def test_pictures_are_not_taken_for_embeddings_of_the_text_and_frequencies_not_for_exact_ones() -> None:
    """The control: what the files say otherwise matters."""
    c = case("made_opt_pictures_and_embeddings_of_the_models_width")
    assert c.images is c.tensors["in.image_features"]
    assert c.images.shape[2] == c.tensors["in.embeds"].shape[2]
    exact, rounded, stored = (case(f"made_llama_text{which}").tensors["out.base.logits"] for which in ("", "_rounded_frequencies", "_stored_frequencies"))
    assert (rounded - exact).abs().max() > 1e-9
    assert (stored - exact).abs().max() > 1e-4


def test_a_picture_edited_as_text_is_seen() -> None:
    """The control: what is compared can differ."""
    c = case("made_gpt2_pictures_before")
    model = c.model()
    adapter = c.adapter(model, "", "linear", "all", ("image", "text"))
    expected = c.tensors["linear.all.logits"]
    close(run(c, model, zeros(c), adapter)[1], expected)
    with torch.no_grad():
        adapter.get_parameter("adalink_image.image.up.weight").copy_(adapter.get_parameter("adalink_text.text.up.weight"))
    assert (run(c, model, zeros(c), adapter)[1] - expected).abs().max() > 1e-3


def test_the_files_are_found() -> None:
    """Skips, saying so, where they are absent; the cases that are made here run everywhere."""
    assert sorted(fixtures("adalink").glob("*.safetensors")) == list(FILES.values()) != []


def zeros(c: Case) -> Tensor:
    return torch.zeros(len(c.tensors["in.input_ids"]), dtype=torch.int64)


def real(c: Case, logits: Tensor) -> Tensor:
    """Without padding; a decoder that reads an encoder has none."""
    mask = c.whole("attention_mask", 1).bool()
    return logits[mask] if logits.shape[:2] == mask.shape else logits


def close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=EXACT)


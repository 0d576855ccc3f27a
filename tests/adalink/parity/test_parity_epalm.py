"""eP-ALM against the authors' code: every file of fixtures/epalm, in float64, to 1e-10; and against a computation of our own on other settings.

What is computed is read off each .json: window, taps, connectors, prompt, sizes of the language model.
"""

from __future__ import annotations

from functools import cache

import epalm_made
import pytest
import torch
from beams_424 import search
from epalm_case import Case
from shared import fixtures, fixtures_root
from torch import Tensor

from adalink import Attachment, attach
from multimodal.batches.collate import Batch
from multimodal.language import Language
from multimodal.model import VisionLanguageModel
from multimodal.template import Template

EXACT = 1e-10
FILES = {path.stem: path for path in sorted((fixtures_root() / "epalm").glob("*.json"))}
NAMES = [*FILES, *epalm_made.SETTINGS]
ON_ALL = pytest.mark.parametrize("name", NAMES)


@cache
def case(name: str) -> Case:
    return Case.read(FILES[name]) if name in FILES else epalm_made.made(**epalm_made.SETTINGS[name])


class Running:
    """A case with its model and adapter attached."""

    def __init__(self, name: str) -> None:
        self.case = case(name)
        self.model = self.case.model()
        self.adapter = self.case.adapter(self.model)
        self.attachment: Attachment = attach(self.model, self.adapter)
        self.taps = self.case.taps()

    def logits(self, ids: Tensor, mask: Tensor, rows: list[int] | None = None) -> Tensor:
        """[B, S + T, V]: of ids without their slots; beams multiply the rows."""
        ids, mask, domain = self.case.with_slots(ids, mask)
        taps = self.taps if rows is None else self.taps[rows]
        with self.attachment.bind(self.case.token_map(domain, taps.repeat_interleave(len(ids) // len(taps), 0))):
            result: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return result

    def losses(self, logits: Tensor) -> Tensor:
        """float64 [B]: shifted cross entropy over the text, summed over each row."""
        labels = self.case.tensors["in.labels"][:, 1:]
        logits = logits[:, self.case.n_slots : -1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)

    def prompts(self, rows: list[int], key: str) -> tuple[Tensor, Tensor]:
        """ids and mask of the prompts; a row asked alone has no padding."""
        ids, mask = self.case.tensors["gen.prompt_ids"][rows], self.case.tensors["gen.prompt_attention_mask"][rows]
        length = int(mask.sum(1).max()) if "single" in key else ids.shape[1]
        return ids[:, :length], mask[:, :length]


@ON_ALL
def test_logits_loss_and_every_gradient_equal_the_authors(name: str) -> None:
    r = Running(name)
    logits = r.logits(r.case.tensors["in.input_ids"], r.case.tensors["in.attention_mask"])
    close(logits, r.case.tensors["out.logits"])
    losses = r.losses(logits)
    close(losses, r.case.tensors["out.loss_per_sample"])
    loss = losses.mean() * r.case.spec["lm_loss_weight"]
    close(loss.reshape(1), r.case.tensors["out.loss_total"].reshape(1))
    loss.backward()
    expected, roles = r.case.under("grad."), r.case.roles()
    assert {official for official, gradient in expected.items() if gradient.any()} <= set(roles)
    parameters = dict(r.adapter.named_parameters())
    for official, ours in roles.items():
        gradient = parameters[ours].grad
        assert gradient is not None
        close(gradient, expected[official])
        assert gradient.any() or not expected[official].any()


@ON_ALL
def test_every_layer_reads_what_it_reads_in_the_authors_code(name: str) -> None:
    r = Running(name)
    start = r.case.window[0]
    read: dict[int, Tensor] = {}
    masks: dict[int, Tensor] = {}

    def watch(number: int, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        read[number], masks[number] = args[0], kwargs["attention_mask"]

    for number, layer in enumerate(r.model.model.decoder.layers):
        layer.register_forward_pre_hook(lambda module, args, kwargs, number=number: watch(number, args, kwargs), with_kwargs=True)
    with torch.no_grad():
        r.logits(r.case.tensors["in.input_ids"], r.case.tensors["in.attention_mask"])
    for number, value in read.items():
        if f"mid.layer_in.{number}" in r.case.tensors:
            close(value[:, 1:] if number < start else value, r.case.tensors[f"mid.layer_in.{number}"])
    last = masks[max(masks)][:, 0]
    if "mid.mask_visible_post" in r.case.tensors:
        assert torch.equal(visible(last), r.case.tensors["mid.mask_visible_post"].bool())
    if "mid.mask_visible_pre" in r.case.tensors and start > 0:
        assert torch.equal(visible(masks[0][:, 0])[:, 1:, 1:], r.case.tensors["mid.mask_visible_pre"].bool())


def generations_of(name: str) -> list[tuple[str, list[int], int]]:
    """(key of the expected ids, rows, beams) of a case; one that is made here is made when a test of it runs."""
    if name in FILES:
        return case(name).generations()
    rows = list(range(epalm_made.SETTINGS[name].get("n_rows", 3)))
    return [(f"gen.{which}.{how}", asked, beams) for which, asked in (("batch", rows), ("single1", [1])) for how, beams in (("beam3", 3), ("greedy", 1))]


GENERATIONS = [(name, *what) for name in NAMES for what in generations_of(name)]


def generations(shift: int) -> pytest.MarkDecorator:
    """All of them, of which every second pair of beams and greedy is slow: one test takes those that the other leaves out."""
    marked = [pytest.param(*each, marks=() if (i // 2 + shift) % 2 == 0 else pytest.mark.slow) for i, each in enumerate(GENERATIONS)]
    return pytest.mark.parametrize(("name", "key", "rows", "beams"), marked)


@ON_ALL
def test_the_generations_of_a_case_are_those_of_its_parameters(name: str) -> None:
    assert case(name).generations() == generations_of(name)


@generations(0)
def test_generated_ids_equal_the_authors(name: str, key: str, rows: list[int], beams: int) -> None:
    r = Running(name)
    ids, mask = r.prompts(rows, key)
    settings = r.case.spec["generation"]

    def step(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return r.logits(ids, mask, rows)[:, -1]

    found, scores = search(
        step, ids, mask, beams=beams, max_length=settings["max_length"], end=r.case.spec["tokens"]["bos_eos"], pad=r.case.spec["tokens"]["pad"],
        penalty=settings["length_penalty"], stops_early=settings.get("early_stopping", False),
    )  # fmt: skip
    assert torch.equal(found, r.case.tensors[key])
    if beams > 1 and f"{key}.scores" in r.case.tensors:
        torch.testing.assert_close(scores, r.case.tensors[f"{key}.scores"].double(), rtol=0, atol=1e-5)  # theirs are kept in float32


@generations(1)
def test_transformers_generates_the_same_with_and_without_a_cache(name: str, key: str, rows: list[int], beams: int) -> None:
    r = Running(name)
    own_ids, own_mask = r.prompts(rows, key)
    ids, mask, domain = r.case.with_slots(own_ids, own_mask)
    tokens, settings = r.case.spec["tokens"], r.case.spec["generation"]

    def generated(use_cache: bool) -> Tensor:
        with r.attachment.bind(r.case.token_map(domain, r.taps[rows])):
            result: Tensor = r.model.generate(
                ids, attention_mask=mask, position_ids=mask.cumsum(1) - 1, max_length=settings["max_length"] + r.case.n_slots, num_beams=beams,
                do_sample=False, use_cache=use_cache, pad_token_id=tokens["pad"], eos_token_id=tokens["bos_eos"],
            )  # fmt: skip
        return result[:, r.case.n_slots :]

    uncached = generated(False)
    if r.case.is_exact_with_a_cache:
        assert torch.equal(generated(True), uncached)
    if beams == 1:  # several beams are weighed by other lengths since
        expected = r.case.tensors[key]
        length = max(expected.shape[1], uncached.shape[1])
        assert torch.equal(filled(uncached, length, tokens["pad"]), filled(expected, length, tokens["pad"]))


def test_the_files_are_told_apart_by_more_than_noise() -> None:
    """The control: a connector of other weights, or the causal mask, is far from the numbers that are expected."""
    r = Running("two_layers_after_it")
    r.attachment.detach()
    with torch.no_grad():
        r.adapter.get_parameter("epalm.tap0.project.weight").mul_(1.1)
    r.attachment = attach(r.model, r.adapter)
    changed = r.logits(r.case.tensors["in.input_ids"], r.case.tensors["in.attention_mask"])
    assert (changed - r.case.tensors["out.logits"]).abs().max() > 1e-3
    r.attachment.detach()
    r.attachment = attach(r.model, r.case.adapter(r.model, mask="causal"))
    causal = r.logits(r.case.tensors["in.input_ids"], r.case.tensors["in.attention_mask"])
    assert (causal - r.case.tensors["out.logits"])[:, r.case.n_slots :].abs().max() > 1e-3


@ON_ALL
def test_the_causal_mask_differs_only_where_the_slot_is_read_after_the_window(name: str) -> None:
    r = Running(name)
    r.attachment.detach()
    r.attachment = attach(r.model, r.case.adapter(r.model, mask="causal"))
    logits = r.logits(r.case.tensors["in.input_ids"], r.case.tensors["in.attention_mask"])
    text = r.case.tensors["in.attention_mask"].bool()
    difference = (logits - r.case.tensors["out.logits"])[:, r.case.n_slots :][text].abs().max()
    is_last_injected = r.case.window[1] == r.case.spec["opt"]["num_hidden_layers"]
    assert (difference < EXACT) == is_last_injected


@pytest.mark.parametrize("name", FILES)
def test_the_composed_model_has_the_authors_loss_on_their_pictures(name: str) -> None:
    """From pixels to the loss as training computes it, with explicit positions and pairs of source and target."""
    c = case(name)
    language = Language(model=c.model(), tokenizer=None, name=name)
    model = VisionLanguageModel(c.tower(), language, Template(prompt="<image>"))
    adapter = model.add_adapter("a", c.methods()).double()
    adapter.load_state_dict(c.adapter(language.model).state_dict())
    ids, mask, domain = c.with_slots(c.tensors["in.input_ids"], c.tensors["in.attention_mask"])
    labels = c.tensors["in.labels"]
    source = torch.arange(labels.shape[1] - 1).expand(len(ids), -1) + c.n_slots
    batch = Batch(
        ids=ids, domain=domain, source=source, target=labels[:, 1:], image=torch.arange(len(ids)), pixels=c.tensors["in.images"],
        position=torch.where(mask == 1, mask.cumsum(1) - 1, 0), n_targets=len(ids) / c.spec["lm_loss_weight"],
    )  # fmt: skip
    loss = model(batch)
    torch.testing.assert_close(loss.double(), c.tensors["out.loss_total"].squeeze(), rtol=1e-6, atol=0)  # the loss is float32
    loss.backward()
    for official, ours in c.roles().items():
        torch.testing.assert_close(adapter.get_parameter(ours).grad, c.tensors[f"grad.{official}"], rtol=0, atol=1e-5)


def visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def filled(ids: Tensor, length: int, pad: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=pad)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected.double(), rtol=0, atol=EXACT)


def test_the_authors_files_are_found() -> None:
    """Skips, saying so, where they are absent; the cases that are made here run everywhere."""
    assert sorted(fixtures("epalm").glob("*.safetensors")) == sorted(path.with_suffix(".safetensors") for path in FILES.values()) != []

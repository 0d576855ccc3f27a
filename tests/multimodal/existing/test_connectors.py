"""The connector of a model that sees already: a trained copy, or methods on its linears; what it learns is what the model itself would learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from existing_checks import MADE_WAYS, NEED_IMAGES, arranged, check_same, families, samples
from existing_families import images, made
from sharing import excite, in_double
from torch import Tensor, nn

from adalink import IA3, AdaLink, BitFit, LoRA, Method, Prompt, get_adalink_model
from adalink.attachment.existing import NO_LABEL
from adalink.errors import AdalinkError, ConfigError
from adalink.methods import METHODS
from multimodal.batches.collate import collate, stacked
from multimodal.batches.packing import fork_answers, fork_rows, pack_answers, pack_rows, separate_rows
from multimodal.batches.prepared import Prepared
from multimodal.batches.tokenize import Row
from multimodal.data.feature_cache.encode import encode_all
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.template import Template, Text

TEXTS = (Text("what color is it?", "red"), Text("what color is it?", "two of them"), Text("how many circles?", "no"))
TEMPLATE = Template(prompt="<image>{question}", target="{text}")
WORDS: Mapping[str, Method] = {"lora": LoRA(rank=2)}
CONNECTOR: Mapping[str, Method] = {"lora": LoRA(rank=2, alpha=3.0)}
NO_LINEAR = ("gemma3",)
ARRANGED = {"packs": {"texts": pack_rows, "answers": pack_answers}, "forks": {"texts": fork_rows, "answers": fork_answers}}


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


def seeing(name: str, kind: str = "") -> VisionLanguageModel:
    """A model with the adapter `own`, whose connector is trained or has methods; with neither, where kind is empty."""
    model = VisionLanguageModel.from_model(*made(name), template=TEMPLATE)
    if kind:
        add(model, "own", kind)
    return model.eval()


def add(model: VisionLanguageModel, name: str, kind: str) -> None:
    """An adapter whose weights are random."""
    chosen: dict[str, Any] = {"trained": {"connector": "trained"}, "methods": {"connector_methods": CONNECTOR}, "frozen": {}}[kind]
    model.add_adapter(name, WORDS, **chosen)
    trained = TrainedParts.of(model)
    for module in (trained.edits, trained.connector):
        if module is not None:
            excite(module.double())


def rows(model: VisionLanguageModel, name: str) -> tuple[list[Prepared], list[list[Row]]]:
    """Two images of unlike shapes, and where the family takes it a sample without one, with the rows of their texts."""
    prepared: list[Any] = [model.tower.preprocess(image) for image in images()[1:]]
    prepared += [] if name in (*NEED_IMAGES, "blip2") else [Prepared(wording=(), counts=())]
    encoder = model.row_encoder()
    return prepared, [[encoder.row(text, one) for text in TEXTS] for one in prepared]


def gradients(
    model: VisionLanguageModel, prepared: Sequence[Prepared], texts: Sequence[Sequence[Row]], arrange: Callable[[Sequence[Row]], Sequence[Row]]
) -> dict[str, Tensor]:
    """The loss, and every gradient by name."""
    each = arranged(texts, arrange)
    about = [i for i, one in enumerate(each) for _ in one]
    pad_id = model.language.tokenizer.pad_token_id
    loss = model(collate([row for one in each for row in one], about, stacked(prepared), kind="pixels", side="right", pad_id=pad_id))
    return {"loss": loss.detach(), **_gradients(loss, TrainedParts.of(model).parameters())}


def _gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


class ByHand(nn.Module):
    """W x + b + s B A x."""

    def __init__(self, linear: nn.Module, edit: Any) -> None:
        super().__init__()
        self.linear, self.scale = linear, 3.0 / 2
        self.down, self.up = (nn.Parameter(one.weight.detach().clone()) for one in (edit.down, edit.up))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * (x @ self.down.T @ self.up.T)  # type: ignore[no-any-return]


def by_the_model_itself(model: VisionLanguageModel, name: str, prepared: Sequence[Prepared], texts: Sequence[Sequence[Row]]) -> dict[str, Tensor]:
    """The same of the model's own call with each image, after its connector was changed by hand."""
    trained, (other, _) = TrainedParts.of(model), made(name)
    own = _changed(other, model, trained)
    adapted = get_adalink_model(other, WORDS).eval()
    edits = adapted.active_adapter()
    edits.load_state_dict({key: value for key, value in trained.edits.state_dict().items() if key in edits.state_dict()})
    for parameter in own.values():
        parameter.requires_grad_(True)
    total, n = torch.zeros(()), sum(len(row.target) for one in texts for row in one)
    for one, its_rows in zip(prepared, texts, strict=True):
        for row in its_rows:
            ids = torch.tensor([row.ids])
            form: Any = model.tower.form  # type: ignore[union-attr]
            kinds = {form.kind: torch.tensor([row.kind])} if form.kind else {}
            inputs = {key: value.double() if value.is_floating_point() else value for key, value in (one.inputs[0] if one.inputs else {}).items()}
            logits = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kinds, **inputs).logits[0]
            total = total + nn.functional.cross_entropy(logits[list(row.source)], torch.tensor(row.target), ignore_index=NO_LABEL, reduction="sum")
    return {"loss": total.detach() / n, **_gradients(total / n, {**dict(edits.named_parameters()), **own})}


def _changed(other: Any, model: VisionLanguageModel, trained: TrainedParts) -> dict[str, nn.Parameter]:
    """Write what was trained on the connector into another model; its parameters there, by the names that they have as trained ones."""
    found: dict[str, nn.Parameter] = {}
    for path, copy in trained.edits.copies.items():
        other.get_submodule(path).load_state_dict(copy.state_dict())
        found |= {f"modules_to_save.{path}.{key}": one for key, one in other.get_submodule(path).named_parameters()}
    for placement in () if trained.connector is None else trained.connector.placements:
        path = model.connectors.linears[placement.port.module]  # type: ignore[union-attr]
        parent, _, last = path.rpartition(".")
        by_hand = ByHand(other.get_submodule(path), placement.edit)
        other.get_submodule(parent).register_module(last, by_hand)
        found |= {f"connector.{placement.role}.down.weight": by_hand.down, f"connector.{placement.role}.up.weight": by_hand.up}
    return found


CASES = [(name, kind) for name in MADE_WAYS for kind in ("trained", "methods") if (name, kind) not in {(one, "methods") for one in NO_LINEAR}]


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*one, marks=() if one in (("qwen3_vl", "methods"), ("gemma3", "trained"), ("llava", "trained")) else pytest.mark.slow) for one in CASES],
)
def test_it_learns_what_the_model_itself_would_learn(name: str, kind: str) -> None:
    model = seeing(name, kind)
    prepared, texts = rows(model, name)
    wanted = by_the_model_itself(model, name, prepared, texts)
    connector = [key for key in wanted if key.startswith(("connector.", "modules_to_save."))]
    assert sum(bool(wanted[key].abs().max() > 0) for key in connector) > 0.6 * len(connector)
    packs, forks, _ = MADE_WAYS[name]
    ways = [separate_rows, *([ARRANGED["packs"][packs]] if packs else []), *([ARRANGED["forks"][forks]] if forks else [])]
    for arrange in ways:
        found = gradients(model, prepared, texts, arrange)
        check_same([found[key] for key in wanted], list(wanted.values()))
        assert found.keys() == wanted.keys()


@pytest.mark.parametrize("name", families(["qwen2_5_vl"]))
def test_rows_of_several_adapters_stand_beside_each_other(name: str) -> None:
    """And each reads the vectors of its own adapter's connector."""
    model = seeing(name)
    kinds = ["trained", "frozen", *([] if name in NO_LINEAR else ["methods"])]
    for kind in kinds:
        add(model, kind, kind)
    one = images()[1]
    every = [*kinds, "__base__"]
    alone = {adapter: model.generate(one, "what is it?", adapter_names=[adapter], max_new_tokens=4) for adapter in every}
    asked = [*every, every[0]]
    together = model.generate([one] * len(asked), ["what is it?"] * len(asked), adapter_names=asked, max_new_tokens=4)
    assert together == [alone[adapter][0] for adapter in asked]
    assert len({text for (text,) in alone.values()}) > 1
    two = every[:2]
    beams = model.generate([one] * 2, ["what is it?"] * 2, adapter_names=two, max_new_tokens=2, num_beams=2)
    assert beams == [model.generate(one, "what is it?", adapter_names=[adapter], max_new_tokens=2, num_beams=2)[0] for adapter in two]
    model.delete_adapter("trained")
    assert model.generate(one, "what is it?", adapter_names=["__base__"], max_new_tokens=4) == alone["__base__"]


@pytest.mark.parametrize("kind", ["trained", "methods"])
def test_it_is_saved_and_loaded_with_the_adapter(kind: str, tmp_path: Path) -> None:
    model = seeing("llava", kind)
    before = {name: value.clone() for name, value in model.language.model.state_dict().items()}
    wanted = model.generate(images(), ["what is it?"] * 3, max_new_tokens=4)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "connector").exists() == (kind == "methods")
    other = seeing("llava", "frozen")
    assert other.adapted.parts["language_model"].fingerprint == model.adapted.parts["language_model"].fingerprint
    untrained = other.generate(images(), ["what is it?"] * 3, max_new_tokens=4)
    other.load_adapter(tmp_path / "saved", "loaded")
    assert TrainedParts.of(other).counts() == TrainedParts.of(model).counts()
    other.double()
    assert other.generate(images(), ["what is it?"] * 3, max_new_tokens=4) == wanted != untrained
    other.set_adapter("own")
    assert other.generate(images(), ["what is it?"] * 3, max_new_tokens=4) == untrained
    model.delete_adapter("own")
    after = model.adapted.unload()
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for name, module in after.named_modules() if "projector" in name)


@pytest.mark.parametrize("methods", [{"ia3": IA3(attention=("linear_1",), feed_forward=("linear_2",))}, {"bitfit": BitFit()}])
def test_other_methods_act_on_its_linears(methods: Mapping[str, Method]) -> None:
    model = seeing("llava")
    model.add_adapter("own", WORDS, connector_methods=methods)
    prepared, texts = rows(model, "llava")
    frozen = gradients(seeing("llava", "frozen"), prepared, texts, separate_rows)
    edits = TrainedParts.of(model).connector
    assert edits is not None
    excite(edits.double())
    found = gradients(model, prepared, texts, pack_rows)
    assert abs(found["loss"] - frozen["loss"]) > 1e-6
    assert all(bool(value.abs().max() > 0) for name, value in found.items() if name.startswith("connector."))


def test_a_batch_of_texts_alone_gives_it_a_gradient_of_zero() -> None:
    """Processes that train together wait for every weight's."""
    model = seeing("llava", "methods")
    text = Prepared(wording=(), counts=())
    found = gradients(model, [text], [[model.row_encoder().row(TEXTS[0], text)]], separate_rows)
    assert not any(value.any() for name, value in found.items() if name.startswith("connector."))
    assert found["loss"] > 0


def test_what_changes_is_not_cached() -> None:
    model = seeing("llava", "frozen")
    cached = encode_all(model, samples(), dtype="float32")
    add(model, "other", "methods")
    with pytest.raises(ConfigError, match=r"has a connector of its own, so an image's features change with every step and cannot be cached"):
        encode_all(model, samples())
    (batch,) = model.batches(samples(), lambda sample, rng: TEXTS, batch_size=3, features=cached)
    with pytest.raises(ConfigError, match="the batch holds cached features, and the adapter other has a connector of its own: collate it with the images"):
        model(batch)
    model.set_adapter("own")
    model(batch)


def test_every_method_acts_on_its_linears_or_is_refused() -> None:
    model, taken = seeing("llava"), []
    for name, kind in METHODS.items():
        try:
            model.add_adapter(name, WORDS, connector_methods={name: kind()})
        except (AdalinkError, TypeError):  # TypeError: settings without defaults
            assert name not in model.adapter_names
        else:
            taken.append(name)
    assert sorted(taken) == ["adalora", "bitfit", "hira", "lora"]


def test_what_a_connector_cannot_have_is_refused() -> None:
    gemma, llava = seeing("gemma3"), seeing("llava")
    refused = {
        "has no linear for connector_methods to act on: give connector: trained": lambda: gemma.add_adapter("own", WORDS, connector_methods=CONNECTOR),
        r"connector is trained, and connector_methods \(lora\) would act on its frozen weights": lambda: llava.add_adapter(
            "own", WORDS, connector="trained", connector_methods=CONNECTOR
        ),
        "prompt adds tokens to a row": lambda: llava.add_adapter("own", WORDS, connector_methods={"prompt": Prompt(length=2)}),
        "acts on more than the connector's linears": lambda: llava.add_adapter(
            "own", WORDS, connector_methods={"adalink": AdaLink(rank=2, modalities=("image",))}
        ),
        "is for tokens of text": lambda: llava.add_adapter("own", WORDS, connector_methods={"lora": LoRA(rank=2, groups={"text": ("text",)})}),
        "connector is 'tuned': give frozen or trained": lambda: llava.add_adapter("own", WORDS, connector="tuned"),  # type: ignore[arg-type]
    }
    for sentence, asked in refused.items():
        with pytest.raises(ConfigError, match=sentence):
            asked()
    assert not llava.adapter_names
    assert not gemma.adapter_names

"""A compiled model learns the same, from few compilations, and only where it sees what is attached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from composed import Drawn, compose, excite, two_texts
from PIL import Image
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from adalink import AdaLink, Bridge, LoRA
from adalink.errors import AttachError, ConfigError
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import arrangement_of
from multimodal.model import VisionLanguageModel
from multimodal.template import Text
from multimodal.training.prepare import CompiledModel, compiled
from multimodal.training.settings import Stage, TrainSettings
from multimodal.training.train import train

METHODS = {
    "bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("text",)),
    "lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=2, targets=("query", "value")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(family: str) -> VisionLanguageModel:
    model = compose(family)
    excite(model.add_adapter("a", METHODS).double())
    return model


def batch_of(model: VisionLanguageModel, n_words: int, *, packed: bool) -> Batch:
    """Two images with two texts each, of `n_words` words and one more."""
    texts = [Text("is it red", " ".join(["red"] * (n_words + i))) for i in range(2)]
    rows = [model.row_encoder().row(text) for text in texts]
    rows = list(arrangement_of(model)[0](rows)) if packed else rows
    retained = torch.randn(2, model.tower.n_retained, model.tower.width, generator=torch.Generator().manual_seed(n_words), dtype=torch.float64)
    return collate([*rows, *rows], [0] * len(rows) + [1] * len(rows), retained, kind="patches", side="right", pad_id=0)


def gradients(model: VisionLanguageModel, batch: Batch) -> list[Tensor]:
    loss = model(batch)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.adapted.active_adapter().parameters()))]


@pytest.mark.parametrize(
    ("family", "packed", "backend"),
    [
        ("gpt2", True, "eager"),  # traced, and run as it was traced: a fifth of the time
        *(pytest.param(*case, "aot_eager", marks=pytest.mark.slow) for case in (("opt", False), ("opt", True), ("llama", True), ("t5", False))),
    ],
)
def test_loss_and_gradients_are_the_same_from_two_graphs_for_all_lengths(family: str, packed: bool, backend: str) -> None:
    model = model_of(family)
    batches = [batch_of(model, n, packed=packed) for n in (2, 5, 3)]
    expected = [gradients(model, batch) for batch in batches]
    counter = CompileCounterWithBackend(backend)
    model.language_loss.call = CompiledModel(model.adapted, backend=counter)
    for batch, before in zip(batches, expected, strict=True):
        for ours, theirs in zip(gradients(model, batch), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if family in ("llama", "t5") else 1e-10)
    assert counter.frame_count == 2  # one for the first length, one for any other


@pytest.mark.slow
def test_a_compiled_model_whose_trained_methods_change_has_their_gradients() -> None:
    """A second stage of a run names more methods than the first."""
    model = model_of("opt")
    batch = batch_of(model, 2, packed=True)
    expected = dict(zip(dict(model.adapted.active_adapter().named_parameters()), gradients(model, batch)[1:], strict=True))
    later = [one for name, one in model.adapted.active_adapter().named_parameters() if name.startswith("lora.")]
    model.language_loss.call = CompiledModel(model.adapted, backend=CompileCounterWithBackend("aot_eager"))
    for learns in (False, True):
        for one in later:
            one.requires_grad_(learns)
        model.zero_grad()
        model(batch).backward()
        found = {name: one.grad for name, one in model.adapted.active_adapter().named_parameters()}
        for name, gradient in found.items():
            if name.startswith("lora.") and not learns:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10)


def test_a_model_whose_adapters_changed_since_is_refused() -> None:
    model = model_of("opt")
    batch = batch_of(model, 2, packed=False)
    with compiled(model, "default"):
        model.add_adapter("b", METHODS)
        with pytest.raises(AttachError, match="adapters were added or taken away after the model was compiled, and it would not see them: compile it again"):
            model(batch)
    assert model.language_loss.call is model.adapted.base


def test_a_model_that_is_not_one_graph_is_refused() -> None:
    model = model_of("opt")
    batch = batch_of(model, 2, packed=False)

    def breaks(module: object, args: object, output: Tensor) -> None:
        torch._dynamo.graph_break()

    model.language.model.model.decoder.layers[0].register_forward_hook(breaks)
    with (
        compiled(model, "default"),
        pytest.raises(ConfigError, match=r"this model cannot be compiled into one graph \(.*\): train with train.compile: no"),
    ):
        model(batch)


def test_a_model_that_chooses_its_answers_is_refused(tmp_path: Path) -> None:
    model = model_of("opt")
    model.add_answer_head(["red", "blue"])
    with pytest.raises(ConfigError, match=r"train\.compile acts on models that write, and this one chooses among answers: train with train.compile: no"):
        train(model, Drawn(4), two_texts, TrainSettings(steps=1, batch_size=2, compile="default"), tmp_path)


def test_a_split_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("opt")
    monkeypatch.setattr("multimodal.training.prepare.FSDPModule", type(model.language.model))  # a process alone is never split
    with pytest.raises(ConfigError, match=r"train\.compile makes one graph of the model, and FSDP2 splits it: train with DDP"), compiled(model, "default"):
        pass


@pytest.mark.slow
def test_a_run_in_compiled_form_learns_what_a_plain_one_does(tmp_path: Path) -> None:
    found = []
    for mode in ("no", "default"):
        model = model_of("opt")
        stages = (Stage(trains=("bridge", "adalink"), steps=3), Stage(trains=("lora", "adalink"), steps=3))
        settings = TrainSettings(stages=stages, batch_size=2, learning_rate=1e-2, warmup=0.0, compile=mode)  # type: ignore[arg-type]
        train(model, Drawn(8), two_texts, settings, tmp_path / mode, measure=None)
        found.append([parameter.detach().clone() for parameter in model.adapted.active_adapter().parameters()])
        assert len(model.generate([Image.new("RGB", (40, 40))], [""])) == 1  # uncompiled, as before
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

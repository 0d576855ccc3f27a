"""transformers' Trainer, as it is, around adapted models: it trains, evaluates, saves adapters alone, resumes and loads the best."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from classifiers import CONFIGS, IDS, SIZES
from classifiers import host as classifier
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from adalink import AdaLink, AdaptedModel, Bottleneck, Method, Prompt, get_adalink_model
from adalink.errors import CheckpointError, ConfigError

TEXT = AdaLink(rank=4, modalities=("text",))


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Eight rows of seven tokens. kind: what their labels are."""

    def __init__(self, kind: str = "words") -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 60, (7,), generator=torch.Generator().manual_seed(index))
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.kind == "ends":
            return {**row, "start_positions": torch.tensor(index % 5), "end_positions": torch.tensor(index % 5 + 1)}
        return {**row, "labels": ids.clone() if self.kind == "words" else torch.tensor(index % 3)}


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **IDS, **settings))


def adapted(base: nn.Module, method: Method = TEXT, **settings: Any) -> AdaptedModel:
    torch.manual_seed(1)
    return get_adalink_model(base, method, **settings)


def trainer(model: Any, folder: Path, kind: str = "words", make: Any = hf.Trainer, **settings: Any) -> Any:
    arguments: Any = hf.Seq2SeqTrainingArguments if make is hf.Seq2SeqTrainer else hf.TrainingArguments
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01, "use_cpu": True, "disable_tqdm": True, "report_to": []}
    own = {name: settings.pop(name) for name in ("compute_metrics", "data_collator") if name in settings}
    return make(model=model, args=arguments(output_dir=str(folder), **{**defaults, **settings}), train_dataset=Rows(kind), eval_dataset=Rows(kind), **own)


def weights(model: AdaptedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.active_adapter().state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [TEXT, Prompt(length=2, init_std=0.5)], ids=["adalink", "prompt"])
def test_it_trains_evaluates_and_saves_the_adapter_alone(method: Method, tied: bool, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=tied)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, method)
    before = weights(model)
    run = trainer(model, tmp_path, save_steps=2)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < first
    assert all(torch.equal(frozen[name], value) for name, value in base.state_dict().items())
    after = weights(model)
    assert not any(torch.equal(value, before[name]) for name, value in after.items())
    stored = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert set(stored) == {"_extra_state", *(f"adapters.default.{name}" for name in after)}
    again = AdaptedModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "checkpoint-4")
    assert all(torch.equal(value, after[name]) for name, value in weights(again).items())
    assert again.active_adapter().methods == model.active_adapter().methods


def test_it_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole, again = adapted(llama()), adapted(llama())
    trainer(whole, tmp_path, save_steps=2).train()
    with torch.no_grad():
        again.active_adapter().get_parameter("adalink.text.up.weight").fill_(7.0)  # what the checkpoint puts right
    trainer(again, tmp_path, save_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())


def test_it_loads_the_best_adapter_at_the_end(tmp_path: Path) -> None:
    model = adapted(llama())
    run = trainer(model, tmp_path, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=50.0, max_steps=3)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses.index(min(losses)) < 2  # so much is learnt that it gets worse
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_gradient_checkpointing_gives_the_same_training(tmp_path: Path) -> None:
    plain, recomputed = adapted(llama(), Bottleneck(width=4)), adapted(llama(), Bottleneck(width=4))
    trainer(plain, tmp_path, save_strategy="no").train()
    with warnings.catch_warnings():  # transformers has a newer name for it
        warnings.simplefilter("ignore", FutureWarning)
        run = trainer(recomputed, tmp_path, save_strategy="no", gradient_checkpointing=True)
    run.train()
    assert recomputed.is_gradient_checkpointing
    for name, value in weights(recomputed).items():
        torch.testing.assert_close(value, weights(plain)[name])
    recomputed.gradient_checkpointing_disable()
    assert not recomputed.is_gradient_checkpointing
    assert not any("forward" in vars(layer) for layer in recomputed.base.modules())
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ConfigError, match=r"asked for with use_reentrant=True, every_n_layers=2, and an adapted model recomputes every layer"):
        recomputed.gradient_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)


def test_a_classifiers_head_is_trained_and_its_accuracy_measured(tmp_path: Path) -> None:
    model = adapted(classifier("Bert", "SequenceClassification").float(), modules_to_save=("classifier",))
    run = trainer(model, tmp_path, "class", compute_metrics=lambda found: {"accuracy": float((np.argmax(found.predictions, -1) == found.label_ids).mean())})
    run.train()
    assert 0 <= run.evaluate()["eval_accuracy"] <= 1
    again = AdaptedModel.from_pretrained(classifier("Bert", "SequenceClassification").float(), tmp_path / "checkpoint-4")
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(again).items())


def test_labels_of_question_answering_are_known(tmp_path: Path) -> None:
    run = trainer(adapted(classifier("Bert", "QuestionAnswering").float()), tmp_path, "ends")
    run.train()
    assert {"eval_loss"} <= set(run.evaluate())


def test_an_encoder_decoder_is_evaluated_by_what_it_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted(hf.T5ForConditionalGeneration(CONFIGS["T5"]()))
    measure = lambda found: {"rows": len(found.predictions)}
    run = trainer(model, tmp_path, make=hf.Seq2SeqTrainer, predict_with_generate=True, compute_metrics=measure)
    run.train()
    found = run.evaluate()
    assert "eval_loss" in found
    assert found["eval_rows"] == 8


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    model, losses = adapted(llama()), []
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    model.train()
    for _ in range(3):
        for batch in DataLoader(Rows(), batch_size=8):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = adapted(llama())
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(again).items())


def test_an_adapted_model_says_of_itself_what_its_frozen_model_says() -> None:
    base = llama()
    model = adapted(base)
    assert (model.config, model.generation_config, model.dtype, model.device) == (base.config, base.generation_config, base.dtype, base.device)
    assert (model.main_input_name, model.can_generate(), type(model).__name__) == ("input_ids", True, "AdaptedLlamaForCausalLM")
    assert model.get_input_embeddings() is base.model.embed_tokens
    n_trained = sum(model.active_adapter().n_parameters().values())
    assert (model.num_parameters(only_trainable=True), model.num_parameters()) == (n_trained, n_trained + base.num_parameters())
    arguments = inspect.signature(model.forward).parameters
    assert {"input_ids", "attention_mask", "labels", "token_map", "adapter_names"} <= set(arguments)
    assert not hasattr(AdaptedModel(nn_of_words()), "config")


def nn_of_words() -> nn.Module:
    """A model that is none of transformers."""
    model = llama()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = model.model

        def get_input_embeddings(self) -> nn.Module:
            return self.inside.embed_tokens  # type: ignore[no-any-return]

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.inside(input_ids=input_ids)

    return Plain()


def test_state_dicts_hold_adapters_alone_and_never_change_the_frozen_model() -> None:
    base = llama()
    model, words = adapted(base), base.model.embed_tokens.weight.clone()
    other = {f"base.{name}": torch.zeros_like(value) for name, value in base.state_dict().items()}
    model.load_state_dict({**model.state_dict(), **other})
    assert torch.equal(base.model.embed_tokens.weight, words)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "adapters.default.adalink.text.down.weight"'):
        model.load_state_dict(other)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        AdaptedModel.from_pretrained(llama(), tmp_path)
    llama().save_pretrained(tmp_path)  # a model without an adapter
    with pytest.raises(CheckpointError, match="is no adapter folder"):
        AdaptedModel.from_pretrained(llama(), tmp_path)
